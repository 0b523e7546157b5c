"""Weights solved while the model runs, from data to compiled model, and the same on both hosts."""

import gc
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close

import qcompile
from qcompile.errors import CalibrationError, PlanError, RecipeError
from qcompile.numerics import dequantize, fake_quantize
from qcompile.observers import Stats
from qcompile.packing import packed_length
from qcompile.pipeline import quantize
from qcompile.plan import Plan, make_plan
from qcompile.recipe import Recipe, Rule, recipe_from_table
from qcompile.sequential import solve_in_turn
from qcompile.sites import find_sites
from qcompile.solvers import solve_gptq_refitted
from qcompile.spec import Spec, parse_spec
from tests.compile.test_importance import HIDDEN, WIDTH, Net, calibrated, codes, data, run, trained
from tests.families import FAMILIES, build, tokens
from tests.hosts import FX, ONNX
from tests.variants import variants

SPEC = "int4/g32/asym/bf16"


def gptq(weight: str = SPEC, **more: Any) -> Recipe:
    return Recipe(name="gptq", rules=(Rule(weight=parse_spec(weight), solver="gptq", **more),))


def chosen(plan: Plan) -> dict[str, Tensor]:
    found = {name: d.solved.qparams.codes for name, d in plan.decisions.items() if d.solved is not None}
    return {name: tensor for name, tensor in found.items() if tensor is not None}


@pytest.fixture
def net() -> Net:
    return trained()


def by_hand(net: Net, batches: list[Tensor], weight: str, given: Spec | None = None) -> dict[str, Tensor]:
    """Codes of the net's three weights, written out."""

    def read(x: Tensor) -> Tensor:
        return x if given is None else fake_quantize(x, given)

    def solved(linear: nn.Linear, inputs: list[Tensor]) -> tuple[Tensor, Tensor]:
        k = linear.in_features
        moments = torch.zeros(k, k)
        for x in inputs:
            moments.addmm_(x.t(), x)
        found = solve_gptq_refitted(linear.weight, parse_spec(weight), moments / sum(len(x) for x in inputs))
        return found.codes, dequantize(found.codes, found)

    normed = [read(net.norm(x)) for x in batches]
    up, up_values = solved(net.up, normed)
    side, _ = solved(net.side, normed)
    down, _ = solved(net.down, [read(torch.relu(F.linear(x, up_values, net.up.bias))) for x in normed])
    return {"up": up, "side": side, "down": down}


@pytest.mark.parametrize("given", [None, "int8/token/asym"])
@pytest.mark.parametrize("weight", [SPEC, "nf4/g32", "int3/channel"])
def test_each_weight_sees_what_quantized_ones_before_it_make(net: Net, weight: str, given: str | None) -> None:
    batches, spec = [data(rows=90), data(seed=5, rows=40)], None if given is None else parse_spec(given)
    found = chosen(calibrated(net, gptq(weight, input=spec), *batches))
    expected = by_hand(net, batches, weight, spec)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


def test_a_static_input_is_quantized_by_its_range(net: Net) -> None:
    plan = calibrated(net, gptq(input=parse_spec("int4/tensor/asym")))
    token = calibrated(net, gptq())
    assert plan.decisions["down"].input_qparams is not None
    assert not torch.equal(chosen(plan)["down"], chosen(token)["down"])


def test_weights_of_other_solvers_are_quantized_on_the_way(net: Net) -> None:
    coarse = Rule(match="up", weight=parse_spec("int2/channel"))
    recipe = Recipe(name="r", rules=(coarse, *gptq().rules))
    plan, other = calibrated(net, recipe), calibrated(net, gptq())
    assert plan.decisions["up"].solved is None
    assert torch.equal(chosen(plan)["side"], chosen(other)["side"])
    assert not torch.equal(chosen(plan)["down"], chosen(other)["down"])


def test_how_data_is_cut_into_batches_changes_next_to_nothing(net: Net) -> None:
    x = data(rows=240)
    whole = chosen(calibrated(net, gptq(), x))
    cut = chosen(calibrated(net, gptq(), *x.split([7, 100, 1, 132])))
    for name, tensor in whole.items():
        # sums in another order move a code that lies between two
        assert (cut[name] == tensor).float().mean() > 0.995


