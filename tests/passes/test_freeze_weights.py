"""Weights become constants of codes, and the result stays the same to the last bit."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qcompile.graph import Graph, Op
from qcompile.numerics import find_qparams, quantize
from qcompile.passes.freeze_weights import freeze_weights
from qcompile.passes.insert_qdq import insert_qdq
from qcompile.plan import make_plan
from qcompile.presets import PRESETS
from qcompile.recipe import Recipe, Rule
from qcompile.sites import find_sites
from qcompile.spec import parse_spec
from tests.hosts import FX, Host, ordered_text, result


class Net(nn.Module):
    """A linear, and one whose weight is kept as [K, N]."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(128, 256)
        self.turned = nn.Parameter(torch.randn(256, 8))
        self.bias = nn.Parameter(torch.randn(8))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, self.fc(x), self.turned)


@pytest.fixture
def model() -> Net:
    torch.manual_seed(0)
    return Net().eval()


def inserted(host: Host, model: Net, recipe: Recipe) -> Graph[Any]:
    graph = host.open(model, torch.ones(2, 128))
    insert_qdq(graph, make_plan([found.site for found in find_sites(graph)], recipe))
    return graph


@pytest.mark.parametrize("name", [name for name, recipe in PRESETS.items() if not recipe.needs_data])
def test_freezing_changes_no_result_and_leaves_no_float_weight(host: Host, model: Net, name: str) -> None:
    graph = inserted(host, model, PRESETS[name])
    x = torch.randn(2, 128)
    before = result(graph, x)
    assert freeze_weights(graph) == 2
    graph.prune()
    torch.testing.assert_close(result(graph, x), before, rtol=0, atol=0)
    read = [graph.inputs(v)[0] for v in graph.values() if graph.op(v) is Op.DEQUANTIZE]
    names = {graph.name(v) for v in read if v is not None and graph.op(v) is Op.CONSTANT}
    assert names == {"fc.weight_codes", "turned_codes"}
    constants = {graph.name(v) for v in graph.values() if graph.op(v) is Op.CONSTANT}
    assert constants & {"fc.weight", "turned"} == set()


def test_codes_are_those_of_the_oracle(host: Host, model: Net) -> None:
    spec = parse_spec("int4/g32/asym")
    graph = inserted(host, model, Recipe(name="r", rules=(Rule(weight=spec),)))
    freeze_weights(graph)
    codes = {graph.name(v): graph.constant(v) for v in graph.values() if graph.op(v) is Op.CONSTANT}
    for name, weight in (("fc.weight", model.fc.weight), ("turned", model.turned.t())):
        found = codes[f"{name}_codes"]
        assert found is not None
        assert torch.equal(found, quantize(weight, find_qparams(weight, spec)))


def test_a_second_run_finds_nothing(host: Host, model: Net) -> None:
    graph = inserted(host, model, PRESETS["int8"])
    assert freeze_weights(graph) == 2
    graph.prune()
    text = ordered_text(graph)
    assert freeze_weights(graph) == 0
    assert ordered_text(graph) == text


def test_activations_stay_quantized_while_running(host: Host, model: Net) -> None:
    graph = inserted(host, model, PRESETS["int8"])
    freeze_weights(graph)
    graph.prune()
    assert ordered_text(graph).count("= quantize %") == 2


def test_a_constant_quantized_in_two_ways_gets_two_constants(host: Host) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(16, 32)
            self.head = nn.Linear(32, 16, bias=False)
            self.head.weight = self.table.weight

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(self.table(ids))

    graph = host.open(Tied(), torch.arange(4))
    rules = (Rule(weight=parse_spec("int8/channel")), Rule(ops=(Op.EMBEDDING,), weight=parse_spec("nf4/g32")))
    insert_qdq(graph, make_plan([found.site for found in find_sites(graph)], Recipe(name="r", rules=rules)))
    assert freeze_weights(graph) == 2
    names = [graph.name(v) for v in graph.values() if graph.op(v) is Op.CONSTANT]
    assert sorted(name for name in names if "_codes" in name) == ["table.weight_codes", "table.weight_codes_2"]


def test_weights_that_are_only_shapes_give_codes_that_are_only_shapes() -> None:
    model = Net().to("meta").eval()
    graph = FX.open(model, torch.ones(2, 128, device="meta"))
    insert_qdq(graph, make_plan([found.site for found in find_sites(graph)], PRESETS["int8"]))
    assert freeze_weights(graph) == 2
