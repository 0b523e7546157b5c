"""The ops that multiply outlier channels, against float64 and against the graph that they replace."""

import pytest
import torch
from torch import Tensor, library
from torch._subclasses import FakeTensorMode
from torch.nn import functional as F

from qcompile.backends.fx import ops as fx_ops
from qcompile.backends.fx.kernels import Problem, int8, llm_int8, tail
from qcompile.numerics import dequantize, fake_quantize, find_qparams, quantize
from qcompile.spec import parse_spec

SPECS = ["int8/token", "int8/token/asym", "int4/token"]
DTYPES = [torch.float32, torch.bfloat16]


def problem(given: str, N: int, K: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Problem:
    specs = {"weight": parse_spec("int8/channel"), "input": parse_spec(given)}
    return Problem(N=N, K=K, dtype=dtype, device=device, **specs)


def llm(x: Tensor, W: Tensor, bias: Tensor | None, threshold: float, given: str) -> Tensor:
    p = problem(given, *W.shape, dtype=x.dtype)
    qparams = find_qparams(W, p.weight)
    packed = llm_int8.KERNEL.pack(quantize(W, qparams), qparams, x.dtype)
    bound = torch.tensor(threshold, dtype=x.dtype)
    return llm_int8.KERNEL.op(*llm_int8.KERNEL.arguments(p, (x, bound), packed, bias))


def split(x: Tensor, W: Tensor, bias: Tensor | None, threshold: float, given: str) -> tuple[Tensor, Tensor]:
    """What the graph means, in float64; and the sum of the magnitudes that make up each element."""
    outliers = fx_ops.OUTLIERS(x, torch.tensor(threshold, dtype=x.dtype))
    inliers = fake_quantize((x - outliers).float(), parse_spec(given)).double()
    weight = fake_quantize(W.float(), parse_spec("int8/channel")).double()
    added = torch.zeros(()) if bias is None else bias.double()
    given_wide = inliers + outliers.double()
    return given_wide @ weight.T + added, given_wide.abs() @ weight.abs().T + added.abs()


@pytest.mark.parametrize("n", [1, 2, 7, 8, 15, 16, 17, 41])
@pytest.mark.parametrize("shape", [(0,), (1,), (3,), (2, 5)], ids=str)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16], ids=["fp32", "bf16", "fp16"])
def test_tail_is_the_float_product(n: int, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, columns = torch.randn(*shape, 50, dtype=dtype)[..., 50 - n :], torch.randn(24, n, dtype=dtype)
    y = tail.OP(x, *tail.pack(columns).values())
    assert y.shape == (*shape, 24)
    assert y.dtype is dtype
    magnitude = x.double().abs() @ columns.double().abs().T
    # rounded once to dtype, after sums of n in float32; a matmul on the CPU may round sums of 16-bit products too
    roundings = 4 if dtype is torch.float32 else 1
    error = (y.double() - x.double() @ columns.double().T).abs()
    assert (error <= roundings * torch.finfo(dtype).eps * magnitude).all()


@pytest.mark.parametrize("given", SPECS)
@pytest.mark.parametrize("shape", [(0, 64), (1, 33), (3, 96), (2, 17, 50)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "plain"])
@pytest.mark.parametrize("count", [0, 1, 20])
def test_llm_int8_is_the_graph_it_replaces(
    given: str, shape: tuple[int, ...], dtype: torch.dtype, with_bias: bool, count: int
) -> None:
    x, W = torch.randn(shape).clamp(-5, 5).to(dtype), torch.randn(40, shape[-1], dtype=dtype)
    bias = torch.randn(40, dtype=dtype) if with_bias else None
    x[..., torch.randperm(shape[-1])[:count]] *= 50
    y = llm(x, W, bias, 6.0, given)
    reference, magnitude = split(x, W, bias, 6.0, given)
    assert y.dtype is dtype
    assert y.shape == reference.shape
    roundings = 8 if dtype is torch.float32 else 1
    assert ((y.double() - reference).abs() <= roundings * torch.finfo(dtype).eps * magnitude).all()


@pytest.mark.parametrize("given", SPECS)
def test_llm_int8_without_outliers_is_int8(given: str) -> None:
    x, W, bias = torch.randn(5, 70), torch.randn(40, 70), torch.randn(40)
    p = problem(given, 40, 70)
    qparams = find_qparams(W, p.weight)
    codes, scale, *zero = fx_ops.QUANTIZE_DYNAMIC(x, given)
    packed = int8.pack(quantize(W, qparams), qparams, x.dtype)
    plain = int8.KERNEL.op(*int8.KERNEL.arguments(p, (codes, scale, *(zero or [None])), packed, bias))
    assert torch.equal(llm(x, W, bias, 1e6, given), plain)


@pytest.mark.parametrize("given", SPECS)
def test_llm_int8_of_outliers_only_is_the_dequantized_weight(given: str) -> None:
    x, W, bias = torch.randn(5, 70), torch.randn(40, 70), torch.randn(40)
    expected = F.linear(x, fake_quantize(W, parse_spec("int8/channel")), bias)
    torch.testing.assert_close(llm(x, W, bias, 0.0, given), expected)


def test_row_maxima_do_not_see_outliers() -> None:
    x = torch.full((2, 8), 0.5)
    x[0, 3] = 1000.0
    # 0.5 is 127 steps of its row's scale, however large the outlier is
    y = llm(x, torch.ones(1, 8), None, 6.0, "int8/token")
    torch.testing.assert_close(y, torch.tensor([[1003.5], [4.0]]))


def test_rows_of_zeros_give_the_bias() -> None:
    x, bias = torch.randn(4, 16), torch.randn(8)
    x[1] = 0
    x[2], x[2, 5] = 0, 100
    W = torch.randn(8, 16)
    y = llm(x, W, bias, 6.0, "int8/token")
    assert torch.equal(y[1], bias)
    column = fake_quantize(W, parse_spec("int8/channel"))[:, 5]
    torch.testing.assert_close(y[2], bias + 100 * column)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_poisoned_row_stays_in_its_row(bad: float) -> None:
    x, W = torch.randn(5, 64), torch.randn(8, 64)
    x[2, 3] = bad
    y = llm(x, W, None, 6.0, "int8/token")
    assert not y[2].isfinite().any()
    assert y[[0, 1, 3, 4]].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
@pytest.mark.parametrize("threshold", [0.5, 1e6])
def test_opcheck(dtype: torch.dtype, threshold: float) -> None:
    x, W, bias = torch.randn(3, 64, dtype=dtype), torch.randn(8, 64, dtype=dtype), torch.randn(8, dtype=dtype)
    qparams = find_qparams(W, parse_spec("int8/channel"))
    packed = int8.pack(quantize(W, qparams), qparams, dtype)
    weight, scale, total = packed["weight"], packed["scale"], packed["sum"]
    bound = torch.tensor(threshold, dtype=dtype)
    reached = (x.abs() >= bound).any(0)
    ops = torch.ops.qcompile
    checks = [
        (ops.add_outliers_, (torch.zeros(3, 8), x, reached, weight, scale)),
        (ops.linear_llm_int8, (x, bound, weight, scale, total, bias, "int8/token", dtype)),
        (ops.linear_tail, (x[:, :5], torch.randn(5, 8, dtype=dtype))),
        (ops.linear_tail, (x[:, :20], torch.randn(20, 8, dtype=dtype))),
    ]
    for op, args in checks:
        library.opcheck(op.default, args)


def test_only_what_depends_on_data_is_kept_out_of_cuda_graphs() -> None:
    assert torch.Tag.cudagraph_unsafe in torch.ops.qcompile.add_outliers_.default.tags
    assert torch.Tag.cudagraph_unsafe not in torch.ops.qcompile.int_mm.default.tags


def test_llm_int8_traces_without_a_gpu() -> None:
    with FakeTensorMode():
        x, W = torch.randn(2, 5, 64, device="cuda"), torch.randn(32, 64, device="cuda")
        qparams = find_qparams(W, parse_spec("int8/channel"))
        packed = int8.pack(quantize(W, qparams), qparams, x.dtype)
        bound = torch.tensor(6.0, device="cuda")
        p = problem("int8/token", 32, 64, device="cuda")
        y = llm_int8.KERNEL.op(*llm_int8.KERNEL.arguments(p, (x, bound), packed, None))
    assert (y.shape, y.device.type) == ((2, 5, 32), "cuda")


def test_the_dequantized_weight_is_what_the_graph_reads() -> None:
    W = torch.randn(8, 16)
    qparams = find_qparams(W, parse_spec("int8/channel"))
    y, x = torch.zeros(16, 8), torch.eye(16)
    packed = int8.pack(quantize(W, qparams), qparams, torch.float32)
    torch.ops.qcompile.add_outliers_(y, x, torch.ones(16, dtype=torch.bool), packed["weight"], packed["scale"])
    assert torch.equal(y, dequantize(packed["weight"], qparams).T)
