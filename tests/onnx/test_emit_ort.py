"""Files for onnxruntime: the planned kernels appear, and compute what the oracle says within what they round."""

import onnx_ir as ir
import pytest
import torch
from torch import Tensor
from torch.nn.functional import layer_norm
from torch.testing import assert_close

from qcompile.backends.onnx.emit import emit
from qcompile.backends.onnx.fusion import check_fusion
from qcompile.numerics import QParams, fake_quantize, find_qparams
from qcompile.spec import parse_spec
from tests.onnx.canonical import Canonical, linear_model, run_onnxruntime
from tests.onnx.models import K, by_onnxruntime, model

Numbers = list[tuple[Tensor, Tensor | None]]


def expected(x: Tensor, numbers: Numbers) -> list[Tensor]:
    """In float64, so that only the runtime rounds."""
    return [x.double() @ w.double().T + (0 if b is None else b.double()) for w, b in numbers]


def assert_near(found: list[Tensor], x: Tensor, numbers: Numbers, step: float, dtype: torch.dtype) -> None:
    """Each input is off by at most `step`, so a result by at most step * sum |w|; and the result is rounded once."""
    for y, reference, (w, _) in zip(found, expected(x, numbers), numbers, strict=True):
        assert y.dtype == dtype
        bound = step * w.double().abs().sum(1) + 4 * torch.finfo(dtype).eps * (1 + reference.abs())
        assert ((y.double() - reference).abs() <= bound).all()


def int8_step(x: Tensor) -> float:
    """Half a step of int8 blocks, as MatMulNBits rounds its inputs, and some for the order of sums."""
    return 0.51 * float(x.abs().max()) / 127


SHAPES = [(5, 96), (2, 3, 96), (1, 96), (1, 1, 96)]
BY_ROW = ["int8/channel", "int8/tensor", "int8/channel/asym", "int4/channel", "int4/channel/asym", "int2/channel",
          "int3/tensor/asym", "int8/channel/bf16", "int8/channel/fp8_e4m3", "fp4_e2m1/channel", "fp4_e1m2/channel",
          "fp4_e3m0/tensor", "fp6_e2m3/channel"]  # fmt: skip


def model_of(
    shape: tuple[int, ...], weight: str, given: QParams | str | None, **more: object
) -> tuple[ir.Model, Numbers]:
    names = [f"d{i}" for i in range(len(shape) - 1)]
    return linear_model(weight=weight, given=given, shape=[*names, shape[-1]], **more)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("spec", ["int8/tensor/asym", "int8/tensor", "int4/tensor/asym"])
def test_static_inputs_fuse_in_every_rank_with_and_without_bias(
    spec: str, shape: tuple[int, ...], bias: bool, dtype: torch.dtype
) -> None:
    torch.manual_seed(2)
    x = torch.randn(shape).to(dtype)
    qparams = find_qparams(x.float(), parse_spec(spec))
    model, numbers = model_of(shape, "int8/channel", qparams, bias=bias, dtype=dtype)
    emitted = emit(model, "ort-cpu")
    kernels = check_fusion(emitted).counts
    assert kernels["MatMulIntegerToFloat"] == 1
    assert not {"Gemm", "MatMul", "DequantizeLinear", "FusedMatMul"} & kernels.keys()
    assert emitted.notes == ()
    seen = fake_quantize(x.float(), parse_spec(spec))
    assert_near(run_onnxruntime(emitted.model, x), seen, numbers, 0.0, dtype)


@pytest.mark.parametrize("weight", BY_ROW)
@pytest.mark.parametrize("given", ["static", "dynamic"])
def test_every_weight_that_is_integers_by_row_fuses(weight: str, given: str) -> None:
    torch.manual_seed(2)
    x = torch.randn(5, 96)
    spec = parse_spec("int8/tensor/asym")
    model, numbers = model_of((5, 96), weight, find_qparams(x, spec) if given == "static" else str(spec))
    emitted = emit(model, "ort-cpu")
    kernels = check_fusion(emitted).counts
    assert kernels["MatMulIntegerToFloat" if given == "static" else "DynamicQuantizeMatMul"] == 1
    assert emitted.notes == ()
    # a scale found by the kernel may differ in its last bit, which moves inputs next to ties by a step
    step = 0.0 if given == "static" else float(find_qparams(x, spec).scale)
    assert_near(run_onnxruntime(emitted.model, x), fake_quantize(x, spec), numbers, step, torch.float32)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("given", ["static", "int8/tensor/asym", "int8/token/asym"])
