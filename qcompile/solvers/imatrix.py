"""Spend the codes of each tile where errors cost most: columns count by what calibration saw of their channels.

An error in column k of a weight adds E[x_k^2] times its square to that of the outputs, if channels are independent.
Source: the importance matrix of llama.cpp (Kawrakow 2024), whose groups have a free minimum in place of a zero point.
"""

from collections.abc import Iterator, Sequence
from itertools import chain

import torch
from torch import Tensor

from qcompile.formats import Integer
from qcompile.numerics import SMALLEST_SCALE, QParams, find_qparams
from qcompile.scales import keep_scale
from qcompile.solvers.kquant import solve_kquant
from qcompile.solvers.mse import clips, solve_mse
from qcompile.solvers.round import solve_round
from qcompile.spec import ALL, SCALES, Granularity, Spec, Zero
from qcompile.steps import step_size

# kinds of scales that do not depend on those of other tiles
OWN_SCALES = ("fp32", "fp16", "bf16")
# zero points around that of a whole range: a clip need not take as much from both ends
AROUND = (0, -1, 1)
# ranges in units of the deviation, where elements that count for little do not show: the best of normal data ends at
# 1.5 for 2 bits and at 3.9 for 8 (Nagel 2021), and heavy tails reach further
REACHES = (1.5, 2.0, 2.6, 3.4, 4.5, 6.0)
# of codes for a scale, and then the scale that fits these codes best: more of them hardly change a tile
ROUNDS = 2
# elements of one step on the CPU, so that its passes find them in a cache
CHUNK = 2**18

# scale and zero point of each tile, float32 [R, G]
_Found = tuple[Tensor, Tensor]


