"""The lens on a live ONNX model: what it shows, what its edits do, and what they refuse."""

import numpy as np
import onnx_ir as ir
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from qcompile.backends.onnx.door import open_onnx
from qcompile.backends.onnx.graph import OnnxGraph
from qcompile.errors import GraphError, SpecError
from qcompile.graph import Op
from qcompile.numerics import dequantize, fake_quantize, find_qparams, quantize
from qcompile.spec import parse_spec
from tests.hosts import ordered_text
from tests.onnx.models import K, N, all_results, model, ops_of

TOKEN, CHANNEL = parse_spec("int8/token"), parse_spec("int8/channel")
BODY = "p = MatMul(x, fc__weight) l = Add(p, fc__bias) y = Relu(l)"


@pytest.fixture
def x() -> Tensor:
    torch.manual_seed(0)
    return torch.randn(2, 3, K)


@pytest.fixture
def W() -> Tensor:
    return torch.randn(N, K)


@pytest.fixture
def b() -> Tensor:
    return torch.randn(N)


@pytest.fixture
def graph(W: Tensor, b: Tensor) -> OnnxGraph:
    return open_onnx(model(BODY, fc__weight=W.t().contiguous(), fc__bias=b))


def linear_of(graph: OnnxGraph) -> ir.Value:
    return ops_of(graph, Op.LINEAR)[0]


def result(graph: OnnxGraph, *args: Tensor) -> Tensor:
    return all_results(graph, *args)[0]


def expected(x: Tensor, W: Tensor, b: Tensor) -> Tensor:
    return F.linear(x, W, b).relu()


def test_what_the_lens_shows(graph: OnnxGraph, W: Tensor) -> None:
    linear = linear_of(graph)
    x, weight, bias = graph.inputs(linear)
    assert [graph.op(v) for v in (x, weight, bias, linear)] == [Op.INPUT, Op.CONSTANT, Op.CONSTANT, Op.LINEAR]
    assert [graph.name(v) for v in (weight, bias, linear)] == ["fc.weight", "fc.bias", "fc"]
    assert graph.shape(x) == (None, None, K)
    assert graph.shape(linear) == (None, None, N)
    assert graph.constant(x) is None
    assert torch.equal(graph.constant(weight), W)
    assert graph.users(x) == [linear]
    (relu,) = graph.users(linear)
    assert graph.label(relu) == "Relu"
    assert graph.outputs() == [relu]
    order = list(graph.values())
    assert all(order.index(v) < order.index(linear) for v in (x, weight, bias))


def test_a_dynamic_quantize_is_one_value(graph: OnnxGraph, x: Tensor, W: Tensor, b: Tensor) -> None:
    linear = linear_of(graph)
    spec = parse_spec("int8/token/asym")
    dequantized = graph.add_qdq(graph.inputs(linear)[0], spec)
    graph.set_input(linear, 0, dequantized)
    (codes,) = graph.inputs(dequantized)
    assert [graph.op(codes), graph.op(dequantized)] == [Op.QUANTIZE, Op.DEQUANTIZE]
    assert graph.users(codes) == [dequantized]
    assert graph.users(graph.inputs(codes)[0]) == [codes]
    assert graph.shape(codes) == graph.shape(dequantized) == (None, None, K)
    assert graph.qparams(codes) == graph.qparams(dequantized) == spec
    # scale and zero are no values of their own
    assert not set(codes.producer().outputs[1:]) & set(graph.values())
    torch.testing.assert_close(result(graph, x), expected(fake_quantize(x, spec), W, b))


