"""Every kernel of the FX host against the oracle: dequantized operands, multiplied in float64."""

import pytest
import torch
from torch import Tensor, library
from torch._subclasses import FakeTensorMode

from qcompile.backends.fx import ops as fx_ops
from qcompile.backends.fx.kernels import KERNELS, Problem, choose, int8
from qcompile.backends.fx.kernels.int8 import FLOAT_M, float_mm
from qcompile.backends.fx.kernels.problem import Kernel
from qcompile.numerics import dequantize, find_qparams, quantize
from qcompile.spec import Spec, parse_spec

BY_NAME = {kernel.name: kernel for kernel in KERNELS}
# weight and input specs that reach each kernel on the CPU; K divides by 32
CASES = [
    ("int8", "int8/channel", "int8/token"),
    ("int8", "int8/tensor", "int8/token"),
    ("int8", "int4/channel", "int4/token"),
    ("int8", "int8/channel", "int8/tensor"),
    ("int8", "int8/channel", "int8/token/asym"),
    ("int8", "int8/channel", "int8/tensor/asym"),
    ("narrow", "int8/channel", None),
    ("narrow", "int4/g32/asym/bf16", None),
    ("narrow", "int5/channel", None),
    ("narrow", "fp4_e2m1/channel", None),
    ("narrow", "fp4_e3m0/channel", None),
    ("narrow", "fp6_e2m3/channel", None),
    ("lifted", "fp4_e2m1/channel", "fp4_e2m1/token"),
    ("lifted", "fp4_e1m2/tensor", "fp4_e3m0/token"),
    ("lifted", "fp6_e2m3/channel", "fp8_e4m3/token"),
    ("lifted", "fp4_e2m1/channel", "int8/token/asym"),
    ("dense", "int4/g32/asym/bf16", None),
    ("packed", "int8/channel", None),
    ("packed", "int4/g32/asym/bf16", None),
    ("packed", "int4/g32/asym/u4row", None),
    ("packed", "int3/g32/asym", None),
    ("packed", "nf4/g32", None),
    ("packed", "nf4/g32/dq256", None),
    ("packed", "fp4_e2m1/b32/e8m0", None),
    ("packed", "fp4_e2m1/b16/fp8_e4m3", None),
    ("packed", "fp6_e3m2/b32/e8m0", None),
    ("packed", "fp8_e4m3/channel", None),
    ("packed", "lloyd4/g32", None),
]


def problem(weight: str, given: str | None, N: int, K: int, **more: object) -> Problem:
    spec = None if given is None else parse_spec(given)
    return Problem(
        N=N, K=K, weight=parse_spec(weight), input=spec, **({"dtype": torch.float32, "device": "cpu"} | more)
    )


