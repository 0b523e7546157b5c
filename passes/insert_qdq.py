"""Quantize what the plan says: a quantize and a dequantize on the weight and on the input of each of its sites."""

from dataclasses import replace

from qcompile.graph import Graph, V
from qcompile.numerics import QParams
from qcompile.plan import Decision, Plan, equal_qparams
from qcompile.sites import Found, find_sites, tail_owner
from qcompile.solvers import SOLVERS
from qcompile.spec import Spec


def insert_qdq(graph: Graph[V], plan: Plan) -> int:
    """Insert the pairs; sites that read the same value in the same way share one. Returns how many were inserted.

    A site that the plan does not name stays as it is, save that the linear which multiplies outliers found while
    running (see `split_outliers`) reads its site's quantized weight. What a solver raises passes through.
    """
    pairs: dict[V, list[tuple[QParams | Spec, V]]] = {}
    solved: dict[tuple[V, Spec, str], QParams] = {}
    for found in find_sites(graph):
        x, weight = graph.inputs(found.value)[:2]
        decision = _decision(plan, found.site.name)
        if decision is None or x is None or weight is None:
            continue
        if decision.weight is not None:
            key = (weight, decision.weight, decision.solver)
            if key not in solved:
                solved[key] = SOLVERS[decision.solver](found.site.weight, decision.weight)
            _quantize_input(graph, found, 1, solved[key], pairs)
        if decision.input is not None:
            _quantize_input(graph, found, 0, decision.input_qparams or decision.input, pairs)
    return sum(len(made) for made in pairs.values())


def _decision(plan: Plan, name: str) -> Decision | None:
    site = tail_owner(name)
    if name in plan.decisions or site is None or site not in plan.decisions:
        return plan.decisions.get(name)
    owner = plan.decisions[site]
    return None if owner.threshold is None else replace(owner, input=None)


def _quantize_input(
    graph: Graph[V],
    found: Found[V],
    index: int,
    qparams: QParams | Spec,
    pairs: dict[V, list[tuple[QParams | Spec, V]]],
) -> None:
    """Make the site read its input number `index` through a pair with these qparams, an earlier one if it is equal."""
    source = graph.inputs(found.value)[index]
    assert source is not None
    made = pairs.setdefault(source, [])
    dequantized = next((value for known, value in made if equal_qparams(known, qparams)), None)
    if dequantized is None:
        dequantized = graph.add_qdq(source, qparams)
        made.append((qparams, dequantized))
    graph.set_input(found.value, index, dequantized)