def test_outputs_gain_on_data_that_calibration_did_not_see(net: Net) -> None:
    x, error = data(seed=2), {}
    for solver in ("gptq", "imatrix", "mse"):
        plan = calibrated(
            net, Recipe(name=solver, rules=(Rule(weight=parse_spec(SPEC), solver=solver),)), data(rows=600)
        )
        error[solver] = float((run(net, plan, x, lower=False) - net(x)).norm())
    assert error["gptq"] < error["imatrix"] < error["mse"]


def test_the_codes_that_run_are_those_that_were_chosen(net: Net) -> None:
    plan, x = calibrated(net, gptq()), data(rows=3)
    expected = chosen(plan)
    for host in (FX, ONNX):
        graph = host.open(net, x)
        quantize(graph, plan)
        found = codes(graph)
        assert found.keys() == {f"{name}.weight_codes" for name in expected}
        assert all(torch.equal(found[f"{name}.weight_codes"], expected[name]) for name in expected)
    values = {
        name: dequantize(d.solved.qparams.codes, d.solved.qparams)
        for name, d in plan.decisions.items()
        if d.solved is not None and d.solved.qparams.codes is not None
    }
    y = net.norm(x)
    hidden = torch.relu(F.linear(y, values["up"], net.up.bias))
    by_values = [F.linear(hidden, values["down"], net.down.bias), F.linear(y, values["side"], net.side.bias)]
    assert_close(run(net, plan, x, lower=False), torch.cat(by_values, -1))


@pytest.mark.usefixtures("graphs_only")
@pytest.mark.parametrize("family", variants(FAMILIES, quick=("llama",)))
def test_the_preset_equals_its_reference(family: str) -> None:
    model, ids = build(family), tokens(2, 8)
    plan = calibrated(model, "gptq4", tokens(4, 16, seed=3), tokens(2, 16, seed=4))
    linears = [found for found in plan.decisions.values() if found.solver == "gptq" and found.weight is not None]
    assert linears
    assert all(d.solved is not None for d in linears)
    assert_close(run(model, plan, ids)[0], run(model, plan, ids, lower=False)[0])


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_not_counted(side: str) -> None:
    # in float32 sums of other lengths differ, and codes that lie between two move those behind them
    model, ids, pad = build("llama").double(), tokens(24, 16, seed=3), 4
    width = (pad, 0) if side == "left" else (0, pad)
    mask = F.pad(torch.ones_like(ids), width)
    padded = {
        "input_ids": F.pad(ids, width, value=77),
        "attention_mask": mask,
        "position_ids": (mask.cumsum(1) - 1).clamp(min=0),
    }
    # scales that are fitted to codes, and rounded then, would carry the smallest difference on to the layers behind
    rule = Rule(weight=parse_spec("int4/g128/bf16"), solver="gptq-unordered")
    bare, found = (
        chosen(qcompile.calibrate(model, [batch], Recipe(name="plain", rules=(rule,)), progress=False))
        for batch in ({"input_ids": ids}, padded)
    )
    for name, tensor in bare.items():
        # padding that counts moves a fifth of all codes and more
        assert (found[name] == tensor).float().mean() > 0.999


@pytest.mark.usefixtures("graphs_only")
def test_plans_of_other_data_have_packs_of_their_own(net: Net) -> None:
    x = data(seed=3)
    plans = [calibrated(net, gptq(), data() * torch.randn(WIDTH).exp()) for _ in range(2)]
    first, second = (run(net, plan, x) for plan in plans)
    assert not torch.equal(first, second)
    for found, plan in zip((first, second), plans, strict=True):
        assert_close(found, run(net, plan, x, lower=False))


@pytest.mark.usefixtures("graphs_only")
@pytest.mark.parametrize("weight", [SPEC, "int3/channel", "nf4/g32/dq256", "fp4_e2m1/b16/fp8_e4m3", "int4/tensor"])
def test_a_loaded_plan_gives_the_same_outputs(net: Net, tmp_path: Path, weight: str) -> None:
    plan, x = calibrated(net, gptq(weight)), data(seed=3)
    qcompile.save(plan, tmp_path / "plan")
    loaded = qcompile.load(tmp_path / "plan", net)
    assert loaded == plan
    assert loaded.decisions["up"].data_digest == plan.decisions["up"].data_digest
    assert torch.equal(run(net, loaded, x), run(net, plan, x))
    held = load_file(tmp_path / "plan" / "plan.safetensors")["up.solved.weight"]
    assert held.shape == (HIDDEN, packed_length(WIDTH, parse_spec(weight).format.bits))