@pytest.mark.parametrize("name", ["int8/channel", "int4/g2/asym", "lloyd3/tensor", "fp4_e2m1/b2/e8m0", "nf4/g3/dq256"])
def test_a_static_pair_keeps_its_qparams(graph: OnnxGraph, x: Tensor, W: Tensor, b: Tensor, name: str) -> None:
    linear = linear_of(graph)
    qparams = find_qparams(W, parse_spec(name))
    graph.set_input(linear, 1, graph.add_qdq(graph.inputs(linear)[1], qparams))
    (codes,), (dequantized,) = ops_of(graph, Op.QUANTIZE), ops_of(graph, Op.DEQUANTIZE)
    for value in (codes, dequantized):
        found = graph.qparams(value)
        assert (found.spec, found.stored) == (qparams.spec, qparams.stored)
        for part in ("scale", "zero", "levels"):
            assert getattr(found, part) is getattr(qparams, part)
    _, seen = graph.run([x], [codes, dequantized])
    assert torch.equal(seen[codes], quantize(W, qparams))
    assert torch.equal(seen[dequantized], dequantize(quantize(W, qparams), qparams))


def test_constant_codes_keep_the_qparams(graph: OnnxGraph, x: Tensor, W: Tensor) -> None:
    linear = linear_of(graph)
    qparams = find_qparams(W, parse_spec("int8/channel/asym"))
    graph.set_input(linear, 1, graph.add_qdq(graph.inputs(linear)[1], qparams))
    before = result(graph, x)
    codes = graph.add_constant("fc.weight_codes", quantize(W, qparams))
    graph.replace_uses(ops_of(graph, Op.QUANTIZE)[0], codes)
    # the quantize and the weight
    assert graph.prune() == 2
    (dequantized,) = ops_of(graph, Op.DEQUANTIZE)
    assert graph.inputs(dequantized) == [codes]
    assert torch.equal(graph.qparams(dequantized).zero, qparams.zero)
    assert torch.equal(result(graph, x), before)
    assert "fc.weight" not in graph.model.graph.initializers


@pytest.mark.parametrize("kind", ["float16", "double"])
def test_a_dequantized_value_has_the_dtype_of_what_was_quantized(kind: str) -> None:
    dtype = {"float16": torch.float16, "double": torch.float64}[kind]
    graph = open_onnx(model("y = Relu(x)", inputs=f"{kind}[B, 4] x", returns=f"{kind}[B, 4] y"))
    (relu,) = ops_of(graph, Op.RELU)
    graph.set_input(relu, 0, graph.add_qdq(graph.inputs(relu)[0], TOKEN))
    x = torch.randn(3, 4, dtype=dtype)
    assert torch.equal(result(graph, x), fake_quantize(x, TOKEN).relu())


def test_a_dequantize_takes_codes_with_the_qparams_of_their_quantize(graph: OnnxGraph, x: Tensor) -> None:
    source = graph.inputs(linear_of(graph))[0]
    static = find_qparams(x, parse_spec("int8/tensor"))
    pairs = [graph.add_qdq(source, q) for q in (parse_spec("int8/token/asym"), TOKEN, static)]
    order = list(graph.values())
    for before in pairs:
        codes = graph.inputs(before)[0]
        for after in pairs:
            if order.index(codes) < order.index(after):
                graph.set_input(after, 0, codes)
                assert graph.inputs(after) == [codes]
                assert str(graph.qparams(after)) == str(graph.qparams(codes))
                graph.run([x], [after])


def test_codes_without_qparams_cannot_be_dequantized(graph: OnnxGraph) -> None:
    dequantized = graph.add_qdq(graph.inputs(linear_of(graph))[0], TOKEN)
    with pytest.raises(GraphError, match="qparams come from the quantize"):
        graph.set_input(dequantized, 0, graph.add_constant("codes", torch.zeros(2, 3, K, dtype=torch.int8)))


def test_one_dynamic_quantize_stands_in_for_another(graph: OnnxGraph, x: Tensor) -> None:
    linear = linear_of(graph)
    source = graph.inputs(linear)[0]
    second, first = (graph.add_qdq(source, TOKEN) for _ in range(2))
    graph.set_input(linear, 0, second)
    before = result(graph, x)
    with pytest.raises(GraphError, match="only a dynamic quantize can stand in"):
        graph.replace_uses(graph.inputs(second)[0], source)
    graph.replace_uses(graph.inputs(second)[0], graph.inputs(first)[0])
    assert graph.prune() == 2
    assert len(ops_of(graph, Op.QUANTIZE)) == 1
    assert torch.equal(result(graph, x), before)


