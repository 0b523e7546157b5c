"""Specs: a format, who shares a scale, and how the scale is kept.

Written `format/granularity[/asym][/scale]`, for example `int8/token`, `int4/g128/asym/bf16`,
`fp4_e2m1/b32/e8m0` (MXFP4), `fp4_e2m1/b16/fp8_e4m3` (NVFP4), `nf4/g64/dq256` (QLoRA).
"""

import re
from dataclasses import dataclass

from qcompile.errors import SpecError, nearest
from qcompile.formats import Format, Integer, parse_format

# stands in a tile for "the whole axis"
ALL = 0


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


@dataclass(frozen=True, kw_only=True)
class ScaleKind:
    """How a scale is kept. bits: per scale, what it shares with others included."""

    name: str
    bits: float
    meaning: str


SCALES: dict[str, ScaleKind] = {
    s.name: s
    for s in (
        ScaleKind(name="fp32", bits=32, meaning="float32"),
        ScaleKind(name="fp16", bits=16, meaning="rounded to float16"),
        ScaleKind(name="bf16", bits=16, meaning="rounded to bfloat16"),
        ScaleKind(name="e8m0", bits=8, meaning="a power of two (OCP MX)"),
        ScaleKind(name="fp8_e4m3", bits=8, meaning="E4M3 under one float32 of the tensor (NVFP4)"),
        ScaleKind(name="dq256", bits=8 + 32 / 256, meaning="dynamic 8-bit in blocks of 256, mean subtracted (QLoRA)"),
    )
}


@dataclass(frozen=True, kw_only=True)
class Spec:
    """What a tensor is quantized to. Parse one with `parse_spec`; `str(spec)` writes it back."""

    format: Format
    granularity: Granularity
    symmetric: bool = True
    scale: str = "fp32"

    def __post_init__(self) -> None:
        if not self.symmetric and not isinstance(self.format, Integer):
            raise SpecError(f"'asym' belongs to integers only: {self.format.name} has no zero point")
        if self.scale not in SCALES:
            raise SpecError(f"unknown scale {self.scale!r}; nearest: {nearest(self.scale, SCALES)}")
        if self.scale == "e8m0" and not self.symmetric:
            raise SpecError("a power-of-two scale ('e8m0') has no zero point: leave out 'asym'")

    def __str__(self) -> str:
        parts = [self.format.name, self.granularity.name]
        parts += [] if self.symmetric else ["asym"]
        parts += [] if self.scale == "fp32" else [self.scale]
        return "/".join(parts)

    @property
    def code_range(self) -> tuple[int, int]:
        """Smallest and largest code in use, of integers only."""
        bits = self.format.bits
        return (-(2 ** (bits - 1)) + 1, 2 ** (bits - 1) - 1) if self.symmetric else (0, 2**bits - 1)

    def bits_per_element(self, rows: int, columns: int) -> float:
        """Bits that one element of a [rows, columns] tensor costs, scales and zero points included.

        What a tensor stores once (its own scale, learned levels) is left out, see `qcompile.packing.stored_bytes`.
        """
        tile = (self.granularity.rows or rows) * (self.granularity.columns or columns)
        # a zero point is stored as one byte
        zero = 0 if self.symmetric else 8
        return self.format.bits + (SCALES[self.scale].bits + zero) / tile


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
    symmetric = "asym" not in rest
    scales = [part for part in rest if part != "asym"]
    if len(scales) > 1 or len(rest) - len(scales) > 1:
        raise SpecError(f"spec {text!r} has too many parts; the form is format/granularity[/asym][/scale]")
    return Spec(
        format=fmt,
        granularity=parse_granularity(granularity),
        symmetric=symmetric,
        scale=scales[0] if scales else "fp32",
    )
