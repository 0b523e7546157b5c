"""Stats of an activation: the same however the data is cut, and never silent about NaN."""

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from qcompile.numerics import find_qparams
from qcompile.observers import OBSERVERS, Stats, merge, observe
from qcompile.spec import parse_spec


@pytest.fixture
def x() -> Tensor:
    return torch.randn(3, 7, 5, generator=torch.Generator().manual_seed(0)) + 0.5


def test_stats_are_what_they_are_called(x: Tensor) -> None:
    stats = observe(x)
    rows = x.reshape(-1, 5).double()
    assert stats.count == 21
    assert float(stats.low) == float(x.min())
    assert float(stats.high) == float(x.max())
    assert torch.equal(stats.amax, x.abs().amax((0, 1)))
    # each of 21 squares and their float64 sum are rounded to float32 at most once
    assert_close(stats.squares, rows.square().sum(0), rtol=2**-23, atol=0)
    assert stats.squares.dtype is torch.float64


def test_batches_merge_to_the_stats_of_all_rows(x: Tensor) -> None:
    whole = observe(x)
    merged = merge(merge(observe(x[0]), observe(x[1])), observe(x[2]))
    for name in ("count", "low", "high", "amax"):
        assert torch.equal(torch.as_tensor(getattr(merged, name)), torch.as_tensor(getattr(whole, name)))
    # float64 additions in another order
    assert_close(merged.squares, whole.squares, rtol=1e-15, atol=0)


def test_memory_does_not_grow_with_the_data(x: Tensor) -> None:
    stats = observe(x)
    for _ in range(10):
        stats = merge(stats, observe(x))
    assert [t.numel() for t in (stats.low, stats.high, stats.amax, stats.squares)] == [1, 1, 5, 5]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_squares_of_narrow_floats_do_not_overflow(dtype: torch.dtype) -> None:
    stats = observe(torch.full((4, 2), 3e4, dtype=dtype))
    value = float(torch.tensor(3e4, dtype=dtype))
    assert stats.squares.tolist() == [4 * value**2] * 2
    assert stats.is_finite


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_one_bad_value_shows_also_after_merging(x: Tensor, bad: float) -> None:
    poisoned = x.clone()
    poisoned[1, 2, 3] = bad
    assert observe(x).is_finite
    assert not observe(poisoned).is_finite
    assert not merge(observe(x), observe(poisoned)).is_finite
    assert not merge(observe(poisoned), observe(x)).is_finite


@pytest.mark.parametrize("name", OBSERVERS)
@pytest.mark.parametrize("spec", ["int8/tensor", "int8/tensor/asym", "int4/tensor", "fp8_e4m3/tensor"])
def test_absmax_finds_what_the_whole_data_gives(x: Tensor, name: str, spec: str) -> None:
    found = OBSERVERS[name](observe(x), parse_spec(spec))
    expected = find_qparams(x, parse_spec(spec))
    assert torch.equal(found.scale, expected.scale)
    assert (found.zero is None) == (expected.zero is None)
    assert found.zero is None or torch.equal(found.zero, expected.zero)


def test_an_input_that_was_always_zero_gets_scale_one() -> None:
    stats: Stats = observe(torch.zeros(3, 4))
    assert float(OBSERVERS["absmax"](stats, parse_spec("int8/tensor")).scale) == 1.0
