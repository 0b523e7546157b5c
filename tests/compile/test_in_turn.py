"""Weights solved while the model runs, beside what else a recipe does, and in models of all kinds."""

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close
from transformers.pytorch_utils import Conv1D

import qcompile
from qcompile import sequential
from qcompile.errors import PlanError
from qcompile.folds import rescaled, scale_before
from qcompile.graph import Op
from qcompile.numerics import dequantize, fake_quantize
from qcompile.observers import observe
from qcompile.pipeline import quantize
from qcompile.plan import Plan
from qcompile.recipe import Recipe, Rule
from qcompile.smooth import parse_smooth
from qcompile.solvers import IN_TURN, solve_gptq_refitted
from qcompile.spec import parse_spec
from tests.compile.test_importance import HIDDEN, WIDTH, Net, calibrated, codes, data, run, trained
from tests.compile.test_sequential import SPEC, chosen, gptq
from tests.families import FAMILIES, build, tokens
from tests.hosts import FX, ONNX
from tests.variants import variants


@pytest.fixture
def net() -> Net:
    return trained()


def solved_by_hand(weight: Tensor, x: Tensor, spec: str = SPEC) -> tuple[Tensor, Tensor]:
    """Codes and values."""
    found = solve_gptq_refitted(weight, parse_spec(spec), x.t() @ x / len(x))
    return found.codes, dequantize(found.codes, found)


@pytest.mark.parametrize("given", [None, "int8/token/asym"])
@pytest.mark.parametrize("smooth", ["0.6", "awq"])
def test_weights_are_solved_as_folds_leave_them(net: Net, smooth: str, given: str | None) -> None:
    x, spec = data(rows=300), None if given is None else parse_spec(given)
    plan = calibrated(net, gptq(input=spec, smooth=parse_smooth(smooth)), x)
    before, behind = (scale_before(name, plan.folds) for name in ("up", "down"))
    assert before is not None
    assert behind is not None

    def read(x: Tensor) -> Tensor:
        return x if spec is None else fake_quantize(x, spec)

    y = read(net.norm(x) / before)
    up, values = solved_by_hand(rescaled("up", net.up.weight, before.double(), behind.double()), y)
    side, _ = solved_by_hand(rescaled("side", net.side.weight, before.double(), None), y)
    hidden = torch.relu(F.linear(y, values, net.up.bias / behind))
    down, _ = solved_by_hand(rescaled("down", net.down.weight, behind.double(), None), read(hidden))
    for name, expected in {"up": up, "side": side, "down": down}.items():
        # sums in another order move a code that lies between two
        assert (chosen(plan)[name] == expected).float().mean() > 0.995


@pytest.mark.parametrize("smooth", ["0.5", "awq"])
def test_both_hosts_run_the_codes_behind_folds(net: Net, smooth: str) -> None:
    plan, x = calibrated(net, gptq(smooth=parse_smooth(smooth))), data(rows=3)
    assert plan.folds
    for host in (FX, ONNX):
        graph = host.open(net, x)
        quantize(graph, plan)
        found = codes(graph)
        # a folded weight has a name of its own
        of_site = {name: [t for key, t in found.items() if key.startswith(f"{name}.weight")] for name in chosen(plan)}
        assert all(len(of_site[name]) == 1 and torch.equal(of_site[name][0], t) for name, t in chosen(plan).items())


def outputs(model: nn.Module, plan: Plan, x: Any, **options: object) -> Tensor:
    found = run(model, plan, x, **options)
    return found if isinstance(found, Tensor) else found[0]


@pytest.mark.usefixtures("graphs_only")
@pytest.mark.parametrize("family", variants(FAMILIES, quick=("llama",)))
def test_awq_equals_its_reference_in_every_family(family: str) -> None:
    model, ids = build(family), tokens(2, 8)
    plan = calibrated(model, "awq4", tokens(4, 16, seed=3), tokens(2, 16, seed=4))
    assert any(d.solved is not None for d in plan.decisions.values())
    assert not any("was undone" in note for note in plan.notes)
    assert_close(outputs(model, plan, ids), outputs(model, plan, ids, lower=False))


def loud(net: Net) -> Net:
    """Two channels of the norm are large, as in trained models, and hardly matter less in the weights behind."""
    with torch.no_grad():
        net.norm.weight[[3, 17]] *= 30
    return net


