"""Linears whose input is written to in place: what is quantized is what the linear reads."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qcompile import pipeline
from qcompile.backends.fx.targets import aten
from qcompile.presets import parse_recipe
from tests.fx.capture import dynamo_graph, result


class Written(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 8), nn.Linear(16, 8)


class Filled(Written):
    def forward(self, x: Tensor) -> Tensor:
        h = torch.zeros_like(x)
        h[:, :8] = x[:, 8:]
        return self.first(h)


class WrittenBetween(Written):
    def forward(self, x: Tensor) -> Tensor:
        h = x * 2
        y = self.first(h)
        h.add_(5)
        return y + self.second(h)


class WrittenThroughViews(Written):
    def forward(self, x: Tensor) -> Tensor:
        h = x * 2
        h[:, 0].mul_(0)
        h.view(-1)[3:].fill_(3.0)
        return self.first(h)


class ReluInPlace(Written):
    def forward(self, x: Tensor) -> Tensor:
        h = x * 2
        F.relu(h, True)
        g = x * 3
        F.silu(g, inplace=True)
        return self.first(h) + self.second(g)


class InputWritten(Written):
    def forward(self, x: Tensor) -> Tensor:
        x[0] = 4
        return self.first(x)


NETS = (Filled, WrittenBetween, WrittenThroughViews, ReluInPlace, InputWritten)


@pytest.mark.parametrize("net", NETS, ids=lambda net: net.__name__)
def test_what_is_quantized_is_what_the_linear_reads(net: type[Written]) -> None:
    model, x = net().eval(), torch.randn(5, 16)
    graph = dynamo_graph(model, x.clone())
    pipeline.quantize(graph, parse_recipe("int8"))
    with torch.no_grad():
        expected = model(x.clone())
    # 8 bits keep an error of a hundredth of the result; reading too early gives one of its size
    assert float((result(graph, x.clone()) - expected).norm() / expected.norm()) < 0.03


def test_an_input_that_stays_as_it_is_is_read_directly() -> None:
    class Relu(Written):
        def forward(self, x: Tensor) -> Tensor:
            h = F.relu(x * 2, inplace=True)
            return self.first(h) + self.second(h)

    graph = dynamo_graph(Relu(), torch.randn(5, 16))
    assert not any(node.target is aten.alias.default for node in graph.module.graph.nodes)
