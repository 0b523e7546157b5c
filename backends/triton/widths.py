"""How weights of 2 to 8 bits lie in memory for kernels that feed 16-bit tensor cores: words of codes, and scales.

A block of 64 rows and 128 columns is one run of 256 words for each bit of a code. It has 4 parts of 16 rows, one a
warp. Within a part, a code has eight digits: its row is 8 * q + i, its column 16 * (4 * x + 2 * y + z) + 8 * c + 2 * j
+ e, where lane 4 * i + j of a warp takes it for the first operand of m16n8k16 and of wgmma. A `Field` says which digits
count words and which the codes within a word; so that the words of a lane become pairs of floats (e = 0, 1) without
crossing lanes.

words: int32 [N / 64, K / 128, 256 * bits].
scales: int32 [N / 64, S, 64], S scales a row: one, or one for each group of a block. In them bfloat16 bits of the scale
above, the zero point below. Scales that bfloat16 does not hold are int32 [N / 64, S, P, 64]: float32 bits, and for
codes with zero points these, or float32 bits of the minimum (P = 2). N and K are filled up to whole blocks; scales with
zeros. Scales that are integers of 8 bits under a float16 of a block stay so, int32 [N / 64, K / 128, P, 64]: a word of
the float16 below and that of minima above, then four integers a word, group by group, then those of minima.
levels: int32 [256], of code books: the numbers of two codes, in the dtype of x, for every byte of codes.

Of 4 bits a shift and a mask make a pair of 16-bit floats. Source of the trick with the bits of the mantissa: Kim 2022
(Who Says Elephants Can't Run); of the order: Marlin.
"""

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
_DIGITS = {"q": 2, "i": 8, "x": 2, "y": 2, "z": 2, "c": 2, "j": 4, "e": 2}


@dataclass(frozen=True, kw_only=True)
class Field:
    """Codes of `bits` bits. words, inside: digits of words in a part, and of codes in a word, highest first."""

    words: str
    inside: str
    bits: int


@dataclass(frozen=True, kw_only=True)
class Width:
    """A kind of codes 0 .. 2**bits - 1.

    center: the code of 0 where codes are signed.  book: codes are places in a table.  mantissa: of floats in bytes, of
    sign, 7 - mantissa bits of exponent, whose bias is half of them, and mantissa, subnormals as in IEEE 754; else None.
    flip: bits of a code that words hold inverted.  fields: the lowest bits first, the words of a block field by field;
    none of codes that cross words, see `_THIRDS`.
    """

    name: str
    bits: int
    fields: tuple[Field, ...] = ()
    book: bool = False
    flip: int = 0
    mantissa: int | None = None

    @property
    def numbers(self) -> bool:
        """Whether codes stand for numbers whose 0 is 0: none is added to them, and no zero point is."""
        return self.book or self.mantissa is not None

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


# Of 3 bits, the 16 pairs n = 8 * c + 4 * x + 2 * y + z of a lane's row fill three words: words 0 and 1 of its two rows
# stand together, then all words 2. Either half of word w, e, has the codes of 5 * w + k from bit 3 * k on, and above
# them bit w of the last code.
_THIRDS = 3
_BYTES = (Field(words="xqijcy", inside="ez", bits=8),)
_FOURS = Field(words="qijcx", inside="eyz", bits=4)
_TWOS = Field(words="ijqc", inside="exyz", bits=2)
_ONES = Field(words="ijq", inside="ecxyz", bits=1)
WIDTHS: dict[str, Width] = {
    width.name: width
    for width in (
        Width(name="int8", bits=8, fields=_BYTES, flip=128),
        *(
            Width(name=f"e{7 - mantissa}m{mantissa}", bits=8, fields=_BYTES, mantissa=mantissa)
            for mantissa in range(2, 6)
        ),
        Width(name="int6", bits=6, fields=(_FOURS, _TWOS)),
        Width(name="int5", bits=5, fields=(_FOURS, _ONES)),
        Width(name="int4", bits=4, fields=(_FOURS,)),
        Width(name="book", bits=4, fields=(Field(words="qijcx", inside="yze", bits=4),), book=True),
        Width(name="int3", bits=3),
        Width(name="int2", bits=2, fields=(_TWOS,)),
    )
}


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
    if not width.fields:
        return _pack_thirds(digits.permute(["uPqibxyzcje".index(d) for d in "ubPijqcxyze"]))
    runs, low = [], 0
    for field in width.fields:
        parts = digits.permute(["uPqibxyzcje".index(d) for d in "ubP" + field.words + field.inside])
        parts = parts.flatten(-len(field.inside))
        words = torch.zeros(parts.shape[:-1], dtype=torch.int32, device=codes.device)
        for n in range(parts.shape[-1]):
            words |= (parts[..., n].to(torch.int32) >> low & 2**field.bits - 1) << (field.bits * n)
        runs.append(words.reshape(units, blocks, WORDS * field.bits))
        low += field.bits
    return torch.cat(runs, dim=2)


