"""The kernels of 8-bit codes on a GPU: integers bit for bit, everything else against float64."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, library

pytest.importorskip("triton.experimental.gluon.language.nvidia.hopper")

from qcompile.backends.fx.kernels import KERNELS
from qcompile.backends.triton import eight_bit_ring, hopper
from qcompile.backends.triton.eight_bit import Operands
from qcompile.backends.triton.eight_bit_table import FP8, INT8, Config, HopperTiles, Library, RingTiles
from qcompile.backends.triton.fp8_matmul import fp8_matmul
from qcompile.backends.triton.int8_matmul import int8_matmul
from qcompile.backends.triton.table import capability_of, configs_of
from qcompile.numerics import find_qparams, quantize
from qcompile.spec import parse_spec
from tests.triton.alone import check_alone
from tests.triton.compiled import name_of
from tests.triton.needs import require_fp8

pytestmark = pytest.mark.gpu

# columns that one fp8 instruction adds to a sum
FP8_DEPTH = 32
BFLOAT16, FLOAT16, FLOAT32 = torch.bfloat16, torch.float16, torch.float32


# configurations whose kernels do not take everything
REFUSES = {RingTiles: eight_bit_ring.why_not, HopperTiles: hopper.why_not}


def configs(o: Operands) -> list[Config]:
    """The kernels' that this device may run on these operands."""
    found = configs_of(INT8 if o.x.dtype is torch.int8 else FP8, capability_of(torch.device("cuda", 0)))
    kernels = [config for config in found if not isinstance(config, Library)]
    return [c for c in kernels if type(c) not in REFUSES or REFUSES[type(c)](o) is None]


def random(*size: int, dtype: torch.dtype = FLOAT32) -> Tensor:
    return torch.randn(size, device="cuda").to(dtype)


def operands(M: int, N: int, K: int, dtype: torch.dtype, *, full: bool = False, tail: int = 0) -> Operands:
    """Random int8 operands; full: with zeros, bias and residual."""
    x, w = (torch.randint(-128, 128, size, dtype=torch.int8, device="cuda") for size in ((M, K), (N, K)))
    scale_x, scale_w = torch.rand(M, 1, device="cuda") / K, torch.rand(N, 1, device="cuda") / 100
    o = Operands(x=x, w=w, scale_x=scale_x, scale_w=scale_w, dtype=dtype)
    if full:
        zero = torch.randint(0, 256, (M, 1), device="cuda").float()
        o = replace(o, zero=zero, sum_w=w.sum(1, dtype=torch.int32))
        o = replace(o, bias=random(N, dtype=dtype), residual=random(M, N, dtype=dtype))
    if tail:
        o = replace(o, x_tail=random(M, tail + -tail % 8, dtype=dtype), w_tail=random(tail, N, dtype=dtype))
    return o


def exact(o: Operands) -> Tensor:
    """y of operands without a tail: float64 holds every sum of codes exactly; then float32, step by step."""
    sums = o.x.double() @ o.w.double().T
    if o.zero is not None and o.sum_w is not None:
        sums = sums - (o.zero.double() - 128) * o.sum_w.double()
    y = sums.float() * (o.scale_x * o.scale_w.squeeze(-1))
    y = y if o.bias is None else y + o.bias
    return (y if o.residual is None else y + o.residual).to(o.dtype)


def poison(count: int) -> None:
    """Leave NaN in the memory that the next result is likely to take."""
    torch.full((count,), torch.nan, device="cuda")


@pytest.mark.parametrize(("N", "K"), [(48, 64), (400, 352), (264, 2208), (12, 130)])
@pytest.mark.parametrize("full", [False, True], ids=["plain", "full"])
def test_odd_shapes_are_exact(N: int, K: int, full: bool) -> None:
    for M in (0, 1, 3, 16, 17, 33, 257):
        o = operands(M, N, K, BFLOAT16, full=full)
        poison(M * N)
        assert torch.equal(int8_matmul(o), exact(o)), M


@pytest.mark.parametrize("dtype", [FLOAT16, FLOAT32], ids=str)
def test_other_results_are_exact(dtype: torch.dtype) -> None:
    for M in (3, 257):
        o = operands(M, 400, 352, dtype, full=True)
        y = int8_matmul(o)
        assert y.dtype is dtype
        assert torch.equal(y, exact(o)), M


@pytest.mark.parametrize("full", [False, True], ids=["plain", "full"])
def test_every_configuration_is_exact(full: bool) -> None:
    for M in (1, 20, 128, 300):
        o = operands(M, 1000, 2208, BFLOAT16, full=full)
        for config in configs(o):
            poison(M * 1000)
            assert torch.equal(int8_matmul(o, config), exact(o)), (M, name_of(config))


