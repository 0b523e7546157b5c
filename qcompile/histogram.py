"""Histograms whose bins are the same for everybody, so that merging them is exact.

A bin is a sign, an exponent and the top bits of the mantissa of a float32. A line keeps the octaves below its largest
exponent; what is smaller falls into the bin at zero. The window depends on the largest exponent alone, never on the
order of the data: when a larger value arrives, the lowest octaves fold into the bin at zero.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qcompile.distribution import Distribution
from qcompile.steps import step_size

FLOAT32_MANTISSA = 23
POSITIVE, NEGATIVE = 0, 1
LARGEST = torch.finfo(torch.float32).max
# elements and counters of one step on the CPU: both stay in a second-level cache, and calls into torch cost little
CHUNK = 2**18
COUNTERS = 2**17


@dataclass(frozen=True, kw_only=True)
class Resolution:
    """2**mantissa bins an octave, in so many octaves."""

    mantissa: int
    octaves: int

    @property
    def bins(self) -> int:
        """Bins of one sign, the one at zero included."""
        return (self.octaves << self.mantissa) + 1

    @property
    def shift(self) -> int:
        """Bits of a float32 that its bin does not tell."""
        return FLOAT32_MANTISSA - self.mantissa


# the top octave is cut as finely as 2048 linear bins, which the estimator of least divergence takes
FINE = Resolution(mantissa=10, octaves=24)
TOKENS = Resolution(mantissa=8, octaves=24)
# what lines of different places and divisors are brought to
COMMON = Resolution(mantissa=6, octaves=30)


def channel_resolution(k: int) -> Resolution:
    """The resolution of K histograms, a function of K alone: 16 bins an octave up to K = 2048, 8 or 4 beyond."""
    # the error of an integer's clip is found as well with 8 as with 1024 bins an octave, and to 0.15 dB with 4
    mantissa = 4 if k <= 2048 else 3 if k <= 4096 else 2
    return Resolution(mantissa=mantissa, octaves=12)


@dataclass(frozen=True, kw_only=True, eq=False)
class Histogram:
    """How many values each bin of each of C lines holds.

    counts: int64 or int32 [C, 2, bins], the positive side first, each side from zero outwards. -0.0 is negative.
    top: int32 [C], exponent code of the largest octave of a line.
    divisor: float32 [C]; the values counted were divided by it since; None for 1.
    """

    counts: Tensor
    top: Tensor
    resolution: Resolution
    divisor: Tensor | None = None

    @property
    def total(self) -> int:
        """How many values were counted."""
        return int(self.counts.sum())

    @property
    def edges(self) -> Tensor:
        """Magnitudes at which bins end.  Returns float64 [C, bins + 1], the first 0."""
        codes = _base(self.top, self.resolution)[:, None] + torch.arange(
            self.resolution.bins + 1, dtype=torch.int32, device=self.top.device
        )
        edges = (codes << self.resolution.shift).view(torch.float32).double()
        # where the largest exponent ends, float32 has Inf
        edges[:, -1] = edges[:, -1].clamp(max=2.0**128)
        edges[:, 0] = 0.0
        return edges if self.divisor is None else edges / self.divisor.double()[:, None]

    def divided(self, scale: Tensor) -> "Histogram":
        """The histogram of values / scale.  scale: float32 [C], positive."""
        return replace(self, divisor=scale if self.divisor is None else self.divisor * scale)

    def without(self, lines: Tensor) -> "Histogram":
        """The histogram with all values of these lines zero.  lines: int64 [n]."""
        counts = self.counts.clone()
        counts[lines] = 0
        counts[lines, POSITIVE, 0] = self.counts[lines].sum((1, 2)).to(counts.dtype)
        return replace(self, counts=counts)

    def reaching(self, threshold: float) -> Tensor:
        """How many values of each line may have a magnitude of at least `threshold`: never too few.  int64 [C]."""
        if self.divisor is None:
            # as the edges say, and found sooner
            reach = torch.arange(self.resolution.bins, device=self.top.device) >= self._place(threshold)[:, None]
        else:
            reach = self.edges[:, 1:] > threshold
        return (self.counts.sum(1) * reach).sum(1)

    def begins_at(self, threshold: float) -> bool:
        """Whether a bin of each line begins at `threshold`, so that `reaching` is exact.  The divisor is 1."""
        whole = _bits(threshold) % (1 << self.resolution.shift) == 0
        return self.divisor is None and whole and bool((self._place(threshold) > 0).all())

    def _place(self, threshold: float) -> Tensor:
        """The bin of each line that holds `threshold`, int32 [C]; the one at zero, and below, if it is under all."""
        return (_bits(threshold) >> self.resolution.shift) - _base(self.top, self.resolution)

    def lines(self, low: Tensor, high: Tensor) -> Distribution:
        """Each line as a distribution.  low, high: [C], its known extremes."""
        edges, counts = self.edges.cpu(), self.counts.cpu().double()
        return Distribution(
            edges=_between(torch.cat([-edges.flip(1), edges[:, 1:]], 1), low, high),
            mass=torch.cat([counts[:, NEGATIVE].flip(1), counts[:, POSITIVE]], 1),
        )

    def together(self, low: Tensor, high: Tensor) -> Distribution:
        """All lines as one distribution [1, n].  low, high: [], its known extremes."""
        if len(self.top) == 1:
            return self.lines(low[None], high[None])
        if self.divisor is not None:
            return _on_common_edges(self, low, high)
        # lines of one window have one set of edges
        tops, place = self.top.unique(return_inverse=True)
        counts = self.counts.new_zeros((len(tops), *self.counts.shape[1:]), dtype=torch.int64)
        counts.index_add_(0, place, self.counts.long())
        return _on_common_edges(replace(self, top=tops, counts=counts), low, high)


def count(
    rows: Tensor, resolution: Resolution, *, amax: Tensor, finite: bool = True, beside: Histogram | None = None
) -> Histogram:
    """Histogram of one line: all elements.

    rows: floating [R, K]; amax: float32 [], of its finite elements. beside: what the result will be merged with; its
    window then holds both, so that merging moves no counts.
    """
    top = _top(amax[None], resolution) if beside is None else torch.maximum(_top(amax[None], resolution), beside.top)
    parts = rows.split(max(1, step_size(rows, CHUNK) // rows.shape[1]))
    counts = _counted(parts[0].float(), top, resolution, finite)
    for part in parts[1:]:
        counts += _counted(part.float(), top, resolution, finite)
    return Histogram(counts=counts.view(1, 2, -1), top=top, resolution=resolution)


def count_channels(
    rows: Tensor, resolution: Resolution, *, amax: Tensor, finite: bool = True, beside: Histogram | None = None
) -> Histogram:
    """Histogram of K lines, the columns.  rows: floating [R, K]; amax: float32 [K], of finite elements; see `count`."""
    r, k = rows.shape
    top = _top(amax, resolution) if beside is None else torch.maximum(_top(amax, resolution), beside.top)
    counts = rows.new_empty(k, 2 * resolution.bins, dtype=torch.int32)
    # few columns at a time, so that their counters stay in a cache
    width = max(1, min(step_size(rows, CHUNK) // r, step_size(rows, COUNTERS) // (2 * resolution.bins)))
    for start in range(0, k, width):
        block = slice(start, start + width)
        found = sum(
            _counted(part.float(), top[block], resolution, finite)
            for part in rows[:, block].split(step_size(rows, CHUNK))
        )
        assert isinstance(found, Tensor)
        counts[block] = found.view(-1, 2 * resolution.bins)
    return Histogram(counts=counts.view(k, 2, -1), top=top, resolution=resolution)


def merge_histograms(a: Histogram, b: Histogram) -> Histogram:
    """Histogram of the values of both.  a, b: of the same lines, resolution and divisor."""
    assert a.resolution == b.resolution, "histograms of one thing have one resolution"
    assert (a.divisor is None) == (b.divisor is None), "a divided histogram merges with its like only"
    assert a.divisor is None or b.divisor is None or torch.equal(a.divisor, b.divisor), "the divisors differ"
    top = torch.maximum(a.top, b.top)
    return replace(a, counts=_folded(a, top) + _folded(b, top), top=top)


def _folded(histogram: Histogram, top: Tensor) -> Tensor:
    """Counts in the window below `top`, which is at least the histogram's own."""
    counts = histogram.counts
    if torch.equal(top, histogram.top):
        return counts
    steps = (top - histogram.top) << histogram.resolution.mantissa
    for step in steps.unique().tolist():
        if step == 0:
            continue
        lines = (steps == step).nonzero().flatten()
        old = histogram.counts[lines]
        new = torch.zeros_like(old)
        new[..., 1 : max(1, histogram.resolution.bins - step)] = old[..., 1 + step :]
        new[..., 0] = old[..., : 1 + step].sum(-1)
        counts = counts.index_copy(0, lines, new)
    return counts


