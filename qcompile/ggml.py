"""GGML's blocks: the bytes of a row as codes and qparams of a spec, and back, without any rounding.

A block holds the codes of 32 or 256 neighbours of a row, and their scales. Each type is a spec (`TYPES`): the K-quants'
scales are integers under one float16 of their block of 256.
Source: ggml (block layouts of ggml-common.h, scales of Q3_K to Q5_K as in ggml-quants.c).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from qcompile.errors import SpecError
from qcompile.formats import CodeBook, Integer
from qcompile.numerics import QParams
from qcompile.packing import pack, unpack
from qcompile.scales import stored_minimum, stored_scale
from qcompile.spec import SCALES, Spec, Zero, parse_spec


@dataclass(frozen=True, kw_only=True)
class BlockType:
    """A kind of block. name: as ggml writes it; elements, size: of a block, in elements and bytes."""

    name: str
    spec: Spec
    elements: int
    # fields in their order: name and bytes
    fields: tuple[tuple[str, int], ...]

    @property
    def size(self) -> int:
        return sum(count for _, count in self.fields)


def _type(name: str, spec: str, elements: int, **fields: int) -> BlockType:
    return BlockType(name=name, spec=parse_spec(spec), elements=elements, fields=tuple(fields.items()))


# d: scale or that of scales, m: minimum or that of minima; low and high: lower and upper bits of codes
TYPES: dict[str, BlockType] = {
    one.name: one
    for one in (
        _type("Q4_0", "int4/b32/full/fp16", 32, d=2, low=16),
        _type("Q4_1", "int4/b32/min/fp16", 32, d=2, m=2, low=16),
        _type("Q5_0", "int5/b32/full/fp16", 32, d=2, high=4, low=16),
        _type("Q5_1", "int5/b32/min/fp16", 32, d=2, m=2, high=4, low=16),
        _type("Q8_0", "int8/b32/fp16", 32, d=2, codes=32),
        _type("Q2_K", "int2/b16/min/u4x16", 256, scales=16, low=64, d=2, m=2),
        _type("Q3_K", "int3/b16/full/i6x16", 256, high=32, low=64, scales=12, d=2),
        _type("Q4_K", "int4/b32/min/u6x8", 256, d=2, m=2, scales=12, low=128),
        _type("Q5_K", "int5/b32/min/u6x8", 256, d=2, m=2, scales=12, high=32, low=128),
        _type("Q6_K", "int6/b16/full/i8x16", 256, low=128, high=64, scales=16, d=2),
        _type("IQ4_NL", "iq4_nl/b32/fp16", 32, d=2, low=16),
        _type("IQ4_XS", "iq4_nl/b32/i6x8", 256, d=2, scales=6, low=128),
        _type("MXFP4", "fp4_e2m1/b32/e8m0", 32, e=1, low=16),
    )
}


def type_of(spec: Spec) -> BlockType | None:
    """The kind of block that holds tensors of this spec, None if there is none."""
    return next((one for one in TYPES.values() if one.spec == spec), None)


def require_type(name: str, where: str = "") -> None:
    """Raises SpecError if blocks of this type are not read.  where: they are, for the message."""
    if name not in TYPES:
        raise SpecError(f"{where}blocks of type {name!r} are not read; known: {', '.join(TYPES)}")


def from_blocks(data: Tensor, name: str) -> QParams:
    """Codes and qparams of a tensor [N, K] that is stored as blocks.

    data: uint8 [N, bytes].  name: of `TYPES`.  Raises SpecError for another name, or bytes that are no whole blocks.
    """
    require_type(name)
    kind = TYPES[name]
    if data.dim() != 2 or data.shape[1] % kind.size:
        raise SpecError(
            f"{name} has blocks of {kind.size} bytes along the rows of a matrix, got shape {list(data.shape)}"
        )
    blocks = data.reshape(len(data), -1, kind.size)
    parts = dict(zip((n for n, _ in kind.fields), blocks.split([c for _, c in kind.fields], -1), strict=True))
    spec = kind.spec
    codes = _codes(kind, parts).flatten(1)
    stored = _stored(kind, parts)
    groups = codes.shape[1] // spec.granularity.columns
    zero = stored_minimum(stored, spec.scale, groups) if spec.zero is Zero.MINIMUM else None
    scale = stored_scale(stored, spec.scale, groups)
    return QParams(spec=spec, scale=scale, zero=zero, stored=stored, codes=codes)


def to_blocks(codes: Tensor, qparams: QParams) -> Tensor:
    """The bytes of a tensor's blocks, uint8 [N, bytes].  codes: [N, K], as `quantize` makes them.

    Raises SpecError if no kind of block holds the spec, or whole blocks are no rows.
    """
    kind = type_of(qparams.spec)
    if kind is None:
        raise SpecError(f"no kind of block holds {qparams.spec}; those that do: {', '.join(TYPES)}")
    if codes.dim() != 2 or codes.shape[1] % kind.elements:
        raise SpecError(
            f"{kind.name} has blocks of {kind.elements} elements along the rows of a matrix, got {list(codes.shape)}; "
            "write it as another type of smaller blocks, or as floats"
        )
    parts = _parts(kind, codes.cpu().unflatten(1, (-1, kind.elements)), qparams)
    return torch.cat([parts[name] for name, _ in kind.fields], -1).flatten(1)


def _center(kind: BlockType) -> int:
    """What is added to signed codes of fewer than 8 bits."""
    signed = isinstance(kind.spec.format, Integer) and kind.spec.symmetric
    return 1 << (kind.spec.format.bits - 1) if signed else 0


def _spread(field: Tensor, bits: int, run: int) -> Tensor:
    """Codes of `bits` bits of bytes [..., n], uint8 [..., n * 8 / bits]: of each run of bytes the lowest bits first."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8)
    runs = field.unflatten(-1, (-1, 1, run)) >> shifts[:, None]
    return (runs & (2**bits - 1)).flatten(-3)


