"""Stats of an activation: the same however the data is cut, and never silent about NaN."""

from dataclasses import fields

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from qcompile.errors import CalibrationError
from qcompile.histogram import Histogram
from qcompile.observers import BATCHES, THRESHOLD, Part, Stats, extended, merge, observe, range_of

ALL = Part.TENSOR | Part.CHANNELS
# each of R products is rounded to float32, and so are their partial sums
ROUNDING = 2**-20


@pytest.fixture
def x() -> Tensor:
    g = torch.Generator().manual_seed(0)
    return torch.randn(3, 7, 5, generator=g) * torch.tensor([1.0, 8.0, 0.01, 1e-9, 1.0]) + 0.5


def assert_same(a: Stats, b: Stats) -> None:
    """Integers and extremes equal, sums to rounding."""
    assert a.count == b.count
    for name in ("low", "high", "amax", "exceeding"):
        assert torch.equal(getattr(a, name), getattr(b, name)), name
    assert_close(a.squares, b.squares, rtol=ROUNDING, atol=0)
    assert_close(a.fourths, b.fourths, rtol=ROUNDING, atol=0)
    assert a.history.batches == b.history.batches
    assert torch.equal(a.history.low, b.history.low)
    assert torch.equal(a.history.high, b.history.high)
    for field in fields(a.sample):
        assert torch.equal(getattr(a.sample, field.name), getattr(b.sample, field.name))
    for name in ("tokens", "tensor", "channels"):
        left, right = getattr(a, name), getattr(b, name)
        assert isinstance(left, Histogram)
        assert torch.equal(left.counts, right.counts)
        assert torch.equal(left.top, right.top)


@pytest.mark.parametrize("loudest", [1.0, 50.0, 2.0**14])
@pytest.mark.parametrize("channels", [2, 40])
def test_rows_that_reach_the_threshold_are_counted_whatever_else_is_seen(channels: int, loudest: float) -> None:
    x = 5 * torch.randn(200, 40, generator=torch.Generator().manual_seed(channels))
    x[:, channels:] /= 100
    x[:9, 0], x[9, 1] = 6.0, -loudest
    expected = (x.abs() >= THRESHOLD).sum(0)
    for parts in (Part.NONE, Part.CHANNELS):
        assert torch.equal(observe(x, parts=parts).exceeding, expected)
    # the window of what was seen before may not reach down to the threshold
    loud = observe(x * 2.0**16, parts=Part.CHANNELS)
    assert torch.equal(observe(x, parts=Part.CHANNELS, beside=loud).exceeding, expected)


def test_stats_are_what_they_are_called(x: Tensor) -> None:
    stats = observe(x, batch=7, parts=ALL)
    rows = x.reshape(-1, 5)
    assert stats.count == 21
    assert torch.equal(stats.low, rows.amin(0))
    assert torch.equal(stats.high, rows.amax(0))
    assert torch.equal(stats.amax, rows.abs().amax(0))
    assert_close(stats.squares, rows.double().square().sum(0), rtol=ROUNDING, atol=0)
    assert_close(stats.fourths, rows.double().pow(4).sum(0), rtol=ROUNDING, atol=0)
    assert stats.exceeding.tolist() == (rows.abs() >= THRESHOLD).sum(0).tolist()
    assert int(stats.exceeding.sum()) > 0
    assert stats.tokens.total == 21
    assert stats.tensor is not None
    assert stats.tensor.total == 105
    assert stats.channels is not None
    assert stats.channels.counts.sum((1, 2)).tolist() == [21] * 5
    assert stats.history.batches == (7,)
    assert (float(stats.history.low), float(stats.history.high)) == (float(x.min()), float(x.max()))
    assert sorted(stats.sample.rows.tolist()) == sorted(rows.tolist())


def test_histograms_are_kept_if_asked_for(x: Tensor) -> None:
    assert [s is None for s in (observe(x).tensor, observe(x).channels)] == [False, True]
    bare = observe(x, parts=Part.NONE)
    assert [s is None for s in (bare.tensor, bare.channels)] == [True, True]
    with pytest.raises(CalibrationError, match="one parts"):
        merge(bare, observe(x))


