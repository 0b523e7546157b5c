"""LLM-FP4 from calibration to the compiled model: every site shifted, folded and run."""

import copy
from itertools import product
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import qcompile
from qcompile.backends.fx.kernels import Problem, choose
from qcompile.presets import PRESETS
from qcompile.recipe import recipe_from_table, recipe_to_table
from qcompile.spec import parse_spec
from tests.families import build, tokens
from tests.variants import variants

pytestmark = pytest.mark.usefixtures("graphs_only")


@pytest.mark.parametrize(
    ("recipe", "family"),
    variants(product(("fp4", "fp4-token"), ("llama", "gpt2", "bert")), quick=(("fp4-token", "llama"),)),
)
def test_a_model_runs_as_planned(recipe: str, family: str, tmp_path: Path) -> None:
    model, ids = build(family), tokens(2, 8)
    float_model = model(ids)[0].clone()
    plan = qcompile.calibrate(model, [{"input_ids": tokens(4, 16)}], recipe=recipe, progress=False)
    assert not plan.notes
    shifted = [decision for decision in plan.decisions.values() if decision.shift]
    assert shifted
    assert all(min(d.shift) >= 0 and max(d.shift) <= 14 and len(d.shift) == d.shape[1] for d in shifted)
    fast = torch.compile(model, backend="qcompile", options={"plan": plan})
    y = fast(ids)[0]
    slow = torch.compile(model, backend="qcompile", options={"plan": plan, "lower": False})
    # a number between two of 4 bits may become either where sums round, and then results differ by more
    equal = 0
    for seed in range(3):
        given = tokens(2, 8, seed)
        expected = slow(given)[0]
        equal += torch.allclose(fast(given)[0], expected, rtol=0, atol=float(expected.abs().max()) * 1e-4)
    assert equal >= 2
    assert float((y - float_model).norm() / float_model.norm()) < 1
    report = qcompile.report(fast)
    kernels = {site.name: site.kernel for site in report.sites}
    assert any("weights with lowered columns are stored in" in note for note in report.notes)
    assert {kernels[d.name] for d in shifted} == {"lifted"}
    qcompile.save(plan, tmp_path / "plan")
    again = qcompile.load(tmp_path / "plan", model)
    assert again == plan


def loud(model: nn.Module, seed: int) -> nn.Module:
    """The same function, in which channels of every norm are 20 to 60 times as large, and their weights as small."""
    model, generator = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        for norm, readers in (
            (layer.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
            (layer.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj)),
        ):
            factor = torch.ones(norm.weight.numel())
            factor[torch.randperm(len(factor), generator=generator)[:3]] = 20 + 40 * torch.rand(3, generator=generator)
            norm.weight.data *= factor
            for linear in readers:
                linear.weight.data /= factor
    return model


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["fp4", "nvfp4-shift", "fp4-token", "mxfp4-shift"])
def test_loud_channels_of_small_weights_cost_next_to_nothing(recipe: str) -> None:
    plain, ids, data = build("llama"), tokens(8, 16), [{"input_ids": tokens(16, 16)}]
    errors = []
    for model in (plain, loud(plain, len(recipe))):
        plan = qcompile.calibrate(model, data, recipe=recipe, progress=False)
        assert not plan.notes
        torch._dynamo.reset()
        y = torch.compile(model, backend="qcompile", options={"plan": plan, "lower": False})(ids)[0]
        errors.append(float((y - plain(ids)[0]).norm()))
    assert any("norm" in fold.into for fold in plan.folds)
    assert errors[1] < 1.15 * errors[0]


@pytest.mark.slow
def test_weights_that_another_recipe_packed_are_shifted_too() -> None:
    model, ids = build("llama"), tokens(2, 8)
    torch.compile(model, backend="qcompile", options={"recipe": "int8"})(ids)
    plan = qcompile.calibrate(model, [{"input_ids": tokens(4, 16)}], recipe="fp4-token", progress=False)
    y = torch.compile(model, backend="qcompile", options={"plan": plan})(ids)[0]
    slow = torch.compile(model, backend="qcompile", options={"plan": plan, "lower": False})(ids)[0]
    torch.testing.assert_close(y, slow, rtol=0, atol=float(slow.abs().max()) * 1e-4)


def test_a_linear_that_runs_twice_is_not_raised_twice() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(32, 32), nn.Linear(32, 32)
            self.scale = nn.Parameter(torch.exp2(torch.linspace(-4, 4, 32)))

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.tanh(self.b(self.a(x) * self.scale)) * self.scale)

    torch.manual_seed(0)
    model, x = Twice().eval(), torch.randn(64, 32)
    plan = qcompile.calibrate(model, [x], recipe="fp4-token", progress=False)
    assert not plan.decisions["b"].shift
    y = torch.compile(model, backend="qcompile", options={"plan": plan})(x)
    assert float((y - model(x)).norm() / model(x).norm()) < 0.5


def test_float16_is_shifted_as_far_as_it_is_exact() -> None:
    model = build("llama").half()
    plan = qcompile.calibrate(model, [{"input_ids": tokens(4, 16)}], recipe="fp4-token", progress=False)
    assert 0 < max(max(d.shift, default=0) for d in plan.decisions.values()) <= 3
    assert not plan.notes


def test_presets_survive_as_tables() -> None:
    for name in ("fp4", "fp4-token", "fp4-a8", "fp4-weight", "mxfp4-shift", "nvfp4-shift"):
        assert recipe_from_table(recipe_to_table(PRESETS[name])) == PRESETS[name]


@pytest.mark.parametrize("given", ["fp4_e2m1/token", "fp4_e3m0/tensor", "fp8_e4m3/token"])
def test_folded_weights_run_on_fp8_tensor_cores(given: str) -> None:
    problem = Problem(
        N=64,
        K=64,
        weight=parse_spec("fp8_e4m3/channel"),
        input=parse_spec(given),
        dtype=torch.bfloat16,
        device="cuda",
        capability=(8, 9),
    )
    assert choose(problem)[0].name == "fp8"


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        ({"weight": "int4/channel", "input": "int4/token", "shift": 3}, "not both floats"),
        ({"weight": "fp4_e2m1/channel", "input": "fp4_e2m1/token", "shift": 3, "smooth": 0.5}, "smooths or splits"),
        ({"input": "fp4_e2m1/token", "shift": 3}, "not both floats"),
        ({"weight": "fp4_e2m1/channel", "input": "fp4_e2m1/token", "shift": 15}, "from 1 to 14"),
        ({"weight": "fp4_e2m1/channel", "input": "fp4_e2m1/token", "shift": True}, "from 1 to 14"),
    ],
)
def test_rules_that_cannot_be_followed(rule: dict, words: str) -> None:
    with pytest.raises(qcompile.QcompileError, match=words):
        qcompile.calibrate(build("llama"), [tokens(1, 8)], recipe={"rules": [rule]}, progress=False)
