"""How weights of 2 to 8 bits lie in memory for kernels that feed 16-bit tensor cores: words of codes, and scales.

A block of 64 rows and 128 columns is 256 words for each bit of a code. It has 4 parts of 16 rows, one a warp. Within a
part, a code has eight digits: its row is 8 * q + i, its column 16 * (4 * x + 2 * y + z) + 8 * c + 2 * j + e, where lane
4 * i + j of a warp takes it for the first operand of m16n8k16 and of wgmma. A lane has as many words of a row as a code
has bits. They hold the 16 pairs (e = 0, 1) n = 8 * c + 4 * x + 2 * y + z in the two halves of words, see
`Width.places`, so that a shift and a mask make a pair of 16-bit floats, and no lane needs words of another.

words: int32 [N / 64, K / 128, 256 * bits]: runs of 4, 2 or 1 words of all lanes, part by part, those of 4 by q, i, j,
the others by i, j, q: a lane loads 16 bytes at once where it has them.
scales: int32 [N / 64, S, 64], S scales a row: one, or one for each group of a block. In them bfloat16 bits of the scale
above, the zero point below. Scales that bfloat16 does not hold are int32 [N / 64, S, P, 64]: float32 bits, and for
codes with zero points these, or float32 bits of the minimum (P = 2). N and K are filled up to whole blocks; scales with
zeros. Scales that are integers of 8 bits under a float16 of a block stay so, int32 [N / 64, K / 128, P, 64]: a word of
the float16 below and that of minima above, then four integers a word, group by group, then those of minima.
levels: int32 [256], of code books: the numbers of two codes, in the dtype of x, for every byte of codes.

Source of the trick with the bits of the mantissa: Kim 2022 (Who Says Elephants Can't Run); of the order: Marlin.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from qcompile.numerics import QParams

ROWS, COLUMNS, PARTS = 64, 128, 4
# words of a block for each bit of a code
WORDS = 256
# groups of fewer columns than a block; others are whole blocks
SMALL_GROUPS = (32, 64)
# and of code books the groups that are as deep as one product of 16-bit tensor cores
SMALLEST_GROUP = 16
LEVELS = 16
# kinds of scales that bfloat16 holds
BFLOAT16_SCALES = ("bf16", "e8m0", "u4row")
# bits of half a word, and pairs of codes that a lane has of a row and a block
_HALF, _PAIRS = 16, 16
_DIGITS = {"q": 2, "i": 8, "x": 2, "y": 2, "z": 2, "c": 2, "j": 4, "e": 2}


@dataclass(frozen=True, kw_only=True)
class Bits:
    """Bits `low`.. of a code, `count` of them, in bits `start`.. of one of a lane's words of a row."""

    word: int
    start: int
    count: int
    low: int = 0