def unpack_codes(words: Tensor, width: Width, N: int, K: int) -> Tensor:
    """The codes that `pack_codes` packed, uint8 [N, K]."""
    units, blocks = words.shape[:2]
    if not width.fields:
        codes = _by_rows(_unpack_thirds(words), "ijqcxyze")
    else:
        runs = words.split([WORDS * field.bits for field in width.fields], dim=2)
        codes, low = torch.zeros(units * ROWS, blocks * COLUMNS, dtype=torch.uint8, device=words.device), 0
        for field, run in zip(width.fields, runs, strict=True):
            shifts = torch.arange(0, 32, field.bits, dtype=torch.int32, device=words.device)
            digits = (run[..., None] >> shifts) & (2**field.bits - 1)
            codes |= _by_rows(digits, field.words + field.inside) << low
            low += field.bits
    return (codes ^ width.flip)[:N, :K]


def _by_rows(codes: Tensor, named: str) -> Tensor:
    """Codes [u, b, P, digits as `named`], uint8 [N, K]."""
    units, blocks = codes.shape[:2]
    digits = codes.to(torch.uint8).reshape(units, blocks, PARTS, *(_DIGITS[d] for d in named))
    rows = digits.permute([("ubP" + named).index(d) for d in "uPqibxyzcje"])
    return rows.reshape(units * ROWS, blocks * COLUMNS)


def _pack_thirds(codes: Tensor) -> Tensor:
    """Words, int32 [u, b, 768], of codes [u, b, P, i, j, q, c, x, y, z, e]."""
    pairs = codes.flatten(-5, -2).to(torch.int32)  # [..., n, e]
    words = torch.zeros((*pairs.shape[:-2], _THIRDS), dtype=torch.int32, device=codes.device)
    for w in range(_THIRDS):
        for e in range(2):
            for k in range(5):
                words[..., w] |= pairs[..., 5 * w + k, e] << (16 * e + 3 * k)
            words[..., w] |= ((pairs[..., 15, e] >> w) & 1) << (16 * e + 15)
    return torch.cat([words[..., :2].flatten(2), words[..., 2].flatten(2)], dim=2)


def _unpack_thirds(words: Tensor) -> Tensor:
    """Codes [u, b, P, i, j, q, n, e] of words as `_pack_thirds` makes them."""
    first, last = words.split([WORDS * 2, WORDS], dim=2)
    rows = (*words.shape[:2], PARTS, 8, 4, 2)
    whole = torch.cat([first.reshape(*rows, 2), last.reshape(*rows, 1)], dim=-1)
    halves = torch.stack([whole & 0xFFFF, (whole >> 16) & 0xFFFF], dim=-1)  # [..., w, e]
    shifts = torch.arange(0, 15, 3, dtype=torch.int32, device=words.device)[:, None]
    codes = ((halves[..., None, :] >> shifts) & 7).flatten(-3, -2)
    bits = torch.arange(_THIRDS, dtype=torch.int32, device=words.device)[:, None]
    return torch.cat([codes, ((halves >> 15) << bits).sum(-2, keepdim=True, dtype=torch.int32)], dim=-2)


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
