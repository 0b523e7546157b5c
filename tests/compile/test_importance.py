"""Weights solved by the importance of their columns, from data to compiled model, and the same on both hosts."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.testing import assert_close

import qcompile
from qcompile.budget import parse_budget
from qcompile.errors import CalibrationError
from qcompile.graph import Graph, Op
from qcompile.observers import observe
from qcompile.passes.fold_smooth import fold_smooth
from qcompile.pipeline import quantize
from qcompile.plan import Plan
from qcompile.recipe import Recipe, Rule
from qcompile.sites import find_sites
from qcompile.smooth import Smooth
from qcompile.solvers import SOLVERS
from qcompile.spec import parse_spec
from tests.families import build, tokens
from tests.hosts import FX, ONNX
from tests.variants import variants

WIDTH, HIDDEN = 64, 96
RECIPE = "int4-imatrix"


class Net(nn.Module):
    """A norm, and two linears behind each other."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.side, self.down = (nn.Linear(*size) for size in ((WIDTH, HIDDEN), (WIDTH, 32), (HIDDEN, WIDTH)))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return torch.cat([self.down(torch.relu(self.up(y))), self.side(y)], -1)


@torch.no_grad()
def trained() -> Net:
    torch.manual_seed(0)
    model = Net().eval()
    # as in trained models, weights are normal, and some channels are far larger than others
    for linear in (model.up, model.side, model.down):
        linear.weight.normal_(std=WIDTH**-0.5)
    model.norm.weight.mul_(torch.randn(WIDTH).exp())
    model.up.bias.add_(torch.randn(HIDDEN))
    return model


@pytest.fixture
def net() -> Net:
    return trained()


def data(seed: int = 1, rows: int = 200) -> Tensor:
    return torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(seed))


def calibrated(model: nn.Module, recipe: str | Recipe = RECIPE, *batches: Tensor) -> Plan:
    return qcompile.calibrate(model, list(batches) or [data()], recipe, progress=False)


def run(model: nn.Module, plan: Plan, x: Tensor, **options: object) -> Tensor:
    torch._dynamo.reset()
    return torch.compile(model, backend="qcompile", dynamic=False, options={"plan": plan, **options})(x)


def codes(graph: Graph[Any]) -> dict[str, Tensor | None]:
    found = {graph.name(v): graph.constant(v) for v in graph.values() if graph.op(v) is Op.CONSTANT}
    return {name: tensor for name, tensor in found.items() if name.endswith("_codes")}


def test_outputs_gain_on_data_that_calibration_did_not_see(net: Net) -> None:
    x = data(seed=2)
    rule = Rule(weight=parse_spec("int4/g32/asym/bf16"), solver="mse")
    error = {
        plan.recipe.name: float((run(net, plan, x, lower=False) - net(x)).norm())
        for plan in (calibrated(net), calibrated(net, Recipe(name="mse", rules=(rule,))))
    }
    assert error[RECIPE] < 0.9 * error["mse"]


def test_both_hosts_give_the_same_codes(net: Net) -> None:
    plan, x = calibrated(net), data(rows=3)
    graphs = [host.open(net, x) for host in (FX, ONNX)]
    for graph in graphs:
        quantize(graph, plan)
    fx, onnx = (codes(graph) for graph in graphs)
    assert len(fx) == 3
    assert fx.keys() == onnx.keys()
    assert all(torch.equal(fx[name], onnx[name]) for name in fx)


def test_codes_are_those_of_the_solver_and_the_stats(net: Net) -> None:
    plan, x = calibrated(net), data()
    decision = plan.decisions["up"]
    assert torch.equal(decision.importance, observe(net.norm(x)).importance)
    expected = SOLVERS["imatrix"](net.up.weight, decision.weight, decision.importance)
    graph = FX.open(net, x)
    quantize(graph, plan)
    found = next(
        q
        for v in graph.values()
        if graph.op(v) is Op.DEQUANTIZE and graph.name(graph.inputs(v)[0]).startswith("up.") and (q := graph.qparams(v))
    )
    assert torch.equal(found.scale, expected.scale)
    assert torch.equal(found.zero, expected.zero)


@pytest.mark.usefixtures("graphs_only")
@pytest.mark.parametrize("family", variants(["llama", "gpt2"], quick=["llama"]))
def test_the_preset_equals_its_reference(family: str) -> None:
    model, ids = build(family), tokens(2, 8)
    plan = calibrated(model, RECIPE, tokens(4, 16, seed=3))
    assert_close(run(model, plan, ids)[0], run(model, plan, ids, lower=False)[0])


