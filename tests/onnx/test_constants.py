"""Constants: of every type, seen through views, and read from a file no sooner than somebody asks."""

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch

from qcompile.backends.onnx.door import open_onnx
from qcompile.backends.onnx.values import constant
from qcompile.errors import GraphError
from qcompile.graph import Op
from tests.onnx.models import K, N, all_results, by_onnxruntime, model, ops_of

DTYPES = [torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.bool, torch.int64]


@pytest.mark.parametrize("dtype", DTYPES)
def test_constants_of_every_type_come_back(dtype: torch.dtype, tmp_path: Any) -> None:
    graph = open_onnx(model("y = Relu(x)", returns=f"float[B, T, {K}] y"))
    given = torch.tensor([[0.0, 1.0, 3.0], [2.0, 0.5, 4.0]]).to(dtype)
    value = graph.add_constant("c", given)
    graph.model.graph.outputs.append(value)
    assert graph.constant(value) is given
    path = tmp_path / "m.onnx"
    ir.save(graph.model, path, external_data="m.data")
    read = ir.load(path).graph.initializers["c"]
    for source in (read, ir.from_proto(ir.to_proto(graph.model)).graph.initializers["c"]):
        found = constant(source)
        assert found is not None
        assert found.dtype is dtype
        assert torch.equal(found.view(torch.uint8), given.view(torch.uint8))


def test_constants_are_seen_through_views_and_vectors_through_sums() -> None:
    body = """t = Transpose<perm = [1, 0]>(w) u = Unsqueeze(t, zero) r = Reshape(u, sizes) a = Add(one, g)
        c = Cast<to = 10>(a) m = Mul(w, w) k = MatMul(r, m) q = Mul(k, a) z = Cast<to = 10>(q) y = Mul(z, c)"""
    W, g = torch.randn(3, 3), torch.randn(3)
    numbers = {"zero": np.array([0]), "sizes": np.array([9, -1]), "one": np.float32(1)}
    source = model(
        body.replace("MatMul(r, m)", "MatMul(x, m)"),
        inputs="float[B, 3] x",
        returns="float16[B, 3] y",
        w=W,
        g=g,
        **numbers,
    )
    source.graph.outputs.append(next(v for n in source.graph for v in n.outputs if v.name == "r"))
    graph = open_onnx(source)
    named = {v.name: v for v in graph.values()}
    assert torch.equal(graph.constant(named["r"]), W.t().reshape(9, 1))
    assert torch.equal(graph.constant(named["a"]), 1 + g)
    assert torch.equal(graph.constant(named["c"]), (1 + g).half())
    # a computed matrix is no constant: it would be held twice
    assert graph.constant(named["m"]) is None


def test_nothing_of_external_data_is_read_at_the_door(tmp_path: Any) -> None:
    W, b, x = torch.randn(K, N), torch.randn(N), torch.randn(2, 3, K)
    source = model("p = MatMul(x, fc__weight) y = Add(p, fc__bias)", fc__weight=W, fc__bias=b)
    before = by_onnxruntime(source, x)[0]
    path = tmp_path / "m.onnx"
    ir.save(source, path, external_data="m.data", size_threshold_bytes=0)
    data = (tmp_path / "m.data").read_bytes()
    (tmp_path / "m.data").unlink()
    graph = open_onnx(path)
    with pytest.raises(GraphError, match=r"'fc.weight' cannot be read.*copy the data file"):
        graph.constant(graph.inputs(ops_of(graph, Op.LINEAR)[0])[1])
    (tmp_path / "m.data").write_bytes(data)
    torch.testing.assert_close(all_results(graph, x)[0], before)


def test_large_constants_are_read_in_place(tmp_path: Any) -> None:
    W, x = torch.randn(64, 48), torch.randn(2, 3, 64)
    source = model("y = MatMul(x, w)", inputs="float[B, T, 64] x", returns="float[B, T, 48] y", w=W)
    path = tmp_path / "m.onnx"
    ir.save(source, path, external_data="m.data", size_threshold_bytes=0)
    graph = open_onnx(path)
    torch.testing.assert_close(all_results(graph, x)[0], x @ W)
    weight = graph.inputs(ops_of(graph, Op.LINEAR)[0])[1]
    first, second = constant(weight), constant(weight)
    assert first is not None
    assert second is not None
    # a view of the mapped file, turned, and no copy of it
    assert first.data_ptr() == second.data_ptr()
    assert first.stride() == (1, 48)
    assert torch.equal(first, W.t())


def test_a_shared_constant_is_never_written() -> None:
    g, w = torch.rand(K) + 0.5, torch.randn(K, N)
    body = """a = LayerNormalization<axis = -1>(x, norm__weight) p = MatMul(a, w)
        c = LayerNormalization<axis = -1>(x, norm__weight) q = MatMul(c, w) y = Add(p, q)"""
    source = model(body, norm__weight=g, w=w)
    graph = open_onnx(source)
    first, second = ops_of(graph, Op.LAYER_NORM)
    shared = graph.inputs(first)[1]
    assert graph.inputs(second)[1] is shared
    graph.set_input(first, 1, graph.add_constant("norm.weight.folded", g * 2))
    assert graph.inputs(second)[1] is shared
    assert torch.equal(constant(shared), g)
    assert np.array_equal(source.graph.initializers["norm.weight"].const_value.numpy(), g.numpy())


@pytest.mark.parametrize("kind", ["INT4", "UINT4", "FLOAT4E2M1", "STRING"])
def test_a_type_that_torch_does_not_have_is_no_constant(kind: str) -> None:
    held = ir.tensor(["a", "b"] if kind == "STRING" else np.ones(2, ir.DataType[kind].numpy()), name="c")
    assert held.dtype is ir.DataType[kind]
    value = ir.Value(name="c", shape=ir.Shape([2]), type=ir.TensorType(held.dtype), const_value=held)
    graph = open_onnx(model("y = Relu(x)", returns=f"float[B, T, {K}] y"))
    graph.model.graph.register_initializer(value)
    assert graph.op(value) is Op.CONSTANT
    assert graph.constant(value) is None


def test_a_sum_over_a_deep_model_is_no_constant_and_soon_known_to_be_none() -> None:
    depth = 1200
    body = " ".join(f"r{i} = Relu(x{i}) x{i + 1} = Add(x{i}, r{i})" for i in range(depth))
    graph = open_onnx(model(f"x0 = Neg(x) {body} y = MatMul(x{depth}, w)", w=torch.randn(K, N)))
    (linear,) = ops_of(graph, Op.LINEAR)
    assert graph.constant(graph.inputs(linear)[0]) is None
