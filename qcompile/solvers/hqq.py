"""HQQ: scales and zero points for which many errors are small and few are large, without any data.

It lowers sum |w - w'|^p with p < 1, half-quadratically: by turns, the largest errors are set aside (the proximal
operator of |.|^p), and the scale and zero point are fitted to what is left by least squares. Errors are counted in
steps of the codes, where the original counts them in units of the weights, which sets none aside if weights are small;
zero points are codes, as all kernels take them, where its own are real and no code stands for 0; and so the scale is
fitted, too, without which a whole zero point has nowhere to go.
Source: Badri and Shaji 2023 (Half-Quadratic Quantization of Large Machine Learning Models).
"""

from dataclasses import replace

import torch
from torch import Tensor

from qcompile.errors import SpecError
from qcompile.numerics import SMALLEST_SCALE, QParams, dequantize, over_tiles, quantize, tiles
from qcompile.scales import keep_scale
from qcompile.solvers.imatrix import OWN_SCALES
from qcompile.solvers.mse import rows_of, solve_mse
from qcompile.solvers.round import solve_round
from qcompile.spec import ALL, Spec, Zero
from qcompile.steps import step_size

# source of all three: the paper's code
POWER = 0.7
BETA, GROWTH = 10.0, 1.01
ROUNDS = 20
# elements of one step on the CPU, so that its passes find them in a cache
CHUNK = 2**18


def solve_hqq(weight: Tensor, spec: Spec, importance: Tensor | None = None) -> QParams:
    """Scales (and zero points) of the least sum |error|^0.7 in each tile; never more than `mse` or `round`.

    weight: [N, K]; on meta, shapes only.  importance: changes nothing.
    Raises SpecError if the spec's tiles do not divide the weight, or its scales are not free to be fitted.
    """
    if spec.zero is Zero.MINIMUM:
        raise SpecError(f"solver 'hqq' fits zero points, and {spec} has minima: take solver 'kquant'")
    if spec.scale not in OWN_SCALES:
        raise SpecError(
            f"solver 'hqq' fits the scale of each tile, and those of {spec} are not free: take a spec with scales "
            f"{', '.join(OWN_SCALES)}, or solver 'mse'"
        )
    if weight.is_meta:
        return solve_round(weight, spec)
    starts = [solve_mse(weight, spec), solve_round(weight, spec)]
    rows = spec.granularity.rows
    if rows == ALL:
        return _fitted(weight.float(), starts)
    step = max(rows, step_size(weight, CHUNK) // weight.shape[1] // rows * rows)
    parts = []
    for first in range(0, len(weight), step):
        tiles_of = slice(first // rows, (first + step) // rows)
        parts.append(_fitted(weight[first : first + step].float(), [rows_of(one, tiles_of) for one in starts]))
    zeros = [part.zero for part in parts if part.zero is not None]
    return replace(
        parts[0],
        scale=torch.cat([part.scale for part in parts]),
        zero=torch.cat(zeros) if zeros else None,
        stored={name: torch.cat([part.stored[name] for part in parts]) for name in parts[0].stored},
    )


def lost(x: Tensor, qparams: QParams) -> Tensor:
    """Sum |error|^0.7 of each tile, over that of its largest magnitude, float32 like the scale.  x: float32 [N, K]."""
    view, dims = tiles(x, qparams.spec.granularity)
    peak = view.abs().amax(dims, keepdim=True)
    errors, _ = tiles(dequantize(quantize(x, qparams), qparams) - x, qparams.spec.granularity)
    return (errors / torch.where(peak > 0, peak, 1.0)).abs().pow(POWER).sum(dims)


def _fitted(x: Tensor, starts: list[QParams]) -> QParams:
    """The best of the starts and of where they lead to, tile by tile."""
    best, least = starts[0], lost(x, starts[0])
    for now in starts:
        best, least = _better(best, least, now, x)
        beta = BETA
        for _ in range(ROUNDS):
            now = _next(now, x, beta)
            best, least = _better(best, least, now, x)
            beta *= GROWTH
    return best


def _better(best: QParams, least: Tensor, now: QParams, x: Tensor) -> tuple[QParams, Tensor]:
    found = lost(x, now)
    gained = found < least
    zero = None if best.zero is None or now.zero is None else torch.where(gained, now.zero, best.zero)
    scale, stored = _kept(torch.where(gained, now.scale, best.scale), now.spec)
    return replace(best, scale=scale, zero=zero, stored=stored), torch.minimum(found, least)


def _kept(scale: Tensor, spec: Spec) -> tuple[Tensor, dict[str, Tensor]]:
    # of specs whose codes reach further on one side, the sign says to which
    held = scale.abs().clamp(min=SMALLEST_SCALE).copysign(scale)
    return keep_scale(held, spec.scale, scale.abs(), spec.format.max)


def _next(now: QParams, x: Tensor, beta: float) -> QParams:
    """Scale and zero point that fit x best under its present codes, once the largest errors are set aside."""
    spec = now.spec
    codes = quantize(x, now)
    unscaled = replace(now, scale=torch.ones_like(now.scale), zero=None)
    values, dims = tiles(dequantize(codes, unscaled), spec.granularity)
    unit = over_tiles(now.scale, spec.granularity)
    # in steps of the codes
    steps = tiles(x, spec.granularity)[0] / unit
    errors = steps - (values if now.zero is None else values - over_tiles(now.zero, spec.granularity))
    target = steps - _set_aside(errors, beta)
    zero = now.zero
    if zero is not None:
        centred = values - values.mean(dims, keepdim=True)
        slope = (centred * target).sum(dims) / centred.square().sum(dims)
        slope = torch.where(slope.isfinite() & (slope > 0), slope, 1.0)
        zero = (values.mean(dims) - target.mean(dims) / slope).round().clamp(*spec.code_range)
        values = values - over_tiles(zero, spec.granularity)
    along, length = (values * target).sum(dims), values.square().sum(dims)
    scale = torch.where(along > 0, along / length, 1.0) * now.scale
    scale, stored = _kept(scale, spec)
    return replace(now, scale=scale, zero=zero, stored=stored)


def _set_aside(errors: Tensor, beta: float) -> Tensor:
    """The part of each error that does not count: the proximal operator of |.|^p, which leaves small ones at 0."""
    size = errors.abs()
    # an error of 0 would give inf, which is right, and 0 * inf is not formed
    return errors.sign() * (size - size.pow(POWER - 1) / beta).clamp(min=0.0)
