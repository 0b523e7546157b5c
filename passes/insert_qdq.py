"""Quantize what the plan says: a quantize and a dequantize on the weight and on the input of each of its sites.

Where the plan quantizes the result of a convolution too, all that read it read it so, and so is what is added to it:
the sum of a residual block then has codes on both sides, as kernels of integers take it.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch

from qcompile.graph import Graph, Op, V
from qcompile.numerics import QParams, exact_exp2, over_dimensions
from qcompile.plan import Decision, Plan
from qcompile.sites import SITE_OPS, Found, constant_name, find_sites, result_of, tail_owner
from qcompile.solved import equal_qparams
from qcompile.spec import Spec


def insert_qdq(graph: Graph[V], plan: Plan) -> int:
    """Insert the pairs; sites that read the same value in the same way share one. Returns how many were inserted.

    A site that the plan does not name stays as it is, save that the linear which multiplies outliers found while
    running (see `split_outliers`) reads its site's quantized weight. Raises what solvers raise, and PlanError for a
    weight that is not the one its codes in the plan were chosen for.
    """
    pairs: dict[V, list[tuple[QParams | Spec, V]]] = {}
    solved: dict[tuple[V, Spec, str, str], QParams] = {}
    found_sites = find_sites(graph, SITE_OPS)
    addends = _addends(graph, found_sites, plan)
    for found in found_sites:
        x, weight = graph.inputs(found.value)[:2]
        decision = _decision(plan, found.site.name)
        if decision is None or x is None or weight is None:
            continue
        if decision.weight is not None and decision.shift:
            _quantize_shifted(graph, found, decision)
        elif decision.weight is not None:
            key = (weight, decision.weight, decision.solver, decision.data_digest)
            if key not in solved:
                qparams = decision.qparams_of(found.site.weight)
                solved[key] = over_dimensions(qparams, len(graph.shape(weight)))
            _quantize_input(graph, found, 1, solved[key], pairs)
        if decision.input is not None:
            _quantize_input(graph, found, 0, decision.input_qparams or decision.input, pairs)
            _share(graph, x, graph.inputs(found.value)[0], addends.get(x, ()))
        if decision.output is not None and (result := _result(graph, found)) is not None:
            graph.replace_uses(result, _pair(graph, result, decision.output, pairs))
    return sum(len(made) for made in pairs.values())


def _decision(plan: Plan, name: str) -> Decision | None:
    site = tail_owner(name)
    if name in plan.decisions or site is None or site not in plan.decisions:
        return plan.decisions.get(name)
    owner = plan.decisions[site]
    return None if owner.threshold is None else replace(owner, input=None)


def _result(graph: Graph[V], found: Found[V]) -> V | None:
    """What is quantized behind a site; None if the model returns it, as one call of a shared convolution may be."""
    result = result_of(graph, found.value)
    return None if result in graph.outputs() else result


def _addends(graph: Graph[V], sites: Sequence[Found[V]], plan: Plan) -> dict[V, list[tuple[V, int]]]:
    """Activations that are added to quantized results: the sums, and which of their inputs each is."""
    found: dict[V, list[tuple[V, int]]] = {}
    for site in sites:
        decision = _decision(plan, site.site.name)
        result = None if decision is None or decision.output is None else _result(graph, site)
        for total in () if result is None else graph.users(result):
            read = list(graph.inputs(total)) if graph.op(total) is Op.ADD else []
            for index, other in enumerate(read):
                if other is not None and other is not result:
                    found.setdefault(other, []).append((total, index))
    return found


def _share(graph: Graph[V], x: V, dequantized: V | None, sums: Sequence[tuple[V, int]]) -> None:
    """Make sums that add the activation x read it as a convolution does."""
    for total, index in sums:
        if dequantized is not None and graph.inputs(total)[index] is x:
            graph.set_input(total, index, dequantized)


def _quantize_shifted(graph: Graph[V], found: Found[V], decision: Decision) -> None:
    """Make the site read numbers of its weight that were chosen before its columns were lowered, and lowered then."""
    weight = graph.inputs(found.value)[1]
    assert weight is not None
    # known even where of the weight only the shape is
    factor = exact_exp2(torch.tensor(decision.shift, device="cpu"))
    name = constant_name(graph, weight)
    raised = (found.site.weight.float() * factor.to(found.site.weight.device)).to(found.site.weight.dtype)
    dequantized = graph.add_qdq(graph.add_constant(f"{name}.raised", raised), decision.qparams_of(raised))
    lowered = graph.add_op(Op.MUL, [dequantized, graph.add_constant(f"{name}.lowering", 1 / factor, like=weight)])
    graph.set_input(found.value, 1, lowered)


def _quantize_input(
    graph: Graph[V],
    found: Found[V],
    index: int,
    qparams: QParams | Spec,
    pairs: dict[V, list[tuple[QParams | Spec, V]]],
) -> None:
    """Make the site read its input number `index` through a pair with these qparams."""
    source = graph.inputs(found.value)[index]
    assert source is not None
    graph.set_input(found.value, index, _pair(graph, source, qparams, pairs))


def _pair(graph: Graph[V], source: V, qparams: QParams | Spec, pairs: dict[V, list[tuple[QParams | Spec, V]]]) -> V:
    """The value through a pair with these qparams, an earlier one if it is equal."""
    made = pairs.setdefault(source, [])
    dequantized = next((value for known, value in made if equal_qparams(known, qparams)), None)
    if dequantized is None:
        dequantized = graph.add_qdq(source, qparams)
        made.append((qparams, dequantized))
    return dequantized