def solve_imatrix(weight: Tensor, spec: Spec, importance: Tensor | None = None) -> QParams:
    """Scales (and zero points) of the least squared error, weighted by importance; never more than `mse` or `round`.

    weight: [N, K]; on meta, shapes only.  importance: float32 [K], at least 0; None for all columns alike.
    Of integers whose tiles have scales of their own, scale and zero point are searched; of all else, how much of the
    range is clipped; groups with minima, or scales that are integers, are fitted as by `kquant`.
    Raises SpecError if the spec's tiles do not divide the weight.
    """
    if weight.is_meta:
        return find_qparams(weight, spec)
    alike = weight.new_ones(weight.shape[1], dtype=torch.float32)
    importance = alike if importance is None else importance.to(alike)
    tile = spec.granularity
    # scales that are quantized themselves are no longer those that were searched
    together = isinstance(spec.format, Integer) and SCALES[spec.scale].shared and spec.zero is not Zero.CODE
    if spec.zero is Zero.MINIMUM or together:
        return solve_kquant(weight, spec, importance)
    if not isinstance(spec.format, Integer) or spec.scale not in OWN_SCALES or tile.rows == ALL:
        return solve_mse(weight, spec, importance)
    # where nothing matters, the first is kept
    known = [solve_mse(weight, spec), solve_round(weight, spec)]
    step = tile.rows * max(1, step_size(weight, CHUNK) // (tile.rows * weight.shape[1]))
    parts = []
    for start in range(0, len(weight), step):
        x, w = _side_by_side(weight[start : start + step].float(), importance, tile)
        rows = slice(start // tile.rows, (start + step) // tile.rows)
        tried = [(one.scale[rows], _zero(one)[rows]) for one in known]
        parts.append(_least([*tried, _searched(x, w, spec)], x, w, spec))
    scale, zero = (torch.cat(part) for part in zip(*parts, strict=True))
    scale, stored = keep_scale(scale, spec.scale, scale, spec.format.max)
    return QParams(spec=spec, scale=scale, zero=None if spec.symmetric else zero, stored=stored)


def _side_by_side(part: Tensor, importance: Tensor, tile: Granularity) -> tuple[Tensor, Tensor]:
    """Elements of each tile along the last dimension, [R, G, E], and their importance, at most 1, [G, E]."""
    columns = tile.columns or part.shape[1]
    blocks = part.unflatten(1, (-1, columns)).unflatten(0, (-1, tile.rows))  # [R, rows, G, columns]
    weights = importance.unflatten(0, (-1, 1, columns)).expand(-1, tile.rows, -1).flatten(1)
    most = weights.amax(1, keepdim=True)
    return blocks.transpose(1, 2).flatten(2), weights / torch.where(most > 0, most, 1.0)


def _zero(qparams: QParams) -> Tensor:
    return torch.zeros_like(qparams.scale) if qparams.zero is None else qparams.zero


def _searched(x: Tensor, w: Tensor, spec: Spec) -> _Found:
    """From several ranges on, by turns the nearest codes and the scale that fits them best; x, w: `_side_by_side`.

    The error of codes c under their best scale is sum w x^2 - (sum w c x)^2 / sum w c^2; what is taken off is the gain.
    """
    moves = AROUND[: 1 if spec.symmetric else None]
    unit = _whole_range(x, spec)
    # in units of it, no sum of squares leaves float32
    x = x / unit[..., None]
    wx = w * x
    best = (torch.zeros_like(unit), torch.ones_like(unit), torch.zeros_like(unit))
    for scale, zero in chain(_parts(x, spec), _around_mean(x, w, spec)):
        steps = (x / scale[..., None]).round_()
        for move in moves:
            best = _better(best, steps, zero + move, wx, w, spec)
    for _ in range(ROUNDS):
        _, scale, zero = best
        steps = (x / scale[..., None]).round_()
        for move in moves:
            best = _better(best, steps, zero + move, wx, w, spec)
    _, scale, zero = best
    return _kept(scale * unit, spec), zero


def _whole_range(x: Tensor, spec: Spec) -> Tensor:
    """The scale of each tile's whole range, 1 for zeros."""
    low, high = x.amin(-1).clamp(max=0.0), x.amax(-1).clamp(min=0.0)
    scale = (torch.maximum(high, -low) if spec.symmetric else high - low) / spec.code_range[1]
    return torch.where(scale > 0, scale, 1.0)


def _parts(x: Tensor, spec: Spec) -> Iterator[_Found]:
    """Parts of the whole range, which has the scale 1."""
    zero = torch.zeros_like(x[..., 0]) if spec.symmetric else -x.amin(-1).clamp(max=0.0).round()
    yield from ((torch.full_like(zero, clip), zero) for clip in clips(spec))


def _around_mean(x: Tensor, w: Tensor, spec: Spec) -> Iterator[_Found]:
    """Ranges around the weighted mean, of as many deviations."""
    total = w.sum(-1).clamp(min=SMALLEST_SCALE)
    mean = torch.zeros_like(x[..., 0]) if spec.symmetric else (w * x).sum(-1) / total
    deviation = (w * (x - mean[..., None]).square()).sum(-1).div(total).sqrt()
    least, most = spec.code_range
    for reach in REACHES:
        scale = torch.where(deviation > 0, 2 * reach * deviation / (most - least), 1.0)
        yield scale, ((least + most) / 2 - mean / scale).round()


def _better(
    best: tuple[Tensor, Tensor, Tensor], steps: Tensor, zero: Tensor, wx: Tensor, w: Tensor, spec: Spec
) -> tuple[Tensor, Tensor, Tensor]:
    """Gain, scale and zero point of each tile: the best, or those of the codes `steps` around `zero`, clipped."""
    least, most = spec.code_range
    zero = zero.clamp(least, most)
    # several times as fast as `clamp`
    codes = torch.maximum(steps, (least - zero)[..., None]).minimum((most - zero)[..., None])
    along, length = (wx * codes).sum(-1), (w * codes * codes).sum(-1)
    scale = torch.where(along > 0, along / length, 1.0)
    gain = torch.where(along > 0, scale * along, 0.0)
    gained = gain > best[0]
    known_gain, known_scale, known_zero = best
    return (
        torch.where(gained, gain, known_gain),
        torch.where(gained, scale, known_scale),
        torch.where(gained, zero, known_zero),
    )


def _kept(scale: Tensor, spec: Spec) -> Tensor:
    return keep_scale(scale.clamp(min=SMALLEST_SCALE), spec.scale, scale, spec.format.max)[0]


def _least(tried: Sequence[_Found], x: Tensor, w: Tensor, spec: Spec) -> _Found:
    """Of each tile the scale and zero point with which x loses least, the first of several."""
    best, error = tried[0], _error(tried[0], x, w, spec)
    for found in tried[1:]:
        new = _error(found, x, w, spec)
        scale, zero = (torch.where(new < error, a, b) for a, b in zip(found, best, strict=True))
        best, error = (scale, zero), torch.minimum(new, error)
    return best


def _error(found: _Found, x: Tensor, w: Tensor, spec: Spec) -> Tensor:
    """Weighted sum of squared errors of each tile, over the square of its largest magnitude."""
    scale, zero = (part[..., None] for part in found)
    least, most = spec.code_range
    codes = torch.maximum((x / scale).round_(), least - zero).minimum(most - zero)
    peak = x.abs().amax(-1, keepdim=True)
    errors = (codes * scale - x) / torch.where(peak > 0, peak, 1.0)
    return (w * errors.square()).sum(-1)
