"""Where quantize and dequantize go, as text; and that the graph then computes what the oracle says."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qcompile.calibrate import calibrate
from qcompile.graph import Graph, Op
from qcompile.numerics import dequantize, fake_quantize, quantize
from qcompile.observers import Part, observe
from qcompile.passes.insert_qdq import insert_qdq
from qcompile.passes.merge_qdq import merge_qdq
from qcompile.plan import Plan, make_plan
from qcompile.presets import parse_recipe
from qcompile.recipe import Recipe, Rule
from qcompile.sites import SITE_OPS, find_sites, result_of
from qcompile.solvers import SOLVERS
from qcompile.spec import parse_spec
from tests.hosts import FX, HOSTS, Host, ordered_text, result


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


def plan_for(graph: Graph[Any], recipe: Recipe) -> Plan:
    return make_plan([found.site for found in find_sites(graph)], recipe)


def kinds(graph: Graph[Any], op: Op) -> int:
    return sum(graph.op(value) is op for value in graph.values())


@pytest.fixture
def model() -> Attention:
    torch.manual_seed(0)
    return Attention()


def test_sites_of_one_activation_share_its_quantize(host: Host, model: Attention) -> None:
    graph = host.open(model, IDS)
    assert insert_qdq(graph, plan_for(graph, parse_recipe("int8"))) == 5
    assert ordered_text(graph).splitlines() == [
        "%0 = input : [2, 5]",
        '%1 = embedding %0, const[11, 32] "table.weight" "table" : [2, 5, 32]',
        "%2 = quantize %1 int8/token/asym dynamic : [2, 5, 32]",
        "%3 = dequantize %2 int8/token/asym dynamic : [2, 5, 32]",
        '%4 = quantize const[16, 32] "q.weight" int8/channel static : [16, 32]',
        "%5 = dequantize %4 int8/channel static : [16, 32]",
        '%6 = linear %3, %5, none "q" : [2, 5, 16]',
        '%7 = quantize const[16, 32] "k.weight" int8/channel static : [16, 32]',
        "%8 = dequantize %7 int8/channel static : [16, 32]",
        '%9 = linear %3, %8, none "k" : [2, 5, 16]',
        "%10 = mul %6, %9 : [2, 5, 16]",
        "%11 = quantize %10 int8/token/asym dynamic : [2, 5, 16]",
        "%12 = dequantize %11 int8/token/asym dynamic : [2, 5, 16]",
        '%13 = quantize const[8, 16] "o.weight" int8/channel static : [8, 16]',
        "%14 = dequantize %13 int8/channel static : [8, 16]",
        '%15 = linear %12, %14, none "o" : [2, 5, 8]',
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
def test_the_graph_computes_what_the_oracle_says(
    host: Host, model: Attention, weight: str | None, input_: str | None
) -> None:
    def held(x: Tensor, spec: str | None) -> Tensor:
        return x if spec is None else fake_quantize(x, parse_spec(spec))

    rule = Rule(
        weight=None if weight is None else parse_spec(weight), input=None if input_ is None else parse_spec(input_)
    )
    graph = host.open(model, IDS)
    insert_qdq(graph, plan_for(graph, Recipe(name="r", rules=(rule,))))
    with torch.no_grad():
        x = held(model.table(IDS), input_)
        product = F.linear(x, held(model.q.weight, weight)) * F.linear(x, held(model.k.weight, weight))
        expected = F.linear(held(product, input_), held(model.o.weight, weight))
    host.assert_equal(result(graph, IDS), expected)


def test_static_inputs_of_one_activation_share_a_pair(host: Host, model: Attention) -> None:
    plan = calibrate(model, [IDS], "int8-static")
    graph = host.open(model, IDS)
    assert insert_qdq(graph, plan) == 5
    assert ordered_text(graph).count("int8/tensor/asym static") == 4
    assert "dynamic" not in ordered_text(graph)


def test_specs_that_differ_on_one_activation_get_a_pair_each(host: Host, model: Attention) -> None:
    rules = (
        Rule(match="q", input=parse_spec("int8/token")),
        Rule(match="k", input=parse_spec("int4/token")),
        Rule(match="o"),
    )
    graph = host.open(model, IDS)
    assert insert_qdq(graph, plan_for(graph, Recipe(name="r", rules=rules))) == 2
    text = ordered_text(graph)
    assert text.count("quantize %") == 4
    assert "int4/token dynamic" in text


def test_a_shared_weight_is_quantized_once(host: Host) -> None:
    graph = host.open(Twice(), torch.randn(2, 32))
    assert insert_qdq(graph, plan_for(graph, parse_recipe("int8"))) == 3
    assert ordered_text(graph).count('quantize const[32, 32] "fc.weight"') == 1
    assert kinds(graph, Op.QUANTIZE) == kinds(graph, Op.DEQUANTIZE) == 3


class Tied(nn.Module):
    """Two linears with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = (nn.Linear(32, 32, bias=False) for _ in range(2))
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.relu(self.a(x)))


