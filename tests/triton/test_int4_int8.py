"""The W4A8 kernel on a GPU, against the oracle's numbers in float64."""

import pytest
import torch
from torch import Tensor, library

pytest.importorskip("triton.experimental.gluon.language.nvidia.hopper")

from qcompile.backends.fx.kernels.int4_int8 import KERNEL
from qcompile.backends.triton.int4_int8_table import TABLE, AsInt8
from qcompile.numerics import QParams, dequantize, find_qparams, quantize
from qcompile.spec import parse_spec
from tests.triton.alone import check_alone
from tests.triton.compiled import name_of
from tests.triton.needs import hopper

pytestmark = [pytest.mark.gpu, hopper]

BFLOAT16 = torch.bfloat16
TOKENS = "int8/token/asym"
BY_ROW = "int4/g128/asym/u4row"
# words, scales, sums, and row and totals of integers of a row
Pack = tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]


def packed(text: str, N: int, K: int, dtype: torch.dtype = BFLOAT16, size: float = 1.0) -> tuple[Pack, Tensor]:
    """A random weight as the op takes it, and the oracle's floats."""
    weight = torch.randn(N, K, device="cuda") * size
    qparams = find_qparams(weight, parse_spec(text))
    codes = quantize(weight, qparams)
    parts = KERNEL.pack(codes, qparams, dtype)
    pack = (parts["words"], parts["scales"], parts["sums"], parts.get("row"), parts.get("totals"))
    return pack, dequantize(codes, qparams).double()


def inputs(M: int, K: int, text: str = TOKENS) -> tuple[Tensor, QParams]:
    """Random codes and their qparams, off center so that zeros matter."""
    x = torch.randn(M, K, device="cuda") + 0.5
    qparams = find_qparams(x, parse_spec(text))
    return quantize(x, qparams), qparams