def test_awq_gains_where_inputs_are_loud_and_moves_nothing_where_they_are_alike(net: Net) -> None:
    model, x, error = loud(net), data(seed=2), {}
    scaled = {"smooth": parse_smooth("awq")}
    rules = {
        f"{solver}{kind}": Rule(weight=parse_spec("int4/channel"), solver=solver, **more)
        for solver in ("round", "awq")
        for kind, more in (("", {}), (" scaled", scaled))
    }
    for name, rule in rules.items():
        plan = calibrated(model, Recipe(name=name, rules=(rule,)), data(rows=600))
        error[name] = float((run(model, plan, x, lower=False) - model(x)).norm())
    # a clip that knows which channels are loud leaves less to be gained
    assert error["round scaled"] < 0.95 * error["round"]
    assert error["awq scaled"] < error["awq"] < error["round"]
    assert all(fold.method.startswith("awq power=") for fold in plan.folds)
    with torch.no_grad():
        model.norm.weight.fill_(1.0)
    plan = calibrated(model, Recipe(name="r", rules=(rules["awq scaled"],)), torch.randn(4000, WIDTH).sign())
    # magnitudes differ by what chance makes of a sample of rows
    assert all(float((fold.scale - 1).abs().max()) < 0.1 for fold in plan.folds if "up" in fold.sites)


