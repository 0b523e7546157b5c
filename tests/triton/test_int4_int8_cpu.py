"""The W4A8 kernel without a GPU: its weight, its table, its binaries, and what it refuses."""

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton.experimental.gluon.language.nvidia.hopper")

from qcompile.backends.fx.kernels import int4_int8
from qcompile.backends.fx.kernels.problem import Problem
from qcompile.backends.triton.int4_int8_linear import MAX_K, why_not_int8
from qcompile.backends.triton.int4_int8_table import TABLE, AsInt8, Int4Int8Tiles
from qcompile.backends.triton.int4_int8_words import pack_weight, pack_words, unpack_words
from qcompile.backends.triton.table import configs_of, fitting
from qcompile.numerics import dequantize, find_qparams, quantize
from qcompile.recipe import recipe_from_table
from qcompile.spec import parse_spec
from tests.triton.compiled import name_of
from tests.triton.int4_int8_cubins import cubin, unpack_cubin
from tests.triton.needs import run_interpreted
from tests.triton.on_cpu import Heads, lowered_for_hopper, on_cpu

CONFIGS = [
    pytest.param(tiles, id=name_of(tiles)) for tiles in configs_of(TABLE, 90) if isinstance(tiles, Int4Int8Tiles)
]


@pytest.mark.parametrize(("N", "K"), [(64, 128), (1, 32), (65, 160), (200, 352), (128, 1024)])
def test_words_hold_every_code(N: int, K: int) -> None:
    codes = torch.randint(0, 16, (N, K), dtype=torch.uint8)
    words = pack_words(codes)
    assert words.shape == (-(-N // 64), -(-K // 128), 1024)
    assert torch.equal(unpack_words(words, N, K), codes)


def test_a_code_stands_where_the_module_says() -> None:
    for row, column in [(0, 0), (5, 1), (9, 2), (16, 8), (63, 127), (22, 93)]:
        codes = torch.zeros(64, 128, dtype=torch.uint8)
        codes[row, column] = 15
        words = pack_words(codes).flatten()
        (at,) = words.nonzero().flatten().tolist()
        s, h, j, b = column // 32, column // 16 % 2, column // 4 % 4, column % 4
        i, q, part = row % 8, row // 8 % 2, row // 16
        assert at == 256 * part + 128 * q + 16 * i + 4 * j + s
        assert int(words[at]) & 0xFFFFFFFF == 15 << (8 * b + 4 * h)


@pytest.mark.parametrize(
    "text",
    [
        *("int4/g32", "int4/g64/asym/bf16", "int4/g128/asym/bf16", "int4/g256", "int4/channel"),
        *("int4/tensor/asym", "int4/b2x64"),
        *("int4/g64/asym/u4row", "int4/g256/u4row"),
    ],
)
@pytest.mark.parametrize(("N", "K"), [(80, 256), (64, 768)])
def test_packs_hold_the_weight_and_its_sums(text: str, N: int, K: int) -> None:
    weight, spec = torch.randn(N, K), parse_spec(text)
    qparams = find_qparams(weight, spec)
    codes = quantize(weight, qparams)
    packed = pack_weight(codes, qparams, torch.bfloat16)
    words, scales = packed["words"], packed["scales"]
    wide = scales.dim() == 4
    assert wide == (spec.scale == "fp32")
    values = scales[:, :, 0] if wide else scales & -65536
    zeros = scales[:, :, 1] if wide else scales & 0xFFFF
    scale, zero = (t.transpose(1, 2).reshape(words.shape[0] * 64, -1)[:N] for t in (values.view(torch.float32), zeros))
    width = 128 * words.shape[1] // scales.shape[1]
    restored = (unpack_words(words, N, K) - zero.repeat_interleave(width, 1)[:, :K]) * scale.repeat_interleave(width, 1)
    assert torch.equal(restored, dequantize(codes, qparams))
    torch.testing.assert_close(packed["sums"].double(), restored.double().sum(1), rtol=0, atol=1e-4)


@pytest.mark.parametrize("text", ["int4/g32/u4row", "int4/g128/asym/u4row", "int4/g256/asym/u4row"])
def test_packs_of_integers_of_a_row_are_int8_times_it(text: str) -> None:
    weight, spec = torch.randn(80, 768) + 0.5, parse_spec(text)
    qparams = find_qparams(weight, spec)
    codes = quantize(weight, qparams)
    packed = pack_weight(codes, qparams, torch.bfloat16)
    # scales of groups take no more than other ones do
    assert packed["scales"].dim() == 3
    whole = dequantize(codes, qparams) / packed["row"]
    assert torch.equal(whole, whole.to(torch.int8).float())
    assert torch.equal(packed["totals"], whole.sum(1).to(torch.int32))
    assert packed["row"].shape == (80, 1)
    assert set(pack_weight(codes, find_qparams(weight, parse_spec("int4/g128")), torch.bfloat16)) == {
        *("words", "scales", "sums"),
    }


INTERPRETED = """
import torch
from qcompile.backends.triton.int4_int8_unpack import unpack
from qcompile.backends.triton.int4_int8_words import pack_weight
from qcompile.numerics import QParams, find_qparams, quantize
from qcompile.spec import parse_spec

torch.manual_seed(0)
# all integers and all zeros that go together, all codes in each of their groups
pairs = [(i, z) for i in range(1, 17) for z in range(16) if z * i <= 128 and (15 - z) * i <= 127]
for group, N, K in ((32, len(pairs), 160), (64, len(pairs) + 1, 192), (128, 70, 384), (256, 7, 512)):
    spec = parse_spec(f"int4/g{group}/asym/u4row")
    places = (torch.arange(N)[:, None] * (K // group) + torch.arange(K // group)) % len(pairs)
    integer, zero = torch.tensor(pairs)[places].unbind(-1)
    outer = (torch.randint(8, 16, (N, 1)) / 64).bfloat16()
    qparams = QParams(spec=spec, scale=integer * outer.float(), zero=zero.float(), stored={"outer": outer})
    codes = torch.arange(K).expand(N, K).remainder(16).to(torch.uint8)
    expected = (codes - zero.repeat_interleave(group, 1)) * integer.repeat_interleave(group, 1)
    for dtype in (torch.bfloat16, torch.float16):
        if dtype is torch.float16:
            # smaller than its normal numbers: scales in float32
            outer = outer * 2.0**-20
            qparams = QParams(spec=spec, scale=integer * outer.float(), zero=zero.float(), stored={"outer": outer})
        packed = pack_weight(codes, qparams, dtype)
        assert (packed["scales"].dim() == 4) == (dtype is torch.float16)
        for blocks in (1, 4):
            made = unpack(packed["words"], packed["scales"], packed["row"], K, blocks)
            assert made.dtype is torch.int8 and torch.equal(made.long(), expected), (group, N, K, dtype, blocks)
for text in ("int4/g32/u4row", "int4/g32/asym/u4row"):
    weight = torch.randn(65, 96) ** 3
    weight[3], weight[5, :32] = 0, 0
    qparams = find_qparams(weight, parse_spec(text))
    codes = quantize(weight, qparams)
    packed = pack_weight(codes, qparams, torch.bfloat16)
    made = unpack(packed["words"], packed["scales"], packed["row"], 96, 2)
    zero = 0 if qparams.zero is None else qparams.zero.repeat_interleave(32, 1)
    assert torch.equal(made * packed["row"], (codes - zero) * qparams.scale.repeat_interleave(32, 1)), text
    assert torch.equal(made.sum(1, dtype=torch.int32), packed["totals"])
print("equal")
"""


def test_the_interpreter_unpacks_every_code_integer_and_zero() -> None:
    run_interpreted(INTERPRETED, loops=False)


@pytest.mark.parametrize("config", [c for c in configs_of(TABLE, 90) if isinstance(c, AsInt8)], ids=name_of)
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("wide", [False, True])
def test_unpacking_compiles(config: AsInt8, groups: int, wide: bool) -> None:
    assert unpack_cubin(config, groups, wide=wide)[:4] == b"\x7fELF"


def test_sums_take_a_row_of_zeros_out_exactly() -> None:
    """Products of codes -128, added in float32 group by group, as a fused multiply-add does."""
    qparams = find_qparams(torch.randn(64, 2048) + 0.3, parse_spec("int4/g64/asym/bf16"))
    codes = torch.randint(0, 16, (64, 2048), dtype=torch.uint8)
    assert qparams.zero is not None
    total = torch.zeros(64)
    for g in range(32):
        dots = -128 * (codes[:, 64 * g : 64 * g + 64].long() - qparams.zero[:, g : g + 1].long()).sum(1)
        total = (total.double() + dots.double() * qparams.scale[:, g].double()).float()
    assert torch.equal(total, -128 * pack_weight(codes, qparams, torch.bfloat16)["sums"])


@pytest.mark.parametrize("tiles", CONFIGS)
@pytest.mark.parametrize(("groups", "wide", "whole"), [(1, False, True), (1, False, False), (4, True, True)])
def test_configuration_compiles(tiles: Int4Int8Tiles, groups: int, wide: bool, whole: bool) -> None:
    assert cubin(tiles, torch.bfloat16, groups, wide=wide, whole=whole, full=True)[:4] == b"\x7fELF"


@pytest.mark.slow
@pytest.mark.parametrize("tiles", CONFIGS)
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_variant_compiles(tiles: Int4Int8Tiles, groups: int, wide: bool, dtype: torch.dtype) -> None:
    for full in (False, True):
        assert cubin(tiles, dtype, groups, wide=wide, whole=True, full=full)[:4] == b"\x7fELF"


def test_the_table_takes_every_problem() -> None:
    for M in (1, 8, 9, 16, 17, 64, 65, 257, 2048, 1 << 20):
        for N in (8, 4096, 28672, 12345):
            tiles, *_ = (c for c in fitting(TABLE, M, N, 4096, 90) if isinstance(c, Int4Int8Tiles))
            assert tiles.tokens >= min(M, 128)


@pytest.mark.parametrize(("M", "many"), [(768, False), (769, True), (8192, True)])
def test_many_rows_read_the_weight_as_int8(M: int, many: bool) -> None:
    assert isinstance(next(fitting(TABLE, M, 4096, 4096, 90)), AsInt8) is many


@pytest.mark.parametrize(
    ("N", "K", "row", "reason"),
    [
        (64, 256, torch.ones(64, 1), None),
        (64, 256, None, "not integers times one number of the row"),
        (60, 256, torch.ones(60, 1), "N=60"),
        (64, MAX_K + 1, torch.ones(64, 1), "can overflow int32"),
    ],
)
def test_what_stays_groups_says_why(N: int, K: int, row: torch.Tensor | None, reason: str | None) -> None:
    found = why_not_int8(N, K, row)
    assert found is None if reason is None else reason in str(found)


@pytest.mark.parametrize(
    ("given", "more", "reason"),
    [
        ("int8/token/asym", {}, None),
        ("int8/token", {"weight": parse_spec("int4/g32")}, None),
        ("int8/token/asym", {"weight": parse_spec("int4/g64/asym/u4row")}, None),
        ("int8/tensor", {"dtype": torch.float16}, None),
        (None, {}, "not quantized"),
        ("fp8_e4m3/token", {}, "not integers"),
        ("int8/g128", {}, "one scale a token or tensor"),
        ("int8/token", {"weight": parse_spec("nf4/g64")}, "not 4-bit integers"),
        ("int8/token", {"weight": parse_spec("int4/g16")}, "multiples of 128"),
        ("int8/token", {"dtype": torch.float32}, "float32"),
        ("int8/token", {"device": "cpu", "capability": None}, "CUDA"),
        ("int8/token", {"capability": (8, 9)}, "sm_89"),
        ("int8/token", {"K": 120}, "K=120"),
    ],
)
def test_refusals_say_why(given: str | None, more: dict[str, object], reason: str | None) -> None:
    fields = {"N": 64, "K": 256, "dtype": torch.bfloat16, "device": "cuda", "capability": (9, 0)}
    fields |= {"weight": parse_spec("int4/g128"), "input": None if given is None else parse_spec(given)}
    found = int4_int8.why_not(Problem(**(fields | more)))
    assert found is None if reason is None else reason in str(found)


def as_int8(codes: Tensor, scale: Tensor, zero: Tensor, words: Tensor, scales: Tensor, *given: Any) -> Tensor:
    """What the op computes for many rows, in plain torch."""
    _, row, totals, bias, dtype = given
    N, K = len(row), codes.shape[1]
    # groups of a block and 32 columns
    integer = (scales & -65536).view(torch.float32).transpose(1, 2).reshape(-1, K // 32)[:N] / row
    zeros = (scales & 0xFFFF).transpose(1, 2).reshape(-1, K // 32)[:N]
    weight = (unpack_words(words, N, K) - zeros.repeat_interleave(32, 1)) * integer.repeat_interleave(32, 1)
    assert torch.equal(weight, weight.to(torch.int8).float())
    sums = codes.double() @ weight.double().T - (zero - 128).double() * totals
    y = sums * scale.double() * row.double().T
    return (y if bias is None else y + bias.double()).to(dtype)


def as_rows(x: Tensor, *given: Any) -> list[Tensor]:
    """Of `quantize_rows` behind a norm, what it computes of integers with a zero point."""
    second, weight, bias, before, eps, spec, offset, _ = given
    assert (second, bias, before, offset) == (None, None, "rms_norm", 128)
    value = torch.nn.functional.rms_norm(x, x.shape[-1:], weight, eps)
    qparams = find_qparams(value, parse_spec(spec))
    assert qparams.zero is not None
    return [(quantize(value, qparams).short() - offset).to(torch.int8), qparams.scale, qparams.zero]


def test_joined_weights_are_int8_under_one_number_a_row() -> None:
    torch.manual_seed(0)
    model, x = Heads(128).bfloat16().eval(), torch.randn(2, 30, 128).bfloat16()
    table = {"name": "rows", "rules": [{"weight": "int4/g32/asym/u4row", "input": "int8/token/asym"}]}
    with on_cpu(int4_int8_mm=as_int8, quantize_rows=as_rows):
        text, error = lowered_for_hopper(recipe_from_table(table), model, x)
    # q and k behind each other, and v, whose rows fill no unit of a pack
    assert text.count("linear_int4_int8") == 2
    # numbers that the planned graph rounds to bfloat16, and results
    assert error < 5e-3
