import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from qcompile.errors import GraphError, SpecError
from qcompile.graph import Op, graph_text
from qcompile.numerics import dequantize, fake_quantize, find_qparams, quantize
from qcompile.spec import parse_spec
from tests.fx.capture import dynamo_graph, dynamo_graphs, exported_graph, ops_of, result
from tests.fx.nets import K, N, net

TOKEN, CHANNEL = parse_spec("int8/token"), parse_spec("int8/channel")


class Linear(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.fc = nn.Linear(K, N, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x).relu()


@pytest.fixture
def x():
    torch.manual_seed(0)
    return torch.randn(2, 3, K)


@pytest.fixture
def model(x):
    return Linear()


@pytest.fixture(params=[dynamo_graph, exported_graph])
def graph(request, model, x):
    return request.param(model, x)


def linear_of(graph):
    return ops_of(graph, Op.LINEAR)[0]


def test_a_dynamic_pair_quantizes_each_input(graph, model, x, assert_text):
    linear = linear_of(graph)
    graph.set_input(linear, 0, graph.add_qdq(graph.inputs(linear)[0], TOKEN))
    assert_text("fx_dynamic_pair", graph_text(graph))
    expected = F.linear(fake_quantize(x, TOKEN), model.fc.weight, model.fc.bias).relu()
    assert torch.equal(result(graph, x), expected)


def test_a_dynamic_quantize_is_one_value(graph):
    linear = linear_of(graph)
    spec = parse_spec("int8/token/asym")
    dequantized = graph.add_qdq(graph.inputs(linear)[0], spec)
    (codes,) = graph.inputs(dequantized)
    assert graph.op(codes) is Op.QUANTIZE
    assert graph.op(dequantized) is Op.DEQUANTIZE
    assert graph.users(codes) == [dequantized]
    assert graph.shape(codes) == graph.shape(dequantized) == (2, 3, K)
    assert graph.qparams(codes) == graph.qparams(dequantized) == spec
    # codes, scale and zero, none of which is a value of its own
    assert len(dequantized.all_input_nodes) == 3
    assert not set(dequantized.all_input_nodes) & set(graph.values())
    assert set(graph.values()) >= {codes, dequantized}


@pytest.mark.parametrize("name", ["int8/channel", "int4/g2/asym", "lloyd3/tensor", "fp4_e2m1/b2/e8m0"])
def test_a_static_pair_keeps_its_qparams(graph, model, x, name):
    linear = linear_of(graph)
    weight = graph.inputs(linear)[1]
    qparams = find_qparams(model.fc.weight.detach(), parse_spec(name))
    graph.set_input(linear, 1, graph.add_qdq(weight, qparams))
    (codes,) = ops_of(graph, Op.QUANTIZE)
    (dequantized,) = ops_of(graph, Op.DEQUANTIZE)
    for value in (codes, dequantized):
        found = graph.qparams(value)
        assert (found.spec, found.stored) == (qparams.spec, qparams.stored)
        for part in ("scale", "zero", "levels"):
            assert getattr(found, part) is getattr(qparams, part)
    weight = dequantize(quantize(model.fc.weight, qparams), qparams)
    assert torch.equal(result(graph, x), F.linear(x, weight, model.fc.bias).relu())


def test_constant_codes_keep_the_qparams(graph, model, x, assert_text):
    linear = linear_of(graph)
    qparams = find_qparams(model.fc.weight.detach(), parse_spec("int8/channel/asym"))
    graph.set_input(linear, 1, graph.add_qdq(graph.inputs(linear)[1], qparams))
    (quantized,) = ops_of(graph, Op.QUANTIZE)
    codes = graph.add_constant("fc.weight_codes", quantize(model.fc.weight.detach(), qparams))
    before = result(graph, x)
    graph.replace_uses(quantized, codes)
    # the quantize and the weight
    assert graph.prune() == 2
    (dequantized,) = ops_of(graph, Op.DEQUANTIZE)
    assert graph.inputs(dequantized) == [codes]
    assert torch.equal(graph.qparams(dequantized).zero, qparams.zero)
    assert torch.equal(result(graph, x), before)
    assert "fc.weight" not in {graph.name(v) for v in graph.values()}
    assert not any(t is model.fc.weight for t in graph.constants().values())
    assert_text("fx_constant_codes", graph_text(graph))


def test_a_quantized_weight_may_have_no_values(x):
    graph = dynamo_graph(Linear(), x, meta=True)
    linear = linear_of(graph)
    weight = graph.inputs(linear)[1]
    graph.set_input(linear, 1, graph.add_qdq(weight, find_qparams(graph.constant(weight), CHANNEL)))
    (quantized,) = ops_of(graph, Op.QUANTIZE)
    graph.replace_uses(quantized, graph.add_constant("codes", torch.empty(N, K, dtype=torch.int8, device="meta")))
    graph.prune()
    assert "int8/channel static" in graph_text(graph)


def test_a_dequantized_value_has_the_dtype_of_what_was_quantized():
    x = torch.randn(3, K, dtype=torch.bfloat16)
    graph = dynamo_graph(Linear(torch.bfloat16), x)
    linear = linear_of(graph)
    graph.set_input(linear, 0, graph.add_qdq(graph.inputs(linear)[0], TOKEN))
    (dequantized,) = ops_of(graph, Op.DEQUANTIZE)
    assert dequantized.meta["example_value"].dtype is torch.bfloat16
    assert result(graph, x).dtype is torch.bfloat16


def test_new_values_of_dynamic_size_stay_dynamic(model, x):
    (opened,) = dynamo_graphs(model, x, dynamic=True)
    graph = opened.graph
    linear = linear_of(graph)
    dequantized = graph.add_qdq(graph.inputs(linear)[0], TOKEN)
    graph.set_input(linear, 0, dequantized)
    assert graph.shape(dequantized) == (None, None, K)
    assert isinstance(dequantized.meta["example_value"], FakeTensor)
    expected = F.linear(fake_quantize(x, TOKEN), model.fc.weight, model.fc.bias).relu()
    assert torch.equal(result(graph, *opened.inputs), expected)


def test_a_dequantize_takes_codes_with_the_qparams_of_their_quantize(graph, x):
    source = graph.inputs(linear_of(graph))[0]
    static = find_qparams(x, parse_spec("int8/tensor"))
    first, second, third = (graph.add_qdq(source, q) for q in (parse_spec("int8/token/asym"), TOKEN, static))
    for before in (first, second, third):
        codes = graph.inputs(before)[0]
        for after in (first, second, third):
            if codes < after:
                graph.set_input(after, 0, codes)
                assert graph.inputs(after) == [codes]
                assert str(graph.qparams(after)) == str(graph.qparams(codes))
                assert graph.module is not None


def test_codes_without_qparams_cannot_be_dequantized(graph):
    dequantized = graph.add_qdq(graph.inputs(linear_of(graph))[0], TOKEN)
    codes = graph.add_constant("codes", torch.zeros(2, 3, K, dtype=torch.int8))
    with pytest.raises(GraphError, match="qparams come from the quantize"):
        graph.set_input(dequantized, 0, codes)


def test_one_dynamic_quantize_stands_in_for_another(graph, x):
    linear = linear_of(graph)
    source = graph.inputs(linear)[0]
    second, first = (graph.add_qdq(source, TOKEN) for _ in range(2))
    graph.set_input(linear, 0, second)
    before = result(graph, x)
    graph.replace_uses(graph.inputs(second)[0], graph.inputs(first)[0])
    # the quantize and the dequantize that lost their readers
    assert graph.prune() == 2
    assert len(ops_of(graph, Op.QUANTIZE)) == 1
    assert torch.equal(result(graph, x), before)


def test_a_value_stands_in_for_what_it_is_computed_from(graph, model, x):
    linear = linear_of(graph)
    graph.replace_uses(linear, graph.add_qdq(linear, TOKEN))
    assert torch.equal(result(graph, x), fake_quantize(model.fc(x), TOKEN).relu())


def test_graph_outputs_are_replaced_too(graph, model, x):
    (returned,) = graph.outputs()
    dequantized = graph.add_qdq(returned, TOKEN)
    graph.replace_uses(returned, dequantized)
    assert graph.outputs() == [dequantized]
    assert torch.equal(result(graph, x), fake_quantize(model(x), TOKEN))


def test_an_edit_against_the_order_is_refused(graph):
    linear, relu = linear_of(graph), ops_of(graph, Op.RELU)[0]
    with pytest.raises(GraphError, match="computed after it"):
        graph.set_input(linear, 0, relu)
    with pytest.raises(GraphError, match="has 1 inputs, no number 1"):
        graph.set_input(relu, 1, linear)


def test_a_value_does_not_stand_in_for_one_that_was_read_before(x):
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(K, K)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x) + x.relu()

    graph = dynamo_graph(Branches(), x)
    (relu,) = ops_of(graph, Op.RELU)
    with pytest.raises(GraphError, match="computed after it"):
        graph.replace_uses(graph.inputs(relu)[0], relu)


