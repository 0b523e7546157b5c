"""Powers of two per channel end in the exponents of weights, and no bit of the result changes."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from qcompile.calibrate import calibrate
from qcompile.folds import Fold
from qcompile.graph import Graph, Op
from qcompile.numerics import dequantize, find_qparams, quantize
from qcompile.passes.fold_exponent_bias import fold_exponent_bias
from qcompile.passes.fold_smooth import fold_smooth
from qcompile.passes.insert_qdq import insert_qdq
from qcompile.pipeline import quantize as run_passes
from qcompile.plan import Decision, Plan, make_plan
from qcompile.recipe import Recipe, Rule
from qcompile.sites import find_sites
from qcompile.solvers import SOLVERS
from qcompile.spec import parse_spec
from tests.hosts import FX, Host, result

K = 48
FORMATS = ("fp4_e2m1", "fp4_e1m2", "fp4_e3m0", "fp6_e3m2", "fp6_e2m3")


class Net(nn.Module):
    """A norm, and a linear that reads it; its channels are far apart."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(K, eps=1e-6)
        self.fc = nn.Linear(K, 32)
        self.norm.weight.data = torch.exp2(torch.linspace(-5, 5, K))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.norm(x))


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


def planned(graph: Graph, fmt: str, shift: tuple[int, ...], given: str | None = None) -> Plan:
    rule = Rule(weight=parse_spec(f"{fmt}/channel"), input=None if given is None else parse_spec(given), solver="mse")
    plan = make_plan([found.site for found in find_sites(graph)], Recipe(name="test", rules=(rule,)))
    decisions = {name: replace(decision, shift=shift) for name, decision in plan.decisions.items()}
    fold = Fold(sites=("fc",), scale=-torch.tensor(shift).float(), into="norm")
    return replace(plan, decisions=decisions, folds=(replace(fold, scale=fold.scale.exp2()),))


def shifts(most: int) -> tuple[int, ...]:
    return tuple(torch.linspace(most, 0, K).round().int().tolist())


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("most", [1, 3, 8])
def test_no_bit_changes(host: Host, net: Net, fmt: str, most: int) -> None:
    x = torch.randn(5, K)
    graph = host.open(net, x)
    plan = planned(graph, fmt, shifts(most), f"{fmt}/token")
    fold_smooth(graph, plan.folds)
    insert_qdq(graph, plan)
    before = result(graph, x)
    assert fold_exponent_bias(graph, plan) == 1
    graph.prune()
    assert torch.equal(result(graph, x), before)
    (linear,) = (value for value in graph.values() if graph.op(value) is Op.LINEAR)
    weight = graph.inputs(linear)[1]
    assert weight is not None
    assert graph.op(weight) is Op.DEQUANTIZE
    assert fold_exponent_bias(graph, plan) == 0


@pytest.mark.parametrize("fmt", FORMATS[:3])
def test_shifting_alone_changes_no_bit_of_the_float_model(host: Host, net: Net, fmt: str) -> None:
    x = torch.randn(5, K)
    graph = host.open(net, x)
    before = result(graph, x)
    fold_smooth(graph, planned(graph, fmt, shifts(14)).folds)
    host.assert_equal(result(graph, x), before)


@pytest.mark.parametrize("fmt", FORMATS[:3])
def test_the_weight_is_chosen_before_it_is_lowered(net: Net, fmt: str) -> None:
    graph = FX.open(net, torch.ones(2, K))
    shift = shifts(6)
    plan = planned(graph, fmt, shift)
    fold_smooth(graph, plan.folds)
    insert_qdq(graph, plan)
    fold_exponent_bias(graph, plan)
    (linear,) = (value for value in graph.values() if graph.op(value) is Op.LINEAR)
    qparams = graph.qparams(graph.inputs(linear)[1])
    source = graph.constant(graph.inputs(graph.inputs(graph.inputs(linear)[1])[0])[0])
    found = dequantize(quantize(source, qparams), qparams)
    lowest = found * torch.tensor(shift).float().exp2()
    # what it is without any shift: at most 15 numbers a row, those of the format
    assert all(len(row.unique()) <= 15 for row in lowest)
    assert float((lowest - net.fc.weight.detach()).norm() / net.fc.weight.detach().norm()) < 0.25


def test_quantizing_under_a_shift_is_shifting_the_grid() -> None:
    x, shift = torch.randn(64, K) * torch.exp2(torch.linspace(-7, 7, K)), torch.tensor(shifts(14)).float().exp2()
    for fmt in FORMATS[:3]:
        qparams = find_qparams(x * shift, parse_spec(f"{fmt}/tensor"))
        raised = dequantize(quantize(x * shift, qparams), qparams)
        for k in range(0, K, 7):
            own = replace(qparams, scale=qparams.scale / shift[k])
            assert torch.equal(dequantize(quantize(x[:, k : k + 1], own), own) * shift[k], raised[:, k : k + 1])


def test_what_does_not_fit_stays(net: Net) -> None:
    graph = FX.open(net, torch.ones(2, K))
    plan = planned(graph, "fp8_e3m4", shifts(3))
    insert_qdq(graph, plan)
    before = result(graph, torch.ones(2, K))
    assert fold_exponent_bias(graph, plan) == 0
    assert torch.equal(result(graph, torch.ones(2, K)), before)


@pytest.mark.parametrize("fmt", ["fp4_e3m0", "fp6_e2m3", "e4m1", "fp8_e4m3", "fp8_e2m5", "e5m2"])
@pytest.mark.parametrize("given", ["tensor", "token"])
def test_whatever_calibration_lowers_folds(net: Net, fmt: str, given: str) -> None:
    net.fc.weight.data *= torch.exp2(torch.linspace(9, -9, K))
    net.norm.weight.data = torch.exp2(torch.linspace(-9, 9, K))
    rule = Rule(weight=parse_spec(f"{fmt}/channel"), input=parse_spec(f"{fmt}/{given}"), solver="imatrix", shift=14)
    x = torch.randn(64, K)
    plan = calibrate(net, [(x,)], recipe=Recipe(name="test", rules=(rule,)))
    # the input is raised, whatever becomes of the weight
    assert plan.folds
    graph = FX.open(net, x)
    run_passes(graph, plan)
    (linear,) = (value for value in graph.values() if graph.op(value) is Op.LINEAR)
    weight = graph.inputs(linear)[1]
    assert weight is not None
    # no kernel reads a weight that is multiplied behind its numbers
    assert graph.op(weight) is Op.DEQUANTIZE
    expected, bits = net(x).detach(), int(fmt[-1])
    assert float((result(graph, x) - expected).norm() / expected.norm()) < 0.6 * 2.0**-bits


def test_the_importance_of_columns_follows_their_octaves() -> None:
    importance, weight = torch.rand(32) + 0.1, torch.randn(8, 32)
    spec, shift = parse_spec("fp4_e2m1/channel"), tuple(range(8)) * 4
    factor = torch.tensor(shift).float().exp2()
    decision = Decision(name="fc", op=Op.LINEAR, shape=(8, 32), weight=spec, solver="imatrix", importance=importance)
    found = replace(decision, shift=shift).qparams_of(weight * factor)
    assert torch.equal(found.scale, SOLVERS["imatrix"](weight * factor, spec, importance / factor.square()).scale)
    assert not torch.equal(found.scale, decision.qparams_of(weight * factor).scale)