@pytest.mark.parametrize(("M", "N", "K"), [(1, 4096, 28672), (64, 8200, 14336), (2049, 28672, 512)])
def test_large_sums_are_exact(M: int, N: int, K: int) -> None:
    o = operands(M, N, K, FLOAT32)
    o = replace(o, x=torch.full_like(o.x, -128), w=torch.full_like(o.w, 127))
    assert torch.equal(int8_matmul(o), exact(o))


def test_a_configuration_that_cannot_run_says_why() -> None:
    o = operands(3, 400, 352, FLOAT32, tail=16)
    ring = RingTiles(tokens=8, channels=64, stages=4, resident=1)
    with pytest.raises(ValueError, match=r"RingTiles.*not of 16 bits"):
        int8_matmul(o, ring)
    x, w = (t[:, :350].to(torch.float8_e4m3fn) for t in (o.x, o.w))
    with pytest.raises(ValueError, match=r"RingTiles.*multiples of 16 bytes, at K=350"):
        fp8_matmul(replace(o, x=x, w=w, x_tail=None, w_tail=None), ring)


@pytest.mark.parametrize("M", [1, 40, 300])
def test_strides_do_not_matter(M: int) -> None:
    o = operands(M, 400, 352, BFLOAT16, full=True, tail=16)
    expected = int8_matmul(o)
    wide = torch.randint(-128, 128, (M, 370), dtype=torch.int8, device="cuda")
    wide[:, 5:357] = o.x
    assert o.x_tail is not None
    assert o.residual is not None
    for x in (wide[:, 5:357], o.x.t().contiguous().t()):
        residual, x_tail = o.residual.t().contiguous().t(), o.x_tail.t().contiguous().t()
        y = int8_matmul(replace(o, x=x, residual=residual, x_tail=x_tail))
        torch.testing.assert_close(y, expected, rtol=2**-8, atol=2**-6)


@pytest.mark.parametrize("M", [5, 300])
def test_one_scale_for_all_rows(M: int) -> None:
    o = operands(M, 400, 352, BFLOAT16, full=True)
    assert o.zero is not None
    shared = replace(o, scale_x=o.scale_x[0, 0], zero=o.zero[0, 0])
    rows = replace(o, scale_x=o.scale_x[:1].expand(M, 1).contiguous(), zero=o.zero[:1].expand(M, 1).contiguous())
    assert torch.equal(int8_matmul(shared), int8_matmul(rows))


@pytest.mark.parametrize("M", [5, 300])
def test_scales_that_are_no_numbers_stay_in_their_rows(M: int) -> None:
    o = operands(M, 400, 352, BFLOAT16)
    o.scale_x[:4, 0] = torch.tensor([0.0, torch.nan, torch.inf, -torch.inf])
    y = int8_matmul(o)
    torch.testing.assert_close(y, exact(o), rtol=0, atol=0, equal_nan=True)
    assert y[1].isnan().all()
    assert y[4:].isfinite().all()


@pytest.mark.parametrize("M", [1, 20, 300])
@pytest.mark.parametrize(("tail", "dtype"), [(1, BFLOAT16), (41, BFLOAT16), (130, FLOAT16), (41, FLOAT32)], ids=str)
def test_tail_is_added(M: int, tail: int, dtype: torch.dtype) -> None:
    o = operands(M, 400, 352, dtype, full=True, tail=tail)
    assert o.x_tail is not None
    assert o.w_tail is not None
    left = exact(replace(o, dtype=FLOAT32)).double()
    x_tail = o.x_tail[:, :tail].double()
    reference = left + x_tail @ o.w_tail.double()
    # one rounding to dtype; sums in float32
    magnitude = left.abs() + x_tail.abs() @ o.w_tail.double().abs() + 8
    for config in configs(o):
        poison(M * 400)
        y = int8_matmul(o, config)
        unit = max(torch.finfo(dtype).eps / 2, 2.0**-21)
        assert ((y.double() - reference).abs() <= unit * reference.abs() + 2.0**-21 * magnitude).all(), name_of(config)


def test_a_row_does_not_depend_on_the_others() -> None:
    o = operands(300, 400, 2208, BFLOAT16, tail=41)
    assert o.x_tail is not None
    for config in configs(o):
        y = int8_matmul(o, config)
        assert torch.equal(y, int8_matmul(o, config)), name_of(config)
        for rows in (slice(0, 1), slice(7, 50)):
            part = replace(o, x=o.x[rows], scale_x=o.scale_x[rows], x_tail=o.x_tail[rows])
            assert torch.equal(int8_matmul(part, config), y[rows]), name_of(config)


