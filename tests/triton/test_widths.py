"""How weights of 2 to 8 bits lie in memory, and what is made of their words, without a GPU."""

import pytest
import torch
from torch import Tensor

from qcompile.backends.triton.width_packs import kind_of, pack_weight
from qcompile.backends.triton.width_table import FewRows, ManyRows, Unpack
from qcompile.backends.triton.widths import (
    LEVELS,
    WIDTHS,
    Packed,
    Width,
    pack_codes,
    pack_levels,
    pack_scales,
    unpack_codes,
)
from qcompile.formats import Float, code_values, parse_format
from qcompile.numerics import dequantize, find_qparams, quantize
from qcompile.spec import parse_spec
from tests.triton.ptx import halves, run

HALF = {torch.bfloat16: False, torch.float16: True}


@pytest.mark.parametrize("name", WIDTHS)
@pytest.mark.parametrize(("N", "K"), [(64, 128), (1, 32), (65, 160), (200, 352)])
def test_words_hold_every_code(name: str, N: int, K: int) -> None:
    width = WIDTHS[name]
    codes = torch.randint(0, 2**width.bits, (N, K), dtype=torch.uint8)
    words = pack_codes(codes, width)
    assert words.shape == (-(-N // 64), -(-K // 128), 256 * width.bits)
    assert torch.equal(unpack_codes(words, width, N, K), codes)


@pytest.mark.parametrize("name", WIDTHS)
def test_a_lane_holds_what_tensor_cores_take_from_it(name: str) -> None:
    width = WIDTHS[name]
    for row, column in [(0, 0), (5, 1), (9, 2), (16, 8), (63, 127), (22, 93)]:
        codes = torch.zeros(64, 128, dtype=torch.uint8)
        codes[row, column] = 1
        (changed,) = (pack_codes(codes, width) ^ pack_codes(codes * 0, width)).flatten().nonzero().flatten().tolist()
        start, each = next(run for run in reversed(runs_of(name)) if run[0] <= changed)
        part, inside = divmod(changed - start, 64 * each)
        assert part == row // 16
        # words of a lane stand together, in pieces of up to 16 bytes; where there are eight, of both rows apart
        lane = inside // min(2 * each, 4) % 32
        assert lane == 4 * (row % 8) + column % 8 // 2


def runs_of(name: str) -> list[tuple[int, int]]:
    """Where words of a block begin that are loaded at once, and how many of them a lane has for a row of a part."""
    apart = {"int3": [(0, 2), (512, 1)], "int5": [(0, 4), (1024, 1)], "int6": [(0, 4), (1024, 2)]}
    return apart.get(name, [(start, min(4, WIDTHS[name].bits)) for start in range(0, WIDTHS[name].bits * 256, 1024)])


def fragments(words: Tensor, name: str) -> list[Tensor]:
    """Registers of words of one block's first part, as `width_tiles` loads them: [2, 8, 4, 2 / c, ...] flattened.

    Each holds, for one (q, i, j) and c, what a piece reads; of 3, 5 and 6 bits, for both c.
    """
    words = words.flatten().to(torch.int64) & 0xFFFFFFFF
    both = name in ("int3", "int5", "int6")
    found = []
    for start, each in runs_of(name):
        run = words[start : start + 64 * each]
        if each < 4:
            run = run.view(8, 4, 2, each).permute(2, 0, 1, 3).flatten()
        # a word for each element that it has codes of
        found += list(run.repeat_interleave(4 // each).view(-1, 4 if both else 2).unbind(1))
    return found


def some_codes(width: Width, dtype: torch.dtype) -> Tensor:
    """Of one block, random, without those that stand for no number in a plane."""
    codes = torch.randint(0, 2**width.bits, (64, 128), dtype=torch.uint8)
    # bytes of as many bits of exponent as float16, all of them ones
    return torch.where((codes & 0x7C) == 0x7C, 0, codes) if width.name == "e5m2" and HALF[dtype] else codes


def floats(codes: Tensor, width: Width) -> Tensor:
    """The numbers of bytes, float64."""
    assert width.mantissa is not None
    fmt = Float(name="", exponent=7 - width.mantissa, mantissa=width.mantissa, bias=width.bias)
    return code_values(fmt).double()[codes.long()]


@pytest.mark.parametrize("name", WIDTHS)
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("raised", [False, True])
def test_pieces_make_planes(name: str, dtype: torch.dtype, raised: bool) -> None:
    ptx = pytest.importorskip("qcompile.backends.triton.width_ptx")
    width = WIDTHS[name]
    codes = some_codes(width, dtype)
    levels = torch.randn(LEVELS).to(dtype)
    both = ptx.elements(name) == 4
    given = fragments(pack_codes(codes, width), name)
    assert len(given) == ptx.registers(name)
    if width.book:
        # four times the lane, of q i j c
        given += [torch.arange(128).view(2, 32, 2)[0, :, :1].expand(2, 32, 2).flatten() * 2] * 2
        values = levels.double()[codes.long()]
    elif width.mantissa is not None:
        values = floats(codes, width)
    else:
        # pairs by c and plane
        powers = torch.tensor(ptx.powers(name, HALF[dtype]) if raised else [0] * 16).view(2, 8).t()
        factors = 2.0 ** powers[:, :, None].expand(8, 2, 8).flatten()
        values = codes.double() * factors + ptx.offset(name, HALF[dtype])
    results: list[Tensor | None] = [None] * (16 if both else 8)
    operands = results + given
    run(ptx.planes_ptx(name, HALF[dtype], raised), operands, pack_levels(levels.float(), dtype))
    # row q i, column plane c j e of the first part
    expected = values[:16].view(2, 8, 8, 2, 4, 2).permute(2, 0, 1, 4, 3, 5)
    made = torch.stack([halves(o, dtype) for o in operands[: len(results)]])
    if both:
        made = made.view(8, 2, -1, 2).transpose(1, 2)
    assert torch.equal(made.reshape(expected.shape), expected)


@pytest.mark.parametrize("name", WIDTHS)
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("zero", [None, "fixed"])
@pytest.mark.parametrize("scales", [0, 1, 2])
@pytest.mark.parametrize(("first", "count"), [(0, 4), (4, 4), (2, 2), (7, 1)])
def test_pieces_make_the_weight(
    name: str, dtype: torch.dtype, zero: str | None, scales: int, first: int, count: int
) -> None:
    ptx = pytest.importorskip("qcompile.backends.triton.width_ptx")
    width, half = WIDTHS[name], HALF[dtype]
    if width.numbers and zero is None:
        return
    codes = some_codes(width, dtype)
    levels = torch.randn(LEVELS).to(dtype)
    elements, given = ptx.elements(name), fragments(pack_codes(codes, width), name)
    if width.book:
        # four times the lane, of q i j c
        given += [torch.arange(128).view(2, 32, 2)[0, :, :1].expand(2, 32, 2).flatten() * 2] * 2

    def pair(number: float) -> list[Tensor]:
        bits = int(torch.tensor(number).to(dtype).view(torch.int16)) & 0xFFFF
        return [torch.full_like(given[0], bits << 16 | bits)] * elements

    point, offset = 2**width.bits - 1, ptx.offset(name, half)
    scale = 0.0123 if scales == 2 else float(torch.tensor(0.0123).to(dtype))
    if zero is None:
        given += pair(point + offset)
    if scales:
        given += pair(scale)
    if scales == 2:
        given += pair(scale - float(torch.tensor(scale).to(dtype)))
    operands: list[Tensor | None] = [None] * (count * elements // 2) + given
    fixed = None if zero is None else offset + width.center
    run(ptx.weight_ptx(name, half, first, count, fixed, scales), operands, pack_levels(levels.float(), dtype))
    assert len(operands) == len(ptx.constraints(name, count, (len(given) - ptx.registers(name)) // elements).split(","))
    values = codes.double() - (point if zero is None else width.center)
    if width.numbers:
        values = levels.double()[codes.long()] if width.book else floats(codes, width)
    expected = (values * (scale if scales else 1.0)).to(dtype).double()
    expected = expected[:16].view(2, 8, 8, 2, 4, 2).permute(2, 0, 1, 4, 3, 5)[first : first + count]
    made = torch.stack([halves(o, dtype) for o in operands[: count * elements // 2]])
    if elements == 4:
        made = made.view(count, 2, -1, 2).transpose(1, 2)
    # a scale of two floats has four bits more than the product keeps
    limits = torch.finfo(dtype)
    limit = limits.eps * expected.abs().clamp(min=limits.smallest_normal) if scales == 2 else 0.0 * expected
    assert ((made.reshape(expected.shape) - expected).abs() <= limit).all()


def restored(packed: Packed, N: int, K: int, dtype: torch.dtype) -> Tensor:
    """The weight, float32, from what kernels read."""
    width = WIDTHS[packed.width]
    codes = unpack_codes(packed.words, width, N, K)
    if packed.integers:
        return with_integers(packed, codes)
    zeros: Tensor | int = width.center
    if packed.wide:
        values = packed.scales[:, :, 0]
        zeros = packed.scales[:, :, 1] if packed.zero else zeros
    else:
        values = packed.scales & -65536
        zeros = packed.scales & 0xFFFF if packed.zero else zeros
    span = K if packed.groups == 0 else 128 // packed.groups

    def spread(by_unit: Tensor) -> Tensor:
        return by_unit.transpose(1, 2).reshape(packed.words.shape[0] * 64, -1)[:N].repeat_interleave(span, 1)[:, :K]

    scale = spread(values.contiguous().view(torch.float32))
    if packed.minimum:
        assert isinstance(zeros, Tensor)
        return codes.float() * scale + spread(zeros.contiguous().view(torch.float32))
    if packed.levels is not None:
        return packed.levels.view(dtype).view(-1, 2)[:LEVELS, 0].float()[codes.long()] * scale
    if width.mantissa is not None:
        return floats(codes, width).float() * scale
    return (codes.float() - (spread(zeros) if isinstance(zeros, Tensor) else zeros)) * scale


def with_integers(packed: Packed, codes: Tensor) -> Tensor:
    """The weight, float32, of scales and minima that are integers under float16."""
    N, K = codes.shape
    words = packed.scales.permute(0, 3, 1, 2).flatten(0, 1)[:N]  # [N, B, P]
    more = -(-packed.integers // 4)
    assert words.shape[2] == 1 + more * (1 + packed.minimum)

    def found(first: int, shift: int) -> Tensor:
        fours = words[..., first : first + more, None] >> torch.arange(0, 32, 8, dtype=torch.int32)
        integers = fours.flatten(-2)[..., : packed.integers].to(torch.int8).float()
        outer = (words[..., :1] >> shift).to(torch.int16).view(torch.float16).float()
        return (integers * outer).flatten(1).repeat_interleave(128 // packed.integers, 1)[:, :K]

    scale = found(1, 0)
    if packed.levels is not None:
        return packed.levels.view(torch.bfloat16).view(-1, 2)[:LEVELS, 0].float()[codes.long()] * scale
    if packed.minimum:
        return codes.float() * scale - found(1 + more, 16)
    return (codes.float() - WIDTHS[packed.width].center) * scale


SPECS = ["int8/channel", "int8/channel/asym", "int8/g64/bf16", "int8/g32/asym", "int6/g64/asym", "int5/channel"]
SPECS += [
    "int4/channel",
    "int4/channel/asym",
    "int4/g32",
    "int4/g64/asym/bf16",
    "int4/g128/bf16",
    "int4/g256/asym/bf16",
]
SPECS += ["int3/channel", "int3/g128/asym/bf16", "int3/g64", "int2/g256/asym/bf16", "int2/g32"]
SPECS += ["fp8_e4m3/channel", "fp8_e5m2/g64/bf16", "fp8_e3m4/g32", "fp8_e2m5/channel", "fp8_e4m3fnuz/channel"]
SPECS += ["fp6_e3m2/g128", "fp6_e2m3/b32/e8m0", "e3m3/g64", "e5m1/channel", "e2m2/g64", "e1m3/channel"]
# scales of a tensor, and of blocks of rows
SPECS += ["int8/tensor", "int4/tensor/asym", "fp8_e4m3/b2x128", "int4/b2x64/asym/bf16"]
# those of ggml's blocks; integers under one float16 keep so
SPECS += ["int4/b32/min/fp16", "int5/b32/full/fp16", "int5/b32/min/fp16", "int8/b32/fp16", "int3/g128/min/bf16"]
INTEGERS = [
    *("int2/b16/min/u4x16", "int3/b16/full/i6x16", "int4/b32/min/u6x8", "int5/b32/min/u6x8", "int6/b16/full/i8x16"),
    *("iq4_nl/b32/i6x8", "int4/g64/min/u6x8", "int3/g128/full/i6x16"),
]
# a book whose numbers are integers, but for a factor
LINEAR = ["linear8/g64", "linear8/channel/bf16"]
BOOKS = [
    "iq4_nl/b32/fp16",
    "nf4/g64",
    "nf4/channel",
    "nf4/g64/dq256",
    "bnb_fp4/g64/bf16",
    "fp4_e2m1/b32/e8m0",
    "lloyd4/g128",
    "e1m1/g64",
    "e2m0/channel",
    "lloyd3/g64",
]
BOOKS += ["fp4_e2m1/b16/fp8_e4m3", "fp4_e3m0/channel", "fp4_e2m1/tensor", "nf4/b2x64"]


SHAPES = [(80, 256), (64, 768), (70, 384)]


@pytest.mark.parametrize(
    ("text", "N", "K"),
    [(t, N, K) for t in SPECS + BOOKS + INTEGERS + LINEAR for N, K in SHAPES if "g256" not in t or K % 256 == 0],
)
def test_packs_hold_the_weight(text: str, N: int, K: int) -> None:
    qparams = find_qparams(torch.randn(N, K), parse_spec(text))
    codes = quantize(torch.randn(N, K), qparams)
    width, minimum, integers = kind_of(qparams.spec)
    assert width is not None
    tensors = pack_weight(codes, qparams, torch.bfloat16)
    packed = Packed(width=width, minimum=minimum, integers=integers, **tensors)
    assert (packed.integers > 0) == (text in INTEGERS)
    narrow = qparams.spec.scale in ("bf16", "e8m0") and not minimum and text not in LINEAR
    assert packed.wide == (not narrow and text not in INTEGERS)
    columns = qparams.spec.granularity.columns
    assert packed.groups == (128 // min(columns, 128) if columns else 0)
    expected = dequantize(codes, qparams)
    # numbers of a table are rounded to the dtype of x
    limit = torch.finfo(torch.bfloat16).eps / 2 * expected.abs() if packed.levels is not None else 0.0 * expected
    if text in LINEAR:
        # the factor goes into the scale
        limit = 2 * torch.finfo(torch.float32).eps * expected.abs()
    assert ((restored(packed, N, K, torch.bfloat16) - expected).abs() <= limit).all()


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


@pytest.mark.parametrize(("largest", "dtype", "narrow"), [
    (1.0, torch.float16, True), (1e-4, torch.float16, False), (1e-4, torch.bfloat16, True), (0.0, torch.float16, True),
])  # fmt: skip
def test_scales_that_float16_does_not_hold_are_kept_whole(largest: float, dtype: torch.dtype, narrow: bool) -> None:
    weight = torch.randn(64, 128).clamp(-1, 1) * largest
    qparams = find_qparams(weight, parse_spec("int4/g64/bf16"))
    packed = pack_weight(quantize(weight, qparams), qparams, dtype)
    assert (packed["scales"].dim() == 3) == narrow


def test_one_scale_a_row_is_stored_once() -> None:
    qparams = find_qparams(torch.randn(64, 1024), parse_spec("int8/channel"))
    packed = pack_weight(quantize(torch.randn(64, 1024), qparams), qparams, torch.bfloat16)
    assert packed["scales"].numel() == 64


@pytest.mark.parametrize("name", ["nf4", "fp4_e2m1", "fp4_e3m0", "bnb_fp4"])
def test_tables_hold_their_numbers(name: str) -> None:
    values = code_values(parse_format(name))
    pairs = pack_levels(values, torch.float16).view(torch.float16).view(LEVELS, LEVELS, 2)
    assert torch.equal(pairs[3, :, 0], values.half())
    assert torch.equal(pairs[:, 5, 1], values.half())


@pytest.mark.parametrize(("name", "bits"), [("int4/b32/min/u6x8", 4.75), ("int6/b16/full/i8x16", 6.75)])
def test_scales_that_are_integers_stay_small(name: str, bits: float) -> None:
    qparams = find_qparams(torch.randn(64, 512), parse_spec(name))
    packed = pack_weight(quantize(torch.randn(64, 512), qparams), qparams, torch.bfloat16)
    assert sum(t.nbytes for t in packed.values()) * 8 / (64 * 512) == bits


def test_every_problem_finds_a_configuration() -> None:
    table = pytest.importorskip("qcompile.backends.triton.width_table")
    for width in WIDTHS:
        for capability in (80, 86, 90, 100, 120):
            for M in (1, 8, 9, 16, 17, 32, 33, 128, 129, 512, 513, 5000, 1 << 20):
                for N, K in ((8, 32), (48, 64), (64, 128), (4096, 14336), (28672, 4096), (12345, 4096)):
                    for exact in (True, False):
                        config = table.choose(width, M, N, K, capability, exact=exact)
                        assert not isinstance(config, FewRows) or config.rows >= M
                        assert not isinstance(config, ManyRows) or (capability == 90 and exact and N % 8 == 0)
                        assert isinstance(config, Unpack) or -(-N // 64) % config.units == 0
        few = [entry.config for entry in table.TABLES[width] if isinstance(entry.config, FewRows)]
        assert all(config.blocks % config.depth == 0 for config in few)
