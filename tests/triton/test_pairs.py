"""Rows that take the octaves of columns as pairs, on a GPU, against the oracle's numbers in float64."""

import pytest
import torch
from torch import Tensor, library

pytest.importorskip("triton.experimental.gluon.language.nvidia.hopper")

from qcompile.backends.fx.kernels import fp4_lowered
from qcompile.backends.fx.rows import QUANTIZE_ROWS
from qcompile.backends.triton.pairs import APART, MOST_ROWS
from qcompile.backends.triton.quantize_rows import Rows, quantize_rows
from qcompile.formats import parse_format
from qcompile.numerics import dequantize, find_qparams, quantize
from qcompile.shifts import room
from qcompile.spec import parse_spec
from tests.triton.alone import check_alone
from tests.triton.fused import pairs_of
from tests.triton.needs import hopper
from tests.triton.test_fp4 import BFLOAT16, LIMIT
from tests.triton.test_fp4_cpu import FORMATS, container

pytestmark = [pytest.mark.gpu, hopper]

SPEC = parse_spec("fp8_e4m3/token")


def octaves_of(fmt: str, K: int) -> Tensor:
    """int8 [1, K], the most and none among them."""
    most = min(room(parse_format(fmt)), APART)
    found = torch.randint(0, most + 1, (1, K), dtype=torch.int8)
    found[0, 0], found[0, -1] = most, 0
    return found.cuda()


def lowered_pack(fmt: str, N: int, octaves: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """A random weight whose columns are lowered, and the oracle's floats."""
    made, found, _ = container(fmt, N, tuple(octaves[0].tolist()))
    pack = {name: t.cuda() for name, t in fp4_lowered.pack(made, found, BFLOAT16).items()}
    return pack, dequantize(made, found).double().cuda()


def quantized(x: Tensor, octaves: Tensor) -> Rows:
    # what the allocator hands out next holds NaN
    torch.full((2 * MOST_ROWS * x.shape[-1],), 0x7F, dtype=torch.uint8, device="cuda")
    return quantize_rows(x, SPEC, shift=octaves)


def multiplied(rows: Rows, pack: dict[str, Tensor], fmt: str) -> Tensor:
    torch.full((16 * rows.codes.shape[0] * pack["scale"].shape[0],), torch.nan, device="cuda")
    return torch.ops.qcompile.linear_fp4_lowered(
        rows.codes, rows.scale, pack["words"], pack["scale"], pack["octaves"], None, fmt, "", BFLOAT16, rows.pairs
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("M", "K"), [(1, 1), (3, 300), (32, 4096), (2, 14336), (5, 32768), (33, 64), (0, 64)])
def test_pairs_hold_rows_to_the_bit(dtype: torch.dtype, M: int, K: int) -> None:
    # numbers of all sizes, so that many are subnormal in E4M3
    x = (torch.randn(M, K, device="cuda") * torch.exp2(-18 * torch.rand(M, K, device="cuda"))).to(dtype)
    octaves = octaves_of("fp4_e2m1", K)
    found = quantized(x, octaves)
    assert found.pairs is not None
    assert found.pairs.shape == (2 * MOST_ROWS, K)
    expected = find_qparams(x.cpu(), SPEC)
    assert torch.equal(found.codes.cpu(), quantize(x.cpu(), expected))
    if M <= MOST_ROWS:
        assert torch.equal(found.pairs[: 2 * M].cpu(), pairs_of(found.codes.cpu(), octaves[0].cpu())[: 2 * M])


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("M", [1, 3, 4, 5, 16, 17, 32, 33])
@pytest.mark.parametrize(("N", "K"), [(75, 272), (192, 1024), (4096, 512), (28672, 256), (64, 28672)])
def test_products(fmt: str, M: int, N: int, K: int) -> None:
    octaves = octaves_of(fmt, K)
    pack, weight = lowered_pack(fmt, N, octaves)
    rows = quantized(torch.randn(M, K, device="cuda", dtype=BFLOAT16), octaves)
    x = rows.codes.view(torch.float8_e4m3fn).double() * rows.scale.double()
    y, expected = multiplied(rows, pack, fmt).double(), x @ weight.T
    assert y.isfinite().all()
    assert float(((y - expected).norm(dim=1) / expected.norm(dim=1)).max()) < LIMIT


def test_one_column_alone_is_exact() -> None:
    octaves = octaves_of("fp4_e2m1", 256)
    pack, weight = lowered_pack("fp4_e2m1", 128, octaves)
    x = torch.randn(3, 256, device="cuda", dtype=BFLOAT16)
    x[:, 1:-1] = 0
    # the last one finds the scale, and is so large that the first is subnormal
    x[:, -1] = 2.0**16
    rows = quantized(x, octaves)
    rows.codes[:, -1] = 0
    assert rows.pairs is not None
    rows.pairs[:, -1] = 0
    exact = rows.codes.view(torch.float8_e4m3fn).double() * rows.scale.double() @ weight.T
    torch.testing.assert_close(multiplied(rows, pack, "fp4_e2m1").double(), exact, rtol=2.0**-8, atol=0)


@pytest.mark.parametrize("M", [4, 16, 32])
def test_rows_are_alone_and_results_repeat(M: int) -> None:
    octaves = octaves_of("fp4_e2m1", 1024)
    pack, _ = lowered_pack("fp4_e2m1", 192, octaves)

    def linear(x: Tensor) -> Tensor:
        return multiplied(quantized(x, octaves), pack, "fp4_e2m1")

    x = torch.randn(M, 1024, device="cuda", dtype=BFLOAT16)
    assert (check_alone(linear, x) == 0).all()
    order = torch.randperm(M, device="cuda")
    assert torch.equal(linear(x[order]), linear(x)[order])


@pytest.mark.parametrize("M", [0, 3, 33])
def test_the_ops_are_clean(M: int) -> None:
    octaves = octaves_of("fp4_e2m1", 256)
    pack, _ = lowered_pack("fp4_e2m1", 64, octaves)
    x = torch.randn(2, M, 256, device="cuda", dtype=BFLOAT16)
    weight = torch.randn(256, device="cuda", dtype=BFLOAT16)
    if 0 < 2 * M <= MOST_ROWS:
        # rows of many are not written, so that two calls differ there
        whole = torch.randn(MOST_ROWS, 256, device="cuda", dtype=BFLOAT16)
        given = (whole, None, weight, None, "rms_norm", 1e-6, str(SPEC), 0, False, octaves)
        library.opcheck(QUANTIZE_ROWS, given)
    rows = quantized(x.flatten(0, 1), octaves)
    arguments = (rows.codes, rows.scale, pack["words"], pack["scale"], 1, BFLOAT16, pack["octaves"], rows.pairs)
    library.opcheck(torch.ops.qcompile.fp4_mm.default, arguments)
