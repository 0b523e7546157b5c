"""The architecture in one place: what happens to a graph, in order, on every host."""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Protocol

from torch import Tensor

from qcompile.edges import Edge, find_edges
from qcompile.errors import PlanError, QcompileError, nearest
from qcompile.graph import Graph, Op, V, graph_text
from qcompile.numerics import QParams, dequantize, snr_db
from qcompile.numerics import quantize as quantize_codes
from qcompile.passes.fold_exponent_bias import fold_exponent_bias
from qcompile.passes.fold_smooth import count_multiplications, fold_smooth
from qcompile.passes.freeze_weights import freeze_weights
from qcompile.passes.insert_qdq import insert_qdq
from qcompile.passes.merge_qdq import merge_qdq
from qcompile.passes.order_channels import order_channels
from qcompile.passes.split_outliers import split_outliers
from qcompile.passes.take_weights import take_weights
from qcompile.plan import Decision, Plan, make_plan, unreached
from qcompile.recipe import Recipe
from qcompile.sites import COMMON_OPS, SITE_OPS, Found, constant_name, find_sites, left_over, names_of
from qcompile.solved import Solved

# reasons that a note gives
NAMED = 3
Pass = Callable[[Graph[V]], int]


class Lowering(Protocol[V]):
    """What replaces the quantized ops of a plan by a target's; returns how many it did."""

    def __call__(self, graph: Graph[V], *, plan: Plan) -> int: ...


def passes(plan: Plan, lower: Lowering[V] | None = None) -> dict[str, Pass[V]]:
    """The passes that apply a plan, by name, in order; before constants are replaced by codes, a host may lower."""
    lowering = {} if lower is None else {"lower": partial(lower, plan=plan)}
    return {
        "fold_smooth": partial(fold_smooth, folds=plan.folds),
        "split_outliers": partial(split_outliers, plan=plan),
        "order_channels": partial(order_channels, plan=plan),
        "insert_qdq": partial(insert_qdq, plan=plan),
        "fold_exponent_bias": partial(fold_exponent_bias, plan=plan),
        "merge_qdq": merge_qdq,
        **lowering,
        "freeze_weights": freeze_weights,
    }


def multiplications(graph: Graph[V], plan: Plan) -> Iterator[str]:
    """A note on the multiplications that a plan's folds leave in this graph, if there are any."""
    count = count_multiplications(graph, plan.folds)
    if not count:
        return
    folded = {name for fold in plan.folds for name in fold.sites}
    reasons = [
        edge.reason or f"not all that read what {edge.consumers[0].site.name!r} reads are folded alike"
        for edge in find_edges(graph)
        if any(found.site.name in folded for found in edge.consumers) and (edge.reason or not _is_whole(edge, folded))
    ]
    more = f"; and {len(reasons) - NAMED} more" if len(reasons) > NAMED else ""
    yield f"{count} multiplications by 1 / scale stay in the graph: {'; '.join(reasons[:NAMED])}{more}"


def _is_whole(edge: Edge[V], folded: Collection[str]) -> bool:
    return all(found.site.name in folded for found in edge.consumers)


def quantize(
    graph: Graph[V],
    decide: Recipe | Plan,
    *,
    whole: bool = True,
    dump: str | Path | None = None,
    prepared: dict[tuple[str, str], Tensor] | None = None,
    noise: dict[str, float] | None = None,
    ops: Collection[Op] = COMMON_OPS,
    lower: Lowering[V] | None = None,
) -> Plan:
    """Quantize a graph in place; returns the plan that was applied. The result is right on any machine.

    It is slow where `lower` does not replace it.

    decide: a recipe, or a plan made before (its decisions are taken by site name).
    whole: the graph is the whole model, so that a rule which matches nothing in it is an error.
    dump: a folder that gets the graph's text before the first and after every pass.
    prepared: gets the weights as they are when they are quantized, by names of site and constant.
    noise: gets the signal-to-noise ratio of each quantized weight, in dB, by name of site.
    ops: the kinds of sites that the host can run quantized.
    Raises RecipeError, PlanError, WeightError or SpecError, before anything is changed.
    """
    plan = plan_for(graph, decide, whole=whole, ops=ops)
    _write(graph, dump, 0, "opened")
    steps: dict[str, Pass[V]] = passes(plan, lower)
    for number, (name, run) in enumerate(steps.items(), start=1):
        if prepared is not None and name == "insert_qdq":
            prepared.update(_weights(graph))
        run(graph)
        if noise is not None and name == "insert_qdq":
            noise.update(_noise(graph))
        graph.prune()
        _write(graph, dump, number, name)
    return plan