def test_a_spec_that_does_not_fit_leaves_the_graph_as_it_was(graph):
    before = graph_text(graph)
    with pytest.raises(SpecError, match="divides"):
        graph.add_qdq(graph.inputs(linear_of(graph))[0], parse_spec("int8/g4"))
    assert graph_text(graph) == before


def test_only_quantize_and_dequantize_have_qparams(graph):
    with pytest.raises(GraphError, match="neither quantizes nor dequantizes"):
        graph.qparams(linear_of(graph))


def test_a_missing_bias_can_be_set(x):
    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(K, N, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x)

    model = Bare()
    graph = dynamo_graph(model, x)
    bias = graph.add_constant("fc.bias", torch.randn(N))
    graph.set_input(linear_of(graph), 2, bias)
    assert torch.equal(result(graph, x), F.linear(x, model.fc.weight, graph.constant(bias)))


def test_an_input_of_an_unknown_op_can_be_set(x):
    class Concatenated(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([x, x.relu(), x])

    graph = dynamo_graph(Concatenated(), x)
    (cat,) = ops_of(graph, Op.OTHER)
    source, relu = graph.inputs(cat)
    graph.set_input(cat, 0, relu)
    assert torch.equal(result(graph, x), torch.cat([x.relu()] * 3))
    assert graph.users(source) == [relu]


def test_run_returns_what_was_watched(graph, model, x):
    linear = linear_of(graph)
    codes = graph.inputs(graph.add_qdq(graph.inputs(linear)[0], TOKEN))[0]
    output, seen = graph.run([x], [linear, codes])
    assert torch.equal(output[0] if isinstance(output, tuple) else output, model(x))
    assert torch.equal(seen[linear], model.fc(x))
    assert torch.equal(seen[codes], quantize(x, find_qparams(x, TOKEN)))
    assert not seen[linear].requires_grad


def test_a_watched_value_is_seen_before_it_is_written_to(x):
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(K, K)

        def forward(self, x: Tensor) -> Tensor:
            y = self.fc(x)
            y += 1
            return y

    model = InPlace()
    graph = dynamo_graph(model, x)
    _, seen = graph.run([x], ops_of(graph, Op.LINEAR))
    assert torch.equal(seen[linear_of(graph)], model.fc(x))


def test_a_tensor_that_the_graph_writes_to_is_no_constant(x):
    class Counter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("count", torch.zeros(K))

        def forward(self, x: Tensor) -> Tensor:
            self.count.add_(1)
            return x * self.count

    graph = dynamo_graph(Counter(), x)
    (count,) = ops_of(graph, Op.CONSTANT)
    assert graph.constant(count) is None


def test_prune_keeps_what_acts(x):
    class Writes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("count", torch.zeros(1))

        def forward(self, x: Tensor) -> Tensor:
            self.count.add_(1)
            return x.relu()

    graph = dynamo_graph(Writes(), x)
    assert graph.prune() == 0
    assert "method add_" in [graph.label(v) for v in graph.values()]


def test_calls_can_be_found_by_their_target(graph):
    found = graph.module.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default)
    assert list(found) == ops_of(graph, Op.LINEAR)