def test_outputs_are_replaced_under_their_names(graph: OnnxGraph, x: Tensor, W: Tensor, b: Tensor) -> None:
    (returned,) = graph.outputs()
    dequantized = graph.add_qdq(returned, TOKEN)
    graph.replace_uses(returned, dequantized)
    assert graph.outputs() == [dequantized]
    assert dequantized.name == "y"
    assert returned.name != "y"
    found = result(graph, x)
    torch.testing.assert_close(found, fake_quantize(expected(x, W, b), TOKEN))


def test_an_input_that_is_returned_stays_the_input(graph: OnnxGraph, x: Tensor) -> None:
    (returned,) = graph.outputs()
    graph.replace_uses(returned, graph.model.graph.inputs[0])
    assert [v.name for v in (*graph.model.graph.inputs, *graph.outputs())] == ["x", "y"]
    assert torch.equal(result(graph, x), x)


def test_an_edit_against_the_order_is_refused(graph: OnnxGraph) -> None:
    linear, relu = linear_of(graph), ops_of(graph, Op.RELU)[0]
    with pytest.raises(GraphError, match="computed after it"):
        graph.set_input(linear, 0, relu)
    with pytest.raises(GraphError, match="has 1 inputs, no number 1"):
        graph.set_input(relu, 1, linear)
    with pytest.raises(GraphError, match="neither quantizes nor dequantizes"):
        graph.qparams(linear)
    with pytest.raises(GraphError, match="cannot add 'softmax'; what can be added: linear, mul"):
        graph.add_op(Op.SOFTMAX, [linear])


def test_a_value_does_not_stand_in_for_one_that_was_read_before() -> None:
    graph = open_onnx(model("a = Neg(x) b = Relu(x) y = Add(a, b)", returns=f"float[B, T, {K}] y"))
    (relu,) = ops_of(graph, Op.RELU)
    with pytest.raises(GraphError, match="a cannot read b, which is computed after it"):
        graph.replace_uses(graph.inputs(relu)[0], relu)


def test_what_does_not_fit_leaves_the_graph_as_it_was(graph: OnnxGraph) -> None:
    linear, before = linear_of(graph), ordered_text(graph)
    with pytest.raises(SpecError, match="divides"):
        graph.add_qdq(graph.inputs(linear)[0], parse_spec("int8/g4"))
    assert ordered_text(graph) == before
    odd = graph.add_constant("odd", torch.ones(N, K + 1))
    with pytest.raises(GraphError, match="cannot read"):
        graph.add_op(Op.LINEAR, [graph.inputs(linear)[0], odd, None])
    with pytest.raises(GraphError, match="do not go together"):
        graph.add_op(Op.MUL, [linear, odd])


def test_a_missing_bias_can_be_set(W: Tensor, b: Tensor, x: Tensor) -> None:
    graph = open_onnx(model("y = MatMul(x, w)", w=W.t().contiguous()))
    graph.set_input(linear_of(graph), 2, graph.add_constant("fc.bias", b))
    torch.testing.assert_close(result(graph, x), F.linear(x, W, b))


def test_an_input_of_an_unknown_op_can_be_set(x: Tensor) -> None:
    graph = open_onnx(model("r = Relu(x) y = Concat<axis = 0>(x, r, x)", returns=f"float[B, T, {K}] y"))
    (concatenated,) = ops_of(graph, Op.OTHER)
    source, relu = graph.inputs(concatenated)
    graph.set_input(concatenated, 0, relu)
    assert torch.equal(result(graph, x), torch.cat([x.relu()] * 3))
    assert graph.users(source) == [relu]