def _top(amax: Tensor, resolution: Resolution) -> Tensor:
    # below, the window would reach beyond the smallest normal number
    return (amax.view(torch.int32) >> FLOAT32_MANTISSA).clamp(min=resolution.octaves)


def _bits(x: float) -> int:
    """Of a float32."""
    return int(torch.tensor(x, dtype=torch.float32, device="cpu").view(torch.int32))


def _base(top: Tensor, resolution: Resolution) -> Tensor:
    """The code (exponent and top mantissa bits) that counts as the bin at zero, with all below it."""
    return ((top - resolution.octaves + 1) << resolution.mantissa) - 1


def _counted(block: Tensor, top: Tensor, resolution: Resolution, finite: bool) -> Tensor:
    """Counts of C lines, int64 [C * 2 * bins].  block: float32 [r, c]; top: [c] for c lines, [1] for one of all."""
    bins = resolution.bins
    base = _base(top, resolution)
    line = torch.arange(0, len(top) * 2 * bins, 2 * bins, dtype=torch.int32, device=top.device)
    key = block.abs().view(torch.int32)
    key >>= resolution.shift
    torch.maximum(key, base, out=key)
    key += line - base
    # all ones, which is -1, for a negative number
    key.sub_(block.view(torch.int32) >> 31, alpha=bins)
    flat = key.flatten() if finite else key[torch.isfinite(block)]
    return torch.bincount(flat, minlength=len(top) * 2 * bins)