def run(codes: Tensor, qparams: QParams, pack: Pack, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    # what the allocator hands out next holds NaN
    torch.full((8 * codes.shape[0] * pack[2].shape[0],), torch.nan, device="cuda")
    return torch.ops.qcompile.linear_int4_int8(codes, qparams.scale, qparams.zero, *pack, bias, dtype)


def check(y: Tensor, codes: Tensor, qparams: QParams, weight: Tensor, bias: Tensor | None) -> None:
    """y is rounded once to its dtype; products are exact, scaled in float32, and added in float32."""
    x, added = dequantize(codes, qparams).double(), 0.0 if bias is None else bias.double()
    reference = x @ weight.T + added
    zero = 0.0 if qparams.zero is None else qparams.zero.double()
    # what is summed before zeros are taken out
    magnitude = (x.abs() + (zero - 128).abs() * qparams.scale if qparams.zero is not None else x.abs()) @ weight.abs().T
    limit = torch.finfo(y.dtype).eps / 2 * reference.abs() + 2.0**-20 * (magnitude + reference.abs())
    assert ((y.double() - reference).abs() <= limit).all()


def check_shape(M: int, N: int, K: int, text: str, dtype: torch.dtype) -> None:
    pack, weight = packed(text, N, K, dtype)
    bias = torch.randn(N, dtype=dtype, device="cuda")
    for given in (TOKENS, "int8/token"):
        codes, qparams = inputs(M, K, given)
        for added in (bias, None):
            y = run(codes, qparams, pack, added, dtype)
            assert y.dtype is dtype
            check(y, codes, qparams, weight, added)


@pytest.mark.parametrize("M", [1, 3, 16, 17, 33, 64, 65, 257])
@pytest.mark.parametrize(("N", "K"), [(48, 64), (400, 352), (256, 2208), (12, 128), (64, 28672)])
@pytest.mark.parametrize("text", ["int4/g32/asym/bf16", "int4/g32"])
@pytest.mark.parametrize("dtype", [BFLOAT16, torch.float16], ids=str)
def test_odd_shapes(M: int, N: int, K: int, text: str, dtype: torch.dtype) -> None:
    check_shape(M, N, K, text, dtype)


@pytest.mark.parametrize("M", [1, 17, 257, 1100, 2048])
@pytest.mark.parametrize(("N", "K"), [(400, 384), (1000, 2208), (12, 128), (129, 256), (4096, 1024)])
@pytest.mark.parametrize("text", ["int4/g32/asym/u4row", "int4/g32/u4row"])
@pytest.mark.parametrize("dtype", [BFLOAT16, torch.float16], ids=str)
def test_integers_of_a_row(M: int, N: int, K: int, text: str, dtype: torch.dtype) -> None:
    """On both sides of the number of rows from which the weight is int8, and where N keeps it from being so."""
    check_shape(M, N, K, text, dtype)


@pytest.mark.parametrize("text", [*(f"int4/g{group}/asym/u4row" for group in (32, 64, 128, 256)), "int4/g64/u4row"])
@pytest.mark.parametrize("size", [1.0, 2.0**-14])
@pytest.mark.parametrize("blocks", [1, 2, 4, 8])
def test_a_weight_is_int8_once_unpacked(text: str, size: float, blocks: int) -> None:
    from qcompile.backends.triton.int4_int8_unpack import unpack

    N, K = 1001, 2304
    (words, scales, _, row, totals), weight = packed(text, N, K, torch.float16, size)
    assert row is not None
    assert totals is not None
    # smaller than the normal numbers of float16: they stay float32
    assert (scales.dim() == 4) == (size < 1)
    torch.full((4 * N * K,), 0x55, dtype=torch.uint8, device="cuda")
    made = unpack(words, scales, row, K, blocks)
    assert torch.equal(made.double() * row.double(), weight)
    assert torch.equal(made.sum(1, dtype=torch.int32), totals)


@pytest.mark.parametrize("M", [1, 7, 30, 64, 128, 300, 2048])
@pytest.mark.parametrize(
    "text", ["int4/g32/asym/bf16", "int4/g64/asym/bf16", "int4/g128/asym/bf16", "int4/g128", "int4/g32/u4row", BY_ROW]
)
def test_every_configuration(M: int, text: str) -> None:
    from qcompile.backends.triton.int4_int8_linear import Operands, int4_int8_linear

    N, K = 1000, 2176
    (words, scales, sums, row, totals), weight = packed(text, N, K)
    codes, qparams = inputs(M, K)
    x = (codes.float() - 128).to(torch.int8)
    given = {"x": x, "scale_x": qparams.scale, "words": words, "scales": scales, "sums": sums}
    o = Operands(**given, zero=qparams.zero, row=row, totals=totals, bias=None)
    for tiles in dict.fromkeys(entry.config for entry in TABLE):
        if isinstance(tiles, AsInt8) and row is None:
            with pytest.raises(ValueError, match="not integers times one number of the row"):
                int4_int8_linear(o, BFLOAT16, tiles)
            continue
        torch.full((8 * M * N,), torch.nan, device="cuda")
        y = int4_int8_linear(o, BFLOAT16, tiles)
        assert y.isfinite().all(), name_of(tiles)
        check(y, codes, qparams, weight, None)
        assert torch.equal(y, int4_int8_linear(o, BFLOAT16, tiles)), "the result is not deterministic"


def test_no_rows() -> None:
    pack, _ = packed(BY_ROW, 64, 256)
    codes, qparams = inputs(3, 256)
    y = torch.ops.qcompile.linear_int4_int8(codes[:0], qparams.scale[:0], qparams.zero[:0], *pack, None, BFLOAT16)
    assert y.shape == (0, 64)


@pytest.mark.parametrize("M", [1, 40, 300])
def test_largest_products_are_exact(M: int) -> None:
    """Codes at the ends of their ranges, and scales of 1: float32 holds every sum."""
    N, K = 128, 8192
    qparams = QParams(
        spec=parse_spec("int4/g128/asym/bf16"),
        scale=torch.ones(N, K // 128, device="cuda"),
        zero=torch.zeros(N, K // 128, device="cuda"),
    )
    codes = torch.full((N, K), 15, dtype=torch.uint8, device="cuda")
    parts = KERNEL.pack(codes, qparams, BFLOAT16)
    x = torch.full((M, K), -128, dtype=torch.int8, device="cuda")
    scale = torch.ones(M, 1, device="cuda")
    y = torch.ops.qcompile.int4_int8_mm(
        x, scale, None, parts["words"], parts["scales"], parts["sums"], None, None, None, torch.bfloat16
    )
    assert (y == torch.tensor(-128.0 * 15 * K).to(y.dtype)).all()


@pytest.mark.parametrize("M", [5, 40, 200, 1100])
def test_inputs_that_are_not_contiguous(M: int) -> None:
    pack, weight = packed(BY_ROW, 256, 512)
    codes, qparams = inputs(M, 512)
    wide = torch.zeros(M, 1030, dtype=torch.uint8, device="cuda")
    wide[:, 1:1025:2] = codes
    for x in (wide[:, 1:1025:2], codes.t().contiguous().t()):
        check(run(x, qparams, pack, None, BFLOAT16), codes, qparams, weight, None)
    signed = (codes.float() - 128).to(torch.int8)
    shifted = torch.zeros(M * 512 + 3, dtype=torch.int8, device="cuda")[3:].view(M, 512)
    shifted.copy_(signed)
    y = torch.ops.qcompile.int4_int8_mm(shifted, qparams.scale, qparams.zero, *pack, None, BFLOAT16)
    check(y, codes, qparams, weight, None)


@pytest.mark.parametrize("M", [5, 300, 1100])
def test_one_scale_for_all_rows(M: int) -> None:
    pack, weight = packed(BY_ROW, 256, 512)
    codes, qparams = inputs(M, 512, "int8/tensor/asym")
    assert qparams.scale.dim() == 0
    check(run(codes, qparams, pack, None, BFLOAT16), codes, qparams, weight, None)


@pytest.mark.parametrize("M", [4, 16, 48, 130, 300, 1100])
def test_rows_are_alone(M: int) -> None:
    N, K = 512, 1024
    pack, weight = packed(BY_ROW, N, K)
    x = torch.randn(M, K, device="cuda")
    spec = parse_spec(TOKENS)

    def linear(x: Tensor) -> Tensor:
        qparams = find_qparams(x, spec)
        return run(quantize(x, qparams), qparams, pack, None, BFLOAT16)

    of_zeros = check_alone(linear, x)
    # parts of K are rounded before they are added, so that zeros are taken out but for that
    assert (of_zeros.abs() <= 2.0**-18 * 128 * weight.abs().sum(1)).all()
    # the same rows elsewhere in x of the same length
    order = torch.randperm(M, device="cuda")
    assert torch.equal(linear(x[order]), linear(x)[order])


@pytest.mark.parametrize("M", [300, 1100])
def test_a_row_of_zeros_gives_zeros(M: int) -> None:
    N, K = 16384, 512
    pack, _ = packed(BY_ROW, N, K)
    x = torch.randn(M, K, device="cuda")
    x[7] = 0
    qparams = find_qparams(x, parse_spec(TOKENS))
    assert (run(quantize(x, qparams), qparams, pack, None, BFLOAT16)[7] == 0).all()


@pytest.mark.parametrize("M", [1, 20, 140, 1100])
def test_graph_replays(M: int) -> None:
    N, K = 512, 1024
    pack, _ = packed(BY_ROW, N, K)
    codes, qparams = inputs(M, K)
    run(codes, qparams, pack, None, BFLOAT16)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = torch.ops.qcompile.linear_int4_int8(codes, qparams.scale, qparams.zero, *pack, None, BFLOAT16)
    for _ in range(3):
        codes.random_(0, 256)
        graph.replay()
        assert torch.equal(y, run(codes, qparams, pack, None, BFLOAT16))


@pytest.mark.parametrize("M", [0, 3, 40, 300, 1100])
def test_the_op_is_clean(M: int) -> None:
    pack, _ = packed(BY_ROW, 64, 256)
    codes, qparams = inputs(max(M, 1), 256)
    x = (codes.float() - 128).to(torch.int8)[:M]
    arguments = (x, qparams.scale[:M], qparams.zero[:M], *pack, None, BFLOAT16)
    library.opcheck(torch.ops.qcompile.int4_int8_mm.default, arguments)