def test_added_ops_compute_what_they_are_called(graph: OnnxGraph, x: Tensor, W: Tensor, b: Tensor) -> None:
    linear = linear_of(graph)
    source = graph.inputs(linear)[0]
    channels, threshold = torch.tensor([K - 1, 0]), torch.tensor(2.0)
    selected = graph.add_op(Op.SELECT, [source, graph.add_constant("fc.channels", channels)])
    tail = graph.add_op(
        Op.LINEAR, [selected, graph.add_constant("fc.thin", W[:, channels].clone()), None], "fc.outliers"
    )
    outliers = graph.add_op(Op.OUTLIERS, [source, graph.add_constant("fc.threshold", threshold)])
    two = graph.add_constant("two", torch.tensor(2.0, dtype=torch.float64), like=linear)
    total = graph.add_op(Op.ADD, [linear, graph.add_op(Op.MUL, [tail, two])])
    graph.replace_uses(linear, total)
    assert [graph.op(v) for v in (selected, tail, outliers, total)] == [Op.SELECT, Op.LINEAR, Op.OUTLIERS, Op.ADD]
    assert graph.name(tail) == "fc.outliers"
    assert graph.shape(selected) == (None, None, 2)
    assert graph.shape(tail) == graph.shape(total) == (None, None, N)
    _, seen = graph.run([x], [selected, outliers])
    assert torch.equal(seen[selected], x[..., channels])
    assert torch.equal(seen[outliers], x * (x.abs() >= threshold).flatten(0, 1).any(0))
    torch.testing.assert_close(
        result(graph, x), (F.linear(x, W, b) + 2 * F.linear(x[..., channels], W[:, channels])).relu()
    )


def test_constants_of_one_name_stay_apart(graph: OnnxGraph) -> None:
    first, second = (graph.add_constant("a.weight", torch.full((1,), float(i))) for i in range(2))
    assert [graph.name(v) for v in (first, second)] == ["a.weight"] * 2
    assert first.name != second.name
    assert torch.equal(graph.constant(second), torch.ones(1))


def test_a_tied_head_reads_the_table_itself() -> None:
    W = torch.randn(8, K)
    body = "e = Gather(table__weight, ids) t = Transpose<perm = [1, 0]>(table__weight) y = MatMul(e, t)"
    source = model(body, inputs="int64[B, T] ids", returns="float[B, T, 8] y", table__weight=W)
    graph = open_onnx(source)
    (table,), (head,) = ops_of(graph, Op.EMBEDDING), ops_of(graph, Op.LINEAR)
    assert graph.inputs(table)[1] is graph.inputs(head)[1]
    qparams = find_qparams(W, CHANNEL)
    graph.set_input(table, 1, graph.add_qdq(graph.inputs(table)[1], qparams))
    assert graph.op(table) is Op.EMBEDDING
    ids = torch.tensor([[1, 7, 0]])
    held = dequantize(quantize(W, qparams), qparams)
    torch.testing.assert_close(result(graph, ids), held[ids] @ W.t())


@pytest.mark.parametrize(
    ("body", "op"),
    [
        ("y = Gather<axis = 2>(x, list)", Op.SELECT),
        ("y = Gather<axis = -1>(x, list)", Op.SELECT),
        ("y = Gather<axis = 1>(x, list)", Op.OTHER),
        ("z = Gather<axis = 2>(x, one) y = Relu(z)", Op.OTHER),
        ("y = LayerNormalization<axis = -1>(x, g)", Op.LAYER_NORM),
        ("y = LayerNormalization<axis = 1>(x, wide)", Op.OTHER),
        ("y, m = LayerNormalization<axis = -1>(x, g) z = Relu(m)", Op.LAYER_NORM),
        ("y = BatchNormalization(x, t, t, t, t)", Op.BATCH_NORM),
        ("y = Softmax(x)", Op.SOFTMAX),
        ("y = Flatten(x)", Op.RESHAPE),
        ("y = Conv(x, kernel)", Op.CONV),
        ("y = com.microsoft.Gelu(x)", Op.OTHER),
    ],
)
def test_kinds_depend_on_what_is_meant(body: str, op: Op) -> None:
    numbers = {"list": np.array([1, 0]), "one": np.array(1), "g": np.ones(K, "f"), "wide": np.ones((3, K), "f")}
    numbers |= {"t": np.ones(3, "f"), "kernel": np.ones((2, 3, 1), "f")}
    graph = open_onnx(model(body, inputs=f"float[B, 3, {K}] x", returns="float y", **numbers))
    assert graph.op(next(v for v in graph.values() if v.producer() is not None)) is op