class Functional(nn.Module):
    """Its weights are parameters of its own; the second is used transposed, as GPT-2 has it, the third twice."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Parameter(torch.randn(HIDDEN, WIDTH) / 8)
        self.second = nn.Parameter(torch.randn(HIDDEN, WIDTH) / 8)
        self.third = nn.Parameter(torch.randn(WIDTH, WIDTH) / 8)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.addmm(x, torch.relu(F.linear(x, self.first)), self.second)
        return torch.tanh(y @ self.third.t()) @ self.third.t()


@pytest.mark.usefixtures("graphs_only")
def test_weights_need_no_modules() -> None:
    model, x = Functional().eval(), data(rows=400)
    plan = calibrated(model, gptq(), x)
    with torch.no_grad():
        first, values = solved_by_hand(model.first, x)
        hidden = torch.relu(F.linear(x, values))
        second, back = solved_by_hand(model.second.t(), hidden)
        third, _ = solved_by_hand(model.third, x + F.linear(hidden, back))
    for name, expected in {"first": first, "second": second, "third": third}.items():
        assert (chosen(plan)[name] == expected).float().mean() > 0.995
    with torch.no_grad():
        assert_close(run(model, plan, x[:5], lower=False), run(model, plan, x[:5]), rtol=1e-3, atol=1e-3)


def test_the_weights_of_conv1d_are_solved() -> None:
    model = build("gpt2")
    assert isinstance(model.transformer.h[0].mlp.c_fc, Conv1D)
    plan = calibrated(model, gptq("int4/g32/asym/bf16"), tokens(24, 32))
    shapes = {name: tuple(tensor.shape) for name, tensor in chosen(plan).items()}
    # [N, K], though the module holds [K, N]
    assert shapes["transformer.h.0.attn.c_attn"] == (384, 128)
    assert shapes["transformer.h.1.mlp.c_proj"] == (128, 256 * 2)


@pytest.mark.usefixtures("graphs_only")
def test_a_weight_that_is_an_embedding_too_is_solved_for_the_linear_alone() -> None:
    torch.manual_seed(0)
    config = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1}
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**config, num_attention_heads=4, tie_word_embeddings=True)).eval()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    table = Rule(ops=(Op.EMBEDDING,), weight=parse_spec("int8/channel"))
    plan = calibrated(model, Recipe(name="tied", rules=(table, *gptq().rules)), tokens(16, 32))
    assert plan.decisions["lm_head"].solved is not None
    assert plan.decisions["model.embed_tokens"].solved is None
    ids = tokens(2, 8)
    assert_close(outputs(model, plan, ids), outputs(model, plan, ids, lower=False))


class Shared(nn.Module):
    """A weight of two modules, which read what the other made of it, or the same."""

    def __init__(self, *, alike: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.last = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3))
        self.b.weight, self.alike = self.a.weight, alike

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.a(x))
        return self.last(y + self.b(x if self.alike else y))


@pytest.mark.parametrize("last", [True, False])
def test_that_a_weight_of_several_modules_is_solved_for_the_first_is_noted(last: bool) -> None:
    # the run ends with the last weight that is solved, and what comes behind it is noted, too
    rules = gptq().rules if last else (replace(gptq().rules[0], match="a"),)
    recipe, x = Recipe(name="r", rules=rules), data(rows=400)
    plan = calibrated(Shared(alike=False).eval(), recipe, *x.split(200))
    (note,) = plan.notes
    assert note.startswith(
        "1 sites are called several times in one run, such as 'a', and were solved on what their first"
    )
    # what both read was looked at once, and nothing is missing
    assert calibrated(Shared(alike=True).eval(), recipe, *x.split(200)).notes == ()
    weighed = Recipe(name="i", rules=(Rule(weight=parse_spec(SPEC), solver="imatrix"),))
    # as the note says, its statistics are of all calls
    model = Shared(alike=False).eval()
    plan = calibrated(model, weighed, x)
    with torch.no_grad():
        read = torch.cat([x, torch.tanh(model.a(x))])
    assert_close(plan.decisions["a"].importance, observe(read).importance)
    assert plan.notes == ()


class _InterruptedError(Exception):
    pass


def test_an_interrupted_run_goes_on(net: Net, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    batches, solver, calls = [data(rows=90), data(seed=5, rows=40)], IN_TURN["gptq"], []

    def counting(weight: Tensor, *args: Any) -> Any:
        calls.append(len(weight))
        if len(calls) == stop:
            raise _InterruptedError
        return solver(weight, *args)

    def once_more(model: Net = net, given: list[Tensor] = batches, **more: Any) -> Plan:
        calls.clear()
        return qcompile.calibrate(model, given, gptq(**more), progress=False, resume=tmp_path)

    monkeypatch.setitem(IN_TURN, "gptq", counting)
    stop = 3
    with pytest.raises(_InterruptedError):
        once_more()
    stop = 0
    expected = qcompile.calibrate(net, batches, gptq(), progress=False)
    assert once_more() == expected
    # up and side were known
    assert calls == [WIDTH]
    assert once_more() == expected
    assert calls == []
    # all else starts anew
    once_more(given=[batches[0], batches[1] + 1e-3])
    assert len(calls) == 3
    once_more(smooth=parse_smooth("0.5"))
    assert len(calls) == 3
    with torch.no_grad():
        net.up.bias.add_(1e-3)
    once_more()
    assert len(calls) == 3


def test_what_was_kept_and_is_broken_is_named(net: Net, tmp_path: Path) -> None:
    qcompile.calibrate(net, [data()], gptq(), progress=False, resume=tmp_path)
    files = {file: file.read_bytes() for file in tmp_path.rglob("plan.safetensors")}
    for bit, message in ((1, r"the codes .* of '\w+' are not those"), (None, "is broken")):
        for file, whole in files.items():
            file.write_bytes(b"none" if bit is None else whole[:-1] + bytes([whole[-1] ^ bit]))
        with pytest.raises(PlanError, match=rf"{message}.*; or remove .*{tmp_path.name}.*, and .* is solved anew"):
            qcompile.calibrate(net, [data()], gptq(), progress=False, resume=tmp_path)


def test_values_of_a_weight_are_made_once_for_all_batches(net: Net, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[torch.Size] = []

    def counting(found: Tensor, *args: Any) -> Tensor:
        made.append(found.shape)
        return dequantize(found, *args)

    monkeypatch.setattr(sequential, "dequantize", counting)
    calibrated(net, gptq(), *data(rows=240).split(40))
    # once to find its error, and those that batches run on with once more, until all are solved
    assert sorted(made) == sorted([net.up.weight.shape] * 2 + [net.side.weight.shape] + [net.down.weight.shape])


def test_the_log_has_the_error_of_each_site(net: Net, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "qcompile.sequential")
    plan = calibrated(net, gptq(), data(rows=150), data(seed=5, rows=90))
    first, second = (record.getMessage() for record in caplog.records)
    assert first.startswith("240 rows: up ")
    assert ", side " in first
    assert second.startswith("240 rows: down ")
    assert "held at most" in second
    assert_error(first, net, plan)


def assert_error(line: str, net: Net, plan: Plan) -> None:
    found: Mapping[str, str] = dict(part.split(" ")[-3:-1] for part in line.split(";")[0].split(","))
    x = net.norm(torch.cat([data(rows=150), data(seed=5, rows=90)]))
    solved = plan.decisions["up"].solved
    assert solved is not None
    assert solved.qparams.codes is not None
    noise = F.linear(x, dequantize(solved.qparams.codes, solved.qparams) - net.up.weight)
    expected = 10 * (F.linear(x, net.up.weight).square().sum() / noise.square().sum()).log10()
    # one digit is written
    assert float(found["up"]) == pytest.approx(float(expected), abs=0.06)
