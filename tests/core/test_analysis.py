"""The analysis of a plan: what it holds, and that it survives JSON."""

import json
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from qcompile.advice import Advice, Kind, Remedy
from qcompile.analysis import Analysis, analyze, folded_stats, remedied
from qcompile.errors import PlanError
from qcompile.folds import Fold
from qcompile.graph import Op
from qcompile.observers import Part, Stats, observe
from qcompile.outliers import Group
from qcompile.plan import Plan, make_plan
from qcompile.recipe import Recipe, Rule
from qcompile.sites import Site
from qcompile.spec import parse_spec

K, LOUD = 64, 21
RECIPE = Recipe(name="static", rules=(Rule(weight=parse_spec("int8/channel"), input=parse_spec("int8/tensor/asym")),))


@pytest.fixture
def x() -> Tensor:
    x = torch.randn(300, K, generator=torch.Generator().manual_seed(0))
    x[:, LOUD] *= 50
    return x


@pytest.fixture
def sites() -> list[Site]:
    generator = torch.Generator().manual_seed(1)
    weights = {name: torch.randn(n, K, generator=generator) for name, n in (("q", 16), ("k", 8), ("o", 24))}
    for weight in weights.values():
        weight[:, LOUD] /= 50
    return [Site(name=name, op=Op.LINEAR, weight=weight) for name, weight in weights.items()]


def groups(x: Tensor) -> list[Group]:
    def seen(values: Tensor) -> Stats:
        return observe(values, parts=Part.TENSOR | Part.CHANNELS)

    return [
        Group(sites=("q", "k"), maker=Op.RMS_NORM, stats=seen(x)),
        Group(sites=("o",), maker=Op.ATTENTION, stats=seen(x.roll(1, 1) / 50)),
    ]


def plan_of(sites: list[Site], found: list[Group], *folds: Fold, solver: str = "round") -> Plan:
    stats = {name: folded_stats(group, folds) for group in found for name in group.sites}
    recipe = replace(RECIPE, rules=tuple(replace(rule, solver=solver) for rule in RECIPE.rules))
    return replace(make_plan(sites, recipe, stats), folds=folds)


def analyzed(x: Tensor, sites: list[Site]) -> tuple[Analysis, Plan, list[Group]]:
    found = groups(x)
    plan = plan_of(sites, found)
    return analyze(sites, found, plan), plan, found


def test_every_quantized_site_is_measured(x: Tensor, sites: list[Site]) -> None:
    analysis, plan, found = analyzed(x, sites)
    assert [s.name for s in analysis.sites] == ["q", "k", "o"]
    assert analysis.outliers.channels("k") == (LOUD,)
    assert analysis.sites[0].weight == "int8/channel"
    assert analysis.sites[0].unfolded_db is None
    left = replace(
        plan,
        decisions={**plan.decisions, "k": replace(plan.decisions["k"], weight=None, input=None, input_qparams=None)},
    )
    assert [s.name for s in analyze(sites, found, left).sites] == ["q", "o"]
    assert analyze(sites, [], plan) == Analysis(outliers=analysis.outliers.__class__())


def test_a_fold_is_measured_before_and_after(x: Tensor, sites: list[Site]) -> None:
    scale = torch.ones(K)
    scale[LOUD] = 50
    fold = Fold(sites=("q", "k"), scale=scale, into="norm", method="by hand")
    found = groups(x)
    plan = plan_of(sites, found, fold)
    analysis = analyze(sites, found, plan)
    q, k, o = analysis.sites
    assert q.unfolded_db is not None
    assert q.noise.snr_db > q.unfolded_db + 20
    assert k.unfolded_db is not None
    assert o.unfolded_db is None
    assert q.unfolded_db == pytest.approx(analyzed(x, sites)[0].sites[0].noise.snr_db)
    (note,) = analysis.folds
    assert (note.sites, note.into, note.method, note.smallest, note.largest) == (
        ("q", "k"),
        "norm",
        "by hand",
        1.0,
        50.0,
    )


