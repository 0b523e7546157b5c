"""Distributions: moments, quantiles and errors against sums over the values themselves."""

import math

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from qcompile.distribution import Distribution, lloyd_max_levels, quantile_levels


def uniform(low: float = -1.0, high: float = 3.0, bins: int = 8) -> Distribution:
    edges = torch.linspace(low, high, bins + 1, dtype=torch.float64)[None]
    return Distribution(edges=edges, mass=torch.full((1, bins), 1 / bins, dtype=torch.float64))


def normal(bins: int = 20000) -> Distribution:
    edges = torch.linspace(-8, 8, bins + 1, dtype=torch.float64)
    return Distribution(edges=edges[None], mass=torch.special.ndtr(edges).diff()[None])


def column(*values: float) -> Tensor:
    return torch.tensor([values], dtype=torch.float64)


def test_moments_are_integrals_of_what_is_below() -> None:
    t = column(-2.0, -1.0, 0.3, 3.0, 9.0)
    zeroth, first, second = uniform().moments(t)
    inside = t.clamp(-1, 3)
    assert_close(zeroth, (inside + 1) / 4)
    assert_close(first, (inside**2 - 1) / 8)
    assert_close(second, (inside**3 + 1) / 12)


@pytest.mark.parametrize("part", [0.0, 0.1, 0.5, 0.77, 1.0])
def test_quantiles_of_a_uniform_distribution(part: float) -> None:
    assert float(uniform().quantile(part)) == pytest.approx(4 * part - 1)
    # of |x|: [0, 1] has twice the density of [1, 3]
    expected = 2 * part if part <= 0.5 else 1 + 4 * (part - 0.5)
    assert float(uniform().magnitude_quantile(part)) == pytest.approx(expected)


def test_quantiles_skip_bins_without_mass() -> None:
    gap = Distribution(edges=column(0, 1, 2, 3, 4), mass=column(0, 1, 0, 1))
    assert [float(gap.quantile(p)) for p in (0.0, 0.25, 0.5, 0.75, 1.0)] == [0.0, 1.5, 2.0, 3.5, 4.0]


def test_magnitudes_fold_at_zero() -> None:
    found = uniform().magnitudes(6, torch.tensor([3.0], dtype=torch.float64))
    assert_close(found, column(*(1 / 4 for _ in range(2)), *(1 / 8 for _ in range(4))))


def test_the_squared_error_is_that_of_many_values() -> None:
    g = torch.Generator().manual_seed(0)
    edges = torch.randn(3, 12, generator=g, dtype=torch.float64).sort(1).values
    mass = torch.rand(3, 11, generator=g, dtype=torch.float64)
    levels = torch.randn(3, 4, 6, generator=g, dtype=torch.float64).sort(-1).values
    # 2000 equal parts of each bin, at their middles
    middles = (torch.arange(2000, dtype=torch.float64) + 0.5) / 2000
    points = (edges[:, :-1, None] + edges.diff()[:, :, None] * middles).flatten(1)
    share = (mass[:, :, None] / 2000).expand(-1, -1, 2000).flatten(1)
    distance = (points[:, None, :, None] - levels[:, :, None, :]).abs().amin(-1)
    expected = (distance.square() * share[:, None]).sum(-1)
    found = Distribution(edges=edges, mass=mass).squared_error(levels)
    # the middle rule, and the parts that a threshold divides
    assert_close(found, expected, rtol=1e-4, atol=0)


def test_values_that_are_all_equal_have_no_error_at_their_level() -> None:
    narrow = Distribution(edges=column(2.0, 2.0, 2.0 + 2**-40, 2.0 + 2**-40), mass=column(0, 5, 0))
    assert float(narrow.squared_error(column(-2, 0, 2)[:, None])) < 1e-20
    assert float(narrow.squared_error(column(-3, 0, 3)[:, None])) == pytest.approx(5)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_lloyd_max_levels_of_a_normal_distribution(bits: int) -> None:
    levels = lloyd_max_levels(normal(), 2**bits)
    error = float(normal().squared_error(levels[None, None]))
    # Max 1960, table I, for 4 and 16 levels; Panter and Dite 1951 for many: pi sqrt(3) / 2 / n**2
    expected = {2: 0.1175, 4: 0.009497, 8: math.pi * 3**0.5 / 2 / 256**2}[bits]
    # four digits are given; the high-resolution law holds to a few parts of n
    assert error == pytest.approx(expected, rel=0.02 if bits == 8 else 1e-3)
    assert_close(levels, -levels.flip(0), rtol=0, atol=2e-3)


def test_quantile_levels_hold_equal_parts() -> None:
    assert_close(quantile_levels(uniform(), 4), torch.tensor([-0.5, 0.5, 1.5, 2.5], dtype=torch.float64))


def test_more_levels_than_values_are_in_order() -> None:
    few = Distribution(edges=column(0, 1e-9, 1, 1 + 1e-9), mass=column(1, 0, 1))
    levels = lloyd_max_levels(few, 16)
    assert bool((levels.diff() >= 0).all())
    assert float(few.squared_error(levels[None, None])) < 1e-12
