"""Files for onnxruntime on CUDA hold its narrow matmuls, which give what the plan says."""

import onnx_ir as ir
import pytest
import torch
from onnx.reference.op_run import OpRun
from torch import Tensor

from qcompile.backends.onnx.emit import emit
from qcompile.numerics import QParams, dequantize, find_qparams, quantize
from qcompile.spec import parse_spec
from tests.onnx.canonical import linear_model
from tests.onnx.cuda_kernels import MatMulBlockQuantizedFp4Weight, MatMulBlockQuantizedFp8Weight, run_by_schema


def model_of(
    weight: str, given: QParams | str | None, dtype: torch.dtype, k: int = 128
) -> tuple[ir.Model, Tensor, Tensor]:
    """A linear with its weight's numbers and its bias."""
    model, numbers = linear_model(weight=weight, given=given, shape=("B", "T", k), dtype=dtype)
    weights, bias = numbers[0]
    assert bias is not None
    return model, weights.double(), bias.double()


SINCE = "block.q: {} is in onnxruntime since 1.31, and faster than a float16 matmul for few tokens only"
FP8 = ["fp8_e4m3/channel", "fp8_e4m3/tensor", "fp8_e4m3/g64", "fp8_e4m3/b16x32", "fp8_e4m3/channel/fp16"]
FP4 = ["fp4_e2m1/b16/fp8_e4m3", "fp4_e2m1/b32/e8m0", "fp4_e2m1/channel/fp8_e4m3"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("weight", "kernel"),
    [
        *((spec, MatMulBlockQuantizedFp8Weight) for spec in FP8),
        *((spec, MatMulBlockQuantizedFp4Weight) for spec in FP4),
    ],
)
def test_narrow_floats_stay_narrow(weight: str, kernel: type[OpRun], dtype: torch.dtype) -> None:
    torch.manual_seed(3)
    x = torch.randn(2, 3, 128).to(dtype)
    model, weights, bias = model_of(weight, None, dtype)
    emitted = emit(model, "ort-cuda")
    (matmul,) = (node for node in emitted.model.graph if node.domain == "com.microsoft")
    assert (matmul.op_type, emitted.planned[0].kernel) == (kernel.__name__, kernel.__name__)
    # a float32 model is computed in bfloat16 there, and told so
    inner = torch.bfloat16 if dtype is torch.float32 else dtype
    since, *more = emitted.notes
    assert since == SINCE.format(kernel.__name__)
    assert (
        more == []
        if inner is dtype
        else more == [f"block.q: inputs and results are bfloat16 inside {kernel.__name__}, which has no float32"]
    )
    found = run_by_schema(emitted.model, x)
    seen, half_step = x.to(inner).double(), torch.finfo(inner).eps / 2
    # the expected numbers are weights in the model's dtype; and the product, and the sum where it stands apart, are
    # rounded once each
    moved = seen.abs() @ weights.abs().T + 2 * bias.abs()
    assert ((found - (seen @ weights.T + bias)).abs() <= half_step * moved).all()


@pytest.mark.parametrize("k", [1, 17, 30, 128])
@pytest.mark.parametrize("weight", ["fp8_e4m3/channel", "fp4_e2m1/channel/fp8_e4m3"])
def test_odd_sizes_are_right(weight: str, k: int) -> None:
    torch.manual_seed(3)
    x = torch.randn(1, 2, k).half()
    model, weights, bias = model_of(weight, None, torch.float16, k=k)
    emitted = emit(model, "ort-cuda")
    # two codes fill a byte
    assert (emitted.planned[0].kernel == "MatMulNBits") == (weight.startswith("fp4") and k % 2 == 1)
    if emitted.planned[0].kernel != "MatMulNBits":
        torch.testing.assert_close(run_by_schema(emitted.model, x), x.double() @ weights.T + bias, rtol=2e-3, atol=2e-3)


def test_a_static_fp8_input_goes_into_the_kernel() -> None:
    torch.manual_seed(3)
    x = torch.randn(2, 3, 128).half()
    given = find_qparams(x[:1].float(), parse_spec("fp8_e4m3/tensor"))
    model, weights, bias = model_of("fp8_e4m3/channel", given, torch.float16)
    emitted = emit(model, "ort-cuda")
    assert emitted.notes == (SINCE.format("MatMulBlockQuantizedFp8Weight"),)
    assert [node.op_type for node in emitted.model.graph] == ["MatMulBlockQuantizedFp8Weight"]
    seen = dequantize(quantize(x.float(), given), given, torch.float16).double()
    # the expected weights are those of a float16 model
    torch.testing.assert_close(run_by_schema(emitted.model, x), seen @ weights.T + bias, rtol=1e-3, atol=5e-3)


@pytest.mark.parametrize("weight", ["int8/channel", "fp8_e4m3/channel", "fp4_e2m1/b16/fp8_e4m3"])
def test_float64_is_computed_in_what_the_kernel_has(weight: str) -> None:
    model, _, _ = model_of(weight, None, torch.float64)
    emitted = emit(model, "ort-cuda")
    (matmul,) = (node for node in emitted.model.graph if node.domain == "com.microsoft")
    inner = ir.DataType.FLOAT if matmul.op_type == "MatMulNBits" else ir.DataType.BFLOAT16
    assert (matmul.inputs[0].dtype, matmul.outputs[0].dtype) == (inner, inner)
    assert emitted.model.graph.outputs[0].dtype == ir.DataType.DOUBLE
    assert f"block.q: inputs and results are {inner.name.lower()} inside {matmul.op_type}" in emitted.notes[-1]


@pytest.mark.parametrize("given", ["fp8_e4m3/token", "int8/token/asym"])
def test_inputs_that_no_kernel_reads_stay_as_they_are(given: str) -> None:
    model, _, _ = model_of("fp8_e4m3/channel", given, torch.float16)
    note, _ = emit(model, "ort-cuda").notes
    assert note == (f"block.q: inputs stay float16 (planned: {given}): no CUDA kernel of onnxruntime reads them")


@pytest.mark.parametrize(("target", "block"), [("ort-cuda", 64), ("ort-cpu", 32)])
def test_blocks_are_the_groups_where_inputs_are_not_rounded_by_them(target: str, block: int) -> None:
    model, _, _ = model_of("int4/g64", None, torch.float32)
    written = emit(model, target)
    (matmul,) = (node for node in written.model.graph if node.op_type == "MatMulNBits")
    assert matmul.attributes["block_size"].as_int() == block


def test_scales_that_are_no_e4m3_numbers_are_lifted_to_integers() -> None:
    model, _, _ = model_of("fp4_e2m1/b32", None, torch.float16)
    assert emit(model, "ort-cuda").planned[0].kernel == "MatMulNBits"


@pytest.mark.parametrize("weight", ["fp8_e4m3/channel", "fp4_e2m1/b16/fp8_e4m3"])
def test_files_hold_as_many_bits_as_the_format(weight: str) -> None:
    n, k = 256, 512
    model, _ = linear_model(weight=weight, shape=("M", k), rows=n, bias=False, dtype=torch.float16)
    size = len(ir.to_proto(emit(model, "ort-cuda").model).SerializeToString())
    bits = parse_spec(weight).format.bits
    assert size < n * k * bits // 8 + n * (k // 16 if bits == 4 else 4) + 1500