def test_linears_that_share_an_input_quantize_it_once_and_all_fuse(given: str, shape: tuple[int, ...]) -> None:
    torch.manual_seed(2)
    x = torch.randn(shape)
    qparams = find_qparams(x, parse_spec("int8/tensor/asym"))
    model, numbers = model_of(shape, "int8/channel", qparams if given == "static" else given, linears=3)
    emitted = emit(model, "ort-cpu")
    kernels = check_fusion(emitted).counts
    assert kernels["MatMulIntegerToFloat"] == 3
    assert kernels["QuantizeLinear"] + kernels["DynamicQuantizeLinear"] == 1
    assert_near(run_onnxruntime(emitted.model, x), x, numbers, 0.51 * float(qparams.scale), torch.float32)


@pytest.mark.parametrize(
    ("spec", "note"),
    [
        ("int8/token", None),
        ("int8/token/asym", "8 bits and a scale a token, around zero"),
        ("int4/token/asym", "8 bits and a scale a token, around zero"),
        ("int8/g32", "8 bits and a scale a token, around zero"),
        ("int8/tensor", "8 bits, one scale and a zero point a call"),
        ("int4/tensor/asym", "8 bits, one scale and a zero point a call"),
    ],
)
@pytest.mark.parametrize("shape", SHAPES)
def test_what_onnxruntime_finds_otherwise_than_planned_is_noted(
    spec: str, note: str | None, shape: tuple[int, ...]
) -> None:
    torch.manual_seed(2)
    x = torch.randn(shape)
    model, numbers = model_of(shape, "int8/channel", spec)
    emitted = emit(model, "ort-cpu")
    check_fusion(emitted)
    found = f"block.q: inputs get {note} (planned: {spec}), as onnxruntime's kernel finds them"
    assert emitted.notes == (() if note is None else (found,))
    step = 0.51 * 2 * float(x.abs().max()) / 255
    assert_near(run_onnxruntime(emitted.model, x), x, numbers, step, torch.float32)


def test_tokens_of_very_different_size_do_not_disturb_each_other() -> None:
    torch.manual_seed(2)
    sizes = torch.tensor([1e-42, 1e-30, 1e-4, 1.0, 300.0, 1e30])[:, None]
    x = torch.cat([torch.randn(6, 96) * sizes, torch.zeros(1, 96)])
    model, numbers = model_of((7, 96), "int8/channel", "int8/token", bias=False)
    emitted = emit(model, "ort-cpu")
    found = run_onnxruntime(emitted.model, x)[0].double()
    w = numbers[0][0].double()
    # subnormal numbers are under the smallest scale that there is
    peak = x.double().abs().amax(1, keepdim=True).clamp(min=2.0**-126)
    assert ((found - x.double() @ w.T).abs() <= 0.52 * 2 / 255 * peak * w.abs().sum(1)).all()


def test_a_token_with_inf_does_not_hide_it_and_harms_no_other() -> None:
    torch.manual_seed(2)
    x = torch.randn(3, 96)
    x[1, 7] = torch.inf
    model, numbers = model_of((3, 96), "int8/channel", "int8/token")
    found = run_onnxruntime(emit(model, "ort-cpu").model, x)[0]
    assert not found[1].isfinite().any()
    w, b = numbers[0]
    assert b is not None
    torch.testing.assert_close(found[[0, 2]], torch.nn.functional.linear(x[[0, 2]], w, b), rtol=0, atol=0.5)


NARROW = ["int8/channel", "int4/g32", "int4/g128/asym/bf16", "int2/g64", "int2/g16/asym", "int3/g32/asym", "int5/g16",
          "int6/channel/asym", "int8/g48", "int4/b16x32", "fp4_e2m1/b32/e8m0", "fp4_e2m1/b16/fp8_e4m3", "fp6_e2m3/g32",
          "fp4_e2m1/channel", "fp4_e1m2/b16x32", "int4/g32/asym/u4row"]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(5, 384), (1, 2, 384)])
