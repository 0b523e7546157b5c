"""What a rescue makes of a rule, which rules cannot have one, and where it is taken."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from qcompile.choose import RESCUE_DB, RESCUE_GAIN, choose
from qcompile.errors import RecipeError
from qcompile.methods import check_methods
from qcompile.recipe import FLOAT, Recipe, Rule
from qcompile.smooth import Smooth
from qcompile.spec import Spec, parse_spec
from tests.core.test_choose import INT8, STATIC, TOKEN, K, case, rows

FLOATS = parse_spec("fp8_e4m3/tensor")


def spec(text: str | None) -> Spec | None:
    return None if text is None else parse_spec(text)


def rule(weight: str | None, given: str | None, rescue: str, **more: object) -> Rule:
    return Rule(weight=spec(weight), input=spec(given), rescue=parse_spec(rescue), **more)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("weight", "given", "rescue", "becomes"),
    [
        ("int8/channel", "int8/tensor/asym", "int8/token/asym", "int8/channel"),
        ("int8/g32/asym/bf16", "int8/tensor/asym", "fp8_e5m2/token", "fp8_e5m2/g32/bf16"),
        ("fp8_e4m3/channel", "fp8_e4m3/tensor", "int8/token/asym", "int8/channel"),
        # of the rescue's format before
        ("fp8_e4m3/channel", "int8/tensor", "fp8_e4m3/tensor", "fp8_e4m3/channel"),
        # a code book is multiplied as floats are, by whatever there is
        ("int8/channel", "int8/tensor", "lloyd8/tensor", "int8/channel"),
        (None, "int8/tensor", "fp8_e4m3/tensor", "None"),
    ],
)
def test_a_weight_follows_the_rescue_from_one_kind_to_the_other(
    weight: str | None, given: str, rescue: str, becomes: str
) -> None:
    made = rule(weight, given, rescue)
    check_methods(Recipe(name="mine", rules=(made,)))
    rescued = made.rescued
    assert rescued is not None
    assert (str(rescued.weight), str(rescued.input), rescued.rescue) == (becomes, rescue, None)


@pytest.mark.parametrize("given", [None, "int8/token"])
def test_nothing_is_rescued_without_a_static_input(given: str | None) -> None:
    assert rule("int8/channel", given, "int8/token/asym").rescued is None
    assert Rule(weight=spec("int8/channel"), input=spec("int8/tensor")).rescued is None


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (rule("int8/channel", "int8/token", "fp8_e4m3/tensor"), "no calibrated scale that could be poor"),
        (rule("int8/channel", None, "int8/token"), "input None has no calibrated scale"),
        (rule("int8/channel", "int8/tensor", "fp8_e4m3/b32x32"), "take groups along K: fp8_e4m3/g32"),
        (rule("int4/g128", "int8/tensor", "fp8_e4m3/tensor"), "int4/g128 would follow it .* 4 bits: take int8/token"),
        (rule("int8/channel", "int8/tensor", "fp6_e2m3/token"), "into fp6_e2m3, of other than their 8 bits"),
        (rule("int8/g32/fp16", "int8/tensor", "fp8_e4m3/tensor", solver="kquant"), "'kquant' makes no floats"),
        (rule("fp8_e4m3/channel", "fp8_e4m3/tensor", "int8/token", shift=2), "shift is for floats"),
        (rule("fp8_e4m3/channel", "fp8_e4m3/tensor", "fp8_e4m3/token", format=FLOAT), "chooses the inputs itself"),
    ],
)
def test_a_rescue_that_cannot_be_is_refused_with_what_can(wrong: Rule, words: str) -> None:
    with pytest.raises(RecipeError, match=rf"rule 1 .* rescues inputs by the spec \S+, but .*{words}"):
        check_methods(Recipe(name="mine", rules=(wrong,)))


def test_a_poor_static_input_is_rescued() -> None:
    # tokens of very different size: one scale for all leaves little of the small ones, which are most
    x = rows(1.0)
    x[:4] *= 100
    rule = Rule(weight=INT8, input=STATIC)
    static, rescued = choose(case(x[4:], rule)), choose(case(x, replace(rule, rescue=TOKEN)))
    assert static.input == STATIC
    assert rescued.input == TOKEN
    poor = choose(case(x, rule))
    assert poor.snr_db < RESCUE_DB
    assert rescued.snr_db > poor.snr_db + RESCUE_GAIN


def test_a_good_static_input_stays() -> None:
    choice = choose(case(rows(1.0), Rule(weight=INT8, input=STATIC, rescue=TOKEN)))
    assert choice.snr_db >= RESCUE_DB
    assert choice.input == STATIC


def tailed(count: int = 400, seed: int = 0) -> Tensor:
    """Rows whose magnitudes span decades within each token, so that no scale of integers serves all of them."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, K, generator=generator) * (2 * torch.randn(count, K, generator=generator)).exp()


@pytest.mark.parametrize("more", [{}, {"smooth": Smooth(), "split": 0.02}], ids=["alone", "smoothed and split"])
@pytest.mark.parametrize("rescue", ["fp8_e4m3/tensor", "fp8_e4m3/token"])
def test_where_integers_stay_poor_floats_multiply_floats(rescue: str, more: dict[str, Any]) -> None:
    rule = Rule(weight=INT8, input=STATIC, rescue=parse_spec(rescue), **more)
    poor, rescued = (choose(case(tailed(), replace(rule, rescue=spec))) for spec in (None, rule.rescue))
    assert (poor.input, poor.weight) == (STATIC, None)
    assert poor.snr_db < RESCUE_DB
    assert (str(rescued.input), str(rescued.weight)) == (rescue, "fp8_e4m3/channel")
    assert rescued.snr_db > poor.snr_db + RESCUE_GAIN
    # what the weight loses as floats counts: it is as if the rule had named both
    floats = replace(rule, weight=parse_spec("fp8_e4m3/channel"), input=rule.rescue, rescue=None)
    assert rescued.snr_db == choose(case(tailed(), floats)).snr_db


def test_integers_that_serve_stay_integers_on_both_sides() -> None:
    choice = choose(case(rows(1.0), Rule(weight=INT8, input=STATIC, rescue=FLOATS)))
    assert choice.snr_db >= RESCUE_DB
    assert (choice.input, choice.weight) == (STATIC, None)


def test_floats_that_gain_little_are_not_taken() -> None:
    # poor as integers, and four bits of precision are no better
    rule = Rule(weight=INT8, input=STATIC)
    poor, floats = choose(case(rows(6.0), rule)), Rule(weight=parse_spec("fp8_e4m3/channel"), input=FLOATS)
    assert poor.snr_db < RESCUE_DB
    assert choose(case(rows(6.0), floats)).snr_db < poor.snr_db + RESCUE_GAIN
    choice = choose(case(rows(6.0), replace(rule, rescue=FLOATS)))
    assert (choice.input, choice.weight, choice.snr_db) == (STATIC, None, poor.snr_db)
