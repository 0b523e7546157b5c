"""`format = "auto"`: each site gets the format of least error, of its weight or, with data, of its outputs.

And `format = "float"` of what is no linear: the float of least error, by its own.
"""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from qcompile.auto import RIVALS
from qcompile.choose import rivals
from qcompile.errors import CalibrationError, RecipeError, WeightError
from qcompile.formats import FORMATS
from qcompile.graph import Op
from qcompile.methods import check_methods
from qcompile.numerics import dequantize, find_qparams, quantize, snr_db
from qcompile.observers import Part, Stats, observe
from qcompile.plan import Decision, Preparation, make_plan
from qcompile.recipe import AUTO, FLOAT, Recipe, Rule, recipe_from_table, recipe_to_table
from qcompile.sites import Site
from qcompile.smooth import Smooth
from qcompile.solvers import SOLVERS
from qcompile.spec import Spec, parse_spec


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rule(weight: str, given: str | None = None, **more: object) -> Rule:
    spec = None if given is None else parse_spec(given)
    return Rule(weight=parse_spec(weight), input=spec, **{"format": AUTO, **more})  # type: ignore[arg-type]


def decided(weight: Tensor, chosen: Rule, stats: Stats | None = None, op: Op = Op.LINEAR) -> Decision:
    recipe = Recipe(name="mine", rules=(replace(chosen, ops=(op,)),))
    plan = make_plan([Site(name="fc", op=op, weight=weight)], recipe, {} if stats is None else {"fc": stats})
    return plan.decisions["fc"]


def weight_db(weight: Tensor, spec: Spec, solver: str) -> float:
    qparams = SOLVERS[solver](weight, spec)
    return snr_db(weight, dequantize(quantize(weight, qparams), qparams))


WEIGHTS = {
    "normal": normal(64, 256),
    "flat": torch.rand(64, 256, generator=torch.Generator().manual_seed(0)) - 0.5,
    "heavy": normal(64, 256) * normal(64, 256, seed=1).exp(),
    "powers": torch.exp2(normal(64, 256).mul(2).round()) * normal(64, 256, seed=1).sign(),
}


def test_rivals_of_integers_of_a_row_have_scales_of_their_own() -> None:
    found = {str(decided(weight, rule("int4/g32/asym/u4row")).weight) for weight in WEIGHTS.values()}
    assert len(found) > 1
    assert found <= {"int4/g32/asym/u4row", "fp4_e2m1/g32/bf16", "nf4/g32/bf16"}


@pytest.mark.parametrize(
    "text", ["int4/g64", "int4/channel", "nf4/g32", "fp6_e2m3/b32/e8m0", "int8/tensor", "int4/b16x64"]
)
@pytest.mark.parametrize("solver", ["round", "mse"])
@pytest.mark.parametrize("name", WEIGHTS)
def test_a_weight_gets_the_format_of_least_error(name: str, solver: str, text: str) -> None:
    spec = parse_spec(text)
    found = decided(WEIGHTS[name], rule(text, solver=solver))
    errors = {f: weight_db(WEIGHTS[name], replace(spec, format=FORMATS[f]), solver) for f in RIVALS[spec.format.bits]}
    assert found.weight is not None
    assert errors[found.weight.format.name] == max(errors.values())
    assert replace(found.weight, format=spec.format) == spec
    assert (found.solver, found.reason) == (solver, "")


def test_weights_that_differ_get_different_formats() -> None:
    found = {name: decided(weight, rule("int4/channel", solver="mse")).weight for name, weight in WEIGHTS.items()}
    assert {name: str(spec) for name, spec in found.items()} == {
        "normal": "nf4/channel",
        "flat": "int4/channel",
        "heavy": "nf4/channel",
        "powers": "fp4_e2m1/channel",
    }


def test_a_zero_point_counts_and_stays_with_integers() -> None:
    lopsided = normal(64, 256).abs()
    assert str(decided(lopsided, rule("int4/g64/asym")).weight) == "int4/g64/asym"
    assert str(decided(WEIGHTS["powers"], rule("int4/channel/asym/bf16")).weight) in (
        "fp4_e2m1/channel/bf16",
        "nf4/channel/bf16",
    )