@pytest.mark.parametrize("seed", range(4))
def test_any_cut_in_any_order_gives_the_stats_of_all_rows(seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(400, 6, generator=g) * torch.exp(2 * torch.randn(6, generator=g))
    x[:100] = x[100:200]
    # batches of other sizes, each in pieces
    batches = list(enumerate(x.split([3, 90, 7, 200, 100])))
    whole = [observe(rows, batch=i, parts=ALL) for i, rows in batches]
    pieces = [observe(part, batch=i, parts=ALL) for i, rows in batches for part in rows.split(17)]
    order = torch.randperm(len(pieces), generator=g).tolist()
    expected = merge(merge(merge(merge(whole[0], whole[1]), whole[2]), whole[3]), whole[4])
    found = pieces[order[0]]
    for i in order[1:]:
        found = merge(found, pieces[i])
    assert_same(found, expected)
    # each observed beside what it is merged with
    parts = [(i, part) for i, rows in batches for part in rows.split(17)]
    beside = None
    for i in order:
        batch, rows = parts[i]
        beside = extended(beside, rows, batch=batch, parts=ALL)
    assert_same(beside, expected)
    # some at a time
    beside = None
    for some in (order[:3], order[3:4], order[4:]):
        ranges = [range_of(rows, batch) for batch, rows in (parts[i] for i in some)]
        beside = extended(beside, torch.cat([parts[i][1] for i in some]), ranges=ranges, parts=ALL)
    assert_same(beside, expected)
    # two processes, then one
    halves = []
    for half in (order[::2], order[1::2]):
        part = pieces[half[0]]
        for i in half[1:]:
            part = merge(pieces[i], part)
        halves.append(part)
    assert_same(merge(*halves), expected)
    one = observe(x, parts=ALL)
    assert torch.equal(found.tensor.counts, one.tensor.counts)
    assert torch.equal(found.sample.rows, one.sample.rows)


def test_steps_change_nothing(x: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = observe(x, parts=ALL)
    monkeypatch.setattr("qcompile.observers.CHUNK", 12)
    assert_same(observe(x, parts=ALL), whole)


def test_memory_does_not_grow_with_the_data(x: Tensor) -> None:
    def size(stats: Stats) -> int:
        held = [stats.squares, stats.tensor.counts, stats.channels.counts, stats.tokens.counts, stats.sample.rows]
        return sum(t.numel() for t in held)

    stats = observe(x, parts=ALL)
    for batch in range(10):
        stats = merge(stats, observe(x, batch=batch, parts=ALL))
    assert size(stats) == size(observe(x, parts=ALL))


def test_only_recent_batches_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    assert BATCHES == 1024
    monkeypatch.setattr("qcompile.observers.BATCHES", 16)
    found = observe(torch.zeros(1, 1))
    for i in (*range(0, 50, 2), *range(1, 50, 2)):
        found = merge(observe(torch.full((1, 1), float(i)), batch=i), found)
    assert found.history.batches == tuple(range(34, 50))
    assert found.history.high.tolist() == [float(i) for i in range(34, 50)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_powers_of_narrow_floats_do_not_overflow(dtype: torch.dtype) -> None:
    stats = observe(torch.full((4, 2), 3e4, dtype=dtype), parts=ALL)
    value = float(torch.tensor(3e4, dtype=dtype))
    assert stats.squares.tolist() == [4 * value**2] * 2
    assert stats.fourths.tolist() == pytest.approx([4 * value**4] * 2, rel=ROUNDING)
    assert stats.is_finite


@pytest.mark.parametrize("value", [0.0, 1e-45, 1e-38, 1e-20, 1e20, 3e38])
def test_powers_of_extreme_floats_neither_overflow_nor_vanish(value: float) -> None:
    stats = observe(torch.full((3, 2), value))
    held = float(torch.tensor(value))
    assert_close(stats.squares, torch.full((2,), 3 * held**2, dtype=torch.float64), rtol=ROUNDING, atol=0)
    assert_close(stats.fourths, torch.full((2,), 3 * held**4, dtype=torch.float64), rtol=ROUNDING, atol=0)
    assert stats.is_finite


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_one_bad_value_shows_also_after_merging_and_is_in_no_histogram(x: Tensor, bad: float) -> None:
    poisoned = x.clone()
    poisoned[1, 2, 3] = bad
    good, ill = observe(x, parts=ALL), observe(poisoned, parts=ALL)
    assert good.is_finite
    assert not ill.is_finite
    assert not merge(good, ill).is_finite
    assert not merge(ill, good).is_finite
    assert ill.tensor is not None
    assert ill.tensor.total == x.numel() - 1
    assert ill.tokens.total == 20


@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (2, 0, 4)])
def test_nothing_to_observe_is_an_error(shape: tuple[int, ...]) -> None:
    with pytest.raises(CalibrationError, match="no rows"):
        observe(torch.empty(shape))


def test_other_channels_do_not_merge(x: Tensor) -> None:
    with pytest.raises(CalibrationError, match="of 5 and of 4 channels"):
        merge(observe(x), observe(x[..., :4]))


@pytest.mark.parametrize("shape", [(5,), (1, 1), (2, 3, 1), (1, 4097)])
def test_any_shape_has_stats(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    stats = observe(x, parts=ALL)
    assert stats.count == x.numel() // shape[-1]
    assert torch.equal(stats.high, x.reshape(-1, shape[-1]).amax(0))


def test_views_and_other_strides_have_the_stats_of_their_values(x: Tensor) -> None:
    rows = x.reshape(21, 5)
    buffer = torch.zeros(110)
    views = [rows.T.contiguous().T, buffer[1:106].view(21, 5).copy_(rows), rows.repeat_interleave(2, 1)[:, ::2]]
    for view in views:
        assert_same(observe(view, parts=ALL), observe(rows, parts=ALL))


def test_division_gives_the_stats_of_the_quotient(x: Tensor) -> None:
    scale = torch.tensor([0.1, 3.0, 1.0, 0.7, 8.0])
    found, direct = observe(x, parts=ALL).divided(scale), observe(x / scale, parts=ALL)
    assert torch.equal(found.low, direct.low)
    assert torch.equal(found.amax, direct.amax)
    # the quotient is rounded once
    assert_close(found.squares, direct.squares, rtol=2 * ROUNDING, atol=0)
    assert_close(found.fourths, direct.fourths, rtol=2 * ROUNDING, atol=0)
    assert sorted(found.sample.rows.tolist()) == sorted(direct.sample.rows.tolist())
    assert torch.equal(found.tokens.counts, direct.tokens.counts)
    assert found.tensor is None
    assert found.history.batches == ()
    assert found.channels is not None
    assert found.channels.total == 105


@pytest.mark.parametrize("parts", [Part.CHANNELS, Part.NONE])
def test_large_values_after_a_division_are_never_too_few(x: Tensor, parts: Part) -> None:
    for scale in (torch.full((5,), 0.1), torch.full((5,), 2.0), torch.tensor([0.05, 1.5, 1.0, 1e-10, 100.0])):
        found, direct = observe(x, parts=parts).divided(scale).exceeding, observe(x / scale).exceeding
        assert bool((found >= direct).all())
        assert bool((found[direct == 0] == 0).all()) or parts is Part.CHANNELS
        assert bool((found[observe(x / scale).amax < THRESHOLD] == 0).all())


def test_channels_held_out_count_as_zeros(x: Tensor) -> None:
    gone = torch.tensor([1, 4])
    found, direct = observe(x, parts=ALL).without(gone), observe(x.index_fill(2, gone, 0.0), parts=ALL)
    for name in ("low", "high", "squares", "fourths", "exceeding"):
        assert torch.equal(getattr(found, name), getattr(direct, name)), name
    assert torch.equal(found.tokens.counts, direct.tokens.counts)
    assert found.channels is not None
    assert direct.channels is not None
    assert torch.equal(found.channels.counts, direct.channels.counts)
    assert found.tensor is None
    assert found.is_finite


def test_derived_stats_of_two_processes_merge(x: Tensor) -> None:
    scale = torch.tensor([0.1, 3.0, 1.0, 0.7, 8.0])
    parts = [observe(part, batch=i, parts=Part.CHANNELS).divided(scale) for i, part in enumerate(x)]
    found = merge(merge(parts[0], parts[1]), parts[2])
    whole = observe(x, parts=Part.CHANNELS).divided(scale)
    assert found.channels is not None
    assert whole.channels is not None
    assert torch.equal(found.channels.counts, whole.channels.counts)
    assert torch.equal(found.sample.rows, whole.sample.rows)
    assert torch.equal(found.low, whole.low)


def test_importance_is_the_mean_square_of_each_channel_over_that_of_all() -> None:
    x = torch.randn(1000, 8) * torch.tensor([0.0, 1, 1, 1, 2, 2, 3, 100])
    stats = observe(x)
    squares = x.double().square().mean(0)
    assert_close(stats.importance.double(), (squares / squares.mean() * 1000 + 1) / 1001, rtol=1e-6, atol=0)
    # what was silent is worth as much as one row in a thousand, and the sum is that of channels alike
    assert float(stats.importance[0]) == pytest.approx(1 / 1001)
    assert float(stats.importance.sum()) == pytest.approx(8)


@pytest.mark.parametrize("size", [0.0, 1e-30, 1e30])
def test_importance_is_finite_for_all_sizes(size: float) -> None:
    stats = observe(torch.tensor([[1.0, 1.0, 2.0]]) * size)
    expected = [1.0, 1.0, 1.0] if size == 0 else [0.75, 0.75, 1.5]
    assert stats.importance.tolist() == pytest.approx(expected)
    assert observe(torch.tensor([[1.0, 1.0, 2.0]])).without(torch.tensor([2])).importance.tolist() == pytest.approx(
        [1.25, 1.25, 0.5]
    )
