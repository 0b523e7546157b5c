"""The report of a plan before anything is compiled: bytes as the specs store them, no kernels."""

from collections.abc import Iterable

import torch
from torch import Tensor

from qcompile.folds import scale_before
from qcompile.graph import Op
from qcompile.numerics import dequantize, quantize, snr_db
from qcompile.packing import stored_bytes
from qcompile.plan import Decision, Plan, fold_notes
from qcompile.report import Report, SiteReport
from qcompile.sites import LeftOver, Site
from qcompile.solvers import SOLVERS


def expected_report(
    plan: Plan, sites: Iterable[Site], left: Iterable[LeftOver], *, device: str = "paper (not compiled)"
) -> Report:
    """What a plan will make of these sites.  sites, left: with weights as the float model has them."""
    weights = {site.name: site.weight.detach() for site in sites}
    weights |= {one.name: one.weight.detach() for one in left}
    owners: dict[int, str] = {}
    # a weight that several sites read counts where it is quantized
    for decision in sorted(plan.decisions.values(), key=lambda d: d.weight is None):
        owners.setdefault(weights[decision.name].data_ptr(), decision.name)
    reports = tuple(
        _site(
            d,
            weights[d.name],
            scale_before(d.name, plan.folds),
            owns=owners[weights[d.name].data_ptr()] == d.name,
        )
        for d in plan.decisions.values()
    )
    return Report(recipe=plan.recipe.name, device=device, sites=reports, notes=(*plan.notes, *fold_notes(plan)))


def _site(decision: Decision, weight: Tensor, scale: Tensor | None, *, owns: bool) -> SiteReport:
    before = weight.nbytes if owns else 0
    after, snr = before, None
    if decision.weight is not None:
        coded = weight if scale is None else weight.float() * scale.to(weight.device)
        coded = coded.index_fill(1, torch.tensor(decision.outliers, dtype=torch.int64, device=coded.device), 0.0)
        qparams = SOLVERS[decision.solver](coded, decision.weight)
        snr = snr_db(coded, dequantize(quantize(coded, qparams), qparams))
        tail = weight.element_size() * weight.shape[0] * len(decision.outliers)
        after = stored_bytes(decision.weight, *decision.shape) + tail if owns else 0
    return SiteReport(
        name=decision.name,
        op=decision.op.value,
        shape=decision.shape,
        weight=None if decision.weight is None else str(decision.weight),
        input=None if decision.input is None else str(decision.input),
        snr_db=snr,
        bytes_before=before,
        bytes_after=after,
        macs=weight.numel() if decision.op is Op.LINEAR else 0,
        reason=decision.reason,
        outliers=0 if decision.weight is None else len(decision.outliers),
    )
