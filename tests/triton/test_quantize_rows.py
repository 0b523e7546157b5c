"""Rows quantized on a GPU: codes of the oracle to the bit where the floats before are, else of floats as near."""

from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, library

pytest.importorskip("triton")

import triton
import triton.language as tl

from qcompile.backends.fx.rows import QUANTIZE_ROWS
from qcompile.backends.triton.before_rows import BEFORE
from qcompile.backends.triton.eight_bit_table import TAIL_MULTIPLE
from qcompile.backends.triton.float_grid import divide
from qcompile.backends.triton.quantize_rows import Rows, quantize_rows
from qcompile.numerics import QParams, dequantize, find_qparams, quantize
from qcompile.spec import Spec, parse_spec
from tests.triton.needs import require_fp8

pytestmark = pytest.mark.gpu

INT8, ASYMMETRIC, FP8 = (parse_spec(text) for text in ("int8/token", "int8/token/asym", "fp8_e4m3/token"))
SPECS = (INT8, ASYMMETRIC, FP8, parse_spec("int4/token/asym"))
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
EPS = 1e-5
SHAPES = [(1, 4096), (3, 1), (5, 7), (2, 384), (7, 1000), (33, 4097), (2, 14336), (2, 28672), (3, 32768)]


@pytest.fixture(autouse=True)
def supported(request: pytest.FixtureRequest) -> None:
    spec = request.node.callspec.params.get("spec") if hasattr(request.node, "callspec") else None
    if spec is FP8:
        require_fp8()


def random(*size: int, dtype: torch.dtype) -> Tensor:
    """Of very different sizes from row to row."""
    spread = 2.0 ** torch.randint(-9, 9, (*size[:-1], 1), device="cuda")
    return (torch.randn(size, device="cuda") * spread).to(dtype)


def poison(count: int) -> None:
    """Leave NaN in the memory that results are likely to take."""
    for size in (count, 4 * count, 2 * count):
        torch.full((size,), 0x7F, dtype=torch.uint8, device="cuda")


def assert_codes_of(found: Rows, value: Tensor, spec: Spec) -> None:
    """The codes, scales and zeros that the oracle finds for a value, to the bit.

    On the CPU: on a GPU eager torch divides by a number by multiplying with its inverse.
    """
    value, codes, scale = value.cpu(), found.codes.cpu(), found.scale.cpu()
    zero = None if found.zero is None else found.zero.cpu()
    expected = find_qparams(value, spec)
    exact = {"rtol": 0, "atol": 0, "equal_nan": True}
    torch.testing.assert_close(scale, expected.scale, **exact)
    if expected.zero is not None:
        torch.testing.assert_close(zero, expected.zero, **exact)
    finite = expected.scale.isfinite().expand_as(value)
    expected_codes = quantize(value, expected)
    assert codes.dtype == expected_codes.dtype
    assert torch.equal(codes[finite], expected_codes[finite])
    # codes of other rows are not defined, but none makes a number of a scale that is none
    assert not dequantize(codes, QParams(spec=spec, scale=scale, zero=zero))[~finite].isfinite().any()


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("M", "K"), SHAPES)
def test_codes_are_exact(M: int, K: int, dtype: torch.dtype, spec: Spec) -> None:
    x = random(M, K, dtype=dtype)
    poison(M * K)
    assert_codes_of(quantize_rows(x, spec), x, spec)


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_that_are_no_ordinary_numbers(dtype: torch.dtype, spec: Spec) -> None:
    x = random(12, 300, dtype=dtype)
    x[0] = 0
    x[1, 7] = torch.nan
    x[2, 8], x[3, 9] = torch.inf, -torch.inf
    x[4] = x[4].abs() + 1
    x[5] = -x[5].abs() - 1
    x[6] = torch.finfo(dtype).tiny
    x[7] = x[7] * 0 + torch.finfo(dtype).max
    x[8, 1:], x[8, 0] = 0, torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    x[9, 3], x[9, 4] = torch.nan, torch.inf
    x[10] = x[10] * torch.finfo(dtype).tiny * 64
    x[11, :9] = -0.0
    assert_codes_of(quantize_rows(x, spec), x, spec)


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ties(dtype: torch.dtype, spec: Spec) -> None:
    """Halves of a scale that is a power of two, and what lies beside them."""
    most = float(spec.code_range[1] if spec is not FP8 else spec.format.max)
    x = torch.arange(-most, most + 0.5, 0.5, device="cuda").to(dtype).repeat(3, 1)
    x[1], x[2] = x[1] * (1 + torch.finfo(dtype).eps), x[2] * (1 - torch.finfo(dtype).eps)
    x[:, 0] = most
    assert_codes_of(quantize_rows(x, spec), x, spec)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_strides_and_empty_rows(spec: Spec) -> None:
    wide = random(2, 9, 3 * 264, dtype=torch.bfloat16)
    for x in (wide[..., :264], wide[..., 3:260], wide[:, ::2, 264:528], wide.transpose(1, 2), wide[0, 0], wide[:, :0]):
        found = quantize_rows(x, spec)
        assert found.codes.shape == x.shape
        assert found.scale.shape == (*x.shape[:-1], 1)
        if x.numel():
            assert_codes_of(found, x, spec)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_offset_is_taken_off_the_codes(dtype: torch.dtype) -> None:
    x = random(5, 1000, dtype=dtype)
    x[0, 0] = torch.nan
    plain, less = quantize_rows(x, ASYMMETRIC), quantize_rows(x, ASYMMETRIC, offset=128)
    assert less.codes.dtype is torch.int8
    assert torch.equal(less.codes[1:].int() + 128, plain.codes[1:].int())
    torch.testing.assert_close(less.zero, plain.zero, rtol=0, atol=0, equal_nan=True)