def _between(edges: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Edges [C, n] inside the known extremes, a hair beyond them, so that equal values keep a bin of some width."""
    low, high = low.cpu().double()[:, None], high.cpu().double()[:, None]
    hair = 2.0**-40
    return torch.minimum(torch.maximum(edges, low - hair * low.abs()), high + hair * high.abs())


def _on_common_edges(histogram: Histogram, low: Tensor, high: Tensor) -> Distribution:
    """Lines on edges of their own as one line on common edges, where the mass of a bin goes in equal parts."""
    edges, counts = histogram.edges.cpu(), histogram.counts.cpu()
    line, side, place = counts.nonzero(as_tuple=True)
    start, end = edges[line, place], edges[line, place + 1]
    # with at least as many parts as common bins lie in one, undivided bins are split without loss
    parts = max(4, 1 << (COMMON.mantissa - histogram.resolution.mantissa))
    share = counts[line, side, place].double() / parts
    top = _top(end.amax().clamp(max=LARGEST).float()[None], COMMON)
    base = int(_base(top, COMMON))
    common = torch.zeros(2 * COMMON.bins, dtype=torch.float64, device="cpu")
    for part in range(parts):
        middle = (start + (end - start) * ((part + 0.5) / parts)).clamp(max=LARGEST).float()
        code = (middle.view(torch.int32) >> COMMON.shift) - base
        common += torch.bincount(code.clamp(min=0) + side * COMMON.bins, share, minlength=2 * COMMON.bins)
    return Histogram(counts=common.view(1, 2, -1), top=top, resolution=COMMON).lines(low[None], high[None])
