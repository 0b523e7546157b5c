"""Specs: a format, who shares a scale, and how the scale is kept.

Written `format/granularity[/zero][/scale]`, for example `int8/token`, `int4/g128/asym/bf16`,
`fp4_e2m1/b32/e8m0` (MXFP4), `fp4_e2m1/b16/fp8_e4m3` (NVFP4), `nf4/g64/dq256` (QLoRA), `int4/b32/min/u6x8` (Q4_K),
`int4/g128/asym/u4row` (QServe).
"""

import re
from dataclasses import dataclass, replace
from enum import StrEnum

from qcompile.errors import SpecError, nearest
from qcompile.formats import Format, Integer, parse_format

# stands in a tile for "the whole axis"
ALL = 0
# bits of integers that stay int8 when they are multiplied by those of a row's scales
MOST_BITS_BY_ROW = 4


@dataclass(frozen=True, kw_only=True)
class Granularity:
    """Which elements of x: [rows, columns] share one scale: tiles of `rows` x `columns`."""

    name: str
    rows: int
    columns: int


_NAMED = {
    "tensor": Granularity(name="tensor", rows=ALL, columns=ALL),
    "channel": Granularity(name="channel", rows=1, columns=ALL),
    "token": Granularity(name="token", rows=1, columns=ALL),
}
_GROUP = re.compile(r"[gb](\d+)")
_BLOCK = re.compile(r"b(\d+)x(\d+)")


class Zero(StrEnum):
    """Where the codes of integers lie. All but SYMMETRIC are written in a spec."""

    # from -q to q
    SYMMETRIC = ""
    # from -q - 1 to q, under a scale that may be negative: the largest magnitude of a tile is -q - 1
    FULL = "full"
    # from 0 up, one of them, the zero point, stands for 0
    CODE = "asym"
    # from 0 up, 0 stands for a minimum, which is kept as the scale is
    MINIMUM = "min"


@dataclass(frozen=True, kw_only=True)
class ScaleKind:
    """How a scale is kept. bits: per scale, what it shares with others included, but for row_bits: of a whole row.

    signed: it may be negative.  minimum: a minimum can be kept the same way.
    code_bits: 0, or scales are integers of so many bits: `shared` of a row under one float16, or all of a row under one
        bfloat16, and then so small that (code - zero) * integer is an int8 for every code.
    """

    name: str
    bits: float
    meaning: str
    signed: bool = False
    minimum: bool = False
    shared: int = 0
    code_bits: int = 0
    row_bits: int = 0


def _integers(bits: int, shared: int, *, signed: bool, source: str) -> ScaleKind:
    return ScaleKind(
        name=f"{'i' if signed else 'u'}{bits}x{shared}",
        bits=bits + 16 / shared,
        meaning=f"{'' if signed else 'un'}signed integers of {bits} bits, {shared} under one float16 ({source})",
        signed=signed,
        minimum=True,
        shared=shared,
        code_bits=bits,
    )


SCALES: dict[str, ScaleKind] = {
    s.name: s
    for s in (
        ScaleKind(name="fp32", bits=32, meaning="float32", signed=True, minimum=True),
        ScaleKind(name="fp16", bits=16, meaning="rounded to float16", signed=True, minimum=True),
        ScaleKind(name="bf16", bits=16, meaning="rounded to bfloat16", signed=True, minimum=True),
        ScaleKind(name="e8m0", bits=8, meaning="a power of two (OCP MX)"),
        ScaleKind(name="fp8_e4m3", bits=8, meaning="E4M3 under one float32 of the tensor (NVFP4)"),
        ScaleKind(name="dq256", bits=8 + 32 / 256, meaning="dynamic 8-bit in blocks of 256, mean subtracted (QLoRA)"),
        _integers(4, 16, signed=False, source="GGML Q2_K"),
        _integers(6, 8, signed=False, source="GGML Q4_K, Q5_K"),
        _integers(6, 16, signed=True, source="GGML Q3_K"),
        _integers(8, 16, signed=True, source="GGML Q6_K"),
        _integers(6, 8, signed=True, source="GGML IQ4_XS"),
        ScaleKind(
            name="u4row",
            bits=4,
            meaning="integers 1 to 16, all of a row under one bfloat16, so that weights are int8 times it (QServe)",
            code_bits=4,
            row_bits=16,
        ),
    )
}


