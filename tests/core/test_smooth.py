"""Smoothing scales: what they level, their bounds, and how strengths are written."""

import pytest
import torch
from torch import Tensor

from qcompile.errors import RecipeError
from qcompile.smooth import LARGEST, STRENGTHS, Smooth, awq_scale, parse_smooth, smooth_scale, strength_of


def maxima(k: int = 257, spread: float = 1.5) -> tuple[Tensor, Tensor]:
    """Log-normal maxima of an activation's and a weight's channels, within what no scale is clipped for."""
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(k, generator=generator) * spread).exp(), (torch.randn(k, generator=generator) * spread).exp()


def test_half_the_range_levels_both_sides() -> None:
    activation, weight = maxima()
    scale = smooth_scale(activation, weight, 0.5)
    # both sides round three times in float32
    torch.testing.assert_close(activation / scale, weight * scale, rtol=1e-6, atol=0.0)
    torch.testing.assert_close(activation / scale, (activation * weight).sqrt(), rtol=1e-6, atol=0.0)


def test_the_ends_level_one_side() -> None:
    activation, weight = maxima()
    ones = torch.ones_like(activation)
    torch.testing.assert_close(activation / smooth_scale(activation, weight, 1.0), ones, rtol=1e-6, atol=0.0)
    torch.testing.assert_close(weight * smooth_scale(activation, weight, 0.0), ones, rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("powers_of_two", [False, True])
@pytest.mark.parametrize("strength", [0.0, 0.3, 0.5, 0.85, 1.0])
def test_scales_are_positive_finite_and_within_bounds(strength: float, powers_of_two: bool) -> None:
    edges = torch.tensor([0.0, 1e-45, 1e-38, 1e-6, 1.0, 1e6, 3e38])
    activation, weight = (x.flatten() for x in torch.meshgrid(edges, edges, indexing="ij"))
    scale = smooth_scale(activation, weight, strength, powers_of_two=powers_of_two)
    assert scale.dtype is torch.float32
    assert bool(scale.isfinite().all())
    assert float(scale.min()) >= 1 / LARGEST
    assert float(scale.max()) <= LARGEST
    assert bool((scale[(activation == 0) | (weight == 0)] == 1).all())


def test_far_channels_are_clipped_to_the_bounds() -> None:
    scale = smooth_scale(torch.tensor([1e9, 1e-9]), torch.tensor([1e-9, 1e9]), 0.5)
    assert scale.tolist() == [2.0**10, 2.0**-10]


@pytest.mark.parametrize("strength", [0.0, 0.5, 0.7, 1.0])
def test_powers_of_two_are_the_nearest_ones(strength: float) -> None:
    activation, weight = maxima()
    free = smooth_scale(activation, weight, strength)
    whole = smooth_scale(activation, weight, strength, powers_of_two=True)
    assert bool((torch.frexp(whole).mantissa == 0.5).all())
    assert float((whole / free).log2().abs().max()) <= 0.5 + 1e-6


@pytest.mark.parametrize("power", [0.05, 0.5, 1.0])
def test_awq_keeps_the_ratios_of_a_power_around_one(power: float) -> None:
    magnitude, _ = maxima()
    scale = awq_scale(magnitude, power)
    # both round once in float32
    torch.testing.assert_close(scale / scale[0], (magnitude / magnitude[0]).pow(power), rtol=1e-5, atol=0.0)
    assert float(scale.max() * scale.min()) == pytest.approx(1.0, rel=1e-5)
    whole = awq_scale(magnitude, power, powers_of_two=True)
    assert float((whole / scale).log2().abs().max()) <= 0.5 + 1e-6
    assert bool((torch.frexp(whole).mantissa == 0.5).all())


def test_awq_moves_nothing_of_dead_channels_nor_by_the_power_of_zero() -> None:
    assert awq_scale(torch.tensor([0.0, 4.0, 1.0]), 0.5).tolist() == pytest.approx([1.0, 2.0**0.5, 0.5**0.5])
    assert awq_scale(torch.zeros(3), 0.5).tolist() == [1.0] * 3
    assert awq_scale(torch.tensor([1e-30, 1.0, 1e30]), 0.0).tolist() == [1.0] * 3
    assert awq_scale(torch.tensor([1e-30, 1.0, 1e30]), 1.0).tolist() == pytest.approx([1 / LARGEST, 1.0, LARGEST])


def test_no_channels_get_no_scales() -> None:
    assert smooth_scale(torch.ones(0), torch.ones(0), 0.5).shape == (0,)


@pytest.mark.parametrize(
    "text", ["0", "0.5", "0.85", "1", "search", "model", "awq", "0.5/pow2", "search/pow2", "awq/pow2"]
)
def test_what_is_parsed_is_written_back(text: str) -> None:
    smooth = parse_smooth(text)
    assert str(smooth) == text
    assert parse_smooth(str(smooth)) == smooth
    assert smooth.powers_of_two is text.endswith("/pow2")


def test_the_default_searches() -> None:
    assert Smooth() == parse_smooth("search")
    assert parse_smooth("0.5") == Smooth(strength=0.5)


@pytest.mark.parametrize("text", ["", "-0.1", "1.1", "nan", "inf", "high", "Search", "/pow2"])
def test_a_strength_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(RecipeError, match="a strength from 0 to 1, 'search', 'model' or 'awq'"):
        parse_smooth(text)


@pytest.mark.parametrize("text", ["0.5/", "0.5/pow3", "search/pow2/pow2"])
def test_what_follows_the_strength_is_refused(text: str) -> None:
    with pytest.raises(RecipeError, match="only '/pow2' can stand"):
        parse_smooth(text)


@pytest.mark.parametrize(
    ("model", "strength"),
    [
        ("meta-llama/Llama-2-70b-hf", 0.9),
        ("meta-llama/Llama-2-7b-chat-hf", 0.85),
        ("meta-llama/Llama-2-13b", 0.85),
        ("meta-llama/Llama-3-8B", 0.85),
        ("mistralai/Mistral-7B-v0.1", 0.8),
        ("mistralai/Mixtral-8x7B-v0.1", 0.8),
        ("tiiuae/falcon-7b", 0.6),
        ("tiiuae/falcon-40b", 0.7),
        ("THUDM/glm-130b", 0.75),
        ("facebook/opt-6.7b", 0.5),
        ("bigscience/bloom-176b", 0.5),
    ],
)
def test_strengths_are_those_that_the_authors_publish(model: str, strength: float) -> None:
    assert strength_of(model) == strength


def test_an_unknown_model_is_named_with_what_is_known() -> None:
    with pytest.raises(RecipeError, match=r"no strength for 'gpt2'.*\*falcon\*.*write smooth = 'search'"):
        strength_of("gpt2")
    assert all(0 < strength < 1 for strength in STRENGTHS.values())
