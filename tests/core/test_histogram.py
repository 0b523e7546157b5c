"""Histograms: every value in the bin that its bits say, and merging that no order and no cut can change."""

import pytest
import torch
from torch import Tensor

from qcompile.histogram import (
    FINE,
    NEGATIVE,
    POSITIVE,
    TOKENS,
    Histogram,
    Resolution,
    channel_resolution,
    count,
    count_channels,
    merge_histograms,
)

COARSE = Resolution(mantissa=2, octaves=5)


def wide(rows: int = 37, k: int = 11, seed: int = 0, spread: float = 3.0) -> Tensor:
    """Values over many octaves, of both signs, with zeros of both signs; a channel of zeros, and one that is tiny."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, k, generator=g) * torch.exp(spread * torch.randn(rows, k, generator=g))
    x[torch.rand(rows, k, generator=g) < 0.1] = 0.0
    x[0, 0] = -0.0
    x[:, 1] = 0.0
    x[:, 2] *= 1e-30
    return x


def of_channels(x: Tensor, resolution: Resolution = COARSE) -> Histogram:
    return count_channels(x, resolution, amax=x.float().abs().amax(0))


def of_tensor(x: Tensor, resolution: Resolution = COARSE) -> Histogram:
    return count(x, resolution, amax=x.float().abs().amax())


def assert_equal(a: Histogram, b: Histogram) -> None:
    assert torch.equal(a.top, b.top)
    assert torch.equal(a.counts, b.counts)


@pytest.mark.parametrize("resolution", [COARSE, TOKENS, FINE])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_every_value_is_counted_between_its_edges(resolution: Resolution, dtype: torch.dtype) -> None:
    x = wide().clamp(-6e4, 6e4).to(dtype)
    for found, lines in (
        (of_channels(x, resolution), x.float().T),
        (of_tensor(x, resolution), x.float().reshape(1, -1)),
    ):
        assert found.total == x.numel()
        for line, edges, counts in zip(lines, found.edges, found.counts, strict=True):
            assert bool((edges.diff() > 0).all())
            for side, values in ((POSITIVE, line[~torch.signbit(line)]), (NEGATIVE, -line[torch.signbit(line)])):
                # bins hold their lower edge
                place = torch.bucketize(values.double(), edges, right=True) - 1
                assert torch.equal(counts[side].long(), torch.bincount(place, minlength=resolution.bins))


def test_edges_are_parts_of_octaves_below_the_largest_value() -> None:
    edges = of_tensor(torch.tensor([[5.0]])).edges[0]
    assert edges[-5:].tolist() == [4.0, 5.0, 6.0, 7.0, 8.0]
    # five octaves of four bins, and the one at zero
    assert edges[:3].tolist() == [0.0, 0.25, 0.3125]
    assert len(edges) == 22


@pytest.mark.parametrize("value", [0.0, 1e-45, 2.0**-127, 2.0**-126, 3.4e38])
def test_the_ends_of_float32_are_counted(value: float) -> None:
    found = of_tensor(torch.tensor([[value, -value]]), FINE)
    assert found.total == 2
    inside = (found.edges[0, :-1] <= value) & (value < found.edges[0, 1:])
    assert torch.equal(found.counts[0, POSITIVE].nonzero().flatten(), inside.nonzero().flatten())


def test_what_is_not_finite_is_not_counted() -> None:
    x = wide()
    bad = x.clone()
    bad[3, 4], bad[5, 4], bad[6, 0] = torch.nan, torch.inf, -torch.inf
    amax = torch.where(torch.isfinite(bad), bad, 0.0).abs()
    assert count(bad, FINE, amax=amax.amax(), finite=False).total == x.numel() - 3
    lines = count_channels(bad, COARSE, amax=amax.amax(0), finite=False)
    assert lines.counts.sum((1, 2)).tolist() == [36, 37, 37, 37, 35] + [37] * 6


@pytest.mark.parametrize("make", [of_channels, of_tensor])
@pytest.mark.parametrize("seed", range(5))
def test_any_cut_in_any_order_gives_the_histogram_of_the_whole(make: type, seed: int) -> None:
    x = wide(rows=64, seed=seed)
    g = torch.Generator().manual_seed(seed)
    cuts = [int(c) for c in torch.randint(1, 9, (40,), generator=g)]
    parts = [p for p in x[torch.randperm(64, generator=g)].split([*cuts[:8], 64 - sum(cuts[:8])]) if len(p)]
    found = [make(part) for part in parts]
    one_by_one = found[0]
    for part in found[1:]:
        one_by_one = merge_histograms(one_by_one, part)
    assert_equal(one_by_one, make(x))
    # as a tree, from the other end
    while len(found) > 1:
        found = [merge_histograms(found[-1], found[0]), *found[1:-1]]
    assert_equal(found[0], make(x))


def test_a_larger_value_folds_the_lowest_octaves_into_the_bin_at_zero() -> None:
    small = of_tensor(torch.tensor([[0.25, 0.3, 0.6, -0.26, 1.9]]))
    both = merge_histograms(small, of_tensor(torch.tensor([[16.0]])))
    # five octaves end at 1
    assert both.counts[0, POSITIVE, 0] == 3
    assert both.counts[0, NEGATIVE, 0] == 1
    assert both.total == 6
    far = merge_histograms(small, of_tensor(torch.tensor([[1e30]])))
    assert far.counts[0, :, 0].tolist() == [4, 1]


def test_counting_in_steps_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    x = wide(rows=50, k=23)
    whole = of_channels(x), of_tensor(x)
    for name, value in (("CHUNK", 64), ("COUNTERS", 100)):
        monkeypatch.setattr(f"qcompile.histogram.{name}", value)
        assert_equal(of_channels(x), whole[0])
        assert_equal(of_tensor(x), whole[1])


@pytest.mark.parametrize("power", [-20, -1, 1, 20])
def test_a_power_of_two_moves_the_window_and_no_count(power: int) -> None:
    x = wide()[:, [0, 3, 4, 5]]
    scaled, plain = of_channels(x * 2.0**power), of_channels(x)
    assert torch.equal(scaled.counts, plain.counts)
    assert torch.equal(scaled.top, plain.top + power)
    assert torch.equal(scaled.edges, plain.edges * 2.0**power)


def test_a_division_moves_the_edges_of_each_line() -> None:
    x = wide()
    found = of_channels(x)
    scale = torch.linspace(0.5, 3, 11)
    once = found.divided(scale)
    assert torch.equal(once.counts, found.counts)
    assert torch.equal(once.edges, found.edges / scale.double()[:, None])
    assert torch.equal(once.divided(scale).edges, found.edges / scale.square().double()[:, None])


def test_lines_held_out_are_zeros() -> None:
    x = wide()
    gone = torch.tensor([3, 7])
    bare = x.index_fill(1, gone, 0.0)
    # a window may stay where it was
    assert torch.equal(of_channels(x).without(gone).counts, of_channels(bare).counts)


def test_values_that_may_reach_a_threshold_are_never_too_few() -> None:
    x = wide(rows=200, spread=1.0)
    found = of_channels(x, channel_resolution(11))
    exact, upper = (x.abs() >= 1.7).sum(0), (x.abs() >= 1.7 / (1 + 2**-4)).sum(0)
    assert bool((found.reaching(1.7) >= exact).all())
    assert bool((found.reaching(1.7) <= upper).all())


def test_where_a_bin_begins_at_a_threshold_the_count_is_exact() -> None:
    x = 6 * torch.randn(300, 11, generator=torch.Generator().manual_seed(5))
    x[:7] = 6.0
    x[7:9] = -6.0
    found = of_channels(x, channel_resolution(11))
    assert found.begins_at(6.0)
    assert torch.equal(found.reaching(6.0), (x.abs() >= 6.0).sum(0))
    # between two edges, below a window of 12 octaves, and under a divisor
    assert not found.begins_at(6.1)
    assert not found.begins_at(2.0**-20)
    assert found.reaching(2.0**-20).tolist() == [300] * 11
    assert not found.divided(torch.full((11,), 2.0)).begins_at(6.0)
    assert torch.equal(found.divided(torch.full((11,), 2.0)).reaching(3.0), found.reaching(6.0))


def test_lines_together_are_the_tensor() -> None:
    x = wide(rows=500, seed=3, spread=1.0)[:, 3:]
    low, high = x.amin(), x.amax()
    lines, tensor = of_channels(x, channel_resolution(8)).together(low, high), of_tensor(x, FINE).together(low, high)
    for part in (0.001, 0.1, 0.3, 0.7, 0.9, 0.999):
        # bins of a sixteenth of an octave, spread evenly
        assert float(lines.quantile(part)) == pytest.approx(float(tensor.quantile(part)), rel=1 / 16, abs=1e-3)
    scale = torch.linspace(0.5, 3, 8)
    divided = of_channels(x, channel_resolution(8)).divided(scale).together((x / scale).amin(), (x / scale).amax())
    direct = of_tensor(x / scale, FINE).together((x / scale).amin(), (x / scale).amax())
    assert float(divided.mass.sum()) == pytest.approx(x.numel())
    for part in (0.001, 0.1, 0.9, 0.999):
        assert float(divided.quantile(part)) == pytest.approx(float(direct.quantile(part)), rel=1 / 16, abs=1e-3)


def test_memory_of_wide_activations_is_bounded() -> None:
    # counters of channels, 4 bytes each
    sizes = {k: 2 * k * channel_resolution(k).bins for k in (1, 512, 2048, 2049, 4096, 14336, 28672)}
    assert sizes[2048] == 2 * 2048 * 193
    assert all(size <= 4 * sizes[2048] for size in sizes.values())
