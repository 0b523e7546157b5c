"""K-quants' search: scales (and minima) by least squares, from several starts, before they are integers themselves.

From each start the nearest codes, and the scale and minimum that fit these codes best; what has the least error is
improved by turns. Then scales become what their kind can store, and minima are fitted anew under those scales.
Source: ggml's reference quantizers (make_qx_quants and make_qkx2_quants; Kawrakow 2023).
"""

from dataclasses import replace

import torch
from torch import Tensor

from qcompile.errors import SpecError
from qcompile.formats import CodeBook, Integer
from qcompile.numerics import QParams, decode, encode, find_qparams
from qcompile.scales import keep_minimum, keep_scale
from qcompile.spec import ALL, SCALES, Spec, Zero
from qcompile.steps import step_size

# parts of the range that starts cover; source: ggml, whose inverse scales differ by a tenth of a code
STARTS = tuple(1.0 + 0.025 * i for i in range(-12, 5))
# of codes for a scale, and then the scale and minimum for these codes
ROUNDS = 4
# elements of one step on the CPU, so that its passes find them in a cache
CHUNK = 2**18

# scale, minimum and weighted squared error of each tile, float32 [R, G]
_Found = tuple[Tensor, Tensor, Tensor]


def solve_kquant(weight: Tensor, spec: Spec, importance: Tensor | None = None) -> QParams:
    """Scales (and minima) of the least squared error in each group, as far as the kind of scale can store them.

    weight: [N, K]; on meta, shapes only.  importance: float32 [K], what errors of each column cost; None for all alike.
    Raises SpecError if the spec is not one of groups of integers, or of a fixed code book, that have no zero point.
    """
    fits = isinstance(spec.format, Integer) or (isinstance(spec.format, CodeBook) and spec.format.levels is not None)
    if not fits or spec.zero is Zero.CODE or spec.granularity.rows != 1 or spec.granularity.columns == ALL:
        raise SpecError(
            f"solver 'kquant' fits groups of integers with a minimum or without zero point, and fixed code books, got "
            f"{spec}: take such a spec, as 'int4/g32/min/u6x8', or solver 'mse'"
        )
    if not SCALES[spec.scale].minimum:
        raise SpecError(
            f"solver 'kquant' fits the scale of each group, and those of {spec} are not free: take another kind of "
            "scale, as 'fp16', or solver 'mse'"
        )
    base = find_qparams(weight, spec)
    if weight.is_meta:
        return base
    columns = spec.granularity.columns
    weights = weight.new_ones(weight.shape[1], dtype=torch.float32) if importance is None else importance.to(weight)
    weights = weights.float().unflatten(0, (-1, columns))
    # what is left where nothing matters
    weights = weights + 1e-6 * weights.mean().clamp(min=1e-30)
    step = max(1, step_size(weight, CHUNK) // weight.shape[1])
    found = [
        _kept(_searched(x := part.float().unflatten(1, (-1, columns)), weights, spec), x, weights, spec)
        for part in weight.split(step)
    ]
    zeros = [one.zero for one in found if one.zero is not None]
    return replace(
        base,
        scale=torch.cat([one.scale for one in found]),
        zero=torch.cat(zeros) if zeros else None,
        stored={name: torch.cat([one.stored[name] for one in found]) for name in base.stored},
    )


def _searched(x: Tensor, w: Tensor, spec: Spec) -> tuple[Tensor, Tensor]:
    """Scale and minimum, 0 without one, of x [R, G, E] under weights [G, E]."""
    low, high = x.amin(-1), x.amax(-1)
    if not spec.free_minimum:
        low, high = low.clamp(max=0.0), high.clamp(min=0.0)
    starts = []
    for part in STARTS:
        if spec.zero is Zero.MINIMUM:
            below = low + (1 - part) / 2 * (high - low) if spec.free_minimum else part * low
            starts.append((part * (high - low) / spec.code_range[1], below))
            continue
        largest = torch.where(-low >= high, low, high) if SCALES[spec.scale].signed else torch.maximum(high, -low)
        # either end of the codes may be the further one
        for end in _ends(spec):
            starts.append((part * largest / end, torch.zeros_like(low)))
    best = _least([_fitted(start, x, w, spec) for start in starts])
    for _ in range(ROUNDS):
        best = _least([best, _fitted(best[:2], x, w, spec)])
    return best[0], best[1]


def _ends(spec: Spec) -> tuple[float, ...]:
    if isinstance(spec.format, CodeBook):
        assert spec.format.levels is not None
        ends = (min(spec.format.levels), max(spec.format.levels))
    else:
        ends = spec.code_range
    return ends if SCALES[spec.scale].signed else (max(map(abs, ends)),)


def _least(found: list[_Found]) -> _Found:
    """Of each tile the scale and minimum of the least error, the first of several."""
    best = found[0]
    for one in found[1:]:
        less = one[2] < best[2]
        scale, minimum, error = (torch.where(less, a, b) for a, b in zip(one, best, strict=True))
        best = (scale, minimum, error)
    return best


def _fitted(start: tuple[Tensor, Tensor], x: Tensor, w: Tensor, spec: Spec) -> _Found:
    """What fits the nearest codes under `start` best, and its error with these codes."""
    values = _values(x, *start, spec)
    wv = w * values
    length, along = (wv * values).sum(-1), (wv * x).sum(-1)
    if spec.zero is not Zero.MINIMUM:
        scale = torch.where(length > 0, along / length, 0.0)
        # a sign that storage lacks is none
        scale = scale if SCALES[spec.scale].signed else scale.clamp(min=0.0)
        minimum = torch.zeros_like(scale)
    else:
        total, sum_v, sum_x = w.sum(-1), wv.sum(-1), (w * x).sum(-1)
        determinant = total * length - sum_v * sum_v
        solvable = determinant > 1e-7 * total * length
        scale = torch.where(solvable, (total * along - sum_v * sum_x) / determinant, 0.0)
        minimum = torch.where(solvable, (length * sum_x - sum_v * along) / determinant, sum_x / total)
        if not spec.free_minimum:
            # where it would be above 0, 0 is best
            scale = torch.where(minimum > 0, torch.where(length > 0, along / length, 0.0), scale)
            minimum = minimum.clamp(max=0.0)
        scale = scale.clamp(min=0.0)
    error = (w * (values * scale[..., None] + minimum[..., None] - x).square()).sum(-1)
    return scale, minimum, error


def _values(x: Tensor, scale: Tensor, minimum: Tensor, spec: Spec) -> Tensor:
    """The numbers of the nearest codes, float32 like x."""
    scaled = (x - minimum[..., None]) / torch.where(scale == 0, 1.0, scale)[..., None]
    if isinstance(spec.format, Integer):
        return scaled.round().clamp(*spec.code_range)
    return decode(encode(scaled, spec.format), spec.format)


def _kept(found: tuple[Tensor, Tensor], x: Tensor, w: Tensor, spec: Spec) -> QParams:
    scale, minimum = found
    live = torch.where(scale == 0, 0.0, x.abs().amax(-1))
    scale, stored = keep_scale(torch.where(scale == 0, 1.0, scale), spec.scale, live, spec.format.max)
    if spec.zero is not Zero.MINIMUM:
        return QParams(spec=spec, scale=scale, stored=stored)
    values = _values(x, scale, minimum, spec) * scale[..., None]
    refitted = (w * (x - values)).sum(-1) / w.sum(-1)
    refitted = refitted if spec.free_minimum else refitted.clamp(max=0.0)
    zero, more = keep_minimum(refitted, spec.scale)
    return QParams(spec=spec, scale=scale, zero=zero, stored=stored | more)
