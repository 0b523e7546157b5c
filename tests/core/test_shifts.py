"""Octaves of channels: what they must not depend on, and how far they go."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from qcompile.channels import tied
from qcompile.formats import Float, parse_format
from qcompile.numerics import dequantize, exact_exp2, qparams_of_range, quantize
from qcompile.shifts import (
    floor_shift,
    folds_octaves,
    lowered_importance,
    lowers_columns,
    raised,
    raised_columns,
    room,
    shift_of,
    within,
)
from qcompile.solvers.imatrix import solve_imatrix
from qcompile.spec import parse_spec

AMAX = torch.tensor([8.0, 4.0, 3.9, 1.0, 0.01, 0.0])


def test_octaves_below_the_largest_channel() -> None:
    assert shift_of(AMAX, None, 14, 0.0).tolist() == [0, 1, 1, 3, 10, 0]
    assert shift_of(AMAX, None, 3, 0.0).tolist() == [0, 1, 1, 3, 3, 0]
    # the largest may be clipped by an octave
    assert shift_of(AMAX, None, 14, 1.0).tolist() == [0, 0, 0, 2, 9, 0]


@pytest.mark.parametrize("octaves", [-7, 5])
def test_the_unit_does_not_matter(octaves: int) -> None:
    amax = torch.rand(100) + 0.01
    assert torch.equal(shift_of(amax * 2.0**octaves, None, 14, 0.25), shift_of(amax, None, 14, 0.25))


def test_the_order_of_channels_does_not_matter() -> None:
    amax, order = torch.rand(100).square(), torch.randperm(100)
    assert torch.equal(shift_of(amax[order], None, 14, 0.5), shift_of(amax, None, 14, 0.5)[order])


def test_channels_of_one_row_share_the_least() -> None:
    channels = torch.tensor([0, 1, 0, 1, 2, 2])
    assert shift_of(AMAX, channels, 14, 0.0).tolist() == [0, 1, 0, 1, 10, 10]


def test_without_signal_nothing_is_raised() -> None:
    assert shift_of(torch.zeros(4), None, 14, 0.0).tolist() == [0, 0, 0, 0]


MAGNITUDE = st.just(0.0) | st.floats(min_value=2.0**-60, max_value=2.0**60, width=32)


@given(
    st.lists(MAGNITUDE, min_size=1, max_size=20),
    st.integers(1, 14),
    st.booleans(),
    st.sampled_from(["fp4_e2m1", "fp4_e1m2", "fp4_e3m0"]),
)
def test_whole_octaves_never_clip(magnitudes: list[float], most: int, share: bool, name: str) -> None:
    amax = torch.tensor(magnitudes)
    channels = torch.arange(len(amax)) // 2 if share else torch.arange(len(amax))
    shift = floor_shift(amax, channels if share else None, most)
    raised_amax = amax * exact_exp2(shift)
    assert bool((raised_amax <= amax.amax()).all())
    assert 0 <= int(shift.min()) <= int(shift.max()) <= most
    # nothing is left that could be raised by one more
    reach = tied(amax, channels)
    assert bool((reach * exact_exp2(shift + 1) > amax.amax())[(reach > 0) & (shift < most)].all())
    assert not shift[reach == 0].any()
    # the numbers of one grid over the unraised range lie as near as its widest step, also at the top
    grid = qparams_of_range(-amax.amax(), amax.amax(), parse_spec(f"{name}/tensor"))
    widest = (grid.scale * torch.tensor(grid.spec.format.magnitudes).diff().amax()).double()  # type: ignore[union-attr]
    errors = (dequantize(quantize(raised_amax, grid), grid) - raised_amax).double().abs()
    assert bool((errors <= widest / 2 * (1 + 1e-6)).all())


def test_the_nearest_octave_may_clip() -> None:
    amax = torch.tensor([1.0, 0.7, 0.5, 0.36])
    nearest, whole = shift_of(amax, None, 14, 0.0), floor_shift(amax, None, 14)
    assert (nearest.tolist(), whole.tolist()) == ([0, 1, 1, 1], [0, 0, 1, 1])
    # within the rounding of float32, from both sides
    just = torch.tensor([1.0]).nextafter(torch.tensor([0.0])) / 2
    assert floor_shift(torch.cat([torch.ones(1), 2 * just]), None, 14).tolist() == [0, 0]
    assert floor_shift(torch.cat([torch.ones(1), just]), None, 14).tolist() == [0, 1]


def weighted_error(weight: Tensor, text: str, importance: Tensor, octaves: Tensor) -> float:
    """Of the weight's numbers, chosen for columns raised by octaves and lowered after."""
    factor = octaves.float().exp2()
    qparams = solve_imatrix(weight * factor, parse_spec(text), importance / factor.square())
    found = dequantize(quantize(weight * factor, qparams), qparams) / factor
    return float(((found - weight).square() * importance).sum())