@pytest.mark.usefixtures("graphs_only")
def test_plans_of_other_data_have_packs_of_their_own(net: Net) -> None:
    x = data(seed=3)
    plans = [calibrated(net, RECIPE, data() * torch.randn(WIDTH).exp()) for _ in range(2)]
    first, second = (run(net, plan, x) for plan in plans)
    assert not torch.equal(first, second)
    for found, plan in zip((first, second), plans, strict=True):
        assert_close(found, run(net, plan, x, lower=False))


@pytest.mark.usefixtures("graphs_only")
def test_a_loaded_plan_gives_the_same_outputs(net: Net, tmp_path: Path) -> None:
    plan, x = calibrated(net), data(seed=3)
    qcompile.save(plan, tmp_path / "plan")
    loaded = qcompile.load(tmp_path / "plan", net)
    assert loaded == plan
    assert torch.equal(run(net, loaded, x), run(net, plan, x))


@pytest.mark.usefixtures("graphs_only")
@pytest.mark.parametrize("outliers", [(), (3, 70)])
def test_a_saved_model_is_as_large_as_its_budget_says(outliers: tuple[int, ...], net: Net, tmp_path: Path) -> None:
    bits, spec = 4.5, parse_spec("int4/g32/asym/bf16")
    rule = Rule(weight=spec, solver="imatrix", budget=parse_budget(f"{bits} bits"))
    plan, x = calibrated(net, Recipe(name="mine", rules=(rule,))), data(seed=3)
    # channels between two linears, which a pass may put into another order
    decisions = plan.decisions | {"down": replace(plan.decisions["down"], outliers=outliers)}
    plan = replace(plan, decisions=decisions).bind(net)
    fast = torch.compile(net, backend="qcompile", dynamic=False, options={"plan": plan})
    y = fast(x)
    qcompile.save(fast, tmp_path / "m")
    stored = {n: t for n, t in load_file(tmp_path / "m" / "plan.safetensors").items() if not n.endswith(".columns")}
    numbers = sum(m.weight.numel() for m in (net.up, net.side, net.down))
    assert 8 * sum(t.nbytes for t in stored.values()) <= bits * numbers
    with torch.device("meta"):
        other = Net().eval()
    loaded = qcompile.load(tmp_path / "m", other)
    assert torch.equal(run(other, loaded, x), y)
    # and once more on a model that has its weights
    assert torch.equal(run(net, qcompile.load(tmp_path / "m").bind(net), x), y)


@pytest.mark.usefixtures("graphs_only")
def test_freed_weights_serve_other_shapes(net: Net) -> None:
    plan, x = calibrated(net), data(seed=3)
    fast = torch.compile(net, backend="qcompile", dynamic=False, options={"plan": plan, "free_weights": True})
    first = fast(x)
    assert net.up.weight.isnan().all()
    assert_close(fast(x[:50]), first[:50])


def test_without_data_the_error_says_what_to_do(net: Net) -> None:
    fast = torch.compile(net, backend="qcompile", options={"recipe": RECIPE})
    with pytest.raises(Exception, match=r"gets solver 'imatrix'.*qcompile\.calibrate") as caught:
        fast(data())
    assert isinstance(caught.value, CalibrationError) or "CalibrationError" in str(caught.value)


def test_a_site_that_no_batch_reached_is_named(net: Net) -> None:
    class Half(Net):
        def forward(self, x: Tensor) -> Tensor:
            return self.up(x) if len(x) < 100 else self.down(torch.relu(self.up(x)))

    # what never ran is no site of calibration, and stays float with a reason
    plan = calibrated(Half(), RECIPE, data(rows=3))
    assert plan.decisions["down.weight"].reason == "no op read it"


INT4, TOKEN = parse_spec("int4/g32/asym"), parse_spec("int8/token/asym")
SMOOTHED = Rule(weight=INT4, input=TOKEN, solver="imatrix", smooth=Smooth(strength=0.5))


@pytest.mark.parametrize(
    "rules",
    [(SMOOTHED,), (replace(SMOOTHED, match="up"), Rule(weight=INT4, solver="imatrix"))],
    ids=["all smoothed", "one beside what is smoothed"],
)
def test_importance_is_that_of_what_folds_leave(net: Net, rules: tuple[Rule, ...]) -> None:
    plan, x = calibrated(net, Recipe(name="r", rules=rules)), data()
    assert any("side" in fold.sites for fold in plan.folds)
    graph = FX.open(net, x)
    assert fold_smooth(graph, plan.folds) > 0
    reads = {found.site.name: graph.inputs(found.value)[0] for found in find_sites(graph)}
    seen = graph.run([x], list(reads.values()))[1]
    assert set(reads) == {"up", "side", "down"}
    for name, value in reads.items():
        assert_close(plan.decisions[name].importance, observe(seen[value]).importance)
