import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.testing import assert_close

from qcompile.backends.fx.door import open_dynamo
from qcompile.graph import Op, graph_text
from tests.families import FAMILIES
from tests.fx.capture import Opened, backend, dynamo_graph, dynamo_graphs, exported_graph, ops_of, result
from tests.fx.nets import NETS, K, N, net

# linears of two layers and the head; experts are multiplied by an op of their own
LINEARS = {"llama": 15, "opt": 13, "gpt2": 9, "bert": 12, "mixtral": 11, "qwen2-moe": 19}
IDS = torch.arange(10).reshape(2, 5)


@pytest.mark.parametrize("name", NETS)
def test_both_doors_give_the_same_graph(name, assert_text):
    model, x = net(name)
    text = graph_text(dynamo_graph(model, x))
    assert text == graph_text(exported_graph(model, x))
    assert_text(f"fx_{name}", text)


@pytest.mark.parametrize("opened", [dynamo_graph, exported_graph])
@pytest.mark.parametrize("name", NETS)
def test_an_opened_graph_computes_what_the_model_does(opened, name):
    model, x = net(name)
    # a bias that was added after the matmul is now added inside: one rounding less of a sum of K products
    tolerance = {"matmuls": 1e-5}.get(name, 0.0)
    assert_close(result(opened(model, x), x), model(x), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("name", NETS)
def test_dynamos_graph_is_not_edited(name):
    model, x = net(name)
    seen = []

    def receive(gm, example_inputs):
        before, nodes = str(gm.graph), [dict(node.meta) for node in gm.graph.nodes]
        backend(model, opened := [])(gm, example_inputs)
        seen.append((before, str(gm.graph), nodes == [node.meta for node in gm.graph.nodes]))
        return opened[0].original

    torch.compile(model, backend=receive)(x)
    ((before, after, same_meta),) = seen
    assert before == after
    assert same_meta


def test_inputs_keep_their_order_names_and_origin():
    (opened,) = dynamo_graphs(Mixed(), torch.randn(2, K), torch.randn(2, K))
    original = [n for n in opened.original.graph.find_nodes(op="placeholder") if "weight" not in n.name]
    inputs = opened.graph.module.graph.find_nodes(op="placeholder")
    assert [n.name for n in inputs] == [n.name for n in original]
    assert [n._dynamo_source for n in inputs] == [n._dynamo_source for n in original]
    assert [n.meta["tensor_dict"] for n in inputs] == [n.meta["tensor_dict"] for n in original]


class Mixed(nn.Module):
    """Reads an input, a weight, and an input."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(K, K, bias=False)

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        return self.linear(first) * second


def test_a_constant_stored_by_columns_stands_behind_a_transpose():
    model, x = net("conv1d")
    graph = dynamo_graph(model, x)
    (linear,) = ops_of(graph, Op.LINEAR)
    _, weight, bias = graph.inputs(linear)
    assert graph.op(weight) is Op.TRANSPOSE
    assert torch.equal(graph.constant(weight), model.weight.t())
    assert graph.constant(bias) is model.bias


def test_a_transpose_of_a_weight_is_undone():
    model, x = net("matmuls")
    graph = dynamo_graph(model, x)
    _, *turned = ops_of(graph, Op.LINEAR)
    assert [graph.constant(graph.inputs(linear)[1]) is model.turned for linear in turned] == [True] * 3
    assert len({graph.inputs(linear)[1] for linear in turned}) == 1


def test_a_bias_is_folded_only_into_a_linear_that_nothing_else_reads():
    model, x = net("residual")
    (linear,) = ops_of(graph := dynamo_graph(model, x), Op.LINEAR)
    assert graph.inputs(linear)[2] is None
    assert len(ops_of(graph, Op.ADD)) == 2


def test_a_bias_of_another_dtype_stays_an_addition():
    class Widened(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(K, N, bias=False, dtype=torch.bfloat16)
            self.bias = nn.Parameter(torch.randn(N))

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x) + self.bias

    model, x = Widened(), torch.randn(3, K, dtype=torch.bfloat16)
    graph = dynamo_graph(model, x)
    assert len(ops_of(graph, Op.ADD)) == 1
    assert torch.equal(result(graph, x), model(x))


def test_a_scaled_addmm_is_no_linear():
    class Scaled(Conv):
        def forward(self, x: Tensor) -> Tensor:
            return torch.addmm(self.bias, x, self.weight, beta=0.5)

    assert not ops_of(dynamo_graph(Scaled(), torch.randn(3, K)), Op.LINEAR)


def test_addmm_of_activations_is_no_linear():
    class Activations(Conv):
        def forward(self, x: Tensor) -> Tensor:
            return torch.addmm(self.bias, x, x.t() @ x @ self.weight)

    graph = dynamo_graph(Activations(), torch.randn(3, K))
    assert len(ops_of(graph, Op.LINEAR)) == 1
    assert "torch.addmm" in [graph.label(v) for v in ops_of(graph, Op.OTHER)]


class Conv(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(K, N))
        self.bias = nn.Parameter(torch.randn(N))


@pytest.mark.parametrize("opened", [dynamo_graph, exported_graph])
def test_a_tied_weight_is_one_constant_of_two_ops(opened):
    model, ids = net("tied")
    graph = opened(model, ids)
    (weight,) = ops_of(graph, Op.CONSTANT)
    assert graph.name(weight) == "embed_tokens.weight"
    assert [graph.name(user) for user in graph.users(weight)] == ["embed_tokens", "lm_head"]


def test_an_op_named_by_keywords_reads_its_inputs_in_order():
    model, x = net("keywords")
    graph = dynamo_graph(model, x)
    (norm,) = ops_of(graph, Op.LAYER_NORM)
    assert [graph.name(v) for v in graph.inputs(norm)][1:] == ["norm.weight", "norm.bias"]


@pytest.mark.parametrize("name", NETS)
def test_a_weight_may_have_no_values(name):
    model, x = net(name)
    graph = dynamo_graph(model, x, meta=True)
    assert graph_text(graph) == graph_text(dynamo_graph(model, x))
    assert all(t.is_meta for t in graph.constants().values())


def test_a_layer_compiled_alone_is_named_as_in_the_model():
    model = nn.Sequential(*(net("mlp")[0] for _ in range(2)))
    opened: list[Opened] = []
    for layer in model:
        layer.compile(backend=backend(model, opened))
    with torch.no_grad():
        model(torch.randn(2, 3, K))
    torch._dynamo.reset()
    names = [[o.graph.name(v) for v in o.graph.values() if o.graph.op(v) is not Op.INPUT] for o in opened]
    assert "0.up" in names[0]
    assert "0" in names[0]
    assert [name.replace("0", "1", 1) for name in names[0]] == names[1]
    # the same code serves both
    assert str(opened[0].graph.module.graph) == str(opened[1].graph.module.graph)


def test_dynamic_sizes_stay_unknown():
    model, x = net("mlp")
    (opened,) = dynamo_graphs(model, x, dynamic=True)
    (up, _) = ops_of(opened.graph, Op.LINEAR)
    assert opened.graph.shape(up) == (None, None, 10)
    assert torch.equal(result(opened.graph, *opened.inputs), model(x))


def test_dropout_in_training_and_a_real_cast_stay():
    class Training(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.dropout(x.to(torch.float32).to(torch.float64), 0.5)

    graph = dynamo_graph(nn.Sequential(Training()), torch.randn(3))
    assert [graph.label(v) for v in ops_of(graph, Op.OTHER)] == ["method to", "torch.nn.functional.dropout"]


def test_subgraphs_are_left_alone():
    class Loop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(K, K)

        def forward(self, x: Tensor) -> Tensor:
            y = torch.cond(x.sum() > 0, lambda t: torch.matmul(t, t.t()), lambda t: t @ t.t() + 1, (x,))
            return self.linear(x) + y.sum()

    model, x = Loop(), torch.randn(3, K)
    (opened,) = dynamo_graphs(model, x)
    graph = opened.graph
    labels = [graph.label(v) for v in ops_of(graph, Op.OTHER)]
    assert "higher order: cond" in labels
    assert sum(label.startswith("subgraph ") for label in labels) == 2
    assert torch.equal(result(graph, *opened.inputs), model(x))


def test_a_graph_without_weights_or_examples_opens():
    graph = open_dynamo(fx.symbolic_trace(nn.ReLU()), {})
    assert [graph.op(v) for v in graph.values()] == [Op.INPUT, Op.RELU]
    assert [graph.shape(v) for v in graph.values()] == [(), ()]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_linear_of_a_family_is_found(family):
    torch.manual_seed(0)
    model = FAMILIES[family]().eval()
    model.config.use_cache = False
    (opened,) = dynamo_graphs(model, IDS)
    graph = opened.graph
    linears = ops_of(graph, Op.LINEAR)
    assert len(linears) == LINEARS[family]
    weights = {name for name, p in model.named_parameters() if p.dim() == 2}
    read = [graph.constant(graph.inputs(v)[1]) for v in linears]
    assert len({t.data_ptr() for t in read}) == len(linears)
    assert len({graph.name(v) for v in linears}) == len(linears)
    embedded = {f"{graph.name(v)}.weight" for v in ops_of(graph, Op.EMBEDDING)}
    assert {f"{graph.name(v)}.weight" for v in linears} | embedded >= weights
    with torch.no_grad():
        assert torch.equal(result(graph, *opened.inputs), model(IDS)[0])


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_every_norm_of_a_family_is_found(family):
    model = FAMILIES[family]().eval()
    (opened,) = dynamo_graphs(model, IDS)
    names = [opened.graph.name(v) for v in ops_of(opened.graph, Op.RMS_NORM)]
    assert names == [
        *(f"model.layers.{i}.{norm}" for i in range(2) for norm in ("input_layernorm", "post_attention_layernorm")),
        "model.norm",
    ]


def test_an_exported_family_has_the_same_linears():
    model = FAMILIES["llama"]().eval()
    graphs = [dynamo_graph(model, IDS, use_cache=False), exported_graph(model, IDS, use_cache=False)]
    first, second = ([g.name(v) for v in ops_of(g, Op.LINEAR)] for g in graphs)
    assert first == second
    assert torch.equal(graphs[1].module(IDS, use_cache=False).logits, model(IDS, use_cache=False).logits)
