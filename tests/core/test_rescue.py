"""What a rescue makes of a rule, and which rules cannot have one."""

import pytest

from qcompile.errors import RecipeError
from qcompile.methods import check_methods
from qcompile.recipe import FLOAT, Recipe, Rule
from qcompile.spec import Spec, parse_spec


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
