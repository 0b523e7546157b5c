"""Where quantize and dequantize go, as text; and that the graph then computes what the oracle says."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qcompile.backends.fx.door import open_exported
from qcompile.backends.fx.graph import FxGraph
from qcompile.calibrate import calibrate
from qcompile.graph import Op, graph_text
from qcompile.numerics import fake_quantize
from qcompile.passes.insert_qdq import insert_qdq
from qcompile.plan import Plan, make_plan
from qcompile.presets import parse_recipe
from qcompile.recipe import Recipe, Rule
from qcompile.sites import find_sites
from qcompile.spec import parse_spec


class Attention(nn.Module):
    """Two linears on one activation, one behind them, and a table."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 32)
        self.q = nn.Linear(32, 16, bias=False)
        self.k = nn.Linear(32, 16, bias=False)
        self.o = nn.Linear(16, 8, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        return self.o(self.q(x) * self.k(x))


class Twice(nn.Module):
    """One linear called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(32, 32, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.relu(self.fc(x)))


IDS = torch.arange(10).reshape(2, 5)


def opened(model: nn.Module, *args: Tensor) -> FxGraph:
    return open_exported(torch.export.export(model.eval(), args))


def plan_for(graph: FxGraph, recipe: Recipe) -> Plan:
    return make_plan([found.site for found in find_sites(graph)], recipe)


def kinds(graph: FxGraph, op: Op) -> int:
    return sum(graph.op(value) is op for value in graph.values())


def result(graph: FxGraph, args: Sequence[Tensor]) -> Tensor:
    found = graph.run(args, [])[0]
    return found[0] if isinstance(found, tuple | list) else found


@pytest.fixture
def model() -> Attention:
    torch.manual_seed(0)
    return Attention()


def test_sites_of_one_activation_share_its_quantize(model: Attention) -> None:
    graph = opened(model, IDS)
    assert insert_qdq(graph, plan_for(graph, parse_recipe("int8"))) == 5
    assert graph_text(graph).splitlines() == [
        "%0 = input : [2, 5]",
        '%1 = quantize const[16, 32] "q.weight" int8/channel static : [16, 32]',
        "%2 = dequantize %1 int8/channel static : [16, 32]",
        '%3 = quantize const[16, 32] "k.weight" int8/channel static : [16, 32]',
        "%4 = dequantize %3 int8/channel static : [16, 32]",
        '%5 = quantize const[8, 16] "o.weight" int8/channel static : [8, 16]',
        "%6 = dequantize %5 int8/channel static : [8, 16]",
        '%7 = embedding %0, const[11, 32] "table.weight" "table" : [2, 5, 32]',
        "%8 = quantize %7 int8/token/asym dynamic : [2, 5, 32]",
        "%9 = dequantize %8 int8/token/asym dynamic : [2, 5, 32]",
        '%10 = linear %9, %2, none "q" : [2, 5, 16]',
        '%11 = linear %9, %4, none "k" : [2, 5, 16]',
        "%12 = mul %10, %11 : [2, 5, 16]",
        "%13 = quantize %12 int8/token/asym dynamic : [2, 5, 16]",
        "%14 = dequantize %13 int8/token/asym dynamic : [2, 5, 16]",
        '%15 = linear %14, %6, none "o" : [2, 5, 8]',
        "return %15",
    ]


@pytest.mark.parametrize(
    ("weight", "input_"),
    [
        ("int8/channel", "int8/token"),
        ("int4/g16/asym/bf16", None),
        ("nf4/g16", None),
        ("fp8_e4m3/channel", "fp8_e4m3/token"),
        ("fp4_e2m1/b16/fp8_e4m3", "fp4_e2m1/b16/fp8_e4m3"),
        (None, "int8/token"),
    ],
)
def test_the_graph_computes_what_the_oracle_says(model: Attention, weight: str | None, input_: str | None) -> None:
    def held(x: Tensor, spec: str | None) -> Tensor:
        return x if spec is None else fake_quantize(x, parse_spec(spec))

    rule = Rule(
        weight=None if weight is None else parse_spec(weight), input=None if input_ is None else parse_spec(input_)
    )
    graph = opened(model, IDS)
    insert_qdq(graph, plan_for(graph, Recipe(name="r", rules=(rule,))))
    with torch.no_grad():
        x = held(model.table(IDS), input_)
        product = F.linear(x, held(model.q.weight, weight)) * F.linear(x, held(model.k.weight, weight))
        expected = F.linear(held(product, input_), held(model.o.weight, weight))
    assert torch.equal(result(graph, (IDS,)), expected)


def test_static_inputs_of_one_activation_share_a_pair(model: Attention) -> None:
    plan = calibrate(model, [IDS], "int8-static")
    graph = opened(model, IDS)
    assert insert_qdq(graph, plan) == 5
    assert graph_text(graph).count("int8/tensor/asym static") == 4
    assert "dynamic" not in graph_text(graph)


def test_specs_that_differ_on_one_activation_get_a_pair_each(model: Attention) -> None:
    rules = (
        Rule(match="q", input=parse_spec("int8/token")),
        Rule(match="k", input=parse_spec("int4/token")),
        Rule(match="o"),
    )
    graph = opened(model, IDS)
    assert insert_qdq(graph, plan_for(graph, Recipe(name="r", rules=rules))) == 2
    text = graph_text(graph)
    assert text.count("quantize %") == 4
    assert "int4/token dynamic" in text


def test_a_shared_weight_is_quantized_once() -> None:
    graph = opened(Twice(), torch.randn(2, 32))
    assert insert_qdq(graph, plan_for(graph, parse_recipe("int8"))) == 3
    assert graph_text(graph).count('quantize const[32, 32] "fc.weight"') == 1
    assert kinds(graph, Op.QUANTIZE) == kinds(graph, Op.DEQUANTIZE) == 3


def test_sites_that_the_plan_leaves_or_does_not_name_stay(model: Attention) -> None:
    graph = opened(model, IDS)
    before = graph_text(graph)
    assert insert_qdq(graph, plan_for(graph, Recipe(name="none", rules=(Rule(),)))) == 0
    assert insert_qdq(graph, Plan(recipe=Recipe(name="none", rules=()), decisions={})) == 0
    assert graph_text(graph) == before


def test_a_table_gets_its_weight_quantized(model: Attention) -> None:
    rules = (Rule(ops=(Op.EMBEDDING,), weight=parse_spec("int8/channel")),)
    graph = opened(model, IDS)
    assert insert_qdq(graph, plan_for(graph, Recipe(name="r", rules=rules))) == 1
    assert 'quantize const[11, 32] "table.weight" int8/channel static' in graph_text(graph)


def test_weights_that_are_only_shapes_can_be_planned() -> None:
    graph = opened(Twice().to("meta"), torch.randn(2, 32, device="meta"))
    assert insert_qdq(graph, plan_for(graph, parse_recipe("int8"))) == 3
