"""Every spelling becomes the canonical op, and the graph computes what onnxruntime makes of the file as it came."""

import math

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import Tensor

from qcompile.backends.onnx.door import open_onnx
from qcompile.backends.onnx.ops import DOMAIN
from qcompile.graph import Op
from qcompile.sites import left_over
from tests.hosts import ordered_text
from tests.onnx.models import K, N, all_results, by_onnxruntime, model, ops_of

torch.manual_seed(0)
W, B, G, C = torch.randn(K, N), torch.randn(N), torch.randn(K), torch.randn(K)
X, FLAT = torch.randn(2, 3, K), torch.randn(5, K)
LINEAR = 'linear %0, const[4, 6] "fc.weight", '
ROOT, CUBIC = math.sqrt(0.5), 0.044715
F32 = np.float32


def check(source: ir.Model, *args: Tensor, within: float = 1e-5) -> str:
    """Opens the model; the graph's results are those of onnxruntime, and the model is as it was. Returns the text."""
    before, bits = by_onnxruntime(source, *args), ir.to_proto(source).SerializeToString()
    graph = open_onnx(source)
    for found, expected in zip(all_results(graph, *args), before, strict=True):
        torch.testing.assert_close(found, expected, rtol=within, atol=within, equal_nan=True)
    assert ir.to_proto(source).SerializeToString() == bits
    return ordered_text(graph)


LINEARS = {
    "matmul": ("y = MatMul(x, fc__weight)", {"fc__weight": W}, "none"),
    "matmul and add": ("p = MatMul(x, fc__weight) y = Add(p, fc__bias)", {"fc__weight": W, "fc__bias": B}, "bias"),
    "add and matmul": ("p = MatMul(x, fc__weight) y = Add(fc__bias, p)", {"fc__weight": W, "fc__bias": B}, "bias"),
    "bias of rank 3": (
        "p = MatMul(x, fc__weight) y = Add(p, fc__bias)",
        {"fc__weight": W, "fc__bias": B.reshape(1, 1, N)},
        "bias",
    ),
    "transposed": (
        "t = Transpose<perm = [1, 0]>(fc__weight) y = MatMul(x, t)",
        {"fc__weight": W.t().contiguous()},
        "none",
    ),
    "transposed without perm": (
        "t = Transpose(fc__weight) y = MatMul(x, t)",
        {"fc__weight": W.t().contiguous()},
        "none",
    ),
    "transposed twice": (
        "t = Transpose(fc__weight) u = Transpose(t) y = MatMul(x, u)",
        {"fc__weight": W},
        "none",
    ),
    "through identity": ("t = Identity(fc__weight) y = MatMul(x, t)", {"fc__weight": W}, "none"),
}


@pytest.mark.parametrize("name", LINEARS)
def test_linears_of_matmul(name: str) -> None:
    body, constants, bias = LINEARS[name]
    text = check(model(body, **constants), X)
    assert LINEAR + ('const[4] "fc.bias"' if bias == "bias" else "none") in text
    assert len(text.splitlines()) == 3


GEMMS = {
    "gemm": ("y = Gemm(x, fc__weight)", W, None),
    "gemm with bias": ("y = Gemm(x, fc__weight, fc__bias)", W, B),
    "gemm, transB": ("y = Gemm<transB = 1>(x, fc__weight, fc__bias)", W.t().contiguous(), B),
    "gemm, transB of a transpose": ("t = Transpose(fc__weight) y = Gemm<transB = 1>(x, t, fc__bias)", W, B),
    "gemm with a bias [1, N]": ("y = Gemm(x, fc__weight, fc__bias)", W, B[None]),
}


@pytest.mark.parametrize("name", GEMMS)
def test_linears_of_gemm(name: str) -> None:
    body, weight, bias = GEMMS[name]
    constants = {"fc__weight": weight} | ({} if bias is None else {"fc__bias": bias})
    text = check(model(body, inputs=f"float[B, {K}] x", returns="float[B, N] y", **constants), FLAT)
    assert LINEAR + ("none" if bias is None else 'const[4] "fc.bias"') in text
    assert len(text.splitlines()) == 3