def take(
    graph: Graph[V],
    decide: Recipe | Plan,
    taken: dict[str, Solved],
    *,
    storable: Callable[[Decision], bool],
    whole: bool = True,
) -> Plan:
    """Quantize a graph's weights to be stored, in place; returns the plan that was applied.

    taken: gets what became of them, by site, see `take_weights`.  storable: of which decisions.  The graph computes
    nothing afterwards; what it still reads is what a graph reads beside those weights.
    """
    plan = plan_for(graph, decide, whole=whole)
    steps: dict[str, Pass[V]] = passes(plan)
    for name, run in steps.items():
        run(graph)
        if name == "insert_qdq":
            break
    sites = {d.name for d in plan.decisions.values() if d.weight is not None and storable(d)}
    take_weights(graph, plan, sites, taken)
    graph.prune()
    return plan


def plan_for(graph: Graph[V], decide: Recipe | Plan, *, whole: bool = True, ops: Collection[Op] = COMMON_OPS) -> Plan:
    """Decisions for the sites of this graph.

    Raises PlanError if a given plan knows none of them, or other shapes, and RecipeError if a rule of a given recipe
    matches nothing.
    """
    every = find_sites(graph, ops)
    sites = [found.site for found in every]
    left = list(left_over(graph, ops))
    if isinstance(decide, Recipe):
        return make_plan(sites, decide, left=left, whole=whole)
    # what another host left over goes by the name of a weight, which may be that of a site
    known = {name: decision for name, decision in decide.decisions.items() if decision.op in ops}
    known = _lent(graph, every, known) | known
    if sites and not any(site.name in known for site in sites):
        raise PlanError(
            f"the plan knows none of this graph's sites, such as {sites[0].name!r}; nearest in the plan: "
            f"{nearest(sites[0].name, known)}. It belongs to another model, or the model was compiled in parts: "
            "then bind it to the whole model first, plan.bind(model)"
        )
    for site in sites:
        if site.name in known and tuple(known[site.name].shape) != tuple(site.weight.shape):
            raise PlanError(
                f"the weight of {site.name!r} is {list(site.weight.shape)} here and {list(known[site.name].shape)} in "
                "the plan: it was made for another model; calibrate this one with qcompile.calibrate"
            )
    decisions = {
        site.name: known.get(site.name)
        or Decision(name=site.name, op=site.op, shape=tuple(site.weight.shape), reason="not in the plan")
        for site in sites
    }
    decisions |= unreached(left)
    return replace(decide, decisions=decisions)


def _lent(graph: Graph[V], sites: Iterable[Found[V]], known: Mapping[str, Decision]) -> dict[str, Decision]:
    """Decisions for sites that a module runs with the weight of another, which calibration calls by the weight."""
    found: dict[str, Decision] = {}
    for one in sites:
        for name in names_of(graph, one) - {one.site.name}:
            decision = known.get(name, known.get(name.removesuffix(".weight")))
            if decision is not None and decision.op is one.site.op:
                found[one.site.name] = replace(decision, name=one.site.name)
    return found


def _weights(graph: Graph[V]) -> Iterator[tuple[tuple[str, str], Tensor]]:
    for found in find_sites(graph):
        weight = graph.inputs(found.value)[1]
        assert weight is not None
        yield (found.site.name, constant_name(graph, weight)), found.site.weight


def _noise(graph: Graph[V]) -> Iterator[tuple[str, float]]:
    """Of the weights that sites read through a pair, before codes take their place."""
    ratios: dict[V, float] = {}
    for value in graph.values():
        weight = graph.inputs(value)[1] if graph.op(value) in SITE_OPS else None
        if weight is None or graph.op(weight) is not Op.DEQUANTIZE:
            continue
        if weight not in ratios:
            ratios[weight] = _ratio(graph, weight)
        yield graph.name(value), ratios[weight]


def _ratio(graph: Graph[V], dequantized: V) -> float:
    codes = graph.inputs(dequantized)[0]
    source = None if codes is None else graph.inputs(codes)[0]
    weight = None if source is None else graph.constant(source)
    qparams = graph.qparams(dequantized)
    assert weight is not None
    assert isinstance(qparams, QParams)
    return snr_db(weight, dequantize(quantize_codes(weight, qparams), qparams))


def _write(graph: Graph[V], folder: str | Path | None, number: int, name: str) -> None:
    if folder is None:
        return
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        (Path(folder) / f"{number:02d}_{name}.txt").write_text(graph_text(graph) + "\n")
    except OSError as e:
        raise QcompileError(f"cannot dump to {str(folder)!r}: {e.strerror}; choose a folder you may write to") from e
