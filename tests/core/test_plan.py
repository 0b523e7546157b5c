"""Decisions: which rule gets which site, a reason for every site left alone, and an error for every contradiction."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from qcompile.errors import CalibrationError, PlanError, QcompileError, RecipeError, SpecError, WeightError
from qcompile.graph import Op
from qcompile.numerics import QParams, find_qparams
from qcompile.observers import Part, observe
from qcompile.plan import Plan, make_plan
from qcompile.recipe import Recipe, Rule
from qcompile.sites import LeftOver, Site
from qcompile.solved import equal_qparams
from qcompile.spec import parse_spec

INT8 = parse_spec("int8/channel")
TOKEN = parse_spec("int8/token")
STATIC = parse_spec("int8/tensor")


def site(name: str, *, n: int = 8, k: int = 64, op: Op = Op.LINEAR) -> Site:
    return Site(name=name, op=op, weight=torch.randn(n, k, generator=torch.Generator().manual_seed(0)))


def recipe(*rules: Rule) -> Recipe:
    return Recipe(name="mine", rules=rules)


def assert_says(error: type[QcompileError], words: list[str], call: Callable[[], object]) -> None:
    with pytest.raises(error) as caught:
        call()
    assert [w for w in words if w not in str(caught.value)] == []


def test_the_first_rule_that_matches_decides() -> None:
    rules = recipe(
        Rule(match="*.down", weight=parse_spec("int4/g32"), solver="mse"),
        Rule(match="*.head"),
        Rule(weight=INT8, input=TOKEN),
    )
    plan = make_plan([site("a.down"), site("a.head"), site("a.up")], rules)
    down, head, up = plan.decisions.values()
    assert (str(down.weight), down.input, down.solver, down.reason) == ("int4/g32", None, "mse", "")
    assert (head.weight, head.input, head.reason) == (None, None, "rule 2 leaves it alone")
    assert (up.weight, up.input, up.input_qparams, up.shape) == (INT8, TOKEN, None, (8, 64))
    assert plan.recipe is rules


def test_what_no_rule_reaches_has_a_reason() -> None:
    left = [
        LeftOver(name="experts.w", weight=torch.zeros(2, 3, 4), reader="transformers::grouped_mm_fallback"),
        LeftOver(name="spare", weight=torch.zeros(3, 4), reader=""),
    ]
    plan = make_plan([site("fc"), site("emb", op=Op.EMBEDDING)], recipe(Rule(weight=INT8)), left=left)
    assert plan.decisions["emb"].reason == "no rule of recipe 'mine' matches this embedding"
    experts = plan.decisions["experts.w"]
    assert (experts.op, experts.shape) == (Op.OTHER, (2, 3, 4))
    assert experts.reason == "read by transformers::grouped_mm_fallback, which is not a linear"
    assert plan.decisions["spare"].reason == "no op read it"
    assert all(d.weight is not None or d.reason for d in plan.decisions.values())


def test_an_embedding_gets_a_weight_and_no_input() -> None:
    both = Rule(ops=(Op.LINEAR, Op.EMBEDDING), weight=INT8, input=TOKEN)
    plan = make_plan([site("fc"), site("emb", op=Op.EMBEDDING)], recipe(both))
    assert (plan.decisions["emb"].weight, plan.decisions["emb"].input) == (INT8, None)
    assert plan.decisions["fc"].input == TOKEN


def test_a_module_called_twice_shares_its_decision() -> None:
    fc = site("fc")
    again = replace(fc, weight=fc.weight.t().t())
    plan = make_plan([fc, site("other"), again], recipe(Rule(weight=INT8)))
    assert {name: d.weight for name, d in plan.decisions.items()} == {"fc": INT8, "other": INT8}


@pytest.mark.parametrize("op", [Op.EMBEDDING, Op.LINEAR])
def test_different_weights_under_one_name_stay_float(op: Op) -> None:
    plan = make_plan([site("fc"), site("fc", op=op)], recipe(Rule(weight=INT8)))
    assert plan.decisions["fc"].weight is None
    assert plan.decisions["fc"].reason == "ops with different weights have this name, and a plan goes by names"


def test_a_static_input_gets_qparams_from_its_stats() -> None:
    x = torch.tensor([[1.0] * 64, [-2.0] * 64])
    stats = {"fc": observe(x)}
    plan = make_plan([site("fc")], recipe(Rule(weight=INT8, input=STATIC, observer="absmax")), stats)
    found = plan.decisions["fc"].input_qparams
    assert found is not None
    assert found.spec == STATIC
    assert float(found.scale) == float(torch.tensor(2.0) / 127)


def test_an_observer_may_take_a_parameter_and_names_the_site_it_cannot_serve() -> None:
    stats = {"fc": observe(torch.linspace(-1, 1, 64 * 64).reshape(64, 64))}
    rule = Rule(weight=INT8, input=STATIC, observer="percentile/90")
    found = make_plan([site("fc")], recipe(rule), stats).decisions["fc"].input_qparams
    assert found is not None
    assert float(found.scale) == pytest.approx(0.9 / 127, rel=1e-3)
    bare = {"fc": observe(torch.ones(1, 64), parts=Part.NONE)}
    with pytest.raises(CalibrationError, match="histogram") as caught:
        make_plan([site("fc")], recipe(rule), bare)
    assert "'fc'" in str(caught.value.__notes__)


def test_a_static_input_learns_the_levels_of_a_code_book() -> None:
    stats = {"fc": observe(torch.linspace(-1, 1, 64 * 64).reshape(64, 64))}
    rule = Rule(weight=INT8, input=parse_spec("lloyd4/tensor"))
    found = make_plan([site("fc")], recipe(rule), stats).decisions["fc"].input_qparams
    assert found is not None
    # of a uniform distribution the best levels are the middles of equal parts
    assert_close(found.levels, torch.linspace(-15, 15, 16) / 16, rtol=0, atol=1e-3)


def test_planning_changes_no_site_and_gives_the_same_again() -> None:
    sites = [site("a"), site("b")]
    before = [s.weight.clone() for s in sites]
    rules = recipe(Rule(weight=INT8, input=TOKEN))
    assert make_plan(sites, rules) == make_plan(sites, rules)
    assert all(torch.equal(s.weight, w) for s, w in zip(sites, before, strict=True))


def test_a_rule_that_matches_nothing_names_the_nearest_sites() -> None:
    rules = recipe(Rule(match="*.down_prj", weight=INT8), Rule(weight=INT8))
    sites = [site("l.0.down_proj"), site("l.0.q")]
    words = ["rule 1 ('*.down_prj')", "'mine'", "matches no linear", "'l.0.down_proj'", "remove the rule"]
    assert_says(RecipeError, words, lambda: make_plan(sites, rules))
    assert list(make_plan(sites, rules, whole=False).decisions) == ["l.0.down_proj", "l.0.q"]


def test_a_rule_whose_sites_were_taken_says_so() -> None:
    rules = recipe(Rule(weight=INT8), Rule(match="*.q", weight=INT8))
    words = ["rule 2 ('*.q')", "earlier rules took all 2 sites", "'a.q'", "move it up"]
    assert_says(RecipeError, words, lambda: make_plan([site("a.q"), site("b.q")], rules))


def test_an_optional_rule_may_decide_nothing() -> None:
    rules = recipe(Rule(match="lm_head", optional=True), Rule(weight=INT8))
    assert make_plan([site("fc")], rules).decisions["fc"].weight == INT8


def test_a_rule_for_all_embeddings_is_fine_without_one_and_without_sites() -> None:
    rules = recipe(Rule(ops=(Op.EMBEDDING,), weight=INT8), Rule(weight=INT8))
    assert make_plan([site("fc")], rules).decisions["fc"].weight == INT8
    assert make_plan([], recipe(Rule(match="typo"))).decisions == {}


def test_an_integer_weight_is_refused_where_it_would_be_quantized() -> None:
    held = Site(name="fc", op=Op.LINEAR, weight=torch.zeros(4, 8, dtype=torch.int8))
    words = ["'fc'", "[4, 8]", "dtype int8", "quantized already", "exclude it"]
    assert_says(WeightError, words, lambda: make_plan([held], recipe(Rule(weight=INT8))))
    assert make_plan([held], recipe(Rule())).decisions["fc"].reason == "rule 1 leaves it alone"


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_refused_with_the_count(bad: float) -> None:
    poisoned = site("fc", n=4, k=8)
    poisoned.weight[1, 2:5] = bad
    words = ["'fc'", "[4, 8]", "3 NaN or Inf among 32", "load the checkpoint again", "exclude"]
    assert_says(WeightError, words, lambda: make_plan([poisoned], recipe(Rule(weight=INT8))))


def test_a_weight_on_meta_is_checked_by_shape() -> None:
    meta = Site(name="fc", op=Op.LINEAR, weight=torch.empty(4, 40, device="meta"))
    assert make_plan([meta], recipe(Rule(weight=INT8))).decisions["fc"].weight == INT8
    with pytest.raises(SpecError, match="'fc'"):
        make_plan([meta], recipe(Rule(weight=parse_spec("int4/g32"))))


@pytest.mark.parametrize(
    ("n", "k", "spec", "fits"),
    [
        (8, 4000, "int4/g128", "int4/g32"),
        (8, 4000, "int4/g128/asym/bf16", "int4/g32/asym/bf16"),
        (8, 48, "fp4_e2m1/b32/e8m0", "fp4_e2m1/b16/e8m0"),
        (8, 97, "int4/g128", "int4/channel"),
        (8, 4000, "int4/g128/asym/u4row", "int4/g32/asym/u4row"),
        (8, 97, "int4/g128/asym/u4row", "int4/channel/asym"),
        (64, 192, "fp8_e4m3/b128x128", "fp8_e4m3/b64x64"),
    ],
)
def test_a_group_that_does_not_divide_gets_one_that_does(n: int, k: int, spec: str, fits: str) -> None:
    words = [spec, f"{[n, k]}", "the weight of 'layers.0.down'", f" {fits} fits", "exclude the site with a rule"]
    sites = [site("layers.0.down", n=n, k=k)]
    assert_says(SpecError, words, lambda: make_plan(sites, recipe(Rule(weight=parse_spec(spec)))))
    assert make_plan(sites, recipe(Rule(weight=parse_spec(fits)))).decisions["layers.0.down"].weight is not None


def test_groups_of_the_input_must_divide_too() -> None:
    words = ["fp4_e2m1/b32/e8m0", "the input of 'fc'", "[8, 48]", "b16"]
    rules = recipe(Rule(weight=INT8, input=parse_spec("fp4_e2m1/b32/e8m0")))
    assert_says(SpecError, words, lambda: make_plan([site("fc", k=48)], rules))


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        (Rule(solver="msee"), ["rule 1", "unknown solver 'msee'", "'mse'"]),
        (Rule(observer="absmx"), ["rule 1", "unknown observer 'absmx'", "'absmax'"]),
        (Rule(input=parse_spec("int8/b32x32")), ["rule 1", "int8/b32x32", "blocks of several rows", "int8/g32"]),
        (
            Rule(ops=(Op.LINEAR, Op.CONV), weight=INT8, solver="imatrix"),
            ["rule 1", "convolutions the solver 'imatrix'", "ops = ['conv']", "'mse'"],
        ),
        (Rule(observer="percentile/40"), ["rule 1", "percentile/40", "above 50, at most 100", "percentile/99.99"]),
    ],
)
def test_a_rule_that_cannot_work_is_refused_before_any_site(rule: Rule, words: list[str]) -> None:
    assert_says(RecipeError, words, lambda: make_plan([], recipe(rule)))


def test_a_static_input_without_data_says_how_to_get_it() -> None:
    rules = recipe(Rule(weight=INT8, input=STATIC))
    words = ["'fc'", "static input int8/tensor", "qcompile.calibrate", "int8/token"]
    assert_says(CalibrationError, words, lambda: make_plan([site("fc")], rules))
    assert_says(CalibrationError, words, lambda: make_plan([site("fc")], rules, {"other": observe(torch.ones(1, 64))}))


def test_stats_that_are_not_finite_are_refused() -> None:
    stats = {"fc": observe(torch.tensor([[1.0, float("inf")]]))}
    words = ["input of 'fc'", "NaN or Inf", "1.0 to inf", "finite"]
    assert_says(
        CalibrationError, words, lambda: make_plan([site("fc")], recipe(Rule(weight=INT8, input=STATIC)), stats)
    )


IMATRIX = Rule(ops=(Op.LINEAR, Op.EMBEDDING), weight=parse_spec("int4/g32/asym"), solver="imatrix")


def test_a_solver_that_asks_gets_the_importance_of_columns() -> None:
    seen = observe(torch.randn(50, 64) * torch.linspace(0.1, 3, 64))
    sites = [site("fc"), site("emb", op=Op.EMBEDDING), site("other")]
    rules = recipe(replace(IMATRIX, match="fc|emb"), Rule(weight=INT8))
    found = make_plan(sites, rules, {"fc": seen, "other": seen}).decisions
    assert found["fc"].importance is not None
    assert torch.equal(found["fc"].importance, seen.importance)
    # indices say nothing of the columns of a table, and other solvers do not ask
    assert (found["emb"].importance, found["other"].importance) == (None, None)
    assert make_plan(sites[1:2], recipe(IMATRIX)).decisions["emb"].weight == IMATRIX.weight


def test_decisions_differ_by_importance() -> None:
    a, b, c = (
        make_plan([site("fc")], recipe(IMATRIX), {"fc": observe(x)}).decisions["fc"]
        for x in (torch.eye(64), torch.eye(64), torch.eye(64) + torch.eye(64)[:1])
    )
    assert a == b
    assert a.data_digest == b.data_digest
    assert a != c
    assert a.data_digest != c.data_digest
    assert replace(a, solver="mse", importance=None).data_digest == ""


def test_importance_without_data_says_how_to_get_it() -> None:
    words = ["'fc'", "solver 'imatrix'", "qcompile.calibrate", "'mse'"]
    assert_says(CalibrationError, words, lambda: make_plan([site("fc")], recipe(IMATRIX)))
    other = {"other": observe(torch.ones(1, 64))}
    assert_says(CalibrationError, words, lambda: make_plan([site("fc")], recipe(IMATRIX), other))
    poisoned = {"fc": observe(torch.full((2, 64), float("nan")))}
    words = ["input of 'fc'", "NaN or Inf"]
    assert_says(CalibrationError, words, lambda: make_plan([site("fc")], recipe(IMATRIX), poisoned))


def test_importance_of_other_channels_is_refused() -> None:
    decision = make_plan([site("fc")], recipe(IMATRIX), {"fc": observe(torch.ones(1, 64))}).decisions["fc"]
    for importance, got in ((None, "got None"), (torch.ones(63), "got [63]")):
        words = ["'fc'", "'imatrix'", "importance of 64 channels", got, "qcompile.calibrate"]
        assert_says(PlanError, words, lambda importance=importance: replace(decision, importance=importance))
    # what stays float needs none
    assert replace(decision, weight=None, importance=None).weight is None


class Net(nn.Module):
    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.fc = nn.Linear(64, width)
        self.raw = nn.Parameter(torch.zeros(64, 8))


def plan_of(*sites: Site) -> Plan:
    return make_plan(
        sites, recipe(Rule(weight=INT8, input=STATIC)), {s.name: observe(torch.ones(1, 64)) for s in sites}
    )


def test_binding_keeps_the_data_and_knows_the_parameters() -> None:
    plan = plan_of(site("fc"), site("raw"))
    model = Net(8)
    bound = plan.bind(model)
    assert bound == plan
    assert plan.binding is None
    assert bound.binding is not None
    assert bound.binding.site_name(model.fc.weight, Op.LINEAR) == "fc"
    assert "binding" not in repr(bound)


def test_a_plan_for_another_model_is_refused() -> None:
    words = ["another model", "no 'fcc'", "nearest: 'fc'", "qcompile.calibrate"]
    assert_says(PlanError, words, lambda: plan_of(site("fcc")).bind(Net(8)))
    words = ["another model", "'fc' is [16, 64] in the model and [8, 64] in the plan"]
    assert_says(PlanError, words, lambda: plan_of(site("fc")).bind(Net(16)))
    many = plan_of(*(site(f"x{i}") for i in range(5)))
    assert_says(PlanError, ["no 'x0'", "no 'x2'", "and 2 more"], lambda: many.bind(Net(8)))


def test_equal_qparams_compares_values_and_specs() -> None:
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    a = find_qparams(x, INT8)
    assert equal_qparams(a, find_qparams(x, INT8))
    assert not equal_qparams(a, find_qparams(x * 2, INT8))
    assert not equal_qparams(a, find_qparams(x, parse_spec("int4/channel")))
    assert not equal_qparams(a, INT8)
    assert equal_qparams(TOKEN, TOKEN)
    assert not equal_qparams(TOKEN, INT8)
    asym = parse_spec("int8/tensor/asym")
    held = QParams(spec=asym, scale=torch.ones(()), zero=torch.zeros(()))
    assert not equal_qparams(held, QParams(spec=asym, scale=torch.ones(()), zero=torch.ones(())))


def test_qparams_that_are_only_shapes_are_equal_to_themselves_alone() -> None:
    meta = torch.empty(4, 64, device="meta")
    a = find_qparams(meta, INT8)
    assert equal_qparams(a, a)
    assert not equal_qparams(a, find_qparams(meta, INT8))


def test_a_rule_for_inputs_alone_says_why_the_weight_stays() -> None:
    decision = make_plan([site("fc")], recipe(Rule(input=TOKEN))).decisions["fc"]
    assert (decision.weight, decision.input) == (None, TOKEN)
    assert decision.reason == "rule 1 quantizes its input only"


def conv_site() -> Site:
    torch.manual_seed(0)
    return Site(name="conv", op=Op.CONV, weight=torch.randn(8, 27), positions=4)


def conv_recipe(**more: Any) -> Recipe:
    given = parse_spec("int8/tensor/asym")
    rule = {"ops": (Op.CONV,), "weight": parse_spec("int8/channel"), "input": given, "output": given, **more}
    return Recipe(name="conv", rules=(Rule(**rule),))


def test_a_convolution_gets_ranges_on_both_sides() -> None:
    seen, made = observe(torch.rand(50, 3)), observe(torch.rand(50, 8) * 3)
    decided = make_plan([conv_site()], conv_recipe(observer="minmax"), {"conv": seen}, results={"conv": made})
    decision = decided.decisions["conv"]
    assert decision.input_qparams is not None
    assert decision.output is not None
    torch.testing.assert_close(decision.input_qparams.scale * 255, seen.high.amax())
    torch.testing.assert_close(decision.output.scale * 255, made.high.amax())


def test_a_result_that_nothing_was_seen_of_stays_float() -> None:
    decision = make_plan([conv_site()], conv_recipe(), {"conv": observe(torch.rand(50, 3))}).decisions["conv"]
    assert decision.input_qparams is not None
    assert decision.output is None


def test_inputs_of_a_convolution_have_one_scale() -> None:
    recipe = conv_recipe(input=parse_spec("int8/token"), output=None)
    decision = make_plan([conv_site()], recipe).decisions["conv"]
    assert (decision.weight, decision.input) == (None, None)
    assert decision.reason == "rule 1 gives inputs int8/token, and those of a convolution have one scale each"


@pytest.mark.parametrize(
    ("more", "problem"),
    [
        ({"output": parse_spec("int8/token")}, "they have one calibrated scale: take int8/tensor"),
        ({"input": None}, "only convolutions with a static input give codes: add ops = \\['conv'\\] and an input spec"),
        ({"ops": (Op.LINEAR,)}, "only convolutions with a static input give codes"),
    ],
)
def test_an_output_spec_that_no_site_can_have_is_an_error(more: dict[str, Any], problem: str) -> None:
    with pytest.raises(RecipeError, match=f"rule 1 .* gives results the spec int8/t.*, but {problem}"):
        make_plan([conv_site()], conv_recipe(**more))


def test_plans_differ_by_the_ranges_of_results() -> None:
    seen, made = {"conv": observe(torch.rand(50, 3))}, torch.rand(50, 8)
    first, again, other = (
        make_plan([conv_site()], conv_recipe(), seen, results={"conv": observe(made * peak)}).decisions["conv"]
        for peak in (1.0, 1.0, 2.0)
    )
    assert first == again
    assert first != other