@pytest.mark.parametrize("given", ["int8/tensor", "int8/tensor/asym", "int8/token"])
def test_with_data_loud_channels_get_floats_and_others_integers(given: str) -> None:
    quiet = normal(300, 256)
    loud = quiet.clone()
    loud[:, [3, 77]] *= 200
    # they hardly matter to what is made of them
    weight = normal(64, 256, seed=1)
    weight[:, [3, 77]] /= 200
    found = {}
    for name, x in (("quiet", quiet), ("loud", loud)):
        decision = decided(weight, rule("int8/channel", given), observe(x, parts=Part.TENSOR))
        assert decision.input is not None
        found[name] = (str(decision.weight), str(decision.input))
        if given == "int8/token":
            assert decision.input_qparams is None
        else:
            assert decision.input_qparams is not None
            assert decision.input_qparams.spec == decision.input
    assert found["quiet"] == ("int8/channel", given)
    assert found["loud"] == ("fp8_e4m3/channel", given.removesuffix("/asym").replace("int8", "fp8_e4m3"))


def test_with_data_the_chosen_format_gives_the_outputs_the_least_error() -> None:
    for seed, spread in enumerate((0.0, 0.6, 1.2, 2.0)):
        x = normal(300, 128, seed=seed) * (spread * normal(128, seed=9 + seed)).exp()
        weight = normal(32, 128, seed=20 + seed)
        errors = {}
        for name in ("int4", "fp4_e2m1"):
            pair = [find_qparams(t, parse_spec(f"{name}/{g}")) for t, g in ((x, "token"), (weight, "channel"))]
            xq, wq = (dequantize(quantize(t, q), q) for t, q in zip((x, weight), pair, strict=True))
            errors[name] = snr_db(x @ weight.T, xq @ wq.T)
        decision = decided(weight, rule("int4/channel", "int4/token"), observe(x, parts=Part.NONE))
        assert decision.weight is not None
        # calibration kept 256 of the rows
        assert errors[decision.weight.format.name] >= max(errors.values()) - 0.2


def test_without_data_the_weight_decides_for_both() -> None:
    decision = decided(WEIGHTS["normal"], rule("fp8_e4m3/channel", "fp8_e4m3/token"))
    assert (str(decision.weight), str(decision.input)) == ("int8/channel", "int8/token")


def test_an_embedding_is_chosen_by_its_weight() -> None:
    decision = decided(WEIGHTS["flat"], rule("nf4/g32", None), op=Op.EMBEDDING)
    assert (str(decision.weight), decision.input) == ("int4/g32", None)


@pytest.mark.parametrize("solver", ["round", "mse"])
@pytest.mark.parametrize(
    ("first", "flat", "heavy"),
    [
        ("fp4_e2m1/channel", "fp4_e1m2/channel", "fp4_e3m0/channel"),
        ("fp6_e2m3/tensor", "e1m4/tensor", "fp6_e3m2/tensor"),
        ("fp6_e3m2/channel", "e1m4/channel", "fp6_e3m2/channel"),
        ("fp8_e4m3/channel", "e1m6/channel", "fp8_e3m4/channel"),
        ("e2m0/channel", "e1m1/channel", "e2m0/channel"),
        ("e2m2/tensor", "e1m3/tensor", "e3m1/tensor"),
        ("e3m3/channel", "e1m5/channel", "e3m3/channel"),
    ],
)
def test_tables_take_the_float_that_fits_their_rows(first: str, flat: str, heavy: str, solver: str) -> None:
    tables = {flat: WEIGHTS["flat"], heavy: normal(64, 256) * normal(64, 256, seed=1).mul(2).exp()}
    for best, table in tables.items():
        decision = decided(table, rule(first, solver=solver, format=FLOAT), op=Op.EMBEDDING)
        assert (str(decision.weight), decision.input, decision.solver) == (best, None, solver)
        errors = {spec: weight_db(table, spec, solver) for spec in rivals(parse_spec(first))}
        assert errors[parse_spec(best)] == max(errors.values())


