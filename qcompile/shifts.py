"""Octaves by which channels of an activation are raised before it is quantized, and the weights' exponents lowered.

    Q(x[:, k] * 2**shift[k]) * 2**-shift[k]: the grid of channel k is finer by shift[k] octaves

so that all channels reach about as far into a grid that one scale serves. Multiplying by powers of two is exact, so the
factor moves into what makes the activation, and its inverse into the exponents of the weight's numbers, after these
were chosen: nothing is left to do while the model runs. What lowers exponents then serves the weight, too: each of its
columns is raised, before its numbers are chosen, to where the grid of its rows fits it best.
A block of numbers under a scale of few bits has no room for an exponent of each column, and E4M3 none, or for a few
octaves alone, for floats of much mantissa or exponent: by the rest the weight is divided before it is quantized, which
is SmoothQuant by powers of two.
Source: LLM-FP4 (Liu 2023), section 3.3, pre-shifted exponent bias; the paper's limit is 2**e - 1 octaves, and its
weights keep their columns as they are.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from qcompile.channels import tied
from qcompile.formats import Float, Format, parse_format
from qcompile.numerics import Lowered, QParams, dequantize, exact_exp2, quantize
from qcompile.solvers.mse import solve_mse
from qcompile.spec import Spec

# its three bits of mantissa and four of exponent hold the numbers of 4-bit floats, lowered, as they are
CONTAINER = parse_format("fp8_e4m3")
# octaves by which the largest channels are left out of account: how hard they may be clipped, and around the best
COARSE = (0.0, 1.0, 2.0, 3.0, 4.0, 5.0)
FINE = (-0.5, -0.25, 0.25, 0.5)
# rows of a weight that tell where its columns lie, evenly spread
ROWS = 256
# octaves by which a column may be raised, the likely ones first: of several as good, the first is taken
RAISED = (0, 1, -1, 2, -2, 3, -3, 4, -4, *range(5, 15))


def shift_of(amax: Tensor, channels: Tensor | None, most: int, left_out: float) -> Tensor:
    """Octaves by which channels are raised to reach as far as one `left_out` octaves below the largest; int64 [K].

    amax: float32 [K], largest magnitude of each channel.  channels: int64 [K], what must share a shift; None if nothing
    must.  Shifts are from 0 to `most`; a channel in which nothing was seen has none, as other data may be large there.
    """
    return _below(amax, channels).log2().sub(left_out).clamp(0, most).round().long()


def floor_shift(amax: Tensor, channels: Tensor | None, most: int) -> Tensor:
    """As `shift_of`, by as many octaves as leave every channel within the largest: none is clipped by its shift.

    Rounded to the nearest, a channel may reach beyond by half an octave.
    """
    # m * 2**e with m from 0.5 to 1 has e - 1 whole octaves: exact, unlike a logarithm
    return torch.frexp(_below(amax, channels)).exponent.sub(1).clamp(0, most).long()


def _below(amax: Tensor, channels: Tensor | None) -> Tensor:
    """The largest channel over each, float64 [K]; 1 where nothing was seen."""
    reach = amax.double() if channels is None else tied(amax.double(), channels)
    return (reach.amax() / reach).nan_to_num(nan=1.0, posinf=1.0)


def within(octaves: Tensor, most: int) -> Tensor:
    """The octaves as numbers from 0 to `most`; what all columns share is a matter of scales.  octaves: int64 [K]."""
    low = octaves.amin()
    return octaves - low if int(octaves.amax() - low) <= most else octaves.clamp(0, most)


def scales_alone(spec: Spec | None) -> bool:
    """Whether a weight of this spec has scales that nothing rounds, none of them shared by several of its rows."""
    return spec is not None and spec.scale == "fp32" and spec.granularity.rows == 1


def lowers_columns(spec: Spec | None) -> bool:
    """Whether columns of a weight of this spec can be lowered by octaves after their numbers were chosen."""
    return spec is not None and scales_alone(spec) and folds_octaves(spec, 1)


def most_lowered(spec: Spec | None, most: int) -> int:
    """By how many octaves, at most, columns of a weight of this spec are lowered after its numbers were chosen."""
    if spec is None or not lowers_columns(spec):
        return 0
    # beyond, no kernel would read the weight: it would be made anew from its numbers at each call
    return min(most, room(spec.format))


def raised_columns(weight: Tensor, spec: Spec, importance: Tensor | None = None) -> Tensor:
    """Octaves by which each column of a weight is raised for the least error of its numbers; int64 [K], 0 for most.

    weight: float32 [N, K].  spec: see `lowers_columns`.  importance: float32 [K], what errors in each column cost.
    Found under the best scales for the columns as they are.
    """
    rows = weight[:: -(-len(weight) // ROWS)]
    qparams = solve_mse(rows, spec, importance)
    best = torch.zeros(rows.shape[1], dtype=torch.int64, device=rows.device)
    least = rows.new_full((rows.shape[1],), torch.inf)
    for octave in RAISED:
        raised = rows * 2.0**octave
        error = (dequantize(quantize(raised, qparams), qparams) - raised).square().sum(0) * 0.25**octave
        best = torch.where(error < least, octave, best)
        least = torch.minimum(error, least)
    return best


def lowered_importance(importance: Tensor | None, shift: Sequence[int]) -> Tensor | None:
    """What errors in each column cost before the columns are lowered by that many octaves.  importance: float32 [K]."""
    if importance is None or not shift:
        return importance
    return importance / exact_exp2(torch.tensor(shift, device=importance.device)).square()


def raised(fmt: Format) -> int:
    """Octaves by which numbers of a float can be raised until the largest reaches the top of E4M3."""
    return math.floor(math.log2(CONTAINER.max / fmt.max))


def room(fmt: Format) -> int:
    """Octaves by which E4M3 holds numbers of a float, raised, when they are lowered."""
    assert isinstance(fmt, Float)
    assert isinstance(CONTAINER, Float)
    return raised(fmt) + round(math.log2(fmt.step / CONTAINER.step))


def folds_octaves(spec: Spec, most: int) -> bool:
    """Whether E4M3 holds every number of this spec, lowered by up to `most` octaves."""
    fmt = spec.format
    assert isinstance(CONTAINER, Float)
    return isinstance(fmt, Float) and spec.scale == "fp32" and fmt.mantissa <= CONTAINER.mantissa and most <= room(fmt)


def lowered(codes: Tensor, qparams: QParams, columns: Tensor, shift: Sequence[int]) -> tuple[Tensor, QParams]:
    """A weight's numbers times columns, float32, and the qparams under which E4M3 holds them.

    codes: [N, K] under qparams, of a spec of `folds_octaves`.  columns: [K], powers of two up to 1.
    shift: octaves that these are; empty where the plan did not choose them.
    """
    scale = qparams.scale * 2.0 ** -raised(qparams.spec.format)
    folded = QParams(
        spec=replace(qparams.spec, format=CONTAINER),
        scale=scale,
        # what is stored of a float32 scale is the scale
        stored={"scale": scale},
        lowered=Lowered(narrow=replace(qparams, codes=None), shift=tuple(shift)) if shift else None,
    )
    return dequantize(codes, qparams) * columns.to(codes.device, torch.float32), folded


def lowered_codes(codes: Tensor, qparams: QParams, shift: Sequence[int]) -> tuple[Tensor, QParams]:
    """Codes of E4M3, and their qparams, for a weight whose columns are lowered by these octaves; see `lowered`."""
    columns = exact_exp2(-torch.tensor(shift, device=codes.device))
    values, folded = lowered(codes, qparams, columns, shift)
    return quantize(values, folded), folded
