"""Calibration of models as users have them: every linear is seen, padding is not, and nothing is silent."""

import logging
from collections import UserDict
from collections.abc import Iterator
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close

from qcompile.calibrate import calibrate
from qcompile.errors import CalibrationError, RecipeError, SpecError
from qcompile.graph import Op
from qcompile.observers import Part, Stats
from qcompile.plan import Decision, Plan, Preparation, make_plan
from qcompile.recipe import Recipe
from qcompile.sites import LeftOver, Site
from qcompile.watch import watch
from tests.families import DECODERS, FAMILIES, build, tokens
from tests.trained import language_model, needs_model


def linears(model: nn.Module) -> set[str]:
    """Paths of the modules with a matrix that is no table: linears, GPT-2's Conv1D, routers of experts."""
    return {
        name
        for name, module in model.named_modules()
        if isinstance(weight := getattr(module, "weight", None), Tensor)
        and weight.dim() == 2
        and not isinstance(module, nn.Embedding)
    }


def stats_of(model: nn.Module, batch: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch) -> dict[str, Stats]:
    """What `calibrate` hands to the planner."""
    seen: dict[str, Stats] = {}

    def spy(
        sites: list[Site], recipe: Recipe, stats: dict[str, Stats], left: list[LeftOver], *, prepared: Preparation
    ) -> Plan:
        seen.update(stats)
        return make_plan(sites, recipe, stats, left, prepared=prepared)

    monkeypatch.setattr(import_module("qcompile.calibrate"), "make_plan", spy)
    calibrate(model, [batch])
    return seen


def scales(plan: Plan) -> dict[str, float]:
    return {name: float(d.input_qparams.scale) for name, d in plan.decisions.items() if d.input_qparams is not None}


def of_kind(plan: Plan, op: Op) -> dict[str, Decision]:
    return {name: d for name, d in plan.decisions.items() if d.op is op}


@pytest.mark.parametrize("family", FAMILIES)
def test_sites_are_all_linears_and_every_weight_has_a_decision(family: str) -> None:
    model = build(family)
    plan = calibrate(model, [{"input_ids": tokens(2, 9)}])
    sites = of_kind(plan, Op.LINEAR)
    assert set(sites) == linears(model)
    assert all(d.weight is not None and d.input_qparams is not None for d in sites.values())
    assert all(d.reason for name, d in plan.decisions.items() if name not in sites)
    named = {alias for name in plan.decisions for alias in (name, f"{name}.weight")}
    assert {name for name, p in model.named_parameters() if p.dim() > 1} <= named


def test_shapes_are_n_by_k_also_where_the_weight_is_kept_the_other_way() -> None:
    plan = calibrate(build("gpt2"), [tokens(1, 5)])
    assert plan.decisions["transformer.h.0.attn.c_attn"].shape == (384, 128)
    assert plan.decisions["transformer.h.0.mlp.c_proj"].shape == (128, 512)
    assert plan.decisions["lm_head"].shape == (128, 128)
    assert plan.decisions["transformer.wte"].op is Op.EMBEDDING


def test_expert_weights_are_left_over_with_their_reader() -> None:
    plan = calibrate(build("mixtral"), [tokens(1, 5)], "int8")
    experts = plan.decisions["model.layers.0.mlp.experts.gate_up_proj"]
    assert experts.op is Op.OTHER
    assert experts.shape == (4, 512, 128)
    assert "grouped_mm" in experts.reason
    assert experts.reason.endswith("which is not a linear")