@pytest.mark.parametrize("kind", [Kind.SPLIT, Kind.DYNAMIC, Kind.SMOOTH])
@pytest.mark.parametrize("solver", ["round", "imatrix"])
@pytest.mark.parametrize("halved", [False, True], ids=["nothing folded", "folded before"])
def test_an_advice_that_is_followed_gives_what_it_predicts(
    x: Tensor, sites: list[Site], kind: Kind, halved: bool, solver: str
) -> None:
    found = groups(x)
    halves = Fold(sites=("q", "k"), scale=torch.rand(K, generator=torch.Generator().manual_seed(2)) + 0.5)
    plan = plan_of(sites, found, *([halves] if halved else []), solver=solver)
    analysis = analyze(sites, found, plan)
    advice = next(a for a in analysis.advice if a.remedy.kind is kind and a.sites == ("q", "k"))
    followed = remedied(plan, advice, sites, found)
    after = analyze(sites, found, followed)
    gains = [new.noise.snr_db - old.noise.snr_db for new, old in zip(after.sites, analysis.sites, strict=True)]
    # q and k are measured one by one here, and the advice is about both
    assert min(gains[:2]) - 2 < advice.predicted_db < max(gains[:2]) + 2
    assert gains[2] == 0
    assert after.sites[0].split == advice.remedy.channels
    assert len(followed.folds) == halved + (kind is Kind.SMOOTH)


@pytest.mark.parametrize("kind", [Kind.SPLIT, Kind.SMOOTH, Kind.WEIGHT, Kind.FLOAT])
@pytest.mark.parametrize("given", ["int8/token", "int8/tensor/asym"])
def test_importance_follows_an_advice(x: Tensor, sites: list[Site], kind: Kind, given: str) -> None:
    rule = Rule(weight=parse_spec("int3/g32"), input=parse_spec(given), solver="imatrix")
    recipe, found = Recipe(name="weighted", rules=(rule,)), groups(x)

    def plan_under(*folds: Fold) -> Plan:
        stats = {name: folded_stats(group, folds) for group in found for name in group.sites}
        return replace(make_plan(sites, recipe, stats), folds=folds)

    plan = plan_under()
    analysis = analyze(sites, found, plan)
    remedy = Remedy(kind=kind, channels=(LOUD,) if kind is Kind.SPLIT else (), alpha=0.5, spec="int4/g32")
    gained = {"before_db": 0.0, "predicted_db": 0.0, "bytes": 0}
    advice = Advice(sites=("q", "k"), cause="", action="", remedy=remedy, **gained)
    followed = remedied(plan, advice, sites, found)
    expected = plan_under(*followed.folds).decisions["q"].importance
    if kind is Kind.SPLIT:
        expected = found[0].stats.without(torch.tensor([LOUD])).importance
    assert torch.equal(followed.decisions["q"].importance, expected)
    after = analyze(sites, found, followed).sites
    assert after[-1] == analysis.sites[-1]
    if kind is Kind.SMOOTH:
        assert after[0].unfolded_db == pytest.approx(analysis.sites[0].noise.snr_db)


def test_smoothing_serves_all_that_read_the_activation(x: Tensor, sites: list[Site]) -> None:
    found = groups(x)
    plan = plan_of(sites, found)
    floats = replace(plan.decisions["k"], weight=None, input=None, input_qparams=None)
    plan = replace(plan, decisions={**plan.decisions, "k": floats})
    # the first two channels come from one row of what makes the activation
    smoothable = {"q": torch.arange(K).index_fill(0, torch.tensor([1]), 0)}
    analysis = analyze(sites, found, plan, smoothable=smoothable)
    advice = next(a for a in analysis.advice if a.remedy.kind is Kind.SMOOTH)
    assert advice.sites == ("q",)
    followed = remedied(plan, advice, sites, found, smoothable=smoothable)
    (fold,) = followed.folds
    assert fold.sites == ("q", "k")
    assert fold.scale[0] == fold.scale[1]
    assert followed.decisions["k"] == floats
    assert all(a.sites != ("o",) for a in analysis.advice if a.remedy.kind is Kind.SMOOTH)


def test_the_json_reads_back(x: Tensor, sites: list[Site]) -> None:
    found = groups(x)
    fold = Fold(sites=("o",), scale=torch.full((K,), 2.0), method="twice")
    plan = plan_of(sites, found, fold)
    analysis = analyze(sites, found, plan)
    assert analysis.advice
    assert Analysis.from_json(analysis.to_json()) == analysis


def test_what_is_no_analysis_is_refused(x: Tensor, sites: list[Site]) -> None:
    for text, words in (("{}", "no analysis"), ("[1]", "no analysis"), ("{broken", "no analysis")):
        with pytest.raises(PlanError, match=words):
            Analysis.from_json(text)
    newer = {**json.loads(analyzed(x, sites)[0].to_json()), "schema": 99}
    with pytest.raises(PlanError, match="schema 99"):
        Analysis.from_json(json.dumps(newer))