@dataclass(frozen=True, kw_only=True)
class Spec:
    """What a tensor is quantized to. Parse one with `parse_spec`; `str(spec)` writes it back."""

    format: Format
    granularity: Granularity
    zero: Zero = Zero.SYMMETRIC
    scale: str = "fp32"

    def __post_init__(self) -> None:
        if self.zero and not isinstance(self.format, Integer):
            raise SpecError(f"'{self.zero}' belongs to integers only: {self.format.name} has no zero point")
        if self.scale not in SCALES:
            raise SpecError(f"unknown scale {self.scale!r}; nearest: {nearest(self.scale, SCALES)}")
        kind = SCALES[self.scale]
        if kind.name == "e8m0" and self.zero:
            raise SpecError(f"a power-of-two scale ('e8m0') has no zero point: leave out '{self.zero}'")
        if self.zero is Zero.FULL and not kind.signed:
            raise SpecError(f"'full' needs scales with a sign, got {kind.name!r}; take {_having('signed')}")
        if self.zero is Zero.MINIMUM and not kind.minimum:
            raise SpecError(f"'min' needs scales that can be 0, got {kind.name!r}; take {_having('minimum')}")
        if kind.row_bits and not _stays_int8(self.format):
            raise SpecError(
                f"scales {kind.name!r} make int8 of integers of up to {MOST_BITS_BY_ROW} bits, got "
                f"{self.format.name!r}; take 'bf16'"
            )
        if kind.code_bits and (self.granularity.rows != 1 or self.granularity.columns == ALL):
            raise SpecError(
                f"scales {kind.name!r} belong to groups of a row, got {self.granularity.name!r}; write for example "
                f"'{self.format.name}/g32/{kind.name}'"
            )

    def __str__(self) -> str:
        parts = [self.format.name, self.granularity.name]
        parts += [self.zero.value] if self.zero else []
        parts += [] if self.scale == "fp32" else [self.scale]
        return "/".join(parts)

    @property
    def symmetric(self) -> bool:
        """Whether 0 is the code of 0: codes are signed, and qparams hold no zero."""
        return self.zero in (Zero.SYMMETRIC, Zero.FULL)

    @property
    def free_minimum(self) -> bool:
        """Whether codes count from a minimum that may be above 0, so that a range need not hold 0 (GGML Q4_1, Q5_1)."""
        return self.zero is Zero.MINIMUM and not SCALES[self.scale].shared

    @property
    def code_range(self) -> tuple[int, int]:
        """Smallest and largest code in use, of integers only."""
        most = 2 ** (self.format.bits - 1) - 1
        if self.symmetric:
            return (-most - (self.zero is Zero.FULL), most)
        return (0, 2 * most + 1)

    def bits_per_element(self, rows: int, columns: int) -> float:
        """Bits that one element of a [rows, columns] tensor costs, scales and zero points included.

        What a tensor stores once (its own scale, learned levels) is left out, see `qcompile.sizes.stored_bytes`.
        """
        tile = (self.granularity.rows or rows) * (self.granularity.columns or columns)
        kind = SCALES[self.scale]
        # a zero point is stored as one byte, a minimum as its scale is
        zero = {Zero.CODE: 8, Zero.MINIMUM: kind.bits}.get(self.zero, 0)
        return self.format.bits + (kind.bits + zero) / tile + kind.row_bits / columns


def with_format(spec: Spec, fmt: Format) -> Spec:
    """The spec with another format, which may have no zero point, and no scales that are integers of a row."""
    kept = _stays_int8(fmt) or not SCALES[spec.scale].row_bits
    zero = spec.zero if isinstance(fmt, Integer) else Zero.SYMMETRIC
    return replace(spec, format=fmt, zero=zero, scale=spec.scale if kept else "bf16")


def by_channel(spec: Spec) -> Spec:
    """The spec with one scale a channel, which is no integer under the float of several."""
    scale = "fp32" if SCALES[spec.scale].code_bits else spec.scale
    return replace(spec, granularity=_NAMED["channel"], scale=scale)


def _stays_int8(fmt: Format) -> bool:
    return isinstance(fmt, Integer) and fmt.bits <= MOST_BITS_BY_ROW


def _having(what: str) -> str:
    return ", ".join(kind.name for kind in SCALES.values() if getattr(kind, what))


def parse_granularity(name: str) -> Granularity:
    """Granularity called `name`: tensor, channel, token, g128 (or b128), b128x128."""
    if name in _NAMED:
        return _NAMED[name]
    if (match := _GROUP.fullmatch(name)) and int(match[1]) > 0:
        return Granularity(name=name, rows=1, columns=int(match[1]))
    if (match := _BLOCK.fullmatch(name)) and int(match[1]) > 0 and int(match[2]) > 0:
        return Granularity(name=name, rows=int(match[1]), columns=int(match[2]))
    raise SpecError(f"unknown granularity {name!r}; known: tensor, channel, token, g<K>, b<K>, b<N>x<K>")


def parse_spec(text: str) -> Spec:
    """The spec written as `text`.  Raises SpecError that names the part it does not know."""
    name, *rest = text.split("/")
    fmt = parse_format(name)
    if not rest:
        raise SpecError(f"spec {text!r} does not say who shares a scale; write for example '{name}/channel'")
    granularity, *rest = rest
    zeros = [part for part in rest if part in set(Zero) - {Zero.SYMMETRIC}]
    scales = [part for part in rest if part not in zeros]
    if len(scales) > 1 or len(zeros) > 1:
        raise SpecError(f"spec {text!r} has too many parts; the form is format/granularity[/zero][/scale]")
    return Spec(
        format=fmt,
        granularity=parse_granularity(granularity),
        zero=Zero(zeros[0]) if zeros else Zero.SYMMETRIC,
        scale=scales[0] if scales else "fp32",
    )
