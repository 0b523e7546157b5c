"""Quantizing rows without a GPU: the kernel becomes a binary for each device; the interpreter finds exact codes."""

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from qcompile.backends.triton import quantize_rows
from qcompile.backends.triton.before_rows import BEFORE
from qcompile.backends.triton.quantize_rows import MAX_K, warps_for, why_not
from qcompile.formats import Float, parse_format
from qcompile.spec import parse_spec
from tests.triton.needs import run_interpreted
from tests.triton.rows_cubins import cubin

BFLOAT16 = torch.bfloat16


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("before", BEFORE)
def test_integers_compile(before: str, capability: int) -> None:
    assert cubin(4096, capability, BFLOAT16, before, integer=True, zeros=True, second=True)[:4] == b"\x7fELF"


@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("before", BEFORE)
def test_a_tail_of_outliers_compiles(before: str, early: bool) -> None:
    made = cubin(4096, 90, BFLOAT16, before, integer=True, zeros=True, second=True, split=True, early=early)
    assert made[:4] == b"\x7fELF"


@pytest.mark.parametrize("K", [1, 33])
def test_short_rows_compile(K: int) -> None:
    for before in ("rms_norm", "silu"):
        assert cubin(K, 90, BFLOAT16, before, integer=True, zeros=True, second=True)[:4] == b"\x7fELF"


@pytest.mark.parametrize("capability", [90, 100])
@pytest.mark.parametrize("before", ["nothing", "rms_norm", "silu"])
def test_fp8_compiles(before: str, capability: int) -> None:
    assert cubin(14336, capability, BFLOAT16, before, integer=False, second=True)[:4] == b"\x7fELF"


@pytest.mark.parametrize("capability", [90, 100])
@pytest.mark.parametrize("fmt", ["fp4_e2m1", "fp4_e3m0", "fp6_e3m2"])
@pytest.mark.parametrize("early", [False, True])
def test_floats_of_few_bits_compile(fmt: str, capability: int, early: bool) -> None:
    narrow = parse_format(fmt)
    assert isinstance(narrow, Float)
    assert cubin(4096, capability, BFLOAT16, "rms_norm", integer=False, narrow=narrow, early=early)[:4] == b"\x7fELF"


@pytest.mark.parametrize("K", [1, 4096, 14336, MAX_K])
@pytest.mark.parametrize("before", ["nothing", "rms_norm", "silu"])
def test_pairs_compile(before: str, K: int) -> None:
    for early in (False, True):
        made = cubin(K, 90, BFLOAT16, before, integer=False, second=True, early=early, pairs=True)
        assert made[:4] == b"\x7fELF"