def test_a_convolution_takes_floats_for_weight_and_input_each_for_itself() -> None:
    loud = normal(300, 24) * normal(300, 24, seed=1).mul(2).exp()
    for x, given in ((torch.rand(300, 24, generator=torch.Generator().manual_seed(0)) - 0.5, "e1m2"), (loud, "e3m0")):
        chosen = rule("fp4_e2m1/channel", "fp4_e2m1/tensor", format=FLOAT)
        decision = decided(WEIGHTS["flat"][:, :24], chosen, observe(x, parts=Part.TENSOR), op=Op.CONV)
        assert (str(decision.weight), str(decision.input)) == ("fp4_e1m2/channel", f"fp4_{given}/tensor")
        assert decision.input_qparams is not None
        assert decision.input_qparams.spec == decision.input


def test_one_rule_may_leave_the_floats_of_tables_and_linears_open() -> None:
    ops = (Op.EMBEDDING, Op.LINEAR)
    recipe = Recipe(name="mine", rules=(replace(rule("fp4_e2m1/channel", format=FLOAT), ops=ops),))
    assert recipe.prepares
    assert recipe.chooses
    sites = [Site(name=op.value, op=op, weight=WEIGHTS["flat"]) for op in ops]
    decisions = make_plan(sites, recipe, prepared=Preparation()).decisions
    # a linear's is found with its shift, before the plan
    assert [str(decisions[op.value].weight) for op in ops] == ["fp4_e1m2/channel", "fp4_e2m1/channel"]


def test_of_equals_the_rule_has_its_way() -> None:
    zeros = torch.zeros(8, 64)
    for text in ("fp8_e4m3/channel", "int8/channel", "nf4/g32"):
        assert str(decided(zeros, rule(text)).weight) == text
    decision = decided(zeros, rule("fp8_e4m3/channel", "fp8_e4m3/token"), observe(normal(5, 64)))
    assert str(decision.input) == "fp8_e4m3/token"


def test_columns_are_weighed_where_the_solver_weighs_them() -> None:
    x = normal(300, 256)
    x[:, :8] *= 50
    weight = WEIGHTS["normal"].clone()
    weight[:, 8:] *= normal(64, 248, seed=3).exp()
    decision = decided(weight, rule("int4/channel", solver="imatrix"), observe(x))
    assert decision.importance is not None
    assert decision.weight is not None
    with pytest.raises(CalibrationError, match="looks at data"):
        decided(weight, rule("int4/channel", solver="imatrix"))


def test_a_weight_without_values_is_refused() -> None:
    for text, more in (("int8/channel", {}), ("fp4_e2m1/channel", {"format": FLOAT})):
        with pytest.raises(WeightError, match="'fc' is found from its values"):
            decided(torch.empty(8, 64, device="meta"), rule(text, None, **more), op=Op.EMBEDDING)


def test_the_table_of_a_recipe_keeps_it() -> None:
    table = {"name": "mine", "rules": [{"weight": "int4/g64", "format": "auto"}, {"weight": "int8/channel"}]}
    recipe = recipe_from_table(table)
    assert [r.format for r in recipe.rules] == ["auto", None]
    assert recipe_from_table(recipe_to_table(recipe)) == recipe
    assert "format" not in recipe_to_table(recipe)["rules"][1]
    with pytest.raises(RecipeError, match="key 'format': takes 'auto'"):
        recipe_from_table({"rules": [{"weight": "int4/g64", "format": "int4"}]})


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (Rule(format="auto"), "no spec of weights"),
        (rule("int5/channel"), "no choice among formats of 5 bits: take 4, 6, 8"),
        (rule("int4/g64", "int8/token"), "weights have 4 bits and inputs 8"),
        (rule("int8/channel", "int8/token", smooth=Smooth()), "are chosen for one format"),
        (rule("int8/channel", "int8/token", split=0.01), "are chosen for one format"),
        (rule("int8/channel", "int8/token", threshold=6.0), "are chosen for one format"),
        (rule("int8/channel", "int8/tensor", rescue=parse_spec("int8/token")), "are chosen for one format"),
    ],
)
def test_what_leaves_no_choice_is_refused(wrong: Rule, words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        check_methods(Recipe(name="mine", rules=(wrong,)))