def test_sites_of_one_activation_get_one_scale() -> None:
    found = scales(calibrate(build("llama"), [tokens(2, 9)]))
    q, k, v = (found[f"model.layers.1.self_attn.{x}_proj"] for x in "qkv")
    assert q == k == v
    assert q != found["model.layers.1.self_attn.o_proj"]


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(family: str, side: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids, pad = build(family), tokens(3, 7), 4
    width = (pad, 0) if side == "left" else (0, pad)
    mask = F.pad(torch.ones_like(ids), width)
    padded = {
        "input_ids": F.pad(ids, width, value=77),
        "attention_mask": mask,
        "position_ids": (mask.cumsum(1) - 1).clamp(min=0),
    }
    bare, found = (stats_of(model, batch, monkeypatch) for batch in ({"input_ids": ids}, padded))
    assert found.keys() == bare.keys()
    for name, stats in bare.items():
        assert found[name].count == stats.count == 21
        # attention over masked places adds exact zeros, in float32 sums of another order and length
        assert_close(found[name].amax, stats.amax, rtol=1e-4, atol=1e-6)
        assert_close(found[name].squares, stats.squares, rtol=1e-4, atol=1e-6)
        assert_close(found[name].low, stats.low, rtol=1e-4, atol=1e-6)
        assert_close(found[name].high, stats.high, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_one_batch_of_eight_is_eight_batches_of_one(family: str) -> None:
    model, ids = build(family), tokens(8, 6)
    whole = scales(calibrate(model, [{"input_ids": ids}]))
    # another number of rows takes other matmul code paths, each with its own float32 rounding
    assert scales(calibrate(model, [{"input_ids": row[None]} for row in ids])) == pytest.approx(whole, rel=1e-5)


class Spellings(nn.Module):
    """One linear in each spelling; `kn` weights are [K, N]."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        for name in ("matmul", "operator", "mm", "method", "addmm", "keyword"):
            setattr(self, name, nn.Parameter(torch.randn(4, 4)))

    def forward(self, x: Tensor) -> Tensor:
        x = F.linear(x, self.fc.weight, bias=self.fc.bias)
        x = torch.matmul(x, self.matmul)
        x = x @ self.operator
        x = torch.mm(x, self.mm)
        x = x.mm(self.method.t())
        x = torch.addmm(self.fc.bias, x, self.addmm)
        return F.linear(input=x, weight=self.keyword)


def test_a_linear_is_a_site_in_all_its_spellings() -> None:
    plan = calibrate(Spellings(), [torch.randn(3, 4)])
    assert list(plan.decisions) == ["fc", "matmul", "operator", "mm", "method", "addmm", "keyword"]
    assert all(d.input_qparams is not None for d in plan.decisions.values())


class Odd(nn.Module):
    """Weights that no linear reads."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.conv = nn.Conv1d(3, 3, 1)
        self.sliced = nn.Parameter(torch.randn(2, 4, 4))
        self.unused = nn.Parameter(torch.randn(2, 2))
        self.codes = nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.linear(self.fc(x), self.sliced[1]))


def test_weights_that_no_site_reads_have_a_reason() -> None:
    plan = calibrate(Odd(), [torch.randn(1, 3, 4)], "int8")
    reasons = {name: d.reason for name, d in of_kind(plan, Op.OTHER).items()}
    assert reasons == {
        "conv.weight": "read by conv1d, which is not a linear",
        "sliced": "read by __getitem__, which is not a linear",
        "unused": "no op read it",
    }


def test_batches_are_what_the_model_takes() -> None:
    model, ids = build("llama"), tokens(2, 5)
    expected = scales(calibrate(model, [ids]))
    forms: list[Any] = [{"input_ids": ids}, UserDict(input_ids=ids), (ids,), [ids]]
    assert [scales(calibrate(model, iter([form]))) for form in forms] == [expected] * len(forms)


def test_flags_and_gradients_are_as_before() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.BatchNorm1d(4)).train()
    model[1].eval()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    calibrate(model, [torch.randn(8, 4)])
    assert [m.training for m in model.modules()] == [True, True, False, True]
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        calibrate(model, [torch.randn(8, 5)])
    assert [m.training for m in model.modules()] == [True, True, False, True]
    assert torch.is_grad_enabled()


def test_the_plan_is_bound_and_a_compiled_model_is_seen_through() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    for given in (model, torch.compile(model, backend="eager")):
        plan = calibrate(given, [torch.ones(1, 4)])  # type: ignore[arg-type]
        assert list(plan.decisions) == ["0"]
        assert plan.binding is not None
        assert plan.binding.site_name(model[0].weight, Op.LINEAR) == "0"


class Pooled(nn.Module):
    """Reads tokens one by one, one row a sequence, and some rows chosen by the model."""

    def __init__(self) -> None:
        super().__init__()
        self.all, self.first, self.some = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        y = self.all(x)
        return self.first(y[:, 0]).sum() + self.some(y.reshape(-1, 4)[:5]).sum()


def test_a_mask_that_does_not_fit_an_activation_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    batch = {"x": torch.randn(2, 3, 4), "attention_mask": torch.tensor([[1, 1, 0], [1, 0, 0]])}
    with caplog.at_level(logging.WARNING):
        calibrate(Pooled(), [batch, batch])
    assert [r.getMessage() for r in caplog.records] == [
        "the input of 'some' [5, 4] has not the attention_mask's shape [2, 3]: padding is counted there"
    ]


def test_flattened_tokens_are_masked_and_padding_alone_is_no_data() -> None:
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
            return self.fc(x.reshape(-1, 4))

    x = torch.ones(2, 3, 4)
    x[1] = 100
    mask = torch.tensor([[1, 1, 1], [0, 0, 0]])
    assert scales(calibrate(Flat(), [{"x": x, "attention_mask": mask}]))["fc"] == pytest.approx(1 / 255)
    with pytest.raises(CalibrationError, match=r"'fc' gets the static input int8/tensor/asym, and no data was seen"):
        calibrate(Flat(), [{"x": x, "attention_mask": mask * 0}])


