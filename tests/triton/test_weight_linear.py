"""Linears with 8-, 4-, 3- and 2-bit weights and code books on a GPU, against the oracle's weight in float64."""

import pytest
import torch
from torch import Tensor, library

pytest.importorskip("triton.experimental.gluon")

from qcompile.backends.fx.kernels.weight_triton import KERNEL
from qcompile.backends.triton.table import capability_of, configs_of
from qcompile.backends.triton.width_linear import width_linear
from qcompile.backends.triton.width_packs import kind_of
from qcompile.backends.triton.width_table import TABLES, Config, can_run, rounds_twice
from qcompile.backends.triton.widths import Packed
from qcompile.numerics import dequantize, find_qparams, quantize
from qcompile.spec import parse_spec
from tests.triton.alone import check_alone
from tests.triton.compiled import name_of

pytestmark = pytest.mark.gpu

BFLOAT16 = torch.bfloat16
PRESETS = ["int8/channel", "int4/g128/asym/bf16", "nf4/g64", "int3/g128/asym/bf16", "int2/g64/asym/bf16"]
OTHERS = ["int8/g32/asym/bf16", "int8/channel/asym", "nf4/channel", "bnb_fp4/g32/bf16", "lloyd4/g128", "int3/channel"]
OTHERS += ["int4/g32", "int4/g64/asym/bf16", "int4/g128", "int4/channel", "int4/channel/asym"]
OTHERS += [
    "int2/g32",
    "int3/g64",
    "fp4_e2m1/b32/e8m0",
    "fp4_e2m1/b16/fp8_e4m3",
    "int8/g64",
    "int5/channel",
    "int5/g128/asym/bf16",
    "int6/g64/asym/bf16",
    "int6/g32",
    "int7/channel",
    "fp8_e4m3/channel",
]
OTHERS += ["fp8_e5m2/g64/bf16", "fp8_e3m4/g32", "fp8_e2m5/channel", "fp6_e3m2/g128", "e2m2/b32/e8m0", "e1m1/g64"]
OTHERS += ["int8/tensor", "fp8_e4m3/b64x128", "int4/b2x64/asym/bf16"]
# of ggml's blocks
OTHERS += [
    "int4/b32/full/fp16",
    "int4/b32/min/fp16",
    "int5/b32/full/fp16",
    "int5/b32/min/fp16",
    "int8/b32/fp16",
    "iq4_nl/b32/fp16",
]
OTHERS += ["int2/b16/min/u4x16", "int3/b16/full/i6x16", "int4/b32/min/u6x8", "int5/b32/min/u6x8", "int6/b16/full/i8x16"]
OTHERS += ["iq4_nl/b32/fp16", "iq4_nl/b32/i6x8", "int4/g64/min/u6x8", "linear8/g64", "nf4/g64/dq256"]


def packed(text: str, N: int, K: int, dtype: torch.dtype) -> tuple[Packed, Tensor]:
    """A random weight, and the oracle's floats."""
    floats = torch.randn(N, K, device="cuda")
    qparams = find_qparams(floats, parse_spec(text))
    codes = quantize(floats, qparams)
    width, minimum, integers = kind_of(qparams.spec)
    assert width is not None
    tensors = KERNEL.pack(codes, qparams, dtype)
    weight = Packed(width=width, minimum=minimum, integers=integers, **tensors)
    return weight, dequantize(codes, qparams).double()