@pytest.mark.parametrize(
    ("M", "K", "given", "early"),
    [
        (1, 64, {"shift": torch.zeros(1, 64, dtype=torch.int8)}, True),
        (1, 64, {"keep": torch.ones(64), "channels": torch.zeros(0, dtype=torch.int32)}, True),
        (133, 64, {"shift": torch.zeros(1, 64, dtype=torch.int8)}, False),
        (1, MAX_K, {"shift": torch.zeros(1, MAX_K, dtype=torch.int8)}, False),
        # one binary for any number of rows
        (1, 64, {"weight": torch.ones(64)}, False),
    ],
)
def test_few_rows_hold_constants_early(
    M: int, K: int, given: dict[str, Tensor], early: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    launched: list[tuple[Any, ...]] = []
    monkeypatch.setattr(quantize_rows, "launch", lambda *args, **options: launched.append(args))
    monkeypatch.setattr(quantize_rows, "is_dependent", lambda device: True)
    monkeypatch.setattr(quantize_rows, "processors_of", lambda device: 132)
    monkeypatch.setattr(quantize_rows, "on_device", lambda device: nullcontext())
    quantize_rows.quantize_rows(torch.zeros(M, K), parse_spec("fp8_e4m3/token"), **given)
    assert launched[0][3]["EARLY"] is early


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("before", [kind for kind in BEFORE if "norm" not in kind])
def test_factors_of_channels_compile(before: str, split: bool) -> None:
    made = cubin(4096, 90, BFLOAT16, before, integer=True, zeros=True, second=True, split=split, factor=True)
    assert made[:4] == b"\x7fELF"


@pytest.mark.slow
@pytest.mark.parametrize("K", [1, 100, 4096, 14336, MAX_K])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("before", BEFORE)
@pytest.mark.parametrize("second", [False, True])
@pytest.mark.parametrize(("integer", "zeros"), [(True, False), (True, True), (False, False)])
def test_every_variant_compiles(
    K: int, dtype: torch.dtype, before: str, second: bool, integer: bool, zeros: bool
) -> None:
    assert cubin(K, 90, dtype, before, integer=integer, zeros=zeros, second=second)[:4] == b"\x7fELF"


@pytest.mark.slow
@pytest.mark.parametrize("K", [1, 100, 14336, MAX_K])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("before", BEFORE)
@pytest.mark.parametrize("zeros", [False, True])
def test_a_tail_compiles_in_every_variant(K: int, dtype: torch.dtype, before: str, zeros: bool) -> None:
    assert cubin(K, 90, dtype, before, integer=True, zeros=zeros, second=True, split=True)[:4] == b"\x7fELF"


@pytest.mark.parametrize(
    ("spec", "dtype", "K", "capability", "words"),
    [
        ("int8/token", BFLOAT16, 4096, (9, 0), None),
        ("int8/token/asym", torch.float32, 1, (9, 0), None),
        ("int4/token", torch.float16, MAX_K, (9, 0), None),
        ("fp8_e4m3/token", BFLOAT16, 4096, (9, 0), None),
        ("fp4_e2m1/token", BFLOAT16, 4096, (9, 0), None),
        ("fp8_e3m4/token", BFLOAT16, 4096, (9, 0), "neither"),
        ("fp8_e4m3/token", BFLOAT16, 4096, (8, 0), "begin with sm_89"),
        ("int8/token", BFLOAT16, 4096, (8, 0), "measured on sm_90"),
        ("int8/token", BFLOAT16, 4096, (10, 0), "this is sm_100"),
        ("int8/token", BFLOAT16, MAX_K + 1, (9, 0), f"{MAX_K + 1} elements"),
        ("int8/token", torch.float64, 4096, (9, 0), "float64"),
        ("int8/g128", BFLOAT16, 4096, (9, 0), "scale a row"),
        ("int8/tensor", BFLOAT16, 4096, (9, 0), "scale a row"),
        ("int8/token/bf16", BFLOAT16, 4096, (9, 0), "scale a row"),
        ("fp8_e5m2/token", BFLOAT16, 4096, (9, 0), "neither"),
        ("nf4/token", BFLOAT16, 4096, (9, 0), "neither"),
    ],
)
def test_says_why_not(spec: str, dtype: torch.dtype, K: int, capability: tuple[int, int], words: str | None) -> None:
    reason = why_not(parse_spec(spec), dtype, K, capability)
    assert reason is None if words is None else words in str(reason)


@pytest.mark.parametrize("K", [1, 31, 512, 4096, 14336, 28672, MAX_K])
def test_a_block_of_threads_is_no_larger_than_a_device_takes(K: int) -> None:
    assert 1 <= warps_for(K) <= 32


START = """
import torch
import torch.nn.functional as F
from qcompile.backends.triton.quantize_rows import quantize_rows
from qcompile.numerics import find_qparams, quantize
from qcompile.spec import parse_spec

torch.manual_seed(0)
exact = {"rtol": 0, "atol": 0, "equal_nan": True}
activations = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh")}


def extreme(dtype):
    x = torch.randn(9, 113).to(dtype)[:, 3:104]
    x[0], x[1, 4], x[2, 7], x[3, 8] = 0, torch.nan, torch.inf, -torch.inf
    x[4], x[5] = x[4].abs() + 2, -x[5].abs() - 2
    x[6] = torch.finfo(dtype).smallest_normal
    return x
"""

INTERPRETED = """

def check(found, value, spec, offset=0):
    expected = find_qparams(value, spec)
    finite = expected.scale.isfinite().expand_as(value)
    torch.testing.assert_close(found.scale, expected.scale, **exact)
    if expected.zero is not None:
        torch.testing.assert_close(found.zero, expected.zero, **exact)
    assert torch.equal((found.codes.int() + offset)[finite], quantize(value, expected).int()[finite])


for text in ("int8/token", "int8/token/asym", "int4/token", "int4/token/asym"):
    spec = parse_spec(text)
    for dtype in (torch.float32, torch.float16):
        x = extreme(dtype)
        check(quantize_rows(x, spec), x, spec)
        # ties, and what lies beside them
        ties = torch.arange(-spec.code_range[1], spec.code_range[1] + 0.5, 0.5).to(dtype)
        eps = torch.finfo(dtype).eps
        ties = torch.stack([ties, ties * (1 + eps), ties * (1 - eps)])
        ties[:, 0] = spec.code_range[1]
        check(quantize_rows(ties, spec), ties, spec)
        second = torch.randn(9, 101).to(dtype)
        found = quantize_rows(x, spec, second=second, keep_total=True)
        torch.testing.assert_close(found.total, x + second, **exact)
        check(found, x + second, spec)
        assert quantize_rows(x[:0], spec).codes.shape == (0, 101)

spec = parse_spec("int8/token/asym")
x = torch.randn(2, 3, 60)
check(quantize_rows(x, spec, offset=128), x, spec, 128)
check(quantize_rows(x.transpose(1, 2), spec), x.transpose(1, 2).contiguous(), spec)


def near(found, value, dtype):
    # codes of a float as near as its dtype tells: at most one apart, under equal scales but for the last bits
    expected = find_qparams(value.to(dtype), spec)
    torch.testing.assert_close(found.scale, expected.scale, rtol=4 * torch.finfo(dtype).eps, atol=0)
    off = (found.codes.int() - quantize(value.to(dtype), expected).int()).abs()
    assert off.max() <= 1 and (off > 0).float().mean() < 0.02, (off.max(), (off > 0).float().mean())


for dtype in (torch.float32, torch.float16):
    both = torch.randn(5, 2 * 77).to(dtype)
    x, second = both[:, :77], both[:, 77:]
    weight, bias = torch.randn(77).to(dtype), torch.randn(77).to(dtype)
    for before, activation in activations.items():
        near(quantize_rows(x, spec, before=before), activation(x), dtype)
        near(quantize_rows(x, spec, before=before, second=second), activation(x) * second, dtype)
    total = x + second
    normed = F.rms_norm(total.float(), (77,), None, 1e-5)
    given = {"second": second, "weight": weight, "eps": 1e-5, "keep_total": True}
    found = quantize_rows(x, spec, before="rms_norm", **given)
    torch.testing.assert_close(found.total, total, **exact)
    near(found, normed * weight.float(), dtype)
    near(quantize_rows(x, spec, before="rms_norm_weight_last", **given), weight * normed.to(dtype), dtype)
    layer = F.layer_norm(total.float(), (77,), weight.float(), bias.float(), 1e-5)
    near(quantize_rows(x, spec, before="layer_norm", bias=bias, **given), layer, dtype)
    near(quantize_rows(x, spec, before="rms_norm", eps=1e-5), F.rms_norm(x.float(), (77,), None, 1e-5), dtype)
print("equal")
"""


def test_the_interpreter_finds_the_codes_of_the_oracle() -> None:
    run_interpreted(START + INTERPRETED, loops=False)


SPLIT = """
from qcompile.backends.triton.before_rows import BEFORE


def split(channels, x):
    keep = torch.ones(x.shape[-1], dtype=x.dtype)
    keep[list(channels)] = 0
    return {"keep": keep, "channels": torch.tensor(list(channels), dtype=torch.int32)}


def poisoned(make):
    # what the allocator hands out next held NaN
    for size in (1, 8, 9, 72, 600, 909, 1024):
        torch.full((size,), torch.nan)
    return make()


def check(x, channels, spec, **given):
    # channels in any order: x is masked and gathered as the graph does it, behind what the kernel makes of x
    K = x.shape[-1]
    found = poisoned(lambda: quantize_rows(x, spec, **split(channels, x), **given))
    value = x
    if given.get("before", "nothing") != "nothing" or "second" in given:
        # the same kernel without a tail: each code is the nearest, so that all channels as outliers give the value
        value = quantize_rows(x, spec, **split(range(K), x), **given).tail[..., :K]
        plain = quantize_rows(x, spec, **given)
        finite = plain.scale.isfinite().expand_as(value)
        assert torch.equal(plain.codes[finite], quantize(value, find_qparams(value, spec))[finite])
        if found.total is not None:
            torch.testing.assert_close(found.total, plain.total, **exact)
    masked = value * split(channels, x)["keep"]
    expected = find_qparams(masked, spec)
    torch.testing.assert_close(found.scale, expected.scale, **exact)
    if expected.zero is not None:
        torch.testing.assert_close(found.zero, expected.zero, **exact)
    finite = expected.scale.isfinite().expand_as(value)
    assert torch.equal(found.codes[finite], quantize(masked, expected)[finite])
    width = -(-len(channels) // 8) * 8
    assert found.tail.shape == (*x.shape[:-1], width) and found.tail.dtype is x.dtype
    torch.testing.assert_close(found.tail[..., : len(channels)], value[..., list(channels)], **exact)
    assert (found.tail[..., len(channels) :] == 0).all()


for text in ("int8/token", "int8/token/asym", "int4/token/asym"):
    spec = parse_spec(text)
    for dtype in (torch.float32, torch.float16):
        x = extreme(dtype)
        x[7, ::7] *= 60
        # an outlier that is not finite reaches its row's scale, as it does through the mask
        for channels in ((), (0,), (4, 7), (100, 3, 8, 50), range(0, 101, 7), range(93, 101), range(101)):
            check(x, tuple(channels), spec)
        check(x.unflatten(0, (3, 3)).transpose(0, 1), (5, 99), spec)
    check(torch.randn(3, 1), (0,), spec)
    check(torch.randn(2, 7), (6, 1), spec)
    assert quantize_rows(x[:0], spec, **split((2,), x)).tail.shape == (0, 8)

spec = parse_spec("int8/token/asym")
for dtype in (torch.float32, torch.float16):
    both = torch.randn(5, 2 * 77).to(dtype)
    x, second = both[:, :77], both[:, 77:]
    weight, bias = torch.randn(77).to(dtype), torch.randn(77).to(dtype)
    for before in BEFORE:
        norm = {"weight": weight, "eps": 1e-5} if "norm" in before else {}
        if before == "layer_norm":
            norm |= {"bias": bias}
        for more in ({}, {"second": second}, {"second": second, "keep_total": True}):
            if "keep_total" not in more or norm:
                check(x, (60, 2, 33), spec, before=before, **norm, **more)
check(torch.randn(2, 60), (1, 59), parse_spec("int8/token"), before="silu", second=torch.randn(2, 60))
less = quantize_rows(x, spec, **split((7,), x), offset=128)
assert torch.equal(less.codes.int() + 128, quantize_rows(x, spec, **split((7,), x)).codes.int())
print("equal")
"""


def test_the_interpreter_keeps_outliers_out_of_the_codes() -> None:
    run_interpreted(START + SPLIT, loops=False)


FACTORS = """
def check(found, value, spec):
    expected = find_qparams(value, spec)
    finite = expected.scale.isfinite().expand_as(value)
    torch.testing.assert_close(found.scale, expected.scale, **exact)
    assert torch.equal(found.codes.int()[finite], quantize(value, expected).int()[finite])


for text in ("int8/token", "int8/token/asym", "int4/token"):
    spec = parse_spec(text)
    for dtype in (torch.float32, torch.float16):
        x, general = extreme(dtype), (torch.rand(101) + 0.5).to(dtype)
        power = (2.0 ** torch.randint(-3, 4, (101,))).to(dtype)
        channels = (4, 99, 0)
        keep = torch.ones(101, dtype=dtype).index_fill(0, torch.tensor(channels), 0)
        split = {"keep": keep, "channels": torch.tensor(channels, dtype=torch.int32)}
        for weight in (general, power):
            # rounded to the dtype, as the product in the graph is
            product = x * weight
            check(quantize_rows(x, spec, weight=weight), product, spec)
            found = quantize_rows(x, spec, weight=weight, **split)
            check(found, product * keep, spec)
            torch.testing.assert_close(found.tail[:, :3], product[:, list(channels)], **exact)
            second = torch.randn(9, 101).to(dtype)
            found = quantize_rows(x, spec, weight=weight, second=second, keep_total=True)
            torch.testing.assert_close(found.total, x + second, **exact)
            check(found, (x + second) * weight, spec)
        # powers of two move no digit: codes and scales are those of the same kernel's own value times them
        gate = torch.randn(5, 101).to(dtype)
        everything = {"keep": keep * 0, "channels": torch.arange(101, dtype=torch.int32)}
        for before in activations:
            given = {"before": before, "second": gate}
            value = quantize_rows(x[4:], spec, **given, **everything).tail[:, :101]
            check(quantize_rows(x[4:], spec, weight=power, **given), value * power, spec)
print("equal")
"""


def test_the_interpreter_multiplies_channels_before_it_finds_their_range() -> None:
    run_interpreted(START + FACTORS, loops=False)
