"""Distributions made of bins, the mass of each spread evenly: quantiles, moments, and the error of rounding.

Pure mathematics on C lines at once, in float64 on the CPU.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.functional import pad


@dataclass(frozen=True, kw_only=True, eq=False)
class Distribution:
    """edges: float64 [C, n + 1], ascending; mass: float64 [C, n], what lies in each bin."""

    edges: Tensor
    mass: Tensor

    @cached_property
    def _cumulative(self) -> tuple[Tensor, Tensor, Tensor]:
        """Integrals of 1, x and x**2 up to each edge, three of [C, n + 1]."""
        a, b = self.edges[:, :-1], self.edges[:, 1:]
        powers = (self.mass, self.mass * (a + b) / 2, self.mass * (a * a + a * b + b * b) / 3)
        zeroth, first, second = (pad(p.cumsum(1), (1, 0)) for p in powers)
        return zeroth, first, second

    def moments(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Integrals of 1, x and x**2 up to t.  t: float64 [C, m].  Returns three of [C, m]."""
        place = (torch.searchsorted(self.edges, t.contiguous(), right=True) - 1).clamp(0, self.mass.shape[1] - 1)
        start, end = self.edges.gather(1, place), self.edges.gather(1, place + 1)
        part = ((t - start) / torch.where(end > start, end - start, 1.0)).clamp(0.0, 1.0)
        mass, reach = self.mass.gather(1, place) * part, part * (end - start)
        zeroth, first, second = (c.gather(1, place) for c in self._cumulative)
        return (
            zeroth + mass,
            first + mass * (start + reach / 2),
            second + mass * (start * start + start * reach + reach * reach / 3),
        )

    def quantile(self, part: float) -> Tensor:
        """The value that `part` of each line's mass lies below.  Returns [C]."""
        return _inverse(self.edges, self._cumulative[0], part)

    def magnitude_quantile(self, part: float) -> Tensor:
        """The magnitude that `part` of each line's mass lies below.  Returns [C]."""
        edges = self.edges.abs().sort(1).values
        return _inverse(edges, self._within(edges), part)

    def magnitudes(self, bins: int, amax: Tensor) -> Tensor:
        """Mass of |x| in `bins` equal bins on [0, amax].  amax: [C].  Returns [C, bins]."""
        edges = amax[:, None] * (torch.arange(bins + 1, dtype=torch.float64, device="cpu") / bins)
        # sums of other orders may differ in their last digit
        return self._within(edges).diff(dim=1).clamp(min=0.0)

    def _within(self, t: Tensor) -> Tensor:
        return self.moments(t)[0] - self.moments(-t)[0]

    def cells(self, levels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Integrals of 1, x and x**2 over the values nearest to each level.

        levels: float64 [C, ..., L], ascending.  Returns three of that shape.
        """
        thresholds = (levels[..., 1:] + levels[..., :-1]) / 2
        zeroth, first, second = (
            torch.cat(
                [
                    below.view_as(thresholds),
                    whole[:, -1].view(-1, *[1] * (levels.dim() - 1)).expand_as(levels)[..., :1],
                ],
                -1,
            )
            for below, whole in zip(self.moments(thresholds.flatten(1)), self._cumulative, strict=True)
        )
        zero = torch.zeros_like(levels[..., :1])
        return zeroth.diff(dim=-1, prepend=zero), first.diff(dim=-1, prepend=zero), second.diff(dim=-1, prepend=zero)

    def squared_error(self, levels: Tensor) -> Tensor:
        """Mass times squared distance to the nearest level.  levels: [C, ..., L] ascending.  Returns [C, ...]."""
        zeroth, first, second = self.cells(levels)
        return (second - levels * (2 * first - levels * zeroth)).sum(-1)


def _inverse(edges: Tensor, cumulative: Tensor, part: float) -> Tensor:
    wanted = part * cumulative[:, -1:]
    upper = torch.searchsorted(cumulative, wanted).clamp(1, cumulative.shape[1] - 1)
    below, above = cumulative.gather(1, upper - 1), cumulative.gather(1, upper)
    share = ((wanted - below) / torch.where(above > below, above - below, 1.0)).clamp(0.0, 1.0)
    start = edges.gather(1, upper - 1)
    return (start + share * (edges.gather(1, upper) - start))[:, 0]


def quantile_levels(values: Distribution, count: int) -> Tensor:
    """The medians of `count` cells of equal mass, ascending.  values: one line.  Returns float64 [count]."""
    return torch.cat([values.quantile((i + 0.5) / count) for i in range(count)])


def lloyd_max_levels(values: Distribution, count: int, *, rounds: int = 500, tolerance: float = 1e-6) -> Tensor:
    """The levels of least mean squared error: thresholds at midpoints, levels at conditional means.

    values: one line.  Returns float64 [count], ascending.  Starts from the companding density p**(1/3) (Panter and
    Dite 1951), as from equal spacing hundreds of rounds do not converge for 255 levels.  Source: Lloyd 1982, Max 1960.
    """
    levels = _companded(values, count)
    for _ in range(rounds):
        zeroth, first, _ = values.cells(levels[None])
        moved = torch.where(zeroth > 0, first / torch.where(zeroth > 0, zeroth, 1.0), levels)[0]
        # of a cell without mass the level stays, and its neighbours may pass it
        moved = moved.sort().values
        done = (moved - levels).abs().max() <= tolerance * levels.abs().max()
        levels = moved
        if done:
            break
    return levels


def _companded(values: Distribution, count: int) -> Tensor:
    bins = max(4 * count, 64)
    low, high = values.edges[0, 0], values.edges[0, -1]
    edges = low + (high - low) * (torch.arange(bins + 1, dtype=torch.float64, device="cpu") / bins)
    mass = values.moments(edges[None])[0].diff(dim=1).clamp(min=0.0).pow(1 / 3)
    return quantile_levels(Distribution(edges=edges[None], mass=mass), count)