def test_attributes_do_not_hide_each_other(graph):
    first = graph.add_constant("a.forward", torch.zeros(1))
    second = graph.add_constant("b.forward", torch.ones(1))
    assert [graph.name(v) for v in (first, second)] == ["a.forward", "b.forward"]
    assert torch.equal(graph.constant(second), torch.ones(1))
    assert callable(graph.module.forward)


def test_mlp_quantized_by_hand(assert_text):
    model, x = net("mlp")
    graph = dynamo_graph(model, x)
    for linear in ops_of(graph, Op.LINEAR):
        source, weight, _ = graph.inputs(linear)
        graph.set_input(linear, 0, graph.add_qdq(source, TOKEN))
        graph.set_input(linear, 1, graph.add_qdq(weight, find_qparams(graph.constant(weight), CHANNEL)))
    assert_text("fx_mlp_quantized", graph_text(graph))
    error = (result(graph, x) - model(x)).abs().max()
    assert 0 < error < 0.05


def test_added_ops_compute_what_they_are_called(graph, model, x):
    linear = linear_of(graph)
    source = graph.inputs(linear)[0]
    channels, threshold = torch.tensor([K - 1, 0]), torch.tensor(2.0)
    selected = graph.add_op(Op.SELECT, [source, graph.add_constant("fc.channels", channels)])
    thin = graph.add_constant("fc.thin", model.fc.weight.detach()[:, channels].clone())
    tail = graph.add_op(Op.LINEAR, [selected, thin, None], "fc.outliers")
    outliers = graph.add_op(Op.OUTLIERS, [source, graph.add_constant("fc.threshold", threshold)])
    total = graph.add_op(Op.ADD, [linear, graph.add_op(Op.MUL, [tail, graph.add_constant("two", torch.tensor(2.0))])])
    graph.replace_uses(linear, total)
    assert [graph.op(v) for v in (selected, tail, outliers, total)] == [Op.SELECT, Op.LINEAR, Op.OUTLIERS, Op.ADD]
    assert graph.name(tail) == "fc.outliers"
    assert graph.shape(tail) == (2, 3, N)
    _, seen = graph.run([x], [selected, outliers])
    assert torch.equal(seen[selected], x[..., channels])
    reached = (x.abs() >= threshold).flatten(0, 1).any(0)
    assert torch.equal(seen[outliers], x * reached)
    expected = F.linear(x, model.fc.weight, model.fc.bias) + 2 * F.linear(
        x[..., channels], model.fc.weight[:, channels]
    )
    torch.testing.assert_close(result(graph, x), expected.relu())


def test_only_some_kinds_can_be_added(graph):
    with pytest.raises(GraphError, match="cannot add 'softmax'"):
        graph.add_op(Op.SOFTMAX, [graph.inputs(linear_of(graph))[0]])
