import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qcompile.codebooks import MAX_SAMPLES, learned_levels, lloyd_max_levels, quantile_levels
from qcompile.errors import SpecError
from qcompile.formats import CodeBook, parse_format
from qcompile.numerics import encode, snr_db


def normal_quantiles(count: int) -> torch.Tensor:
    """Samples of N(0, 1), one for each of `count` equally likely cells, ascending."""
    return torch.special.ndtri((torch.arange(count, dtype=torch.float64) + 0.5) / count).float()


def book(name: str) -> CodeBook:
    fmt = parse_format(name)
    assert isinstance(fmt, CodeBook)
    return fmt


def test_quantile_levels_are_the_medians_of_equal_cells():
    assert quantile_levels(torch.arange(16.0), 4).tolist() == [2, 6, 10, 14]
    levels = quantile_levels(normal_quantiles(100_001), 16)
    expected = torch.special.ndtri((torch.arange(16, dtype=torch.float64) + 0.5) / 16).float()
    torch.testing.assert_close(levels, expected, atol=1e-3, rtol=0)


def test_quantile_codes_are_used_about_equally_often():
    x = normal_quantiles(100_000)
    counts = encode(x, book("quantile4"), quantile_levels(x, 16)).long().bincount(minlength=16)
    # the outermost thresholds are midpoints, not quantiles
    assert counts.min() > 0.7 * x.numel() / 16
    assert counts.max() < 1.3 * x.numel() / 16


# Max 1960, table 1: the least mean squared errors of N(0, 1)
@pytest.mark.parametrize(("count", "error"), [(2, 0.3634), (4, 0.1175), (8, 0.03454), (16, 0.009497)])
def test_lloyd_max_reaches_the_published_errors(count, error):
    x = normal_quantiles(200_000)
    levels = lloyd_max_levels(x, count)
    assert (levels.diff() > 0).all()
    nearest = (x[:, None] - levels).abs().amin(1)
    assert float(nearest.double().square().mean()) == pytest.approx(error, rel=5e-3)


def test_lloyd_max_of_many_levels_follows_panter_and_dite():
    # RMSE 1.6495 / n of N(0, 1) for many levels: 7.28 bits at 256
    x = normal_quantiles(400_000)
    levels = lloyd_max_levels(x, 256)
    rounded = levels[encode(x, book("lloyd8"), levels).long()]
    assert snr_db(x, rounded) / 6.0206 == pytest.approx(7.28, abs=0.03)


def test_lloyd_max_is_a_fixed_point_of_its_two_conditions():
    x = normal_quantiles(20_000)
    levels = lloyd_max_levels(x, 8, tolerance=1e-7, rounds=1000)
    cell = torch.bucketize(x, (levels[1:] + levels[:-1]) / 2)
    means = torch.stack([x[cell == i].double().mean() for i in range(8)])
    torch.testing.assert_close(levels.double(), means, atol=1e-4, rtol=0)


@given(st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=40), st.sampled_from(["lloyd3", "quantile3"]))
def test_levels_ascend_and_stay_within_the_data(values, name):
    x = torch.tensor(values)
    levels = learned_levels(book(name), x)
    assert levels.shape == (8,)
    assert levels.dtype == torch.float32
    assert (levels.diff() >= 0).all()
    slack = 1e-6 * x.abs().max()
    assert levels.min() >= x.min() - slack
    assert levels.max() <= x.max() + slack


def test_a_constant_tensor_keeps_its_value():
    x = torch.full((100,), 0.3)
    for name in ("lloyd4", "quantile4"):
        levels = learned_levels(book(name), x)
        rounded = levels[encode(x, book(name), levels).long()]
        torch.testing.assert_close(rounded, x)


def test_long_tensors_are_sampled():
    x = torch.arange(MAX_SAMPLES + 1, dtype=torch.float32)
    torch.testing.assert_close(learned_levels(book("quantile2"), x), quantile_levels(x, 4), rtol=1e-5, atol=2)


def test_meta_tensors_give_the_shape():
    levels = learned_levels(book("lloyd4"), torch.empty(8, 8, device="meta"))
    assert (levels.shape, levels.dtype, levels.is_meta) == ((16,), torch.float32, True)


def test_a_fixed_code_book_cannot_be_learned():
    with pytest.raises(SpecError, match="nf4 has fixed levels; learned code books start with quantile, lloyd"):
        learned_levels(book("nf4"), torch.ones(4))


def test_an_empty_tensor_teaches_nothing():
    with pytest.raises(SpecError, match=r"cannot learn the levels of lloyd4 from an empty tensor of shape \[0, 4\]"):
        learned_levels(book("lloyd4"), torch.empty(0, 4))
