"""Keep outlier channels out of the quantization: a thin float linear multiplies them beside the quantized one.

Calibrated channels O:   y = linear(x, W with columns O zeroed, b) + linear(x[O], W[:, O])
Found in each input:     y = linear(x - outliers(x), W, b) + linear(outliers(x), W)
Source: LLM.int8 (Dettmers 2022); with calibrated channels no shape depends on data.
"""

import torch

from qcompile.graph import Graph, Op, V
from qcompile.passes.freeze_weights import qualified_name
from qcompile.passes.permute_outliers import digest, permute_outliers
from qcompile.plan import Decision, Plan
from qcompile.sites import find_sites, tail_name

# (what was made, of which value, for which channels or threshold)
_Made = dict[tuple[str, V, tuple[float, ...]], V]


def split_outliers(graph: Graph[V], plan: Plan) -> int:
    """Split every linear that gets outliers or a threshold by the plan; returns how many were split.

    What a linear was called, its quantized part is called; its thin part has the name of `tail_name`, and the zeroed
    weight of "a.weight" is "a.weight.without_" and a digest of the channels. Linears of one input share what they can.
    """
    split = {}
    for found in find_sites(graph):
        decision = plan.decisions.get(found.site.name)
        if decision is not None and found.site.op is Op.LINEAR and _is_split(decision):
            split[found.value] = decision
    moved = permute_outliers(graph, plan, [value for value, decision in split.items() if decision.outliers])
    made: _Made[V] = {}
    for linear, decision in split.items():
        if decision.outliers:
            tail = _split_channels(graph, linear, decision, moved.get(linear, tuple(sorted(decision.outliers))), made)
        else:
            tail = _split_found(graph, linear, decision, made)
        graph.replace_uses(linear, graph.add_op(Op.ADD, [linear, tail]))
    return len(split)


def _is_split(decision: Decision) -> bool:
    found_while_running = decision.threshold is not None and decision.input is not None
    return decision.weight is not None and (bool(decision.outliers) or found_while_running)


def _split_channels(graph: Graph[V], linear: V, decision: Decision, channels: tuple[int, ...], made: _Made[V]) -> V:
    """The thin linear of calibrated channels; `linear` loses them."""
    x, weight = graph.inputs(linear)[:2]
    assert x is not None
    assert weight is not None
    values = graph.constant(weight)
    assert values is not None
    index = torch.tensor(channels, device=values.device)
    name = decision.name
    rest, columns, selected = ("rest", weight, channels), ("columns", weight, channels), ("selected", x, channels)
    if rest not in made:
        origin = qualified_name(graph, weight)
        made[rest] = graph.add_constant(f"{origin}.without_{digest(channels)}", values.index_fill(1, index, 0))
        made[columns] = graph.add_constant(f"{origin}.only_{digest(channels)}", values.index_select(1, index))
    if selected not in made:
        made[selected] = graph.add_op(Op.SELECT, [x, graph.add_constant(f"{name}.channels", torch.tensor(channels))])
    # Static qparams were calibrated without the outliers, whose clipped codes meet zero weights. A range found while
    # running must not see them. NaN and Inf reach y either way: through the thin linear, which reads x itself.
    if decision.input is not None and decision.input_qparams is None:
        masked = ("masked", x, channels)
        if masked not in made:
            keep = torch.ones(values.shape[1], dtype=values.dtype)
            keep[list(channels)] = 0
            made[masked] = graph.add_op(Op.MUL, [x, graph.add_constant(f"{name}.mask", keep)])
        graph.set_input(linear, 0, made[masked])
    graph.set_input(linear, 1, made[rest])
    return graph.add_op(Op.LINEAR, [made[selected], made[columns], None], tail_name(name))


def _split_found(graph: Graph[V], linear: V, decision: Decision, made: _Made[V]) -> V:
    """The linear of the channels found while running, with all of the weight; `linear` loses those channels.

    It reads the weight that `linear` reads: as in bitsandbytes' inference, both are to be quantized.
    """
    x, weight = graph.inputs(linear)[:2]
    assert x is not None
    assert weight is not None
    values = graph.constant(weight)
    assert values is not None
    assert decision.threshold is not None
    name, bounds = decision.name, (decision.threshold,)
    found, rest = ("found", x, bounds), ("inliers", x, bounds)
    if found not in made:
        threshold = graph.add_constant(f"{name}.threshold", torch.tensor(decision.threshold, dtype=values.dtype))
        made[found] = graph.add_op(Op.OUTLIERS, [x, threshold])
        minus = graph.add_constant("minus_one", torch.tensor(-1.0, dtype=values.dtype))
        made[rest] = graph.add_op(Op.ADD, [x, graph.add_op(Op.MUL, [made[found], minus])])
    graph.set_input(linear, 0, made[rest])
    return graph.add_op(Op.LINEAR, [made[found], weight, None], tail_name(name))
