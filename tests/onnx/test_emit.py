"""Every preset on every target is right, or refused with what to use; and the ops around the linears."""

import onnx
import onnx_ir as ir
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from qcompile.backends.onnx.emit import TARGETS, emit
from qcompile.backends.onnx.fusion import check_fusion, fused
from qcompile.errors import GraphError, UnsupportedError
from qcompile.graph import Op
from qcompile.numerics import QParams, dequantize, fake_quantize, find_qparams, quantize
from qcompile.presets import PRESETS
from qcompile.spec import parse_spec
from tests.onnx.canonical import Canonical, linear_model, run_onnxruntime, run_reference
from tests.onnx.cuda_kernels import run_by_schema

# rows of a preset: its name, and the specs of one of its rules
RULES = [
    (name, None if rule.weight is None else str(rule.weight), None if rule.input is None else str(rule.input))
    for name, recipe in PRESETS.items()
    for rule in recipe.rules
    if Op.LINEAR in rule.ops
]
TENSORRT_TAKES = {("int8/channel", None), ("fp8_e4m3/channel", "fp8_e4m3/tensor")}
K, N = 128, 48


def given_of(name: str, spec: str | None, x: Tensor) -> QParams | str | None:
    """What calibration or the running model gives an input under a preset."""
    static = spec is not None and spec.split("/")[1] == "tensor"
    return find_qparams(x, parse_spec(spec)) if static and spec is not None else spec


# kernels that onnxruntime's CPU lacks
BY_SCHEMA = ("MatMulBlockQuantizedFp8Weight", "MatMulBlockQuantizedFp4Weight")