def run(kernel: Kernel, p: Problem, x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """The kernel's result, the oracle's in float64, and the sum of the magnitudes that make up each element."""
    weight_qparams = find_qparams(weight, p.weight)
    codes = quantize(weight, weight_qparams)
    given, wide = (x,), x.double()
    if p.input is not None:
        qparams = find_qparams(x, p.input)
        given = (quantize(x, qparams), qparams.scale, qparams.zero)
        wide = dequantize(given[0], qparams).double()
    y = kernel.op(*kernel.arguments(p, given, kernel.pack(codes, weight_qparams, p.dtype), bias))
    wide_weight = dequantize(codes, weight_qparams).double()
    added = 0.0 if bias is None else bias.double()
    magnitude = wide.abs() @ wide_weight.abs().T + (0.0 if bias is None else bias.double().abs())
    return y, wide @ wide_weight.T + added, magnitude


@pytest.mark.parametrize(("name", "weight", "given"), CASES)
@pytest.mark.parametrize("shape", [(0, 64), (1, 32), (3, 96), (2, 17, 64), (33, 160)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "plain"])
def test_kernel_equals_oracle(
    name: str, weight: str, given: str | None, shape: tuple[int, ...], dtype: torch.dtype, with_bias: bool
) -> None:
    if name == "narrow" and dtype is not torch.bfloat16:
        assert "float32" in str(BY_NAME[name].why_not(problem(weight, given, 48, shape[-1])))
        return
    N, K = 48, shape[-1]
    x, W = torch.randn(shape, dtype=dtype), torch.randn(N, K, dtype=dtype)
    bias = torch.randn(N, dtype=dtype) if with_bias else None
    p = problem(weight, given, N, K, dtype=dtype)
    if x.numel() == 0 and given is not None and "tensor" in given:
        return
    y, reference, magnitude = run(BY_NAME[name], p, x, W, bias)
    assert y.dtype is dtype
    assert y.shape == reference.shape
    # bf16: weights and result are rounded to 8 bits; fp32: what summing K products in float32 rounds
    roundings = 8 if dtype is torch.float32 else 2
    assert ((y.double() - reference).abs() <= roundings * torch.finfo(dtype).eps * magnitude).all()


def test_integer_product_is_exact() -> None:
    codes = torch.randint(-127, 128, (37, 4099), dtype=torch.int8)
    weight = torch.randint(-127, 128, (41, 4099), dtype=torch.int8)
    assert torch.equal(torch.ops.qcompile.int_mm(codes, weight), (codes.long() @ weight.long().T).int())


@pytest.mark.parametrize(("M", "K"), [(4, 1), (37, 4099), (5, 1024), (5, 1025), (0, 8), (3, 0)])
@pytest.mark.parametrize("least", [-128, -127])
def test_integer_product_by_floats_is_exact(M: int, K: int, least: int) -> None:
    codes = torch.randint(least, 128, (M, K), dtype=torch.int8)
    weight = torch.randint(least, 128, (41, K), dtype=torch.int8)
    # sums as large as there are
    codes[: M // 2], weight[:20] = least, least
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(float_mm(codes, weight), (codes.long() @ weight.long().T).int())


@pytest.mark.parametrize("M", [1, FLOAT_M, 100])
@pytest.mark.parametrize("units", [True, False])
def test_who_multiplies_integers(M: int, units: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(int8, "has_integer_units", lambda: units)
    codes, weight = (torch.randint(-127, 128, (n, 300), dtype=torch.int8) for n in (M, 17))
    assert torch.equal(torch.ops.qcompile.int_mm(codes, weight), (codes.long() @ weight.long().T).int())


def test_rows_do_not_depend_on_their_number() -> None:
    x, W = torch.randn(33, 64), torch.randn(40, 64)
    p = problem("int8/channel", "int8/token", 40, 64)
    together, *_ = run(BY_NAME["int8"], p, x, W, None)
    alone = torch.cat([run(BY_NAME["int8"], p, row[None], W, None)[0] for row in x])
    assert torch.equal(together, alone)


def test_poisoned_row_stays_in_its_row() -> None:
    x, W = torch.randn(5, 64), torch.randn(8, 64)
    x[2, 3] = torch.nan
    y, *_ = run(BY_NAME["int8"], problem("int8/channel", "int8/token", 8, 64), x, W, None)
    assert y[2].isnan().all()
    assert y[[0, 1, 3, 4]].isfinite().all()


@pytest.mark.parametrize(
    ("weight", "given", "more", "kernel", "reason"),
    [
        ("int8/channel", "int8/token", {}, "int8", None),
        ("int8/channel", None, {}, "dense", "not quantized"),
        ("int4/g32/asym", None, {"small": True}, "packed", "free_weights"),
        ("int4/g32/asym", None, {"dtype": torch.bfloat16}, "narrow", None),
        ("int8/channel", None, {"dtype": torch.bfloat16}, "narrow", None),
        ("fp4_e2m1/channel", None, {"dtype": torch.bfloat16}, "narrow", None),
        ("fp8_e4m3/channel", None, {"dtype": torch.bfloat16}, "dense", "up to 8 bits"),
        ("nf4/channel", None, {"dtype": torch.bfloat16}, "dense", "multiples of one number"),
        ("int8/channel", None, {"dtype": torch.bfloat16, "device": "cuda"}, "dense", "for the CPU"),
        ("int4/g32/asym", None, {"dtype": torch.bfloat16, "N": 24}, "dense", "multiple of 16"),
        ("int4/g32/asym", None, {"device": "cuda", "capability": (9, 0)}, "dense", "tensor cores take bfloat16"),
        ("int8/channel", "int8/token", {"K": 133_200}, "dense", "overflow int32"),
        ("int8/channel", "int8/token", {"device": "cuda", "N": 12}, "dense", "divide by 8"),
        ("fp8_e4m3/channel", "fp8_e4m3/token", {}, "dense", "no fp8 matmul"),
        ("fp8_e4m3/channel", "fp8_e4m3/token", {"device": "cuda", "capability": (9, 0)}, "fp8", None),
        ("fp8_e4m3/channel", "fp8_e4m3/token", {"device": "cuda", "capability": (8, 0)}, "dense", "sm_89"),
        ("fp8_e5m2/channel", "fp8_e5m2/token", {"device": "cuda", "capability": (9, 0)}, "dense", "e5m2"),
    ],
)
def test_choice_and_its_reasons(
    weight: str, given: str | None, more: dict[str, object], kernel: str, reason: str | None
) -> None:
    chosen, refused = choose(problem(weight, given, **({"N": 64, "K": 64} | more)))
    assert chosen.name == kernel
    assert reason is None or any(reason in why for why in refused.values())


@pytest.mark.parametrize(("name", "weight", "given"), [("fp8", "fp8_e4m3/channel", "fp8_e4m3/token")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_cuda_kernels_trace_without_a_gpu(name: str, weight: str, given: str, dtype: torch.dtype) -> None:
    p = problem(weight, given, 32, 64, dtype=dtype, device="cuda", capability=(9, 0))
    with FakeTensorMode():
        x = torch.randn(2, 5, 64, dtype=dtype, device="cuda")
        W, bias = torch.randn(32, 64, dtype=dtype, device="cuda"), torch.randn(32, dtype=dtype, device="cuda")
        assert isinstance(p.input, Spec)
        qparams, weight_qparams = find_qparams(x, p.input), find_qparams(W, p.weight)
        packed = BY_NAME[name].pack(quantize(W, weight_qparams), weight_qparams, dtype)
        y = BY_NAME[name].op(*BY_NAME[name].arguments(p, (quantize(x, qparams), qparams.scale, None), packed, bias))
    assert (y.shape, y.dtype, y.device.type) == ((2, 5, 32), dtype, "cuda")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_opcheck(dtype: torch.dtype) -> None:
    x, W, bias = torch.randn(3, 64, dtype=dtype), torch.randn(8, 64, dtype=dtype), torch.randn(8, dtype=dtype)
    ops = torch.ops.qcompile
    assert fx_ops.QUANTIZE is ops.quantize.default
    q = quantize(W, find_qparams(W, parse_spec("int8/channel")))
    codes, scale = ops.quantize_dynamic(x, "int8/token")
    checks = [
        (ops.int_mm, (codes, q)),
        (ops.quantize, (x, scale, None, None, "int8/token")),
        (ops.quantize_dynamic, (x, "int8/token")),
        (ops.dequantize, (codes, scale, None, None, "int8/token", dtype)),
        (ops.rms_norm, (x, torch.ones(64, dtype=dtype), 1e-6, True)),
        (ops.linear_int8, (codes, scale, None, q, torch.rand(8, 1), torch.zeros(8, dtype=torch.int32), bias, dtype)),
    ]
    for kernel in KERNELS:
        if kernel.name == "narrow" and dtype is torch.bfloat16:
            for text in ("int8/channel", "int4/g32/asym"):
                wide = W.repeat(2, 1)
                p = problem(text, None, 16, 64, dtype=dtype)
                qparams = find_qparams(wide, p.weight)
                packed = kernel.pack(quantize(wide, qparams), qparams, dtype)
                checks.append((kernel.op, kernel.arguments(p, (x,), packed, bias.repeat(2))))
                given = (x, packed["codes"], packed["scale"], packed["dense"])
                checks.append((ops.narrow_int8, given) if text[3] == "8" else (ops.narrow_int4, (*given, 32)))
        if kernel.name == "packed":
            p = problem("int4/g32/asym", None, 8, 64, dtype=dtype)
            qparams = find_qparams(W, p.weight)
            packed = kernel.pack(quantize(W, qparams), qparams, dtype)
            checks.append((kernel.op, kernel.arguments(p, (x,), packed, bias)))
    for op, args in checks:
        library.opcheck(op if isinstance(op, torch._ops.OpOverload) else op.default, args)
