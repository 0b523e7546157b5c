"""A weight whose columns are stored in an order of their own multiplies the channels that belong to them."""

from dataclasses import replace

import torch
from torch import Tensor, nn

from qcompile import pipeline
from qcompile.graph import Op
from qcompile.numerics import dequantize, find_qparams
from qcompile.passes.order_channels import order_channels
from qcompile.plan import Decision, Plan
from qcompile.recipe import Recipe, Rule
from qcompile.solved import solved
from qcompile.spec import parse_spec
from tests.hosts import Host, result

SPEC = "int4/g8/asym"


class Net(nn.Module):
    """Two linears that read one input, and one that reads another."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(32, 5), nn.Linear(32, 5, bias=False), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.tanh(self.a(x)) + self.b(x))


def ordered(model: Net, names: tuple[str, ...]) -> Plan:
    """Codes of a few linears, all in one order; the model gets the numbers that they stand for."""
    order, decisions = torch.randperm(32), {}
    for name in names:
        weight = model.get_submodule(name).weight
        columns = weight.detach()[:, order]
        found = replace(solved(columns, find_qparams(columns, parse_spec(SPEC))), order=order)
        decisions[name] = Decision(
            name=name, op=Op.LINEAR, shape=tuple(weight.shape), weight=parse_spec(SPEC), solved=found
        )
        qparams = found.qparams
        assert qparams.codes is not None
        with torch.no_grad():
            weight[:, order] = dequantize(qparams.codes, qparams)
    return Plan(recipe=Recipe(name="r", rules=(Rule(),)), decisions=decisions)


def test_the_model_stays_as_it_is(host: Host) -> None:
    model, x = Net().eval(), torch.randn(7, 32)
    plan = ordered(model, ("a", "b"))
    graph = host.open(model, x)
    assert order_channels(graph, plan) == 2
    # both read one selection
    assert [graph.op(value) for value in graph.values()].count(Op.SELECT) == 1
    torch.testing.assert_close(result(graph, x), model(x))


def test_a_whole_plan_is_applied(host: Host) -> None:
    model, x = Net().eval(), torch.randn(7, 32)
    plan = ordered(model, ("a", "b"))
    graph = host.open(model, x)
    pipeline.quantize(graph, plan)
    torch.testing.assert_close(result(graph, x), model(x))


def test_nothing_is_done_without_an_order(host: Host) -> None:
    graph = host.open(Net().eval(), torch.randn(7, 32))
    assert order_channels(graph, Plan(recipe=Recipe(name="r", rules=(Rule(),)), decisions={})) == 0