def _gather(codes: Tensor, bits: int, run: int) -> Tensor:
    """The bytes of which `_spread` makes these codes."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8)
    runs = codes.unflatten(-1, (-1, 8 // bits, run)) << shifts[:, None]
    return runs.sum(-2, dtype=torch.uint8).flatten(-2)


@dataclass(frozen=True, kw_only=True)
class _Bits:
    """How codes lie in the fields "low" and "high": bits of a code, and bytes of a run, in each."""

    low: int
    low_run: int
    high: int = 0
    high_run: int = 0


def _bits(kind: BlockType) -> _Bits:
    bits = kind.spec.format.bits
    # a code book has 32 numbers under a scale, and so they lie
    if kind.elements == 32 or isinstance(kind.spec.format, CodeBook):
        return _Bits(low=4, low_run=16, high=bits - 4, high_run=1)
    return _K_QUANTS[bits]


_K_QUANTS = {
    2: _Bits(low=2, low_run=32),
    3: _Bits(low=2, low_run=32, high=1, high_run=32),
    4: _Bits(low=4, low_run=32),
    5: _Bits(low=4, low_run=32, high=1, high_run=32),
    6: _Bits(low=4, low_run=64, high=2, high_run=32),
}


def _codes(kind: BlockType, parts: dict[str, Tensor]) -> Tensor:
    """Codes [N, blocks, elements]."""
    if "codes" in parts:
        return parts["codes"].contiguous().view(torch.int8)
    bits = _bits(kind)
    codes = _spread(parts["low"], bits.low, bits.low_run)
    if bits.high:
        codes = codes | (_spread(parts["high"], bits.high, bits.high_run) << bits.low)
    center = _center(kind)
    return codes.view(torch.int8) - center if center else codes


def _code_fields(kind: BlockType, codes: Tensor) -> dict[str, Tensor]:
    """The fields of which `_codes` makes these codes [N, blocks, elements]."""
    if kind.spec.format.bits == 8:
        return {"codes": codes.view(torch.uint8)}
    bits, plain = _bits(kind), (codes + _center(kind)).view(torch.uint8)
    high = {"high": _gather(plain >> bits.low, bits.high, bits.high_run)} if bits.high else {}
    return {"low": _gather(plain & (2**bits.low - 1), bits.low, bits.low_run)} | high


def _half(field: Tensor) -> Tensor:
    return field.contiguous().view(torch.float16).flatten(1)


def _stored(kind: BlockType, parts: dict[str, Tensor]) -> dict[str, Tensor]:
    """As `qcompile.scales` stores them: [N, groups], or integers as `pack` packs them and [N, blocks]."""
    if kind.spec.scale == "e8m0":
        return {"code": parts["e"].flatten(1)}
    if not SCALES[kind.spec.scale].shared:
        minimum = {"minimum": _half(parts["m"])} if "m" in parts else {}
        return {"scale": _half(parts["d"])} | minimum
    bits = SCALES[kind.spec.scale].code_bits
    scales, minima = _INTEGERS[kind.name][0](parts["scales"])
    stored = {"code": pack(scales.flatten(1), bits), "outer": _half(parts["d"])}
    if minima is not None:
        stored |= {"minimum_code": pack(minima.flatten(1), bits), "minimum_outer": _half(parts["m"])}
    return stored


def _parts(kind: BlockType, codes: Tensor, qparams: QParams) -> dict[str, Tensor]:
    """Fields [N, blocks, bytes]."""
    stored = {name: tensor.cpu() for name, tensor in qparams.stored.items()}
    n, blocks = codes.shape[:2]

    def field(tensor: Tensor) -> Tensor:
        return tensor.contiguous().view(torch.uint8).reshape(n, blocks, -1)

    parts = _code_fields(kind, codes)
    if kind.spec.scale == "e8m0":
        return parts | {"e": field(stored["code"])}
    shared = SCALES[kind.spec.scale].shared
    if not shared:
        return parts | {"d": field(stored["scale"])} | ({"m": field(stored["minimum"])} if "minimum" in stored else {})
    bits, signed = SCALES[kind.spec.scale].code_bits, SCALES[kind.spec.scale].signed

    def integers(name: str) -> Tensor:
        return unpack(stored[name], bits, blocks * shared, signed).reshape(n, blocks, shared)

    parts["d"] = field(stored["outer"])
    minima = None
    if "minimum_code" in stored:
        minima = integers("minimum_code")
        parts["m"] = field(stored["minimum_outer"])
    return parts | {"scales": _INTEGERS[kind.name][1](integers("code"), minima)}


# integers of a block [..., count] out of its bytes, and back: scales, and minima or None
_Read = Callable[[Tensor], tuple[Tensor, Tensor | None]]
_Write = Callable[[Tensor, Tensor | None], Tensor]


def _read_bytes(field: Tensor) -> tuple[Tensor, Tensor | None]:
    return field.contiguous().view(torch.int8), None


def _write_bytes(scales: Tensor, minima: Tensor | None) -> Tensor:
    return scales.contiguous().view(torch.uint8)


def _read_nibbles(field: Tensor) -> tuple[Tensor, Tensor | None]:
    return field & 15, field >> 4


def _write_nibbles(scales: Tensor, minima: Tensor | None) -> Tensor:
    assert minima is not None
    return scales | (minima << 4)


def _read_pairs(field: Tensor) -> tuple[Tensor, Tensor | None]:
    """Q4_K, Q5_K: the first four scales and minima in 6 bits of bytes 0..7, whose upper 2 bits belong to the others."""
    first, second, last = field.split(4, -1)
    scales = torch.cat([first & 63, (last & 15) | ((first >> 6) << 4)], -1)
    minima = torch.cat([second & 63, (last >> 4) | ((second >> 6) << 4)], -1)
    return scales, minima


def _write_pairs(scales: Tensor, minima: Tensor | None) -> Tensor:
    assert minima is not None
    (s0, s1), (m0, m1) = scales.split(4, -1), minima.split(4, -1)
    return torch.cat([s0 | ((s1 >> 4) << 6), m0 | ((m1 >> 4) << 6), (s1 & 15) | ((m1 & 15) << 4)], -1)


def _read_sixteen(field: Tensor) -> tuple[Tensor, Tensor | None]:
    """Q3_K: 16 scales, 4 lower bits in 8 bytes, low nibbles first, and 2 upper bits in 4 more."""
    codes = _spread(field[..., :8], 4, 8) | (_spread(field[..., 8:], 2, 4) << 4)
    return codes.view(torch.int8) - 32, None


def _write_sixteen(scales: Tensor, minima: Tensor | None) -> Tensor:
    codes = (scales + 32).view(torch.uint8)
    return torch.cat([_gather(codes & 15, 4, 8), _gather(codes >> 4, 2, 4)], -1)


def _read_eight(field: Tensor) -> tuple[Tensor, Tensor | None]:
    """IQ4_XS: 8 scales, 2 upper bits in 2 bytes, and 4 lower bits in 4 more, neighbours in one."""
    codes = _spread(field[..., 2:], 4, 1) | (_spread(field[..., :2], 2, 1) << 4)
    return codes.view(torch.int8) - 32, None


def _write_eight(scales: Tensor, minima: Tensor | None) -> Tensor:
    codes = (scales + 32).view(torch.uint8)
    return torch.cat([_gather(codes >> 4, 2, 1), _gather(codes & 15, 4, 1)], -1)


_INTEGERS: dict[str, tuple[_Read, _Write]] = {
    "Q2_K": (_read_nibbles, _write_nibbles),
    "Q3_K": (_read_sixteen, _write_sixteen),
    "Q4_K": (_read_pairs, _write_pairs),
    "Q5_K": (_read_pairs, _write_pairs),
    "Q6_K": (_read_bytes, _write_bytes),
    "IQ4_XS": (_read_eight, _write_eight),
}
