"""Scales that fit codes best once these are known: least squares under the second moments of the input.

A row of the weight is the sum over its groups g of s_g u_g, where u_g are the numbers that the codes stand for under a
scale of 1, in g, and 0 elsewhere. Its output error (w - sum s_g u_g)^T H (w - sum s_g u_g) is least for A s = b with
A_gh = u_g^T H u_h and b_g = u_g^T H w. Codes are chosen one after the other under scales that were found for each
group by itself; what they compensate for each other is known only now.
"""

from dataclasses import replace

import torch
from torch import Tensor

from qcompile.numerics import QParams, dequantize
from qcompile.scales import keep_scale
from qcompile.solvers.imatrix import OWN_SCALES
from qcompile.solvers.moments import Damped, Moments
from qcompile.spec import ALL, Zero
from qcompile.steps import step_size

# of A's diagonal, by which scales are held where they are: groups whose numbers are all 0 have none to find
HELD = 1e-4
# elements of one step on the CPU
CHUNK = 2**20


def refitted(weight: Tensor, qparams: QParams, moments: Moments, damping: float) -> QParams:
    """The qparams with better scales for the codes that they hold; rows that would not gain keep theirs.

    weight: [N, K].  damping: as for `Moments.diagonal`.  As they are where scales are shared by rows, or no floats.
    """
    spec = qparams.spec
    if qparams.codes is None or qparams.codes.is_meta or spec.granularity.rows != 1:
        return qparams
    if spec.scale not in OWN_SCALES or spec.zero is Zero.MINIMUM:
        return qparams
    hessian = moments.damped(damping, weight.device)
    units = replace(qparams, scale=torch.ones_like(qparams.scale), stored={})
    K, G = weight.shape[1], qparams.scale.shape[1]
    # A is float64, and its factor as large
    step = max(1, step_size(weight, CHUNK) // max(K, 4 * G * G))
    parts = []
    for start in range(0, len(weight), step):
        rows = slice(start, start + step)
        zero = None if qparams.zero is None else qparams.zero[rows]
        u = dequantize(qparams.codes[rows], replace(units, scale=units.scale[rows], zero=zero, codes=None))
        parts.append(_fitted(weight[rows].float(), u, qparams.scale[rows], hessian, qparams))
    scale, stored = keep_scale(torch.cat(parts), spec.scale, qparams.scale, spec.format.max)
    return replace(qparams, scale=scale, stored=stored)


def _fitted(weight: Tensor, u: Tensor, scale: Tensor, hessian: Damped, qparams: QParams) -> Tensor:
    """Scales [R, G] of rows: the best, as storage keeps them, or those before.  weight, u: float32 [R, K]."""
    K, groups = weight.shape[1], scale.shape[1]
    columns = qparams.spec.granularity.columns or K
    assert qparams.spec.granularity.columns == ALL or groups * columns == K
    left = weight - u * scale.repeat_interleave(columns, 1)
    toward = (hessian.after(left) * u).unflatten(1, (groups, columns)).sum(2, dtype=torch.float64)
    together = toward.new_empty(len(u), groups, groups)
    for g in range(groups):
        made = hessian.after(u[:, g * columns : (g + 1) * columns], g * columns) * u
        together[:, g] = made.unflatten(1, (groups, columns)).sum(2, dtype=torch.float64)
    held = together.diagonal(dim1=1, dim2=2)
    held += HELD * held.amax(1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    found = scale + torch.linalg.solve(together, toward).to(scale)
    # a scale keeps its sign, and what is no number is none
    found = torch.where(found * scale > 0, found, scale)
    found = keep_scale(found, qparams.spec.scale, scale, qparams.spec.format.max)[0]
    before, after = (_error(weight - u * s.repeat_interleave(columns, 1), hessian) for s in (scale, found))
    return torch.where((after < before)[:, None], found, scale)


def _error(apart: Tensor, hessian: Damped) -> Tensor:
    return (hessian.after(apart) * apart).sum(1, dtype=torch.float64)