@dataclass(frozen=True, kw_only=True)
class Width:
    """A kind of codes 0 .. 2**bits - 1.

    center: the code of 0 where codes are signed.  book: codes are places in a table.  mantissa: of floats in bytes, of
    sign, 7 - mantissa bits of exponent, whose bias is half of them, and mantissa, subnormals as in IEEE 754; else None.
    flip: bits of a code that words hold inverted.
    """

    name: str
    bits: int
    book: bool = False
    flip: int = 0
    mantissa: int | None = None

    @property
    def numbers(self) -> bool:
        """Whether codes stand for numbers whose 0 is 0: none is added to them, and no zero point is."""
        return self.book or self.mantissa is not None

    @property
    def runs(self) -> tuple[int, ...]:
        """How many words of a lane's row stand together."""
        return {2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 8: (4, 4)}[self.bits]

    @property
    def apart(self) -> int:
        """Bits between the codes of a pair. Those of a book are one byte, a place in the table of `levels`."""
        return self.bits if self.book else _HALF

    @property
    def places(self) -> list[tuple[Bits, ...]]:
        """Where the first code of each of the 16 pairs of a lane's row stands; the second one is `apart` bits above.

        A half word has as many whole codes as it holds, and in the bits above them those of the last pairs, in parts.
        """
        bits = self.bits
        if bits == 8:
            # the words of one x are a run
            words = [n % 8 // 4 * 4 + n // 8 * 2 + n % 4 // 2 for n in range(_PAIRS)]
            return [(Bits(word=word, start=n % 2 * bits, count=bits),) for n, word in enumerate(words)]
        if self.book:
            return [(Bits(word=n // 4, start=n % 4 * 2 * bits, count=bits),) for n in range(_PAIRS)]
        starts = range(0, _HALF - bits + 1, bits)
        whole = [(Bits(word=word, start=start, count=bits),) for word in range(bits) for start in starts]
        return whole + [tuple(_in_parts(bits, n)) for n in range(_PAIRS - len(whole))]

    @property
    def center(self) -> int:
        return 0 if self.numbers else 1 << (self.bits - 1)

    @property
    def bias(self) -> int:
        """Of the exponent of floats."""
        assert self.mantissa is not None
        return (1 << (6 - self.mantissa)) - 1


@dataclass(frozen=True, kw_only=True, eq=False)
class Packed:
    """A weight as the module states. width: its kind's name; levels: of a code book.

    minimum: a number stands for code 0, and no code for 0.  integers: groups of a block, where scales are integers.
    """

    words: Tensor
    scales: Tensor
    width: str
    levels: Tensor | None = None
    minimum: bool = False
    integers: int = 0

    @property
    def wide(self) -> bool:
        """Whether scales are float32."""
        return self.scales.dim() == 4 and not self.integers

    @property
    def groups(self) -> int:
        """Groups of a block, 0 where a row has one scale."""
        if self.integers:
            return self.integers
        blocks = self.words.shape[1]
        return self.scales.shape[1] // blocks

    @property
    def zero(self) -> bool:
        """Whether zero points stand beside the scales, or minima."""
        if self.integers:
            return self.minimum
        return not WIDTHS[self.width].numbers and (not self.wide or self.scales.shape[2] == 2)


WIDTHS: dict[str, Width] = {
    width.name: width
    for width in (
        Width(name="int8", bits=8, flip=128),
        *(Width(name=f"e{7 - mantissa}m{mantissa}", bits=8, mantissa=mantissa) for mantissa in range(2, 6)),
        Width(name="int6", bits=6),
        Width(name="int5", bits=5),
        Width(name="int4", bits=4),
        Width(name="book", bits=4, book=True),
        Width(name="int3", bits=3),
        Width(name="int2", bits=2),
    )
}


def _in_parts(bits: int, n: int) -> Iterator[Bits]:
    """Where the n-th of the pairs stands that fill what whole codes leave of half words: whole rests, then shares."""
    rest = _HALF % bits
    words, more = divmod(bits, rest)
    for i in range(words):
        yield Bits(word=words * n + i, start=_HALF - rest, count=rest, low=rest * i)
    if more:
        word, start = divmod(more * n, rest)
        yield Bits(word=words * rest + word, start=_HALF - rest + start, count=more, low=rest * words)


def span_of(columns: int) -> int:
    """How many columns of a block have one scale, where `columns` are a group, or `ALL` of them."""
    return columns if columns in (SMALLEST_GROUP, *SMALL_GROUPS) else COLUMNS


def group_of_spans(columns: int, K: int, groups: int) -> Tensor:
    """For each span of the blocks of K columns the number of its group; past the end of K the last one."""
    span = span_of(columns)
    spans = -(-K // COLUMNS) * (COLUMNS // span)
    return (torch.arange(spans) * span // (columns or K)).clamp(max=groups - 1)


def is_narrow(qparams: QParams, dtype: torch.dtype) -> bool:
    """Whether bfloat16 holds the scales, and numbers of dtype do in full: kernels multiply single weights by them."""
    scale, limits = qparams.scale, torch.finfo(dtype)
    held = (scale == 0) | ((scale >= limits.smallest_normal) & (scale <= limits.max))
    return qparams.spec.scale in BFLOAT16_SCALES and bool(held.all())


def pack_codes(codes: Tensor, width: Width) -> Tensor:
    """Words of codes, uint8 [N, K]."""
    N, K = codes.shape
    full = pad(codes, (0, -K % COLUMNS, 0, -N % ROWS)) ^ width.flip
    units, blocks = full.shape[0] // ROWS, full.shape[1] // COLUMNS
    digits = full.view(units, PARTS, 2, 8, blocks, *(_DIGITS[d] for d in "xyzcje"))
    pairs = digits.permute(["uPqibxyzcje".index(d) for d in "ubPqijcxyze"]).flatten(-5, -2).to(torch.int32)
    words = torch.zeros((*pairs.shape[:-2], width.bits), dtype=torch.int32, device=codes.device)
    for n, parts in enumerate(width.places):
        for p in parts:
            for e in range(2):
                words[..., p.word] |= (pairs[..., n, e] >> p.low & 2**p.count - 1) << p.start + width.apart * e
    return torch.cat([_by_lane(run).flatten(2) for run in words.split(width.runs, dim=-1)], dim=2)


def unpack_codes(words: Tensor, width: Width, N: int, K: int) -> Tensor:
    """The codes that `pack_codes` packed, uint8 [N, K]."""
    units, blocks = words.shape[:2]
    runs = words.split([WORDS * run for run in width.runs], dim=2)
    lanes = [
        _by_lane(run.view(units, blocks, PARTS, *((2, 8, 4) if each == 4 else (8, 4, 2)), each))
        for run, each in zip(runs, width.runs, strict=True)
    ]
    lane = torch.cat(lanes, dim=-1)
    pairs = torch.zeros((*lane.shape[:-1], _PAIRS, 2), dtype=torch.uint8, device=words.device)
    for n, parts in enumerate(width.places):
        for p in parts:
            for e in range(2):
                bits = lane[..., p.word] >> p.start + width.apart * e & 2**p.count - 1
                pairs[..., n, e] |= (bits << p.low).to(torch.uint8)
    digits = pairs.unflatten(-2, [_DIGITS[d] for d in "cxyz"])
    rows = digits.permute(["ubPqijcxyze".index(d) for d in "uPqibxyzcje"])
    return (rows.reshape(units * ROWS, blocks * COLUMNS) ^ width.flip)[:N, :K]


def _by_lane(words: Tensor) -> Tensor:
    """Words [u, b, P, q, i, j, run] in the order of memory, and back: a run of less than four has those of both q."""
    if words.shape[-1] == 4:
        return words
    return words.movedim(3, 5) if words.shape[3] == 2 else words.movedim(5, 3)


def pack_scales(scale: Tensor, zero: Tensor | None, *, narrow: bool, minimum: bool = False) -> Tensor:
    """Scales and zero points, as the module states.

    scale: float32 [N, S].  zero: integers, or float32 minima if `minimum`, [N, S].  narrow: bfloat16 holds the scales.
    """
    rows = -scale.shape[0] % ROWS
    bits = pad(scale.float(), (0, 0, 0, rows)).view(torch.int32)
    if zero is not None and minimum:
        zero = zero.float().contiguous().view(torch.int32)
    zeros = None if zero is None else pad(zero.to(torch.int32), (0, 0, 0, rows))
    if narrow:
        return _by_unit(bits if zeros is None else bits | zeros)
    planes = [bits] if zeros is None else [bits, zeros]
    return torch.stack([_by_unit(plane) for plane in planes], dim=2).contiguous()


def pack_levels(levels: Tensor, dtype: torch.dtype) -> Tensor:
    """The table of a code book, float32 [16], as the module states."""
    byte = torch.arange(LEVELS * LEVELS, device=levels.device)
    pairs = levels.to(dtype)[torch.stack([byte % LEVELS, byte // LEVELS], dim=1)]
    return pairs.contiguous().view(torch.int32).flatten()


def _by_unit(values: Tensor) -> Tensor:
    """[N, S] as [N / 64, S, 64]."""
    return values.view(-1, ROWS, values.shape[1]).transpose(1, 2).contiguous()