@pytest.mark.parametrize("rank", [2, 3])
@pytest.mark.parametrize(("name", "weight", "given"), RULES)
@pytest.mark.parametrize("target", TARGETS)
def test_every_preset_is_right_or_refused_with_a_remedy(
    target: str, name: str, weight: str | None, given: str | None, rank: int
) -> None:
    torch.manual_seed(0)
    shape = (6, K) if rank == 2 else (2, 3, K)
    x = torch.randn(shape)
    names = ["M"] if rank == 2 else ["B", "T"]
    model, numbers = linear_model(weight=weight, given=given_of(name, given, x), shape=[*names, K], rows=N)
    if target == "tensorrt" and (weight, given) not in TENSORRT_TAKES:
        with pytest.raises(
            UnsupportedError, match=r"'block.q' cannot be written for target 'tensorrt': .*; (use|give) "
        ):
            emit(model, target)
        return
    emitted = emit(model, target)
    w, b = numbers[0]
    assert b is not None
    planned = x if given is None else fake_quantize(x, parse_spec(given))
    reference = F.linear(planned.double(), w.double(), b.double())
    exact = F.linear(x.double(), w.double(), b.double())
    onnx_runs = target in ("portable", "tensorrt")
    if emitted.planned[0].kernel in BY_SCHEMA:
        found = run_by_schema(emitted.model, x)
    else:
        found = (run_reference if onnx_runs else run_onnxruntime)(emitted.model, x)[0].double()
    # each input moves by a step of its 8 bits at most, where the target rounds otherwise than planned
    step = float(x.abs().max()) / 127 * 1.5
    bound = (1e-6 if onnx_runs else step) * w.double().abs().sum(1) + 1e-5
    error = (found - reference).abs()
    # a file may be nearer to the float model than planned, if it says so
    error = torch.minimum(error, (found - exact).abs()) if emitted.notes else error
    assert (error <= bound).all()
    if target == "ort-cpu":
        check_fusion(emitted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("target", TARGETS)
def test_rms_norm_is_one_kernel(target: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    made = Canonical(("B", "T", 32), dtype)
    weight = torch.rand(32).to(dtype)
    y = made.op("RMSNorm", made.x, made.constant("norm.weight", weight), like=made.x, epsilon=1e-6)
    model = emit(made.finish(y), target).model
    x = torch.randn(2, 3, 32).to(dtype)
    reference = F.rms_norm(x.float(), [32], weight.float(), 1e-6)
    for found in (run_reference(model, x)[0], run_onnxruntime(model, x)[0]):
        assert found.dtype == dtype
        # the square, the mean and the two products round once each
        torch.testing.assert_close(found.float(), reference, rtol=4 * torch.finfo(dtype).eps, atol=1e-6)
    assert fused(ir.to_proto(model))["SimplifiedLayerNormalization"] == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", [(4, 16), (2, 3, 16), (0, 16), (1, 16)])
def test_outliers_are_whole_columns(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    made = Canonical([f"d{i}" for i in range(len(shape) - 1)] + [16], dtype)
    threshold = torch.tensor(1.5, dtype=dtype)
    model = emit(
        made.finish(made.op("Outliers", made.x, made.constant("threshold", threshold), like=made.x)), "portable"
    ).model
    x = torch.randn(shape).to(dtype)
    reached = (x.abs() >= threshold).reshape(-1, 16).any(0)
    reference = torch.where(reached, x, 0)
    assert torch.equal(run_reference(model, x)[0], reference)
    assert torch.equal(run_onnxruntime(model, x)[0], reference)


@pytest.mark.parametrize("form", ["none", "tanh"])
def test_activations_become_standard_ops(form: str) -> None:
    made = Canonical(("M", 16))
    gelu = made.op("Gelu", made.x, like=made.x, approximate=form)
    model = emit(made.finish(gelu, made.op("Silu", made.x, like=made.x)), "portable").model
    x = torch.linspace(-6, 6, 64).reshape(4, 16)
    for found in (run_reference(model, x), run_onnxruntime(model, x)):
        # erf, tanh and exp of two libraries
        torch.testing.assert_close(found[0], F.gelu(x, approximate=form), rtol=1e-5, atol=2e-6)
        torch.testing.assert_close(found[1], F.silu(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "spec", ["int8/channel", "int8/channel/asym", "int8/tensor", "int6/channel", "int4/g16", "nf4/channel", "int8/g16"]
)
@pytest.mark.parametrize("target", ["portable", "ort-cpu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_quantized_embedding_looks_up_codes(spec: str, target: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    made = Canonical(("B", "T"))
    made.x.dtype = ir.DataType.INT64
    table, numbers = made.weight("embedding.weight", torch.randn(50, 32).to(dtype), spec)
    like = ir.Value(shape=ir.Shape(["B", "T", 32]), type=ir.TensorType(table.dtype or ir.DataType.FLOAT))
    y = made.op("Gather", table, made.x, axis=0, domain="", path="embedding", like=like)
    emitted = emit(made.finish(y), target)
    indices = torch.tensor([[0, 49, 7], [7, 7, 1]])
    assert torch.equal(run_onnxruntime(emitted.model, indices)[0], numbers[indices])
    assert torch.equal(run_reference(emitted.model, indices)[0], numbers[indices])
    by_row = spec.split("/")[0] in ("int8", "int6") and not spec.endswith("g16")
    # codes are looked up first, and only then become numbers
    assert (next(iter(emitted.model.graph)).op_type == "Gather") is by_row
    assert bool(emitted.notes) is not by_row
    assert [site.site for site in emitted.planned] == ["embedding"]


def test_a_tied_float_weight_is_stored_once() -> None:
    torch.manual_seed(0)
    made = Canonical(("B", "T"))
    made.x.dtype = ir.DataType.INT64
    tied = torch.randn(50, 32)
    table = made.constant("embedding.weight", tied)
    like = ir.Value(shape=ir.Shape(["B", "T", 32]), type=ir.TensorType(ir.DataType.FLOAT))
    rows = made.op("Gather", table, made.x, axis=0, domain="", like=like)
    logits = ir.Value(shape=ir.Shape(["B", "T", 50]), type=ir.TensorType(ir.DataType.FLOAT))
    model = emit(made.finish(made.op("Linear", rows, table, path="head", like=logits)), "portable").model
    assert [v.name for v in model.graph.initializers.values()] == ["embedding.weight"]
    indices = torch.tensor([[0, 49, 7]])
    torch.testing.assert_close(run_reference(model, indices)[0], tied[indices] @ tied.T)


def test_a_float_weight_read_by_two_linears_is_stored_once() -> None:
    torch.manual_seed(0)
    made = Canonical(("M", 32))
    shared = torch.randn(32, 32)
    weight = made.constant("shared.weight", shared)
    first = made.op("Linear", made.x, weight, path="a", like=made.x)
    model = emit(made.finish(made.op("Linear", first, weight, path="b", like=made.x)), "ort-cpu").model
    assert len(model.graph.initializers) == 1
    x = torch.randn(3, 32)
    torch.testing.assert_close(run_reference(model, x)[0], x @ shared.T @ shared.T)


@pytest.mark.parametrize("opset", [18, 20, 21, 23])
def test_models_of_older_opsets_are_raised(opset: int) -> None:
    torch.manual_seed(0)
    model, numbers = linear_model(weight="int4/g32", opset=opset)
    emitted = emit(model, "portable")
    assert emitted.model.opset_imports[""] == max(opset, 21)
    assert model.opset_imports[""] == opset
    w, b = numbers[0]
    x = torch.randn(3, 64)
    torch.testing.assert_close(run_reference(emitted.model, x)[0], F.linear(x, w, b))


def test_a_newer_opset_than_the_target_reads_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="opset 27, and target 'tensorrt' reads none above 25"):
        emit(linear_model(weight="int8/channel", opset=27)[0], "tensorrt")


def test_an_op_that_nobody_writes_is_an_error() -> None:
    made = Canonical(("M", 4))
    model = made.finish(made.op("Surprise", made.x, path="block.odd", like=made.x))
    with pytest.raises(GraphError, match=r"no emitter writes 'Surprise' of 'block.odd'"):
        emit(model, "portable")


@pytest.mark.parametrize(("weight", "given"), [
    ("int8/channel", None), ("int8/tensor", None), ("int4/g64", None), ("int4/g128/bf16", None),
    ("int8/channel", "int8/tensor"), ("fp8_e4m3/channel", "fp8_e4m3/tensor"),
])  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_tensorrt_files_have_symmetric_pairs_in_the_models_dtype(
    weight: str, given: str | None, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    x = torch.randn(5, 128).to(dtype)
    qparams = None if given is None else find_qparams(x.float(), parse_spec(given))
    model, numbers = linear_model(weight=weight, given=qparams, shape=("M", 128), linears=2, dtype=dtype)
    emitted = emit(model, "tensorrt")
    onnx.checker.check_model(ir.to_proto(emitted.model), full_check=True)
    kinds = [node.op_type for node in emitted.model.graph]
    assert kinds.count("QuantizeLinear") == (0 if given is None else 1)
    assert set(kinds) <= {"QuantizeLinear", "DequantizeLinear", "MatMul", "Add"}
    for node in emitted.model.graph:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            scale, zero = node.inputs[1], node.inputs[2] if len(node.inputs) > 2 else None
            assert scale is not None
            assert scale.const_value is not None
            assert (scale.const_value.numpy() > 0).all()
            assert scale.dtype == (ir.DataType.FLOAT if dtype is torch.float32 else ir.DataType.FLOAT16)
            assert zero is None or not zero.const_value.numpy().astype(float).any()
    seen = x.float() if qparams is None else dequantize(quantize(x.float(), qparams), qparams)
    for y, (w, b) in zip(run_reference(emitted.model, x), numbers, strict=True):
        assert b is not None
        reference = F.linear(seen, w.float(), b.float())
        # in 16 bits scales, products and sums are rounded: K products of the size of the result each
        rtol, atol = (1e-5, 1e-5) if dtype is torch.float32 else (2e-2, 128 * torch.finfo(dtype).eps)
        torch.testing.assert_close(y.float(), reference, rtol=rtol, atol=atol)


@pytest.mark.parametrize(("weight", "given", "words"), [
    ("int8/channel/asym", None, "it has a zero point"),
    ("int8/channel", "int8/tensor/asym", "it has a zero point"),
    ("int8/channel", "int8/token", "found while running"),
    ("int4/g32", None, "blocks of 64 or 128"),
    ("int4/g64", "int8/tensor", "for weights alone"),
    ("nf4/g64", None, "no weight nf4/g64"),
    ("int8/g64", None, "a scale a channel or a tensor"),
    ("int8/channel", "fp8_e4m3/tensor", "multiplies no fp8_e4m3/tensor by int8/channel"),
    ("int8/channel", "fp8_e5m2/tensor", "inputs are int8 or fp8_e4m3"),
])  # fmt: skip
def test_what_tensorrt_refuses_is_refused_here_with_the_site(weight: str, given: str | None, words: str) -> None:
    x = torch.randn(3, 128)
    model, _ = linear_model(weight=weight, given=given_of("", given, x), shape=("M", 128))
    with pytest.raises(UnsupportedError, match=rf"'block.q' cannot be written for target 'tensorrt': .*{words}.*; "):
        emit(model, "tensorrt")


def test_tensorrt_has_no_float64() -> None:
    model, _ = linear_model(weight="int8/channel", shape=("M", 128), dtype=torch.float64)
    with pytest.raises(UnsupportedError, match="no quantized float64; export the model in float32"):
        emit(model, "tensorrt")


def test_a_scale_that_float16_flushes_is_refused() -> None:
    qparams = find_qparams(torch.full((2, 128), 1e-7), parse_spec("int8/tensor"))
    model, _ = linear_model(weight="int8/channel", given=qparams, shape=("M", 128), dtype=torch.float16)
    with pytest.raises(UnsupportedError, match="not positive and finite in float16; export the model in float32"):
        emit(model, "tensorrt")