@pytest.mark.usefixtures("graphs_only")
def test_freed_weights_serve_other_shapes(net: Net) -> None:
    plan, x = calibrated(net, gptq()), data(seed=3)
    fast = torch.compile(net, backend="qcompile", dynamic=False, options={"plan": plan, "free_weights": True})
    first = fast(x)
    assert net.up.weight.isnan().all()
    assert_close(fast(x[:50]), first[:50])


def test_another_dtype_takes_the_codes_and_other_weights_do_not(net: Net) -> None:
    plan, x = calibrated(net, gptq("int8/channel")), data(rows=3)
    graph = FX.open(net.to(torch.bfloat16), x.to(torch.bfloat16))
    quantize(graph, plan)
    assert torch.equal(codes(graph)["up.weight_codes"], chosen(plan)["up"])
    net.up.weight.mul_(1.1)
    with pytest.raises(PlanError, match=r"codes for the weight of 'up' \[96, 64\] that are .* dB .*calibrate again"):
        quantize(FX.open(net, x.to(torch.bfloat16)), plan)


def test_a_plan_without_its_codes_is_refused(net: Net) -> None:
    plan = calibrated(net, gptq())
    lost = replace(plan, decisions={name: replace(d, solved=None) for name, d in plan.decisions.items()})
    with pytest.raises(PlanError, match=r"no codes for the weight of 'up' by solver 'gptq'.*qcompile\.calibrate"):
        quantize(FX.open(net, data(rows=3)), lost)


def test_without_data_the_error_says_what_to_do(net: Net) -> None:
    sites = [found.site for found in find_sites(FX.open(net, data(rows=3)))]
    with pytest.raises(CalibrationError, match=r"'up' gets solver 'gptq', which looks at data.*qcompile\.calibrate"):
        make_plan(sites, gptq())


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ({"ops": ["conv"]}, r"what weights of linears multiply: .*ops = \['conv'\]"),
        ({"ops": ["linear", "embedding"]}, r"ops = \['embedding'\]"),
        ({"input": "int8/token", "split": 0.01}, "split, shift, threshold and format change weights"),
        ({"input": "int8/token", "threshold": 6.0}, "split, shift, threshold and format change weights"),
    ],
)
def test_what_does_not_go_together_is_refused(net: Net, table: dict[str, Any], said: str) -> None:
    recipe = recipe_from_table({"rules": [{"weight": SPEC, "solver": "gptq", **table}]})
    with pytest.raises(RecipeError, match=f"names the solver 'gptq', but .*{said}"):
        calibrated(net, recipe)


def test_few_rows_are_noted(net: Net) -> None:
    plan = calibrated(net, gptq(), data(rows=WIDTH))
    (note,) = plan.notes
    assert note.startswith(
        f"1 sites were solved on fewer rows of data than they have channels, such as 'down' on {WIDTH}"
    )
    assert f"{HIDDEN} rows or more" in note
    assert calibrated(net, gptq(), data(rows=HIDDEN)).notes == ()


def test_batches_may_be_a_generator_but_not_one_batch(net: Net) -> None:
    def given() -> Iterator[Tensor]:
        yield data(rows=90)
        yield data(seed=5, rows=40)

    plan = qcompile.calibrate(net, given(), gptq(), progress=False)
    assert plan == calibrated(net, gptq(), *given())
    with pytest.raises(CalibrationError, match="not a collection of batches"):
        qcompile.calibrate(net, data(), gptq(), progress=False)