@pytest.mark.parametrize("text", ["fp4_e2m1/channel", "fp4_e1m2/channel", "fp4_e3m0/channel", "fp6_e3m2/g32"])
def test_columns_that_were_divided_are_raised_again(text: str) -> None:
    generator = torch.Generator().manual_seed(len(text))
    weight, none = torch.randn(77, 96, generator=generator), torch.zeros(96, dtype=torch.int64)
    importance = torch.rand(96, generator=generator) + 0.1
    divisor = torch.where(torch.rand(96, generator=generator) < 0.1, 41.0, 1.0)
    divided, cost = weight / divisor, importance * divisor.square()
    octaves = raised_columns(divided, parse_spec(text), cost)
    assert octaves[divisor > 1].float().mean() > octaves[divisor == 1].float().mean() + 3
    errors = [weighted_error(divided, text, cost, shift) for shift in (octaves, none)]
    whole = weighted_error(weight, text, importance, none)
    assert errors[0] < 1.15 * whole
    assert errors[1] - whole > 2 * (errors[0] - whole)


def test_columns_on_the_grid_stay() -> None:
    weight = torch.tensor([[6.0, 1.0, -0.5, 0.0], [3.0, 0.5, 1.5, 0.0]])
    assert raised_columns(weight, parse_spec("fp4_e2m1/channel")).tolist() == [0, 0, 0, 0]


def test_columns_are_lowered_only_where_something_holds_their_exponents() -> None:
    held = ("fp4_e2m1/channel", "fp4_e2m1/g32")
    others = ("fp4_e2m1/b32/e8m0", "fp4_e2m1/b16/fp8_e4m3", "fp4_e2m1/tensor")
    assert [lowers_columns(parse_spec(text)) for text in (*held, *others)] == [True, True, False, False, False]
    assert not lowers_columns(None)


def test_octaves_lie_within_what_can_be_held() -> None:
    octaves = torch.tensor([-2, 0, 3, 5])
    assert within(octaves, 14).tolist() == [0, 2, 5, 7]
    assert within(octaves, 4).tolist() == [0, 0, 3, 4]


def test_a_column_that_will_be_lowered_costs_less() -> None:
    importance = torch.tensor([3.0, 3.0, 8.0])
    assert lowered_importance(importance, (0, 1, 2)).tolist() == [3.0, 0.75, 0.5]
    assert lowered_importance(importance, ()) is importance
    assert lowered_importance(None, (1,)) is None


@pytest.mark.parametrize("name", ["fp4_e2m1", "fp4_e1m2", "fp4_e3m0", "fp6_e3m2", "fp6_e2m3", "e2m2", "e4m3", "e1m3"])
def test_e4m3_holds_all_numbers_up_to_the_room_and_not_beyond(name: str) -> None:
    fmt = parse_format(name)
    assert isinstance(fmt, Float)
    numbers = torch.tensor(fmt.magnitudes) * 2.0 ** raised(fmt)
    assert numbers.max() <= 448 < 2 * numbers.max()
    held = [torch.equal((n := numbers * 2.0**-octave).to(torch.float8_e4m3fn).float(), n) for octave in range(24)]
    assert held.index(False) == room(fmt) + 1
    for octave, fits in enumerate(held):
        assert folds_octaves(parse_spec(f"{name}/channel"), octave) == fits


@pytest.mark.parametrize("text", ["fp8_e3m4/channel", "int4/channel", "fp4_e2m1/b32/e8m0"])
def test_what_e4m3_does_not_hold_folds_nothing(text: str) -> None:
    assert not folds_octaves(parse_spec(text), 0)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.float64], ids=str)
def test_powers_of_two_are_exact(dtype: torch.dtype) -> None:
    octaves = range(-126, 128)
    assert exact_exp2(torch.tensor(octaves, dtype=dtype)).tolist() == [2.0**octave for octave in octaves]
    assert exact_exp2(torch.empty(0, 3, dtype=dtype)).shape == (0, 3)