@pytest.mark.parametrize("weight", NARROW)
def test_weights_alone_become_one_narrow_matmul(weight: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(2)
    x = torch.randn(shape).to(dtype)
    model, numbers = model_of(shape, weight, None, dtype=dtype)
    emitted = emit(model, "ort-cpu")
    kernels = check_fusion(emitted).counts
    # what widens codes and scales was computed when the file was loaded; a 16-bit model casts at its ends
    casts = 0 if dtype is torch.float32 else 2
    assert kernels["MatMulNBits"] == 1
    assert sum(kernels.values()) <= 2 + casts
    (note,) = emitted.notes
    assert note.startswith("block.q: inputs become int8 in blocks of ")
    assert note.endswith(" inside MatMulNBits (planned: float)")
    assert_near(run_onnxruntime(emitted.model, x), x, numbers, int8_step(x.float()), dtype)


@pytest.mark.parametrize(("n", "k"), [(1, 1), (1, 96), (7, 1), (5, 33), (3, 100), (2, 129), (48, 17)])
@pytest.mark.parametrize("weight", ["int8/channel", "int4/channel/asym", "int2/channel", "fp4_e2m1/channel"])
@pytest.mark.parametrize("given", [None, "static", "int8/tensor/asym"])
@pytest.mark.parametrize("tokens", [1, 4])
def test_odd_sizes_are_right(n: int, k: int, weight: str, given: str | None, tokens: int) -> None:
    torch.manual_seed(2)
    x = torch.randn(tokens, k)
    qparams = find_qparams(x, parse_spec("int8/tensor/asym"))
    model, numbers = model_of((tokens, k), weight, qparams if given == "static" else given, rows=n)
    emitted = emit(model, "ort-cpu")
    check_fusion(emitted)
    step = int8_step(x) if given is None else 1.01 * float(qparams.scale)
    assert_near(run_onnxruntime(emitted.model, x), x, numbers, step, torch.float32)


@pytest.mark.parametrize("given", ["int8/token/asym", "int4/token", "static"])
def test_grouped_weights_leave_their_inputs_to_the_kernel_and_say_so(given: str) -> None:
    torch.manual_seed(2)
    x = torch.randn(5, 128)
    qparams = find_qparams(x, parse_spec("int8/tensor/asym"))
    model, numbers = model_of((5, 128), "int4/g64", qparams if given == "static" else given)
    emitted = emit(model, "ort-cpu")
    assert check_fusion(emitted).counts == {"MatMulNBits": 1}
    assert "inputs become int8 in blocks of 32 inside MatMulNBits" in emitted.notes[0]
    assert_near(run_onnxruntime(emitted.model, x), x, numbers, int8_step(x), torch.float32)


@pytest.mark.parametrize(
    "weight", ["nf4/g64", "fp8_e5m2/channel", "fp8_e3m4/g16", "int4/g8", "dynamic8/channel", "lloyd3/g16"]
)
@pytest.mark.parametrize("target", ["ort-cpu", "ort-cuda"])
def test_weights_without_a_kernel_are_restored_once_with_a_reason(weight: str, target: str) -> None:
    x = torch.randn(2, 3, 128)
    model, numbers = model_of((2, 3, 128), weight, None)
    emitted = emit(model, target)
    # nothing but the float linear is left to compute in each run
    assert check_fusion(emitted).counts == {"MatMul": 1, "Add": 1}
    assert "the weight becomes float when the file is loaded" in emitted.planned[0].reason
    assert_near(run_onnxruntime(emitted.model, x), x, numbers, 1e-6, torch.float32)


@pytest.mark.parametrize(
    "spec", ["fp8_e4m3/token", "fp4_e2m1/b32/e8m0", "fp4_e2m1/b16/fp8_e4m3", "nf4/g32", "fp8_e4m3/tensor"]
)
def test_float_inputs_are_rounded_as_planned_and_noted(spec: str) -> None:
    torch.manual_seed(2)
    x = torch.randn(5, 128)
    model, numbers = model_of((5, 128), "fp8_e4m3/channel", spec)
    emitted = emit(model, "ort-cpu")
    check_fusion(emitted)
    assert emitted.notes == (f"block.q: inputs are rounded to {spec} in float: right, but not fast",)
    seen = fake_quantize(x, parse_spec(spec))
    assert_near(run_onnxruntime(emitted.model, x), seen, numbers, 1e-6, torch.float32)


def test_float_inputs_of_narrow_weights_are_rounded_twice_and_both_are_noted() -> None:
    torch.manual_seed(2)
    x = torch.randn(5, 128)
    model, numbers = model_of((5, 128), "int4/g32", "fp8_e4m3/token")
    emitted = emit(model, "ort-cpu")
    assert any("int8 in blocks of 32" in note for note in emitted.notes)
    assert any("rounded to fp8_e4m3/token in float" in note for note in emitted.notes)
    seen = fake_quantize(x, parse_spec("fp8_e4m3/token"))
    assert_near(run_onnxruntime(emitted.model, x), seen, numbers, int8_step(seen), torch.float32)


def test_a_weight_of_an_integer_and_a_float_linear_is_stored_once() -> None:
    torch.manual_seed(2)
    n, k = 64, 96
    made = Canonical(("M", k))
    weight, numbers = made.weight("w", torch.randn(n, k), "int8/channel/asym")
    like = ir.Value(shape=ir.Shape(["M", n]), type=ir.TensorType(ir.DataType.FLOAT))
    rounded = made.op("Linear", made.quantized(made.x, "int8/tensor/asym"), weight, path="a", like=like)
    outliers = made.op("Linear", made.x, weight, path="a.tail", like=like)
    emitted = emit(made.finish(rounded, outliers), "ort-cpu")
    assert len(ir.to_proto(emitted.model).SerializeToString()) < 1.5 * n * k
    assert check_fusion(emitted).counts == {"DynamicQuantizeMatMul": 1, "MatMul": 1}
    x = torch.randn(4, k)
    assert_near(run_onnxruntime(emitted.model, x)[1:], x, [(numbers, None)], 1e-6, torch.float32)


def test_a_dynamic_input_of_zeros_gives_the_bias() -> None:
    model, numbers = model_of((3, 96), "int8/channel", "int8/tensor/asym")
    found = run_onnxruntime(emit(model, "ort-cpu").model, torch.zeros(3, 96))[0]
    bias = numbers[0][1]
    assert bias is not None
    assert torch.equal(found, bias.expand(3, -1))


def test_a_linear_left_float_stays_as_exact_as_it_was() -> None:
    torch.manual_seed(2)
    x = torch.randn(4, 96)
    for target in ("ort-cpu", "ort-cuda", "tensorrt", "portable"):
        model, numbers = linear_model(weight=None, shape=("M", 96))
        emitted = emit(model, target)
        assert_near(run_onnxruntime(emitted.model, x), x, numbers, 1e-6, torch.float32)
        assert emitted.planned[0].kernel is None
        assert emitted.planned[0].reason != ""


def test_cuda_files_keep_the_models_dtype_and_compute_without_rounding_inputs() -> None:
    torch.manual_seed(2)
    x = torch.randn(4, 128)
    for weight in ("int4/g32", "int8/channel", "int2/g64", "fp4_e2m1/b32"):
        model, numbers = model_of((4, 128), weight, "int8/token/asym")
        emitted = emit(model, "ort-cuda")
        assert check_fusion(emitted).counts["MatMulNBits"] == 1
        assert "inputs stay float" in emitted.notes[0]
        assert_near(run_onnxruntime(emitted.model, x), x, numbers, 1e-6, torch.float32)
        half, _ = model_of((4, 128), weight, None, dtype=torch.float16)
        (matmul,) = (n for n in emit(half, "ort-cuda").model.graph if n.op_type == "MatMulNBits")
        assert {v.dtype for v in (matmul.inputs[0], matmul.inputs[2]) if v is not None} == {ir.DataType.FLOAT16}


def test_fp4_files_hold_4_bits_a_weight() -> None:
    n, k = 256, 512
    for given in (None, "int8/tensor/asym"):
        model, _ = linear_model(weight="fp4_e2m1/channel", given=given, shape=("M", k), rows=n, bias=False)
        size = len(ir.to_proto(emit(model, "ort-cpu").model).SerializeToString())
        # scales of MatMulNBits are repeated for each block of 128, with a byte of zero point
        assert size < n * k // 2 + n * (k // 128) * 5 + 2500


@pytest.mark.parametrize(("target", "fuses"), [("ort-cpu", False), ("portable", True)])
def test_a_sum_before_a_norm_stays_out_of_onnxruntimes_slow_op(target: str, fuses: bool) -> None:
    numbers = {"gamma": torch.rand(K) + 0.5, "beta": torch.randn(K)}
    body = "s = Add(x, z) y = LayerNormalization<axis = -1>(s, gamma, beta)"
    source = model(body, returns=f"float[B, T, {K}] y", inputs=f"float[B, T, {K}] x, float[B, T, {K}] z", **numbers)
    x, z = torch.randn(2, 2, 3, K)
    written = emit(source, target)
    kernels = check_fusion(written).counts
    assert kernels == ({"SkipLayerNormalization": 1} if fuses else {"Sum": 1, "LayerNormalization": 1})
    assert_close(by_onnxruntime(written.model, x, z)[0], layer_norm(x + z, [K], *numbers.values()))