def check(y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """y is rounded once, and so may be a number of a table and the weight; sums with an offset keep about 19 bits.

    Of weights with minima, the two parts may be larger than what they add to: twice the largest number bounds them.
    """
    added = 0.0 if bias is None else bias.double()
    reference = x.double() @ weight.T + added
    magnitude = x.double().abs() @ weight.abs().T + (0.0 if bias is None else bias.double().abs())
    assert y.dtype is x.dtype
    assert ((y.double() - reference).abs() <= 2 * torch.finfo(x.dtype).eps * magnitude).all()


def configs(weight: Packed, M: int, N: int, dtype: torch.dtype) -> list[Config]:
    """Those of the table that can run the problem on this device."""
    found = configs_of(TABLES[weight.width], capability_of(torch.device("cuda", 0)))
    return [config for config in found if can_run(config, M, N, exact=not rounds_twice(weight, dtype))]


@pytest.mark.parametrize("M", [1, 3, 16, 17, 33, 257])
@pytest.mark.parametrize(("N", "K"), [(48, 64), (400, 352), (256, 2208), (12, 128)])
@pytest.mark.parametrize("text", PRESETS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_odd_shapes(M: int, N: int, K: int, text: str, dtype: torch.dtype) -> None:
    spec = parse_spec(text)
    if spec.granularity.columns and K % spec.granularity.columns:
        text = text.replace(spec.granularity.name, "g32")
    weight, floats = packed(text, N, K, dtype)
    x, bias = torch.randn(M, K, dtype=dtype, device="cuda"), torch.randn(N, dtype=dtype, device="cuda")
    check(width_linear(x, weight, bias, N), x, floats, bias)
    check(width_linear(x, weight, None, N), x, floats, None)


@pytest.mark.parametrize("M", [1, 7, 16, 30, 128, 300])
@pytest.mark.parametrize("text", PRESETS + OTHERS)
def test_every_configuration(M: int, text: str) -> None:
    N, K = 1024, 2176 - 128 * (M % 2)
    weight, floats = packed(text, N, K, BFLOAT16)
    x = torch.randn(M, K, dtype=BFLOAT16, device="cuda")
    for config in configs(weight, M, N, BFLOAT16):
        # what the allocator hands out next holds NaN
        torch.full((M * N * 8,), torch.nan, device="cuda")
        y = width_linear(x, weight, None, N, config)
        assert y.isfinite().all(), name_of(config)
        check(y, x, floats, None)
        assert torch.equal(y, width_linear(x, weight, None, N, config)), "the result is not deterministic"


@pytest.mark.parametrize("M", [2, 9, 40, 5000])
@pytest.mark.parametrize("text", OTHERS)
def test_float16(M: int, text: str) -> None:
    weight, floats = packed(text, 320, 768, torch.float16)
    x = torch.randn(M, 768, dtype=torch.float16, device="cuda")
    check(width_linear(x, weight, None, 320), x, floats, None)


def arguments(weight: Packed, x: Tensor, N: int) -> tuple[object, ...]:
    kind = weight.width, weight.minimum, weight.integers
    return x, weight.words, weight.scales, weight.levels, None, N, *kind


@pytest.mark.parametrize("text", PRESETS)
def test_no_rows(text: str) -> None:
    weight, _ = packed(text, 64, 256, BFLOAT16)
    x = torch.empty(0, 256, dtype=BFLOAT16, device="cuda")
    assert torch.ops.qcompile.linear_weight(*arguments(weight, x, 64)).shape == (0, 64)


@pytest.mark.parametrize("M", [5, 40, 200])
@pytest.mark.parametrize("text", PRESETS)
def test_inputs_that_are_not_contiguous(M: int, text: str) -> None:
    weight, floats = packed(text, 256, 512, BFLOAT16)
    wide = torch.randn(M, 1024, dtype=BFLOAT16, device="cuda")
    for x in (wide[:, ::2], wide[:, 1:513], wide[:, 512:], torch.randn(512, M, device="cuda").bfloat16().T):
        check(torch.ops.qcompile.linear_weight(*arguments(weight, x, 256)), x, floats, None)


@pytest.mark.parametrize("M", [4, 16, 48, 130])
@pytest.mark.parametrize("text", PRESETS)
def test_rows_are_alone(M: int, text: str) -> None:
    N, K = 512, 1024
    weight, _ = packed(text, N, K, BFLOAT16)
    x = torch.randn(M, K, dtype=BFLOAT16, device="cuda")

    def linear(x: Tensor) -> Tensor:
        return width_linear(x, weight, None, N)

    assert (check_alone(linear, x) == 0).all()
    # the same rows elsewhere in x of the same length
    order = torch.randperm(M, device="cuda")
    assert torch.equal(linear(x[order]), linear(x)[order])


@pytest.mark.parametrize("M", [1, 16, 64])
@pytest.mark.parametrize("text", PRESETS)
def test_long_rows(M: int, text: str) -> None:
    weight, floats = packed(text, 128, 28672, BFLOAT16)
    x = torch.randn(M, 28672, dtype=BFLOAT16, device="cuda") + 1
    check(width_linear(x, weight, None, 128), x, floats, None)


@pytest.mark.parametrize("M", [1, 20, 140])
@pytest.mark.parametrize("text", PRESETS)
def test_graph_replays(M: int, text: str) -> None:
    N, K = 512, 1024
    weight, _ = packed(text, N, K, BFLOAT16)
    x = torch.randn(M, K, dtype=BFLOAT16, device="cuda")
    width_linear(x, weight, None, N)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = width_linear(width_linear(x, weight, None, N)[:, :512].repeat(1, 2), weight, None, N)
    for _ in range(3):
        x.normal_()
        graph.replay()
        first = width_linear(x, weight, None, N)[:, :512].repeat(1, 2)
        assert torch.equal(y, width_linear(first, weight, None, N))


@pytest.mark.parametrize("M", [0, 3, 40])
@pytest.mark.parametrize("text", PRESETS)
def test_the_op_is_clean(M: int, text: str) -> None:
    weight, _ = packed(text, 64, 256, BFLOAT16)
    x = torch.randn(M, 256, dtype=BFLOAT16, device="cuda")
    library.opcheck(torch.ops.qcompile.weight_mm.default, arguments(weight, x, 64))


def test_joined_packs_are_packs_of_the_whole() -> None:
    (first, a), (second, b) = (packed("nf4/g64", 128, 256, BFLOAT16) for _ in range(2))
    whole = Packed(
        words=torch.cat([first.words, second.words]),
        scales=torch.cat([first.scales, second.scales]),
        levels=torch.cat([first.levels, second.levels]),
        width="book",
    )
    x = torch.randn(5, 256, dtype=BFLOAT16, device="cuda")
    check(width_linear(x, whole, None, 256), x, torch.cat([a, b]), None)