@pytest.mark.parametrize(
    ("body", "more", "kept"),
    [
        ("y = Gemm(x, w, c)", {"c": torch.tensor([2.0])}, "add"),
        ("y = Gemm(x, w, c)", {"c": torch.randn(5, N)}, "add"),
        ("y = Gemm<beta = 0.5>(x, w, c)", {"c": torch.randn(5, N)}, "add"),
        ("y = Gemm<beta = 0.5>(x, w, c)", {"c": torch.tensor(2.0)}, "add"),
        ("d = MatMul(x, w) e = Relu(d) y = Gemm<beta = -0.5, alpha = 3.0>(x, w, e)", {}, "add"),
        ("p = MatMul(x, w) y = Add(p, c)", {"c": torch.tensor(2.0)}, "add"),
        ("p = MatMul(x, w) q = Add(p, c) y = Mul(q, p)", {"c": B}, "add"),
        ("p = MatMul(x, w) y = Add(p, p)", {}, "add"),
    ],
)
def test_what_is_added_stays_an_addition_unless_it_is_a_bias(body: str, more: dict[str, Tensor], kept: str) -> None:
    text = check(model(body, inputs=f"float[5, {K}] x", returns="float[5, N] y", w=W, **more), FLAT)
    assert f" = {kept} " in text


