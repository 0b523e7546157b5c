"""The layout of the W4A16 kernels' weights, and their table."""

from types import ModuleType

import pytest
import torch

from qcompile.backends.fx.kernels import int4
from qcompile.backends.fx.kernels.problem import Problem
from qcompile.backends.triton import int4_int8_words, int4_words
from qcompile.backends.triton.int4_table import TABLE, FewRows, ManyRows, Unpack, choose
from qcompile.backends.triton.int4_words import pack_scales, pack_words, unpack_words
from qcompile.numerics import dequantize, find_qparams, quantize
from qcompile.spec import parse_spec


@pytest.mark.parametrize("order", [int4_words, int4_int8_words], ids=lambda module: module.__name__.rpartition(".")[2])
@pytest.mark.parametrize(("N", "K"), [(64, 128), (1, 32), (65, 160), (200, 352), (128, 1024)])
def test_words_hold_every_code(order: ModuleType, N: int, K: int) -> None:
    codes = torch.randint(0, 16, (N, K), dtype=torch.uint8)
    words = order.pack_words(codes)
    assert words.shape == (-(-N // 64), -(-K // 128), 1024)
    assert torch.equal(order.unpack_words(words, N, K), codes)


def test_a_code_stands_where_the_module_says() -> None:
    for row, column in [(0, 0), (5, 1), (9, 2), (16, 8), (63, 127), (22, 93)]:
        codes = torch.zeros(64, 128, dtype=torch.uint8)
        codes[row, column] = 15
        (at,) = pack_words(codes).flatten().nonzero().flatten().tolist()
        d, p, c, j, e = column // 64, column // 16 % 4, column // 8 % 2, column // 2 % 4, column % 2
        i, q, part = row % 8, row // 8 % 2, row // 16
        assert at == 256 * part + 128 * q + 16 * i + 4 * j + 2 * c + d
        assert int(pack_words(codes).flatten()[at]) & 0xFFFFFFFF == 15 << (4 * p + 16 * e)


@pytest.mark.parametrize("narrow", [True, False])
def test_scales_stand_by_units(narrow: bool) -> None:
    scale = (torch.rand(70, 3) + 0.1).bfloat16().float()
    zero = torch.randint(0, 16, (70, 3))
    packed = pack_scales(scale, zero, narrow=narrow)
    bits = packed if narrow else packed[:, :, 0]
    zeros = packed & 0xFFFF if narrow else packed[:, :, 1]
    held = (bits & -65536 if narrow else bits).view(torch.float32).transpose(1, 2).reshape(128, 3)
    assert torch.equal(held[:70], scale)
    assert not held[70:].any()
    assert torch.equal(zeros.transpose(1, 2).reshape(128, 3)[:70], zero.int())


@pytest.mark.parametrize(
    "text",
    ["int4/g32", "int4/g64/asym/bf16", "int4/g128/asym/bf16", "int4/g128", "int4/g256/asym/bf16", "int4/channel"],
)
@pytest.mark.parametrize(("N", "K"), [(80, 256), (64, 768)])
def test_packs_hold_the_weight(text: str, N: int, K: int) -> None:
    weight, spec = torch.randn(N, K), parse_spec(text)
    qparams = find_qparams(weight, spec)
    codes = quantize(weight, qparams)
    packed = int4.pack(codes, qparams, torch.bfloat16)
    words, scales = packed["words"], packed["scales"]
    groups = scales.shape[1] // words.shape[1]
    wide = scales.dim() == 4
    assert wide == (spec.scale == "fp32")
    values = scales[:, :, 0] if wide else scales & -65536
    zeros = scales[:, :, 1] if wide else scales & 0xFFFF
    scale, zero = (t.transpose(1, 2).reshape(words.shape[0] * 64, -1)[:N] for t in (values.view(torch.float32), zeros))
    width = 128 // groups
    restored = (unpack_words(words, N, K) - zero.repeat_interleave(width, 1)[:, :K]) * scale.repeat_interleave(width, 1)
    assert torch.equal(restored, dequantize(codes, qparams))


@pytest.mark.parametrize(
    ("weight", "more", "reason"),
    [
        ("int4/g128", {"input": parse_spec("int8/token")}, "input is quantized"),
        ("int8/channel", {}, "not 4-bit integers"),
        ("nf4/g64", {}, "not 4-bit integers"),
        ("int4/g16", {}, "multiples of 128"),
        ("int4/b64x64", {}, "by channel or group"),
        ("int4/g128", {"device": "cpu"}, "NVIDIA"),
        ("int4/g128", {"dtype": torch.float32}, "float32"),
        ("int4/g128", {"capability": (7, 5)}, "sm_75"),
        ("int4/g128", {"capability": (8, 0)}, "measured on sm_90, this is sm_80"),
        ("int4/channel", {"K": 100}, "multiple of 8"),
    ],
)
def test_refusals_say_why(weight: str, more: dict[str, object], reason: str) -> None:
    fields = {"N": 64, "K": 256, "input": None, "dtype": torch.bfloat16, "device": "cuda", "capability": (9, 0)}
    assert reason in str(int4.why_not(Problem(weight=parse_spec(weight), **(fields | more))))


@pytest.mark.parametrize(("largest", "dtype", "narrow"), [
    (1.0, torch.float16, True), (1e-4, torch.float16, False), (1e-4, torch.bfloat16, True), (0.0, torch.float16, True),
])  # fmt: skip
def test_scales_that_float16_does_not_hold_are_kept_whole(largest: float, dtype: torch.dtype, narrow: bool) -> None:
    weight = torch.randn(64, 128).clamp(-1, 1) * largest
    qparams = find_qparams(weight, parse_spec("int4/g64/bf16"))
    packed = int4.pack(quantize(weight, qparams), qparams, dtype)
    assert (packed["scales"].dim() == 3) == narrow


def test_the_table_takes_every_problem() -> None:
    for capability in (80, 86, 90, 100, 120):
        for M in (1, 8, 9, 16, 17, 32, 33, 128, 129, 4096, 5000, 1 << 20):
            for N, K in ((8, 32), (48, 64), (64, 128), (4096, 14336), (28672, 4096), (12345, 4096)):
                for wide in (False, True):
                    config = choose(M, N, K, capability, wide=wide)
                    assert not isinstance(config, FewRows) or config.rows >= M
                    assert not isinstance(config, ManyRows) or (capability == 90 and not wide and N % 8 == 0)
                    assert isinstance(config, Unpack) or -(-N // 64) % config.units == 0
    assert isinstance(choose(1, 28672, 4096, 90, wide=False), FewRows)
    assert isinstance(choose(64, 28672, 4096, 90, wide=False), ManyRows)


def test_slices_are_whole_numbers_of_what_is_in_flight() -> None:
    few = [entry.config for entry in TABLE if isinstance(entry.config, FewRows)]
    assert few
    assert all(config.blocks % config.depth == 0 for config in few)