@pytest.mark.parametrize(
    ("recipe", "purpose"),
    [("int8-static", "folds and splits come from data"), ("int8", "sites are seen while it runs")],
)
def test_no_batches_is_an_error_that_says_what_they_are_for(recipe: str, purpose: str) -> None:
    used: Iterator[Tensor] = iter([])
    with pytest.raises(CalibrationError, match=rf"batches is empty, and recipe '{recipe}'.*{purpose}.*iterator"):
        calibrate(nn.Linear(2, 2), used, recipe)


@pytest.mark.parametrize("batches", [torch.ones(1, 2), {"input": torch.ones(1, 2)}, "text"])
def test_one_batch_in_place_of_many_is_refused(batches: Any) -> None:
    with pytest.raises(
        CalibrationError, match=rf"batches is one {type(batches).__name__}.*calibrate\(model, \[batch\]"
    ):
        calibrate(nn.Linear(2, 2), batches)


def test_a_batch_of_another_type_is_refused_with_its_number() -> None:
    with pytest.raises(CalibrationError, match=r"batch 1 is str, not a dict .* or a tensor"):
        calibrate(nn.Linear(2, 2), [torch.ones(1, 2), "text"])


def test_a_model_without_sites_is_refused() -> None:
    with pytest.raises(CalibrationError, match=r"2 batches ran, and no linear or embedding read a parameter"):
        calibrate(nn.ReLU(), [torch.ones(1), torch.ones(1)])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_batch_is_named_with_the_site(bad: float) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    with pytest.raises(CalibrationError, match=r"batch 1 gives NaN or Inf at the input of '0' \[3, 2\].*leave the bat"):
        calibrate(model, [torch.ones(3, 2), torch.full((3, 2), bad)])


def test_an_error_of_the_model_says_which_batch_ran() -> None:
    with pytest.raises(RuntimeError, match="cannot be multiplied") as caught:
        calibrate(nn.Linear(2, 2), [torch.ones(1, 2), torch.ones(1, 3)])
    assert caught.value.__notes__ == ["while qcompile.calibrate ran batch 1 through Linear"]


def test_recipes_are_checked_before_the_model_runs() -> None:
    with pytest.raises(RecipeError, match="unknown recipe 'int8-statik'"):
        calibrate(nn.ReLU(), [torch.ones(1)], "int8-statik")
    with pytest.raises(SpecError, match="'0'"):
        calibrate(nn.Sequential(nn.Linear(20, 4)), [torch.ones(1, 20)], "int4-weight")


@pytest.mark.parametrize("family", DECODERS)
def test_memory_of_activations_is_not_kept(family: str) -> None:
    """What a plan holds does not depend on how much data there was."""
    model = build(family)
    few, many = (calibrate(model, [tokens(1, 5, seed) for seed in range(count)]) for count in (1, 4))
    for name, decision in few.decisions.items():
        held = many.decisions[name].input_qparams
        assert (held is None) == (decision.input_qparams is None)
        assert held is None or held.scale.numel() == 1


@needs_model
def test_outliers_of_a_trained_model_are_seen() -> None:
    model = language_model()
    plan = calibrate(model, [torch.arange(64)[None]])
    assert set(of_kind(plan, Op.LINEAR)) == linears(model)
    assert set(of_kind(plan, Op.EMBEDDING)) == {"model.embed_tokens"}
    found = scales(plan)
    down = [found[f"model.layers.{i}.mlp.down_proj"] * 127 for i in range(8)]
    # the emergent outliers of a trained model: a normal distribution of this size stays below 6 times its deviation
    assert max(down) > 20


@pytest.mark.parametrize("observer", ["last", "moving_average", "delayed/4"])
def test_ranges_of_single_batches_do_not_go_with_folds_and_splits(observer: str) -> None:
    rule = {"input": "int8/tensor/asym", "weight": "int8/channel", "observer": observer, "split": 0.1}
    with pytest.raises(RecipeError, match=rf"rule 1 .*observer '{observer}' finds ranges from them: take 'mse'"):
        calibrate(nn.ReLU(), [torch.ones(1)], {"rules": [rule]})


@pytest.mark.parametrize("recipe", ["gptq4", "awq4", "w4a8"])
def test_groups_that_do_not_divide_a_weight_are_refused_with_its_name(recipe: str) -> None:
    model = nn.Sequential(nn.Linear(128, 192), nn.ReLU(), nn.Linear(192, 64))
    with pytest.raises(SpecError, match=r"needs K to divide by 128, got .* = \[64, 192\] at the weight of '2'"):
        calibrate(model, [torch.randn(64, 128)], recipe, progress=False)


@pytest.mark.parametrize("layer", [nn.Linear(4, 4), nn.Conv1d(4, 4, 1)], ids=str)
def test_the_example_is_the_first_batch_that_holds_numbers(layer: nn.Module) -> None:
    batches = [torch.empty(0, 4, 4), torch.ones(2, 4, 4), torch.ones(3, 4, 4), torch.empty(0, 4, 4)]
    assert watch(layer, batches, Part(0), progress=False).example is batches[1]