@pytest.mark.parametrize(
    ("body", "inputs", "op"),
    [
        ("y = Attention(q, k, v)", "float[B, 4, T, 8] q, float[B, 2, S, 8] k, float[B, 2, S, 8] v", Op.ATTENTION),
        (
            "y = Attention<q_num_heads = 2, kv_num_heads = 2>(q, k, v)",
            "float[B, T, 16] q, float[B, S, 16] k, float[B, S, 16] v",
            Op.ATTENTION,
        ),
        # heads of values that several heads of queries share do not lie where the lens could find them
        (
            "y = Attention<q_num_heads = 4, kv_num_heads = 2>(q, k, v)",
            "float[B, T, 32] q, float[B, S, 16] k, float[B, S, 16] v",
            Op.OTHER,
        ),
        (
            "y, pk, pv = Attention(q, k, v, , c, c) z = Add(pk, pv)",
            "float[B, 4, T, 8] q, float[B, 4, S, 8] k, float[B, 4, S, 8] v, float[B, 4, P, 8] c",
            Op.OTHER,
        ),
    ],
)
def test_attention_is_left_alone_unless_all_it_does_is_to_mix_tokens(body: str, inputs: str, op: Op) -> None:
    graph = open_onnx(model(body, inputs=inputs, returns="float y", opset=23))
    assert graph.op(graph.outputs()[0]) is op


def test_values_that_a_branch_reads_have_a_user() -> None:
    text = """<ir_version: 10, opset_import: ["" : 21]> g (bool c, float[B, 4] x) => (float[B, 4] y) {
        a = Relu(x)
        y = If (c) <
            then_branch = t () => (float[B, 4] u) { u = Neg(a) },
            else_branch = e () => (float[B, 4] w) { w = Abs(a) }
        >
    }"""
    source = ir.from_onnx_text(text)
    graph = open_onnx(source)
    (relu,) = ops_of(graph, Op.RELU)
    (branched,) = graph.users(relu)
    assert relu in graph.inputs(branched)
    dequantized = graph.add_qdq(relu, TOKEN)
    graph.replace_uses(relu, dequantized)
    x = torch.randn(3, 4)
    assert torch.equal(result(graph, torch.tensor(True), x), -fake_quantize(x.relu(), TOKEN))
    assert graph.prune() == 0


def test_run_says_what_does_not_fit(graph: OnnxGraph, x: Tensor) -> None:
    with pytest.raises(GraphError, match=r"takes 1 inputs \('x'\), got 2"):
        graph.run([x, x], [])
    with pytest.raises(GraphError, match="'x' takes float, got int64"):
        graph.run([x.long()], [])
    with pytest.raises(GraphError, match="onnxruntime failed"):
        graph.run([x[..., :2]], [])


def test_run_returns_what_was_watched(graph: OnnxGraph, x: Tensor, W: Tensor, b: Tensor) -> None:
    linear = linear_of(graph)
    source, weight, _ = graph.inputs(linear)
    codes = graph.inputs(graph.add_qdq(source, TOKEN))[0]
    output, seen = graph.run([x], [linear, codes, source, weight])
    torch.testing.assert_close(output, expected(x, W, b))
    torch.testing.assert_close(seen[linear], F.linear(x, W, b))
    assert torch.equal(seen[codes], quantize(x, find_qparams(x, TOKEN)))
    assert torch.equal(seen[source], x)
    assert torch.equal(seen[weight], W)
