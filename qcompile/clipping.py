"""Where to clip a distribution: with the least squared error on a spec's own grid, or the least divergence.

Sources: Nagel 2021 (A White Paper on Neural Network Quantization), section 3.1, for the error; Migacz 2017 (8-bit
Inference with TensorRT) for the divergence.
"""

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor

from qcompile.distribution import Distribution
from qcompile.formats import CodeBook, Float, Format, Integer, code_values
from qcompile.numerics import QParams, qparams_of_range
from qcompile.spec import Spec

# scales that depend on nothing but themselves; others are searched as float32
_ALONE = ("fp32", "fp16", "bf16", "e8m0")
_BOTH, _LOW, _HIGH = (1.0, 1.0), (1.0, 0.0), (0.0, 1.0)


def _ratios(steps: Iterable[float], octave: float, *ends: tuple[float, float]) -> tuple[tuple[float, float], ...]:
    """What to multiply low and high with: powers of two, so many steps an octave, of the ends given."""
    return tuple((2 ** (step / octave * a), 2 ** (step / octave * b)) for a, b in ends for step in steps)


# Above 1, rounding may be better centred. Heavy tails clip at a tenth of the range and less.
# The floats' error over the clip is a saw-tooth with the period of one octave (Kuzmin 2022), so candidates lie dense.
_COARSE = range(2, -65, -1)
_TOGETHER = (_ratios(_COARSE, 8, _BOTH), *(_ratios((-2, -1, 1, 2), 8 * 3**n, _BOTH) for n in (1, 2)))
# an end depends on the other by the step between levels alone, so that they can be searched in turn
_APART = (
    _ratios(_COARSE[::2], 8, _BOTH),
    *(_ratios(range(-16, 9), 4, end) for end in (_LOW, _HIGH)),
    *(_ratios(range(-4, 5), 4 * 2**n, end) for n in (0, 1, 2, 3) for end in (_LOW, _HIGH)),
)
# numbers of one step of the search
_CHUNK = 2**21

# bins of magnitude, and the fewest that a clip keeps; source: NVIDIA pytorch-quantization, calib_entropy
KL_BINS, KL_START = 2048, 128
# divergences closer than this differ by rounding alone
_KL_NOISE = 1e-12


def least_error(values: Distribution, low: Tensor, high: Tensor, spec: Spec) -> tuple[Tensor, Tensor]:
    """Ends of a range with the least squared error; where nothing is better, low and high themselves.

    values: C lines. low, high: float32 [C], their extremes.  Of a symmetric spec both ends move together; of an
    asymmetric one each is searched on its own.  Returns float32 [C] twice.
    """
    if spec.scale not in _ALONE:
        spec = replace(spec, scale="fp32")
    apart = not spec.symmetric and bool(((low < 0) & (high > 0)).any())
    best = low.new_ones(len(low), 2)
    error = _errors(values, low, high, best[:, None], spec)[:, 0]
    for ratios in _APART if apart else _TOGETHER:
        tried = best[:, None] * low.new_tensor(ratios)
        least, place = _errors(values, low, high, tried, spec).min(1)
        better = least < error
        best = torch.where(better[:, None], tried[torch.arange(len(low), device=low.device), place], best)
        error = torch.where(better, least, error)
    return low * best[:, 0], high * best[:, 1]


def _errors(values: Distribution, low: Tensor, high: Tensor, ratios: Tensor, spec: Spec) -> Tensor:
    """Squared errors [C, c] of the lines under ranges multiplied by ratios [C, c, 2]."""
    step = max(1, _CHUNK // (ratios.shape[1] * 2**spec.format.bits))
    found = []
    for start in range(0, len(low), step):
        part = slice(start, start + step)
        ends = ratios[part] * torch.stack([low[part], high[part]], 1)[:, None]
        levels = levels_of(qparams_of_range(ends[..., 0], ends[..., 1], spec))
        # what it has summed up serves all ratios
        lines = values if step >= len(low) else Distribution(edges=values.edges[part], mass=values.mass[part])
        found.append(lines.squared_error(levels))
    return torch.cat(found)


def levels_of(qparams: QParams) -> Tensor:
    """The numbers that codes stand for, ascending and distinct.  Returns float64 [*scale.shape, L]."""
    spec = qparams.spec
    scale = qparams.scale.double()[..., None]
    if not isinstance(spec.format, Integer):
        return scale * _numbers(spec.format)
    first, last = spec.code_range
    codes = torch.arange(first, last + 1, dtype=torch.float64, device=scale.device)
    return scale * (codes if qparams.zero is None else codes - qparams.zero.double()[..., None])


def _numbers(fmt: Float | CodeBook) -> Tensor:
    values = code_values(fmt).double()
    return values[torch.isfinite(values) & (values.abs() <= fmt.max)].unique()


def least_divergence(counts: Tensor, cells: Tensor) -> int:
    """How many of the first bins to keep for the least Kullback-Leibler divergence, of equals the most.

    counts: float64 [n], mass of magnitudes in equal bins. cells: float64 [L + 1], the parts of a clip, from 0 to 1, at
        which the cells of a grid end.
    For each clip the reference is what it keeps, the clipped mass added to its last bin; the candidate spreads each
    cell's mass evenly over those of its bins that hold some, without the clipped mass.
    """
    n = len(counts)
    # zeros are exact in every format, and the spike of a ReLU would decide alone
    h = torch.cat([counts[1:2], counts[1:]])
    kept = torch.arange(min(n, max(KL_START, len(cells) - 1)), n + 1, device=counts.device)
    mass, holding, entropy = (_up_to(v) for v in (h, (h > 0).double(), torch.special.xlogy(h, h)))
    # a bin belongs to the cell in which it begins; a hair keeps products that are whole numbers where they belong
    ends = (kept[:, None] * cells - 1e-9).ceil().long().clamp(min=0)
    inside, bins = mass[ends].diff(dim=1), holding[ends].diff(dim=1)
    spread = torch.where(bins > 0, inside / bins.clamp(min=1.0), 0.0)
    clipped, last = mass[-1] - mass[kept], h[kept - 1]
    last_spread = spread.gather(
        1, (torch.searchsorted(ends, kept[:, None] - 1, right=True) - 1).clamp(max=len(cells) - 2)
    )
    divergence = (
        entropy[kept]
        - torch.special.xlogy(last, last)
        + torch.special.xlogy(last + clipped, last + clipped)
        - torch.special.xlogy(inside, spread).sum(1)
        - torch.special.xlogy(clipped, last_spread[:, 0])
    ) / mass[-1] + (mass[kept] / mass[-1]).log()
    # mass in a bin to which the candidate gives none
    divergence = torch.where((clipped > 0) & (last == 0), torch.inf, divergence)
    if not bool(torch.isfinite(divergence).any()):
        return n
    return int(kept[divergence <= divergence.min() + _KL_NOISE][-1])


def _up_to(x: Tensor) -> Tensor:
    return torch.cat([x.new_zeros(1), x.cumsum(0)])


def divergence_cells(fmt: Format, levels: int) -> Tensor:
    """The `cells` of `least_divergence`: those of a grid; equal ones of integers, and before levels are learned."""
    if isinstance(fmt, Integer) or (isinstance(fmt, CodeBook) and fmt.levels is None):
        return torch.arange(levels + 1, dtype=torch.float64, device="cpu") / levels
    numbers = _numbers(fmt)
    numbers = numbers[numbers >= 0] / fmt.max
    return torch.cat([numbers.new_zeros(1), (numbers[1:] + numbers[:-1]) / 2, numbers.new_ones(1)])