@pytest.mark.parametrize("M", [1, 17, 64])
@pytest.mark.parametrize(("N", "K"), [(400, 352), (12, 130), (8192, 4096), (128, 28672)])
def test_fp8(M: int, N: int, K: int) -> None:
    require_fp8()
    x, w = random(M, K).to(torch.float8_e4m3fn), random(N, K).to(torch.float8_e4m3fn)
    o = Operands(x=x, w=w, scale_x=random(M, 1).abs(), scale_w=random(N, 1).abs(), dtype=BFLOAT16)
    scale = o.scale_x.double() * o.scale_w.double().T
    sums, largest = torch.zeros(M, N, device="cuda").double(), torch.zeros(M, N, device="cuda").double()
    for k in range(0, K, FP8_DEPTH):
        sums += x[:, k : k + FP8_DEPTH].double() @ w[:, k : k + FP8_DEPTH].double().T
        largest = torch.maximum(largest, sums.abs())
    reference = sums * scale
    # fp8 tensor cores cut each sum to about 14 bits
    limit = 2.0**-8 * reference.abs() + 2.0**-13 * -(-K // FP8_DEPTH) * largest * scale
    for config in configs(o):
        poison(M * N)
        y = fp8_matmul(o, config)
        assert ((y.double() - reference).abs() <= limit).all(), name_of(config)
        assert torch.equal(y, fp8_matmul(o, config)), name_of(config)
        assert torch.equal(y[:1], fp8_matmul(replace(o, x=x[:1], scale_x=o.scale_x[:1]), config)), name_of(config)


@pytest.mark.parametrize("M", [4, 17, 64, 130, 1300])
def test_rows_of_fp8_are_alone(M: int) -> None:
    require_fp8()
    N, K, spec = 192, 1024, parse_spec("fp8_e4m3/token")
    w, scale_w = random(N, K).to(torch.float8_e4m3fn), random(N, 1).abs()

    def linear(x: Tensor) -> Tensor:
        qparams = find_qparams(x, spec)
        codes = quantize(x, qparams).view(torch.float8_e4m3fn)
        poison(M * N)
        return fp8_matmul(Operands(x=codes, w=w, scale_x=qparams.scale, scale_w=scale_w, dtype=BFLOAT16))

    assert (check_alone(linear, random(M, K)) == 0).all()


@pytest.mark.parametrize("M", [1, 65])
@pytest.mark.parametrize("N", [400, 408])
def test_fp8_by_the_table(M: int, N: int) -> None:
    require_fp8()
    x, w = random(M, 352).to(torch.float8_e4m3fn), random(N, 352).to(torch.float8_e4m3fn)
    o = Operands(x=x, w=w, scale_x=random(M, 1).abs(), scale_w=random(N, 1).abs(), dtype=BFLOAT16)
    reference = (x.double() @ w.double().T) * o.scale_x.double() * o.scale_w.double().T
    poison(M * N)
    assert ((fp8_matmul(o).double() - reference).norm() / reference.norm()) < 4e-3
    # what the library does not take
    with_bias = replace(o, bias=random(N, dtype=BFLOAT16))
    assert ((fp8_matmul(with_bias) - with_bias.bias).double() - reference).norm() / reference.norm() < 1e-2


@pytest.mark.parametrize("M", [0, 1, 65])
def test_ops_pass_opcheck(M: int) -> None:
    o = operands(M, 64, 48, BFLOAT16, full=True, tail=16)
    vectors = (o.scale_w, o.sum_w, o.bias, o.x_tail, o.w_tail)
    library.opcheck(torch.ops.qcompile.int8_matmul, (o.x, o.scale_x, o.zero, o.w, *vectors, BFLOAT16))
    x, w = (random(size, 48).to(torch.float8_e4m3fn).view(torch.uint8) for size in (M, 64))
    if torch.cuda.get_device_capability() >= (8, 9):
        library.opcheck(torch.ops.qcompile.fp8_matmul, (x, o.scale_x, w, o.scale_w))


@pytest.mark.parametrize("M", [1, 300])
def test_a_graph_replays_on_new_values(M: int) -> None:
    o = operands(M, 400, 352, BFLOAT16)
    int8_matmul(o)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = int8_matmul(o)
    o.x.copy_(torch.randint(-128, 128, o.x.shape, dtype=torch.int8, device="cuda"))
    graph.replay()
    assert torch.equal(y, exact(o))


def test_the_kernels_are_preferred_to_the_library() -> None:
    names = [kernel.name for kernel in KERNELS]
    assert names.index("int8-triton") < names.index("int8")
    assert names.index("fp8-triton") < names.index("fp8")
