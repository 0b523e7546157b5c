"""Read channels in the order in which the stored columns of a weight stand.

    y = linear(x[order], W[:, order], b)

GPTQ with act-order numbers the columns of a weight by how large their inputs are, and its groups are neighbours in that
numbering. Sorted by group, every group is a block of columns, as kernels read them.
"""

from qcompile.graph import Graph, Op, V
from qcompile.plan import Plan
from qcompile.sites import constant_name, find_sites


def order_channels(graph: Graph[V], plan: Plan) -> int:
    """Select channels in front of each linear whose weight is stored in an order of its own; returns how many.

    Linears of one input and one order share the selection.
    """
    selected: dict[tuple[V, tuple[int, ...]], V] = {}
    edits = 0
    for found in find_sites(graph, (Op.LINEAR,)):
        decision = plan.decisions.get(found.site.name)
        solved = None if decision is None else decision.solved
        x, weight = graph.inputs(found.value)[:2]
        if solved is None or solved.order is None or x is None or weight is None:
            continue
        order = tuple(solved.order.tolist())
        if (x, order) not in selected:
            channels = graph.add_constant(f"{found.site.name}.order", solved.order)
            selected[x, order] = graph.add_op(Op.SELECT, [x, channels])
        columns = found.site.weight.index_select(1, solved.order.to(found.site.weight.device))
        graph.set_input(found.value, 0, selected[x, order])
        graph.set_input(found.value, 1, graph.add_constant(f"{constant_name(graph, weight)}.ordered", columns))
        edits += 1
    return edits
