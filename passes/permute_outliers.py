"""Move outlier channels to the end of an activation, at no cost while running, where linears make that activation.

Channels may be numbered anew where nobody sees it: the rows of the linears that make them, and the columns of those
that read them, with nothing but elementwise ops between. Behind a norm it would take a gather of all channels.
"""

from collections.abc import Sequence

import torch

from qcompile.graph import Graph, V
from qcompile.plan import Plan
from qcompile.sites import constant_name, digest
from qcompile.ways import Way, find_way


def permute_outliers(graph: Graph[V], plan: Plan, linears: Sequence[V]) -> dict[V, tuple[int, ...]]:
    """Number the channels that `linears` read so that their outliers come last, where that is free.

    linears: sites of the plan that have outliers.  Returns the new outliers of those for which it was done. A permuted
    "a.weight" is called "a.weight.rows_" or "a.weight.columns_" and a digest of the order.
    """
    moved: dict[V, tuple[int, ...]] = {}
    made: dict[tuple[V, int, str], V] = {}
    for linear in linears:
        x = graph.inputs(linear)[0]
        way = None if x is None or linear in moved else find_way(graph, x)
        if way is None or not _all_quantized(graph, plan, way) or not _agree(graph, plan, way):
            continue
        outliers = set(plan.decisions[graph.name(linear)].outliers)
        order = sorted(range(way.K), key=lambda channel: (channel in outliers, channel))
        if order != list(range(way.K)):
            _renumber(graph, way, order, made)
        readers = [value for value in way.consumers if plan.decisions[graph.name(value)].outliers]
        moved |= dict.fromkeys(readers, tuple(range(way.K - len(outliers), way.K)))
    return moved


def _all_quantized(graph: Graph[V], plan: Plan, way: Way[V]) -> bool:
    """Whether every weight on the way will be packed, and every bias is known.

    A weight that stays float would be held twice: as it is, and permuted.
    """
    for value in (*way.producers, *way.consumers):
        decision = plan.decisions.get(graph.name(value))
        weight = graph.inputs(value)[1]
        if decision is None or decision.weight is None or weight is None or graph.constant(weight) is None:
            return False
    biases = (bias for value in way.producers if (bias := graph.inputs(value)[2]) is not None)
    return all((held := graph.constant(bias)) is not None and held.shape == (way.K,) for bias in biases)


def _agree(graph: Graph[V], plan: Plan, way: Way[V]) -> bool:
    """Whether all that read the channels mean the same outliers, and nothing in the plan goes by their numbers."""
    decisions = [plan.decisions[graph.name(value)] for value in way.consumers]
    # a plan that stores codes is without the importance that they were chosen by, and says the same of them
    unnumbered = all(
        (d.input_qparams is None or d.input_qparams.scale.numel() == 1) and not d.weighs_columns for d in decisions
    )
    return unnumbered and len({frozenset(d.outliers) for d in decisions if d.outliers}) == 1


def _renumber(graph: Graph[V], way: Way[V], order: Sequence[int], made: dict[tuple[V, int, str], V]) -> None:
    reads = [(value, index, 0) for value in way.producers for index in (1, 2)]
    reads += [(value, 1, 1) for value in way.consumers]
    reads += [(value, index, -1) for value, index in way.constants]
    for value, index, dim in reads:
        source = graph.inputs(value)[index]
        tensor = None if source is None else graph.constant(source)
        if source is None or tensor is None:
            continue
        key = (source, dim, digest(order))
        if key not in made:
            name = f"{constant_name(graph, source)}.{'columns' if dim else 'rows'}_{digest(order)}"
            permuted = tensor.index_select(dim, torch.tensor(order, device=tensor.device))
            made[key] = graph.add_constant(name, permuted)
        graph.set_input(value, index, made[key])