def test_settings_of_the_caller_hold_in_every_batch() -> None:
    seen = []

    class Asked(Net):
        def forward(self, x: Tensor) -> Tensor:
            seen.append((torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")))
            return super().forward(x)

    with torch.autocast("cpu", dtype=torch.bfloat16), torch.enable_grad():
        calibrated(Asked(), gptq(), data(rows=100), data(rows=120))
    assert seen == [(False, True, torch.bfloat16)] * 4


class Branches(Net):
    """Which linear reads the norm goes by the number of rows; one is read twice."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return self.down(torch.relu(self.up(y))) if len(x) < 100 else self.side(self.down(torch.relu(self.up(y * 2))))


def test_batches_may_take_ways_of_their_own() -> None:
    model = Branches().eval()
    batches = [data(rows=n, seed=n) for n in (70, 150, 99, 120)]
    plan = calibrated(model, gptq(), *batches)
    assert chosen(plan).keys() == {"up", "down", "side"}
    # all batches were there when what all of them read was solved
    moments = torch.zeros(WIDTH, WIDTH)
    for x in batches:
        y = model.norm(x) * (1 if len(x) < 100 else 2)
        moments.addmm_(y.t(), y)
    assert torch.equal(chosen(plan)["up"], solve_gptq_refitted(model.up.weight, parse_spec(SPEC), moments / 439).codes)


class Again(nn.Module):
    """Two of its three linears are called again when the weights of both are solved."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.last = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            x = self.second(torch.tanh(self.first(x)))
        return self.last(x)


@pytest.mark.parametrize("coarse", [False, True])
@torch.no_grad()
def test_a_site_that_is_called_again_has_the_same_weight(coarse: bool) -> None:
    model, x = Again().eval(), data()
    rules = (Rule(match="first", weight=parse_spec("int2/channel")), *gptq().rules)
    plan = calibrated(model, Recipe(name="r", rules=rules[not coarse :]), x)

    def solved(linear: nn.Linear, x: Tensor) -> tuple[Tensor, Tensor]:
        found = solve_gptq_refitted(
            linear.weight, parse_spec(SPEC), torch.zeros(WIDTH, WIDTH).addmm_(x.t(), x) / len(x)
        )
        return found.codes, dequantize(found.codes, found)

    expected, first = {}, fake_quantize(model.first.weight, parse_spec("int2/channel"))
    if not coarse:
        expected["first"], first = solved(model.first, x)
    hidden = torch.tanh(F.linear(x, first))
    expected["second"], second = solved(model.second, hidden)
    y = F.linear(torch.tanh(F.linear(F.linear(hidden, second), first)), second)
    expected["last"], _ = solved(model.last, y)
    found = chosen(plan)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


class Shaky(Net):
    """Has an error of its own, only where weights are quantized, and tries to go on after any."""

    def forward(self, x: Tensor) -> Tensor:
        try:
            y = self.up(self.norm(x))
        except Exception:
            y = x.new_zeros(len(x), HIDDEN)
        if len(x) == 7 and not torch.equal(y, F.linear(self.norm(x), self.up.weight.detach().clone(), self.up.bias)):
            raise ValueError("seven rows")
        return self.down(torch.relu(y))


def test_an_error_of_the_model_ends_all_batches() -> None:
    before, model = threading.active_count(), Shaky()
    with pytest.raises(ValueError, match="seven rows") as caught:
        calibrated(model, gptq(), data(rows=90), data(rows=7), data(rows=80))
    assert any("ran batch 1 through Shaky" in note for note in caught.value.__notes__)
    assert threading.active_count() == before
    assert model.training
    assert torch.is_grad_enabled() is False


class Turning(Net):
    """Reads `side` in float only."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        up = self.up(y)
        same = torch.equal(up, F.linear(y, self.up.weight.detach().clone(), self.up.bias))
        return self.side(self.norm(x)) if same else self.down(torch.relu(up))


def test_a_site_that_quantized_weights_do_not_reach_is_named() -> None:
    with pytest.raises(CalibrationError, match=r"no batch reached 'side', .*give more batches, or .*'imatrix'"):
        calibrated(Turning(), gptq())


def test_statistics_take_no_memory_while_weights_are_solved(net: Net, monkeypatch: pytest.MonkeyPatch) -> None:
    held = []

    def looked_at(*args: Any, **kwargs: Any) -> Plan:
        gc.collect()
        held.extend(thing for thing in gc.get_objects() if type(thing) is Stats)
        return solve_in_turn(*args, **kwargs)

    monkeypatch.setattr(sys.modules["qcompile.calibrate"], "solve_in_turn", looked_at)
    plan = calibrated(net, gptq())
    assert chosen(plan)
    assert held == []
