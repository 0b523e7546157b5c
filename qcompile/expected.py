"""The report of a plan before anything is compiled: bytes as the specs store them, no kernels."""

from collections.abc import Hashable, Iterable, Mapping

import torch
from torch import Tensor

from qcompile.folds import fold_notes, scale_before
from qcompile.numerics import dequantize, exact_exp2, quantize, snr_db
from qcompile.plan import Decision, Plan
from qcompile.report import Report, SiteReport
from qcompile.sharing import kept_apart
from qcompile.shifts import lowered_importance
from qcompile.sites import CHANNEL_AXIS, LeftOver, Site
from qcompile.sizes import stored_bytes
from qcompile.solvers import SOLVERS


def expected_report(
    plan: Plan,
    sites: Iterable[Site],
    left: Iterable[LeftOver],
    *,
    device: str = "paper (not compiled)",
    noise: Mapping[str, float] | None = None,
) -> Report:
    """What a plan will make of these sites.

    sites, left: with weights as the float model has them.  noise: the signal-to-noise ratios of quantized weights by
    site, in dB, where they are known; without it, weights are solved to find them.
    """
    sites = list(sites)
    positions = {site.name: site.positions for site in sites if site.op in CHANNEL_AXIS}
    weights = {site.name: site.weight.detach() for site in sites}
    weights |= {one.name: one.weight.detach() for one in left}
    memory = {name: _memory(name, weight) for name, weight in weights.items()}
    owners: dict[Hashable, Decision] = {}
    firsts: dict[Hashable, Decision] = {}
    # a weight that several sites read counts where it is quantized
    for decision in sorted(plan.decisions.values(), key=lambda d: d.weight is None):
        owners.setdefault(memory[decision.name], decision)
        firsts.setdefault((memory[decision.name], decision.weight), decision)
    reports = tuple(
        _site(
            d,
            weights[d.name],
            owners[memory[d.name]],
            _snr_db(d, weights[d.name], plan) if noise is None else noise.get(d.name),
            positions.get(d.name, 0),
            first=firsts[memory[d.name], d.weight],
        )
        for d in plan.decisions.values()
    )
    return Report(
        recipe=plan.recipe.name,
        device=device,
        sites=reports,
        notes=(*plan.notes, *fold_notes(plan.folds, plan.decisions), *kept_apart(plan.decisions.values(), memory)),
    )


def _memory(name: str, weight: Tensor) -> Hashable:
    """Equal for sites that read the same tensor; one that has no memory is its own."""
    return (weight.data_ptr(), weight.numel()) if weight.numel() and not weight.is_meta else name


def _snr_db(decision: Decision, weight: Tensor, plan: Plan) -> float | None:
    if decision.weight is None:
        return None
    scale = scale_before(decision.name, plan.folds)
    coded = weight if scale is None else weight.float() * scale.to(weight.device)
    coded = coded.index_fill(1, torch.tensor(decision.outliers, dtype=torch.int64, device=coded.device), 0.0)
    if decision.solved is not None:
        return decision.solved.snr_db
    factor = exact_exp2(torch.tensor(decision.shift or 0, device=coded.device))
    raised = coded * factor
    importance = lowered_importance(decision.importance, decision.shift)
    qparams = SOLVERS[decision.solver](raised, decision.weight, importance)
    return snr_db(coded, dequantize(quantize(raised, qparams), qparams) / factor)


def _site(
    decision: Decision, weight: Tensor, owner: Decision, snr: float | None, positions: int, *, first: Decision
) -> SiteReport:
    """owner: the first that reads the weight; first: under the spec of this one, which is stored there."""
    before = weight.nbytes if decision is owner else 0
    # who reads it as float beside one who does not needs it, too
    after = weight.nbytes if decision is owner or owner.weight is not None else 0
    if decision.weight is not None:
        tail = weight.element_size() * weight.shape[0] * len(decision.outliers)
        after = stored_bytes(decision.weight, *decision.shape) + tail if decision is first else 0
    return SiteReport(
        name=decision.name,
        op=decision.op.value,
        shape=decision.shape,
        weight=None if decision.weight is None else str(decision.weight),
        input=None if decision.input is None else str(decision.input),
        snr_db=snr,
        bytes_before=before,
        bytes_after=after,
        macs=weight.numel() * positions,
        reason=decision.reason,
        outliers=0 if decision.weight is None else len(decision.outliers),
    )