@pytest.mark.parametrize("bias", [None, B, B[None]])
@pytest.mark.parametrize("name", ["alpha", "beta", "both", "columns", "no bias"])
@pytest.mark.parametrize("turned", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_factors_of_a_gemm_go_into_weight_and_bias(
    name: str, bias: Tensor | None, turned: int, dtype: torch.dtype
) -> None:
    factors = {"alpha": "alpha = 0.3", "beta": "beta = -1.7", "both": "alpha = 2.5, beta = 0.1"}
    factors |= {"columns": "transA = 1, alpha = 0.3", "no bias": "beta = 0.0"}
    kind = "float" if dtype is torch.float32 else "float16"
    weight = (W.t().contiguous() if turned else W).to(dtype)
    body = f"y = Gemm<transB = {turned}, {factors[name]}>(x, fc__weight{'' if bias is None else ', fc__bias'})"
    constants = {"fc__weight": weight} | ({} if bias is None else {"fc__bias": bias.to(dtype)})
    columns = name == "columns"
    read = f"{kind}[{K}, B] x" if columns else f"{kind}[B, {K}] x"
    source = model(body, inputs=read, returns=f"{kind}[B, N] y", **constants)
    x = (FLAT.t().contiguous() if columns else FLAT).to(dtype)
    # a weight that is rounded with its factor differs by half a unit in the last place, and so do K products of it
    text = check(source, x, within=1e-5 if dtype is torch.float32 else 1e-2)
    has_bias = bias is not None and name != "no bias"
    assert 'const[4, 6] "fc.weight", ' + ('const[4] "fc.bias"' if has_bias else "none") in text
    assert [line.split()[2] for line in text.splitlines()[1:-1]] == ["transpose"] * columns + ["linear"]


def test_a_weight_with_several_factors_is_copied_for_each() -> None:
    body = "a = Gemm(x, w) b = Gemm<alpha = 2.0>(x, w) c = Gemm<alpha = 2.0>(x, w) d = Add(a, b) y = Add(d, c)"
    source = model(body, inputs=f"float[B, {K}] x", returns="float[B, N] y", w=W)
    check(source, FLAT)
    graph = open_onnx(source)
    first, second, third = (graph.inputs(v)[1] for v in ops_of(graph, Op.LINEAR))
    assert second is third
    assert torch.equal(graph.constant(second), 2 * graph.constant(first))


def test_a_factor_that_a_weight_has_no_room_for_stays() -> None:
    source = model(
        "y = Gemm<alpha = 100.0>(x, w)",
        inputs=f"float16[B, {K}] x",
        returns="float16[B, N] y",
        w=torch.full((K, N), 1000.0).half(),
    )
    assert " = Gemm " in check(source, (FLAT / 1000).half(), within=1e-2)
    (left,) = left_over(open_onnx(source))
    assert left.reader == "Gemm"


def test_a_weight_without_numbers_is_left() -> None:
    for size in ((0, N), (K, 0)):
        source = model(
            "y = MatMul(x, w)",
            inputs=f"float[B, T, {size[0]}] x",
            returns=f"float[B, T, {size[1]}] y",
            w=torch.ones(size),
        )
        check(source, X[..., : size[0]])
        (left,) = left_over(open_onnx(source))
        assert left.reader == "MatMul"


def test_types_that_an_op_of_onnxruntime_hides_are_those_of_the_weights() -> None:
    body = "g = com.microsoft.Gelu(x) p = MatMul(g, w) q = Add(p, b) h = com.microsoft.Gelu(q) y = MatMul(h, u)"
    source = model(body, returns="float[B, T, 4] y", w=W, b=B, u=torch.randn(N, N))
    source.opset_imports["com.microsoft"] = 1
    graph = open_onnx(source)
    linears = ops_of(graph, Op.LINEAR)
    assert [value.dtype for linear in linears for value in (graph.inputs(linear)[0], linear)] == [ir.DataType.FLOAT] * 4


def test_two_activations_stay_a_matmul() -> None:
    text = check(model("t = Transpose<perm = [0, 2, 1]>(x) y = MatMul(x, t)", returns="float[B, T, T] y"), X)
    assert "matmul %0, %1" in text


def test_a_bias_that_others_read_too_is_shared() -> None:
    body = "p = MatMul(x, w) a = Add(p, b) q = MatMul(x, w) c = Add(q, b) y = Mul(a, c)"
    graph = open_onnx(model(body, w=W, b=B))
    first, second = ops_of(graph, Op.LINEAR)
    assert list(graph.inputs(first)) == list(graph.inputs(second))


def rms(tail: str, square: str = "s = Mul(x, x)", inverse: str = "", cast: str = "") -> str:
    root = inverse or "r = Sqrt(a) i = Reciprocal(r) n = Mul(x, i)"
    return f"{square} m = ReduceMean<keepdims = 1>(s, axes) a = Add(m, eps) {root} {tail}"


CHAIN = {"axes": np.array([-1]), "eps": F32(1e-3), "two": F32(2), "one": F32(1), "half": F32(-0.5), "norm__weight": G}
NORMS = {
    "mul": rms("y = Mul(n, norm__weight)"),
    "pow": rms("y = Mul(n, norm__weight)", "s = Pow(x, two)"),
    "weight first": rms("y = Mul(norm__weight, n)"),
    "divided": rms("y = Mul(n, norm__weight)", inverse="r = Sqrt(a) n = Div(x, r)"),
    "one over": rms("y = Mul(n, norm__weight)", inverse="r = Sqrt(a) i = Div(one, r) n = Mul(i, x)"),
    "power of minus a half": rms("y = Mul(n, norm__weight)", inverse="i = Pow(a, half) n = Mul(i, x)"),
    "no weight": rms("y = Identity(n)"),
    "one plus weight": rms("w = Add(one, norm__weight) y = Mul(n, w)"),
    "its own op": "y = RMSNormalization<epsilon = 0.001>(x, norm__weight)",
    "its own op, by axis": "y = RMSNormalization<epsilon = 0.001, axis = 2>(x, norm__weight)",
}


@pytest.mark.parametrize("name", NORMS)
def test_both_forms_of_rms_norm(name: str) -> None:
    opset = 23 if "own" in name else 21
    body = NORMS[name]
    source = model(body, opset=opset, returns=f"float[B, T, {K}] y", **CHAIN)
    text = check(source, X)
    weight = {"no weight": '"y.weight"', "one plus weight": "%1"}.get(name, '"norm.weight"')
    assert "rms_norm %0, " in text
    assert weight in text
    (norm,) = ops_of(open_onnx(source), Op.RMS_NORM)
    assert norm.producer().attributes["epsilon"].value == pytest.approx(1e-3)


@pytest.mark.parametrize("opset", [13, 17])
def test_axes_of_a_mean_that_are_an_attribute(opset: int) -> None:
    body = NORMS["pow"].replace("<keepdims = 1>(s, axes)", "<keepdims = 1, axes = [2]>(s)")
    assert "rms_norm" in check(model(body, opset=opset, returns=f"float[B, T, {K}] y", **CHAIN), X)


@pytest.mark.parametrize(
    "tail",
    [
        "c = Cast<to = 10>(n) y = Mul(c, w)",
        "v = Cast<to = 1>(w) c = Mul(n, v) y = Cast<to = 10>(c)",
        "y = Cast<to = 10>(n)",
    ],
)
def test_a_norm_in_float32_of_half_precision_reads_what_was_cast(tail: str) -> None:
    body = "x = Cast<to = 1>(h) " + rms(tail)
    constants = CHAIN | {"w": G.half().numpy()}
    source = model(body, inputs=f"float16[B, T, {K}] h", returns=f"float16[B, T, {K}] y", **constants)
    # rounded to 11 bits once or twice
    text = check(source, X.half(), within=2e-3)
    assert "%1 = rms_norm %0, const[6]" in text
    assert len(text.splitlines()) == 3


def test_a_weight_that_is_wide_is_multiplied_before_the_cast() -> None:
    body = "x = Cast<to = 1>(h) " + rms("c = Mul(n, norm__weight) y = Cast<to = 10>(c)")
    source = model(body, inputs=f"float16[B, T, {K}] h", returns=f"float16[B, T, {K}] y", **CHAIN)
    text = check(source, X.half(), within=2e-3)
    assert [line.split()[2] for line in text.splitlines()[1:4]] == ["Cast", "rms_norm", "Cast"]


@pytest.mark.parametrize(
    "body",
    [
        rms("z = Mul(n, norm__weight) y = Mul(z, i)"),
        NORMS["mul"].replace("s = Mul(x, x)", "s = Mul(x, norm__weight)"),
        NORMS["mul"].replace("n = Mul(x, i)", "n = Mul(s, i)"),
        NORMS["mul"].replace("keepdims = 1>(s, axes)", "keepdims = 1>(s, zero)"),
        NORMS["mul"].replace("Add(m, eps)", "Add(m, norm__weight)"),
        NORMS["divided"].replace("Div(x, r)", "Div(r, x)"),
    ],
    ids=["read twice", "no square", "another factor", "another axis", "no epsilon", "upside down"],
)
def test_what_only_looks_like_a_norm_stays(body: str) -> None:
    text = check(model(body, returns=f"float[B, T, {K}] y", **CHAIN, zero=np.array([1])), X, within=1e-4)
    assert "rms_norm" not in text


NUMBERS = {"root2": F32(math.sqrt(2)), "root": F32(ROOT), "one": F32(1), "half": F32(0.5), "three": F32(3)}
NUMBERS |= {"scale": F32(math.sqrt(2 / math.pi)), "cubic": F32(CUBIC)}
ERF = "d = Div(x, root2) e = Erf(d) t = Add(e, one)"
TANH = "a = Add(x, k) b = Mul(a, scale) e = Tanh(b) t = Add(e, one)"
GELUS = {
    "erf, torch": f"{ERF} h = Mul(half, t) y = Mul(x, h)",
    "erf, x first": f"{ERF} h = Mul(x, t) y = Mul(h, half)",
    "erf, half of x": f"g = Mul(x, half) {ERF} y = Mul(g, t)",
    "erf, times a root": f"{ERF.replace('Div(x, root2)', 'Mul(root, x)')} h = Mul(t, half) y = Mul(h, x)",
    "tanh, pow": f"p = Pow(x, three) k = Mul(cubic, p) {TANH} h = Mul(half, x) y = Mul(h, t)",
    "tanh, products": f"s = Mul(x, x) p = Mul(s, x) k = Mul(p, cubic) {TANH} h = Mul(t, half) y = Mul(x, h)",
}


@pytest.mark.parametrize("name", GELUS)
@pytest.mark.parametrize("opset", [18, 21])
def test_gelu_by_hand(name: str, opset: int) -> None:
    source = model(GELUS[name], opset=opset, returns=f"float[B, T, {K}] y", **NUMBERS)
    text = check(source, 3 * X)
    assert text.splitlines()[1] == "%1 = gelu %0 : [?, ?, 6]"
    assert len(text.splitlines()) == 3


@pytest.mark.parametrize(
    "body",
    [
        GELUS["erf, torch"].replace("root2", "half"),
        GELUS["erf, torch"].replace("Add(e, one)", "Add(e, half)"),
        GELUS["tanh, pow"].replace("three", "root2"),
        f"{ERF} h = Mul(half, t) z = Mul(x, h) y = Add(z, e)",
        "g = Sigmoid(x) z = Mul(x, g) y = Add(z, g)",
    ],
)
def test_what_only_looks_like_an_activation_stays(body: str) -> None:
    positive = X.abs() + 0.1
    text = check(model(body, returns=f"float[B, T, {K}] y", **NUMBERS), positive)
    assert "gelu" not in text
    assert "silu" not in text


def test_silu_in_both_orders_and_gelu_as_one_op() -> None:
    for body in ("s = Sigmoid(x) y = Mul(x, s)", "s = Sigmoid(x) y = Mul(s, x)"):
        assert "%1 = silu %0" in check(model(body, returns=f"float[B, T, {K}] y"), X)
    assert "%1 = gelu %0" in check(model('y = Gelu<approximate = "tanh">(x)', returns=f"float[B, T, {K}] y"), X)


def test_what_does_nothing_is_gone_and_outputs_keep_their_names() -> None:
    body = "a = Identity(x) b, m = Dropout(a) c = Cast<to = 1>(b) d = MatMul(c, w) y = Identity(d) dead = Relu(x)"
    source = model(body, w=W)
    text = check(source, X)
    assert len(text.splitlines()) == 3
    graph = open_onnx(source)
    assert [v.name for v in graph.outputs()] == ["y"]
    assert [v.name for v in graph.model.graph.inputs] == ["x"]


def test_constant_nodes_become_initializers() -> None:
    body = "c = Constant<value = float[4] {1.0, 2.0, 3.0, 4.0}>() p = MatMul(x, w) y = Add(p, c)"
    assert "linear %0" in check(model(body, w=W), X)
    assert "Constant" not in check(
        model("c = Constant<value_float = 2.0>() y = Mul(x, c)", returns="float[B,T,K] y"), X
    )


def test_an_initializer_that_is_listed_among_the_inputs_is_a_constant() -> None:
    source = model("y = MatMul(x, w)", w=W)
    source.graph.inputs.append(source.graph.initializers["w"])
    graph = open_onnx(source)
    assert [v.name for v in graph.model.graph.inputs] == ["x"]
    torch.testing.assert_close(all_results(graph, X)[0], X @ W)


@pytest.mark.parametrize("body", ["y = Gemm<transB = 1>(x, w)", "y = MatMul(x, w)"])
def test_a_weight_that_is_returned_keeps_its_name(body: str) -> None:
    square = torch.randn(K, K)
    source = model(body, inputs=f"float[B, {K}] x", returns=f"float[B, {K}] y", w=square)
    source.graph[0].metadata_props["pkg.torch.onnx.name_scopes"] = "['', 'fc', 'linear']"
    source.graph.outputs.append(source.graph.initializers["w"])
    check(source, FLAT)
    graph = open_onnx(source)
    assert [v.name for v in graph.outputs()] == ["y", "w"]
    assert [graph.name(v) for v in ops_of(graph, Op.LINEAR)] == ["fc"]


def test_a_function_is_seen_through() -> None:
    text = """<ir_version: 10, opset_import: ["" : 21, "local" : 1]>
        g (float[B, 6] x) => (float[B, 6] y) { y = local.swish(x) }
        <domain: "local", opset_import: ["" : 21]> swish (a) => (b) { s = Sigmoid(a) b = Mul(a, s) }"""
    source = ir.from_onnx_text(text)
    assert "silu %0" in check(source, FLAT)


def test_only_ops_of_the_canonical_form_are_not_standard() -> None:
    graph = open_onnx(model(NORMS["mul"] + " z = MatMul(y, w)", returns="float[B, T, N] z", w=W, **CHAIN))
    assert {node.op_type for node in graph.model.graph if node.domain == DOMAIN} == {"RMSNorm", "Linear"}
    assert graph.model.opset_imports[DOMAIN] == 1