def test_a_shared_weight_is_quantized_for_each_importance(host: Host) -> None:
    model, x = Tied(), torch.randn(50, 32)
    rule = Rule(weight=parse_spec("int4/g32/asym"), solver="imatrix")
    loud, alike = observe(x * torch.linspace(0.1, 3, 32)), observe(x)
    for second, pairs in ((loud, 1), (alike, 2)):
        graph = host.open(model, x)
        sites = [found.site for found in find_sites(graph)]
        plan = make_plan(sites, Recipe(name="r", rules=(rule,)), {"a": loud, "b": second})
        assert insert_qdq(graph, plan) == pairs
        with torch.no_grad():
            first, then = (
                dequantize(quantize(model.a.weight, q), q)
                for q in (SOLVERS["imatrix"](model.a.weight, rule.weight, s.importance) for s in (loud, second))
            )
            host.assert_equal(result(graph, x), F.linear(torch.relu(F.linear(x, first)), then))


def test_sites_that_the_plan_leaves_or_does_not_name_stay(host: Host, model: Attention) -> None:
    graph = host.open(model, IDS)
    before = ordered_text(graph)
    assert insert_qdq(graph, plan_for(graph, Recipe(name="none", rules=(Rule(),)))) == 0
    assert insert_qdq(graph, Plan(recipe=Recipe(name="none", rules=()), decisions={})) == 0
    assert ordered_text(graph) == before


def test_a_table_gets_its_weight_quantized(host: Host, model: Attention) -> None:
    rules = (Rule(ops=(Op.EMBEDDING,), weight=parse_spec("int8/channel")),)
    graph = host.open(model, IDS)
    assert insert_qdq(graph, plan_for(graph, Recipe(name="r", rules=rules))) == 1
    assert 'quantize const[11, 32] "table.weight" int8/channel static' in ordered_text(graph)


def test_weights_that_are_only_shapes_can_be_planned() -> None:
    # an ONNX file has its weights
    graph = FX.open(Twice().to("meta"), torch.randn(2, 32, device="meta"))
    assert insert_qdq(graph, plan_for(graph, parse_recipe("int8"))) == 3


class Residual(nn.Module):
    """Two blocks of convolutions; the sum of the first is read by two ops, and its input by a sum of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(4, 4, 3, padding=1) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.a(x))
        y = F.relu(self.b(x) + x)
        return F.relu(self.c(y) + y).mean((2, 3)) + y.mean((2, 3))


def planned(graph: Graph[Any], x: Tensor, **specs: str) -> Plan:
    """As calibration on x would plan all convolutions."""
    sites = find_sites(graph, SITE_OPS)
    values = {f.site.name: (graph.inputs(f.value)[0], result_of(graph, f.value)) for f in sites}
    _, seen = graph.run((x,), [v for pair in values.values() for v in pair])
    known = {v: observe(t.movedim(1, -1).reshape(-1, t.shape[1]), parts=Part.TENSOR) for v, t in seen.items()}
    stats, results = ({name: known[pair[i]] for name, pair in values.items()} for i in (0, 1))
    rule = Rule(ops=(Op.CONV,), **{name: parse_spec(spec) for name, spec in specs.items()})
    recipe = Recipe(name="conv", rules=(rule,))
    return make_plan([f.site for f in sites], recipe, stats, results=results)


def ops_of(graph: Graph[Any], op: Op) -> list[Any]:
    return [value for value in graph.values() if graph.op(value) is op]


def test_results_and_what_is_added_to_them_have_codes(host: Host) -> None:
    torch.manual_seed(0)
    model, x = Residual(), torch.randn(2, 4, 5, 5)
    graph = host.open(model, x)
    spec = "int8/tensor/asym"
    plan = planned(graph, x, weight="int8/channel", input=spec, output=spec)
    # three weights, and what a, b and c read and make, of which b reads what a makes
    assert insert_qdq(graph, plan) == 3 + 6
    merge_qdq(graph)
    graph.prune()
    assert len(ops_of(graph, Op.QUANTIZE)) == 3 + 5
    sums = [value for value in ops_of(graph, Op.ADD) if len(graph.shape(value)) == 4]
    assert [[graph.op(v) for v in graph.inputs(total)] for total in sums] == [[Op.DEQUANTIZE] * 2] * 2
    for relu in ops_of(graph, Op.RELU)[:2]:
        # of the second, a mean reads the numbers as they are
        assert Op.QUANTIZE in {graph.op(user) for user in graph.users(relu)}
    with torch.no_grad():
        expected = model(x)
    assert float((result(graph, x) - expected).norm() / expected.norm()) < 0.02


def test_without_an_output_spec_sums_stay_float(host: Host) -> None:
    torch.manual_seed(0)
    graph = host.open(Residual(), torch.randn(2, 4, 5, 5))
    insert_qdq(graph, planned(graph, torch.randn(2, 4, 5, 5), weight="int8/channel", input="int8/tensor"))
    sums = [value for value in ops_of(graph, Op.ADD) if len(graph.shape(value)) == 4]
    assert [[graph.op(v) for v in graph.inputs(total)] for total in sums] == [[Op.CONV, Op.RELU]] * 2


def test_both_hosts_quantize_convolutions_alike() -> None:
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    model, x = Residual(), torch.randn(2, 4, 5, 5)
    found = []
    for host in HOSTS:
        graph = host.open(model, x)
        insert_qdq(graph, planned(graph, x, weight="int8/channel", input="int8/tensor", output="int8/tensor"))
        found.append(result(graph, x))
    torch.testing.assert_close(*found)
