"""The W4A16 kernels on a GPU, against the oracle's weight in float64."""

import pytest
import torch
from torch import Tensor, library

pytest.importorskip("triton.experimental.gluon")

from qcompile.backends.fx.kernels import int4
from qcompile.backends.triton.int4_linear import int4_linear
from qcompile.backends.triton.int4_table import TABLE, Config, can_run
from qcompile.backends.triton.table import capability_of, configs_of
from qcompile.numerics import dequantize, find_qparams, quantize
from qcompile.spec import parse_spec
from tests.triton.compiled import name_of

pytestmark = pytest.mark.gpu


def packed(text: str, N: int, K: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """A random weight: words, scales, and the oracle's floats."""
    weight = torch.randn(N, K, device="cuda")
    qparams = find_qparams(weight, parse_spec(text))
    codes = quantize(weight, qparams)
    parts = int4.pack(codes, qparams, dtype)
    return parts["words"], parts["scales"], dequantize(codes, qparams).double()


def check(y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """y is rounded once, and so may be the weight; sums of 16-bit floats with their offset keep about 19 bits."""
    added = 0.0 if bias is None else bias.double()
    reference = x.double() @ weight.T + added
    magnitude = x.double().abs() @ weight.abs().T + (0.0 if bias is None else bias.double().abs())
    assert y.dtype is x.dtype
    assert ((y.double() - reference).abs() <= 2 * torch.finfo(x.dtype).eps * magnitude).all()


def configs(M: int, N: int, wide: bool) -> list[Config]:
    """Those of the table that can run the problem on this device."""
    found = configs_of(TABLE, capability_of(torch.device("cuda", 0)))
    return [config for config in found if can_run(config, M, N, wide=wide)]


@pytest.mark.parametrize("M", [1, 3, 16, 17, 33, 257])
@pytest.mark.parametrize(("N", "K"), [(48, 64), (400, 352), (256, 2208), (12, 128)])
@pytest.mark.parametrize("text", ["int4/g32/asym/bf16", "int4/g32"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_odd_shapes(M: int, N: int, K: int, text: str, dtype: torch.dtype) -> None:
    words, scales, weight = packed(text, N, K, dtype)
    x, bias = torch.randn(M, K, dtype=dtype, device="cuda"), torch.randn(N, dtype=dtype, device="cuda")
    check(int4_linear(x, words, scales, bias, N), x, weight, bias)
    check(int4_linear(x, words, scales, None, N), x, weight, None)


@pytest.mark.parametrize("M", [1, 7, 16, 30, 64, 128, 300])
@pytest.mark.parametrize("text", ["int4/g32/asym/bf16", "int4/g64/asym/bf16", "int4/g128/asym/bf16", "int4/g128"])
def test_every_configuration(M: int, text: str) -> None:
    N, K = 1024, 2176 - 128 * (M % 2)
    words, scales, weight = packed(text, N, K, torch.bfloat16)
    x = torch.randn(M, K, dtype=torch.bfloat16, device="cuda")
    for config in configs(M, N, scales.dim() == 4):
        # what the allocator hands out next holds NaN
        torch.full((M * N * 8,), torch.nan, device="cuda")
        y = int4_linear(x, words, scales, None, N, config)
        assert y.isfinite().all(), name_of(config)
        check(y, x, weight, None)
        assert torch.equal(y, int4_linear(x, words, scales, None, N, config)), "the result is not deterministic"


def test_no_rows() -> None:
    words, scales, _ = packed("int4/g128/asym/bf16", 64, 256, torch.bfloat16)
    y = torch.ops.qcompile.linear_int4(
        torch.empty(0, 256, dtype=torch.bfloat16, device="cuda"), words, scales, None, 64
    )
    assert y.shape == (0, 64)


@pytest.mark.parametrize("M", [5, 40, 200])
def test_inputs_that_are_not_contiguous(M: int) -> None:
    words, scales, weight = packed("int4/g128/asym/bf16", 256, 512, torch.bfloat16)
    wide = torch.randn(M, 1024, dtype=torch.bfloat16, device="cuda")
    for x in (wide[:, ::2], wide[:, 1:513], wide[:, 512:], torch.randn(512, M, device="cuda").bfloat16().T):
        check(torch.ops.qcompile.linear_int4(x, words, scales, None, 256), x, weight, None)


@pytest.mark.parametrize("M", [4, 16, 48, 130])
def test_rows_are_alone(M: int) -> None:
    N, K = 512, 1024
    words, scales, _ = packed("int4/g128/asym/bf16", N, K, torch.bfloat16)
    x = torch.randn(M, K, dtype=torch.bfloat16, device="cuda")
    clean = int4_linear(x, words, scales, None, N)
    poisoned = x.clone()
    poisoned[0], poisoned[1, 3], poisoned[2, 5] = 0, torch.nan, torch.inf
    y = int4_linear(poisoned, words, scales, None, N)
    assert torch.equal(y[3:], clean[3:])
    assert (y[0] == 0).all()
    assert y[1].isnan().all()
    assert not y[2].isfinite().any()
    # the same rows elsewhere in x of the same length
    order = torch.randperm(M, device="cuda")
    assert torch.equal(int4_linear(x[order].contiguous(), words, scales, None, N), clean[order])


@pytest.mark.parametrize("M", [1, 16, 64])
def test_long_rows(M: int) -> None:
    words, scales, weight = packed("int4/g128/asym/bf16", 128, 28672, torch.bfloat16)
    x = torch.randn(M, 28672, dtype=torch.bfloat16, device="cuda") + 1
    check(int4_linear(x, words, scales, None, 128), x, weight, None)


@pytest.mark.parametrize("M", [1, 20, 140])
def test_graph_replays(M: int) -> None:
    N, K = 512, 1024
    words, scales, _ = packed("int4/g128/asym/bf16", N, K, torch.bfloat16)
    x = torch.randn(M, K, dtype=torch.bfloat16, device="cuda")
    int4_linear(x, words, scales, None, N)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = int4_linear(int4_linear(x, words, scales, None, N)[:, :512].repeat(1, 2), words, scales, None, N)
    for _ in range(3):
        x.normal_()
        graph.replay()
        first = int4_linear(x, words, scales, None, N)[:, :512].repeat(1, 2)
        assert torch.equal(y, int4_linear(first, words, scales, None, N))


@pytest.mark.parametrize("M", [0, 3, 40])
def test_the_op_is_clean(M: int) -> None:
    words, scales, _ = packed("int4/g128/asym/bf16", 64, 256, torch.bfloat16)
    x = torch.randn(M, 256, dtype=torch.bfloat16, device="cuda")
    library.opcheck(torch.ops.qcompile.int4_mm.default, (x, words, scales, None, 64))
