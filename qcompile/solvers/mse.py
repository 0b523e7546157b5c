"""Clip each tile where the squared error of its elements is least, instead of at its largest element.

Source: Nagel 2021 (A White Paper on Neural Network Quantization), section 3.1; the floats' error over the clip
is a saw-tooth with the period of one octave (Kuzmin 2022), so that the first search covers octaves densely.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import chain

import torch
from torch import Tensor

from qcompile.numerics import QParams, dequantize, find_qparams, qparams_of_range, quantize, tiles
from qcompile.spec import ALL, SCALES, Spec
from qcompile.steps import step_size

# six candidates an octave; above 1, rounding may be better centred
COARSE = tuple(1.2 * 2 ** (-i / 6) for i in range(25))
# octaves that the best clip may lie below the range: heavy tails at 2 bits clip at a tenth of it
OCTAVES = {2: 4, 3: 3, 4: 2}
# between two neighbours of the coarse search
FINE = tuple(2 ** (i / 18) for i in (-2, -1, 1, 2))
POWERS_OF_TWO = tuple(2.0**i for i in (1, 0, -1, -2, -3, -4))
# elements of one step of the search on the CPU, so that its passes find them in a cache
CHUNK = 2**18


def solve_mse(weight: Tensor, spec: Spec, importance: Tensor | None = None) -> QParams:
    """Scales whose clip, a part of the tile's range, gives the least squared error; never more than `round`.

    weight: [N, K].  importance: see `squared_error`; the error is then never more than that without it, either.
    Both ends of an asymmetric range shrink together; the levels of a learned code book stay those of the whole range.
    A scale that is a power of two is searched among its neighbours.
    Raises SpecError if the spec's tiles do not divide the weight.
    """
    base = find_qparams(weight, spec)
    view, dims = tiles(weight, spec.granularity)
    low, high = view.amin(dims).float(), view.amax(dims).float()
    # these keep neighbours together: each tile is searched as if alone, and the outcome is checked below
    together = spec.scale == "dq256" or SCALES[spec.scale].code_bits
    alone = replace(spec, scale="fp32") if together else spec

    def candidate(clip: Tensor | float, spec: Spec = alone) -> QParams:
        return replace(qparams_of_range(low, high, spec, clip=clip), levels=base.levels)

    def searched(importance: Tensor | None, known: Sequence[Tensor] = ()) -> Tensor:
        best = torch.ones_like(low)
        error = squared_error(weight, candidate(best), importance)
        steps = (POWERS_OF_TWO,) if spec.scale == "e8m0" else (clips(spec), FINE)
        for ratios in steps:
            centre = best if ratios is FINE else torch.ones_like(low)
            for clip in chain((centre * ratio for ratio in ratios), () if ratios is FINE else known):
                tried = squared_error(weight, candidate(clip), importance)
                best = torch.where(tried < error, clip, best)
                error = torch.minimum(tried, error)
        return best

    found = [searched(None)]
    if importance is not None:
        found = [searched(importance, found), *found]
    if alone is spec:
        return candidate(found[0])
    return min(
        (*(candidate(clip, spec) for clip in found), base),
        key=lambda q: float(squared_error(weight, q, importance).sum()),
    )


def clips(spec: Spec) -> tuple[float, ...]:
    """Parts of a tile's range that are worth trying, the largest first."""
    return COARSE[: 6 * OCTAVES.get(spec.format.bits, 1) + 1]


def squared_error(weight: Tensor, qparams: QParams, importance: Tensor | None = None) -> Tensor:
    """Sum of squared errors of each tile under qparams, slice by slice of rows.  Returns float32 like the scale.

    importance: float32 [K], how much the errors of each column count; None for all alike; [K / c, c, c] for tiles of c
        columns, how much those of two columns of a tile count together.
    """
    rows = qparams.spec.granularity.rows
    unit = max(rows, 1)
    count = unit * max(1, step_size(weight, CHUNK) // (unit * weight[0].numel()))
    parts = []
    for start in range(0, len(weight), count):
        part = weight[start : start + count].float()
        held = qparams if rows == ALL else rows_of(qparams, slice(start // unit, (start + count) // unit))
        costs = _weighed(dequantize(quantize(part, held), held) - part, importance)
        view, dims = tiles(costs, qparams.spec.granularity)
        parts.append(view.sum(dims))
    return torch.stack(parts).sum(0) if rows == ALL else torch.cat(parts)


def _weighed(errors: Tensor, importance: Tensor | None) -> Tensor:
    if importance is None or importance.dim() == 1:
        return errors.square() if importance is None else errors.square() * importance
    blocks = errors.unflatten(1, importance.shape[:2]).transpose(0, 1)  # [K / c, rows, c]
    return (blocks @ importance * blocks).transpose(0, 1).flatten(1)


def rows_of(qparams: QParams, rows: slice) -> QParams:
    """The qparams of some rows of tiles.  qparams: not of a whole tensor."""
    return replace(qparams, scale=qparams.scale[rows], zero=None if qparams.zero is None else qparams.zero[rows])