def made(before: str, x: Tensor, second: Tensor | None, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """What eager torch makes of x before it is quantized, with each of its roundings, in float64 between them."""
    dtype, K = x.dtype, x.shape[-1]

    def kept(value: Tensor) -> Tensor:
        return value.to(dtype).double()

    value = x.double()
    if before in ("nothing", "rms_norm", "rms_norm_weight_last", "layer_norm"):
        value = value if second is None else kept(value + second.double())
    if before == "layer_norm":
        value = F.layer_norm(value, (K,), None, None, EPS)
    elif before.startswith("rms_norm"):
        value = F.rms_norm(value, (K,), None, EPS)
        value = kept(value) if before == "rms_norm_weight_last" else value
    elif before != "nothing":
        value = kept(F.silu(value) if before == "silu" else F.gelu(value, approximate=_APPROXIMATE[before]))
        return kept(value if second is None else value * second.double())
    value = value if weight is None else value * weight.double()
    return kept(value if bias is None else value + bias.double())


_APPROXIMATE = {"gelu": "none", "gelu_tanh": "tanh"}


@pytest.mark.parametrize("spec", [ASYMMETRIC, FP8], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("before", BEFORE)
@pytest.mark.parametrize("full", [False, True], ids=["alone", "full"])
def test_what_comes_before(before: str, full: bool, dtype: torch.dtype, spec: Spec) -> None:
    """The value that was quantized is the float64 one but for its last bit, so each code is the right one or next."""
    norm = "norm" in before
    for M, K in ((1, 4096), (5, 333), (3, 14336), (4, 9)):
        x = torch.randn(M, K, device="cuda").to(dtype)
        second = torch.randn(M, K, device="cuda").to(dtype) if full else None
        weight = torch.randn(K, device="cuda").to(dtype) if full and norm else None
        bias = torch.randn(K, device="cuda").to(dtype) if full and before == "layer_norm" else None
        keep = full and (norm or before == "nothing")
        poison(M * K)
        given = {"before": before, "second": second, "weight": weight, "bias": bias, "eps": EPS, "keep_total": keep}
        found = quantize_rows(x, spec, **given)
        value = made(before, x, second, weight, bias)
        # as many units in the last place as roundings of a norm in this dtype, or of exp and a quotient in float32
        unit = max(torch.finfo(dtype).eps, 2.0**-19)
        qparams = QParams(spec=spec, scale=found.scale, zero=found.zero)
        step = found.scale if spec is not FP8 else torch.maximum(found.scale * 2.0**-9, value.abs().float() * 2.0**-3)
        off = (dequantize(found.codes, qparams).double() - value).abs()
        assert (off <= 0.5 * step.double() * (1 + 2.0**-9) + 3 * unit * value.abs() + 1e-7).all(), (before, M, K)
        expected = find_qparams(value.to(dtype), spec)
        torch.testing.assert_close(found.scale, expected.scale, rtol=4 * unit, atol=0)
        if keep:
            assert second is not None
            assert torch.equal(found.total, x + second)
        again = quantize_rows(x[:1], spec, **given | {"second": None if second is None else second[:1]})
        assert torch.equal(again.codes, found.codes[:1]), "a row depends on others"


def split(channels: Sequence[int], x: Tensor) -> dict[str, Tensor]:
    """What masks these channels of x, and what makes them the tail."""
    keep = torch.ones(x.shape[-1], dtype=x.dtype, device="cuda")
    keep[list(channels)] = 0
    return {"keep": keep, "channels": torch.tensor(list(channels), dtype=torch.int32, device="cuda")}


def assert_split(found: Rows, value: Tensor, channels: Sequence[int], spec: Spec) -> None:
    """Codes of the value with those channels masked, as a graph masks them, and the channels as they are."""
    assert_codes_of(found, value * split(channels, value)["keep"], spec)
    assert found.tail is not None
    assert found.tail.shape == (*value.shape[:-1], len(channels) + -len(channels) % TAIL_MULTIPLE)
    count = len(channels)
    torch.testing.assert_close(found.tail[..., :count], value[..., list(channels)], rtol=0, atol=0, equal_nan=True)
    assert (found.tail[..., count:] == 0).all()


def assert_split_near(found: Rows, value: Tensor, channels: Sequence[int], spec: Spec) -> None:
    """As `assert_split`, of a value that is known to a few units in its last place."""
    assert found.tail is not None
    torch.testing.assert_close(found.tail[..., : len(channels)], value[..., list(channels)], rtol=1e-6, atol=1e-6)
    rest = value.index_fill(-1, torch.tensor(channels, device=value.device), 0.0)
    expected = find_qparams(rest, spec)
    torch.testing.assert_close(found.scale, expected.scale, rtol=1e-6, atol=0)
    qparams = QParams(spec=spec, scale=found.scale, zero=found.zero)
    step = found.scale if spec is not FP8 else torch.maximum(found.scale * 2.0**-9, rest.abs() * 2.0**-3)
    assert bool(((dequantize(found.codes, qparams) - rest).abs() <= 0.5001 * step + 1e-6).all())


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("M", "K"), SHAPES)
def test_outliers_leave_the_codes(M: int, K: int, dtype: torch.dtype, spec: Spec) -> None:
    x = random(M, K, dtype=dtype)
    some = sorted({K // 2, *range(0, K, 100)})
    x[:, some] *= 60
    for channels in ((), (K - 1,), some, some[::-1], range(K // 2, K), range(K)):
        poison(M * K)
        found = quantize_rows(x, spec, **split(channels, x))
        assert_split(found, x, channels, spec)


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_outliers_that_are_no_ordinary_numbers(dtype: torch.dtype, spec: Spec) -> None:
    x = random(9, 300, dtype=dtype)
    x[0] = 0
    x[1, 7], x[2, 8], x[3, 9] = torch.nan, torch.inf, -torch.inf
    x[4, 7], x[5, 8], x[6, :20] = torch.finfo(dtype).max, -torch.finfo(dtype).max, -0.0
    x[7, 30], x[8, 31] = torch.nan, torch.inf
    channels = (8, 7, 9, 299, 0)
    assert_split(quantize_rows(x, spec, **split(channels, x)), x, channels, spec)


@pytest.mark.parametrize("spec", [INT8, ASYMMETRIC, FP8], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("before", BEFORE)
@pytest.mark.parametrize("full", [False, True], ids=["alone", "full"])
def test_outliers_of_what_comes_before(before: str, full: bool, dtype: torch.dtype, spec: Spec) -> None:
    """The value is what the same kernel leaves, were all channels outliers."""
    norm = "norm" in before
    for M, K in ((1, 4096), (5, 333), (3, 14336), (4, 9)):
        x, second = (torch.randn(M, K, device="cuda").to(dtype) for _ in range(2))
        weight = torch.randn(K, device="cuda").to(dtype) if full and norm else None
        bias = torch.randn(K, device="cuda").to(dtype) if full and before == "layer_norm" else None
        given = {"before": before, "weight": weight, "bias": bias, "eps": EPS, "keep_total": full and norm}
        given |= {"second": second} if full else {}
        everything = quantize_rows(x, spec, **split(range(K), x), **given)
        assert everything.tail is not None
        value, channels = everything.tail[:, :K], sorted({K // 2, *range(0, K, 97)})
        poison(M * K)
        found = quantize_rows(x, spec, **split(channels, x), **given)
        plain = quantize_rows(x, spec, **given)
        if norm and dtype is torch.float32:
            # not rounded to fewer bits, which would hide that the compiler joins products and sums elsewhere
            assert_split_near(found, value, channels, spec)
        else:
            assert_split(found, value, channels, spec)
            assert_codes_of(plain, value.contiguous(), spec)
        if plain.total is not None:
            assert torch.equal(found.total, plain.total)


@pytest.mark.parametrize("powers", [False, True], ids=["any", "powers of two"])
@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("M", "K"), SHAPES)
def test_factors_of_channels(M: int, K: int, dtype: torch.dtype, spec: Spec, powers: bool) -> None:
    """As a graph multiplies: rounded to the dtype, before the range is found."""
    x = random(M, K, dtype=dtype)
    exponents = torch.randint(-3, 4, (K,), device="cuda").to(dtype)
    weight = exponents.exp2() if powers else torch.rand(K, device="cuda", dtype=dtype) + 0.5
    product, channels = x * weight, sorted({K // 2, *range(0, K, 97)})
    poison(M * K)
    assert_codes_of(quantize_rows(x, spec, weight=weight), product, spec)
    assert_split(quantize_rows(x, spec, weight=weight, **split(channels, x)), product, channels, spec)


@pytest.mark.parametrize("spec", [INT8, ASYMMETRIC, FP8], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("before", [kind for kind in BEFORE if "norm" not in kind])
def test_factors_of_what_comes_before(before: str, dtype: torch.dtype, spec: Spec) -> None:
    """The value is what the same kernel leaves, were all channels outliers."""
    for M, K in ((1, 4096), (5, 333), (3, 14336), (4, 9)):
        x, second = (torch.randn(M, K, device="cuda").to(dtype) for _ in range(2))
        weight = torch.rand(K, device="cuda", dtype=dtype) + 0.5
        given = {"before": before, "second": second}
        everything = quantize_rows(x, spec, **split(range(K), x), **given)
        assert everything.tail is not None
        product, channels = everything.tail[:, :K] * weight, sorted({K // 2, *range(0, K, 97)})
        poison(M * K)
        assert_codes_of(quantize_rows(x, spec, weight=weight, **given), product, spec)
        found = quantize_rows(x, spec, weight=weight, **split(channels, x), **given)
        assert_split(found, product, channels, spec)


def test_outliers_of_a_view_and_of_no_rows() -> None:
    wide = random(2, 9, 3 * 264, dtype=torch.bfloat16)
    for x in (wide[..., :264], wide[:, ::2, 264:528], wide.transpose(1, 2)[..., :8], wide[0, 0], wide[:, :0]):
        found = quantize_rows(x, ASYMMETRIC, **split((1, 5), x))
        assert found.tail is not None
        assert found.tail.shape == (*x.shape[:-1], 8)
        if x.numel():
            assert_split(found, x, (1, 5), ASYMMETRIC)


@triton.jit
def _count_wrong(scales, wrong, FIRST: tl.constexpr, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    bits = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK) + 0x3F800000
    scale = bits.to(tl.float32, bitcast=True)
    found = tl.zeros((BLOCK,), tl.int32)
    for i in range(FIRST, FIRST + COUNT):
        v = (scale * 0 + i) / FIRST
        found += (divide(v, scale) != tl.div_rn(v, scale)).to(tl.int32)
    tl.store(wrong + tl.program_id(0), tl.sum(found, 0))


@pytest.mark.parametrize("bits", [8, 11])
def test_every_quotient_is_rounded_right(bits: int) -> None:
    """Of all values with that many significant bits by all scales; powers of two change neither."""
    first, blocks = 2 ** (bits - 1), 2**23 // 1024
    wrong = torch.full((blocks,), -1, dtype=torch.int32, device="cuda")
    _count_wrong[(blocks,)](wrong, wrong, first, first, 1024, enable_fp_fusion=False)
    assert int(wrong.abs().sum()) == 0


@pytest.mark.parametrize("M", [0, 1, 17])
@pytest.mark.parametrize("spec", [INT8, ASYMMETRIC, FP8], ids=str)
def test_op_passes_opcheck(spec: Spec, M: int) -> None:
    x, second = (random(2, M, 96, dtype=torch.bfloat16) for _ in range(2))
    weight = random(1, 96, dtype=torch.bfloat16)[0]
    library.opcheck(QUANTIZE_ROWS, (x, second, weight, None, "rms_norm", EPS, str(spec), 0, True))
    library.opcheck(QUANTIZE_ROWS, (x[..., :48], x[..., 48:], None, None, "silu", 0.0, str(spec), 0, False))
    library.opcheck(QUANTIZE_ROWS, (x, None, weight, None, "nothing", 0.0, str(spec), 0, False))
    outliers = split((3, 90, 4), x).values()
    library.opcheck(QUANTIZE_ROWS, (x, second, weight, None, "rms_norm", EPS, str(spec), 0, True, None, *outliers))


@pytest.mark.parametrize("call", [lambda x: quantize_rows(x, ASYMMETRIC)])
def test_a_graph_replays_on_new_values(call: Callable[[Tensor], Rows]) -> None:
    x = random(5, 1000, dtype=torch.bfloat16)
    call(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = call(x)
    x.copy_(random(5, 1000, dtype=torch.bfloat16))
    graph.replay()
    assert_codes_of(found, x, ASYMMETRIC)
