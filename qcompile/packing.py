"""Packing: codes of 2 to 8 bits in dense bytes, and back.

One layout for all widths, row by row along K: code k fills the bits from k * bits of its row, low bits first,
and bit i of a row is bit i % 8 of byte i // 8. So 4 bits are two neighbours a byte (low nibble: even k), 2 bits
four, 8 bits are the codes themselves; 3, 5, 6 and 7 bits are a stream. A row is filled up with zero bits to whole
bytes: ceil(K * bits / 8) of them.

Plain torch without control flow on values: 2, 4 and 8 bits are shifts and masks that a compiler fuses.
"""

import math

import torch
from torch import Tensor
from torch.nn.functional import pad

from qcompile.errors import SpecError


def pack(codes: Tensor, bits: int) -> Tensor:
    """Dense bytes of codes, laid out as the module states.

    codes: int8 or uint8 [..., K]; of each the lowest `bits` bits count, so signed codes are two's complement.
    Returns uint8 [..., ceil(K * bits / 8)].  Raises SpecError unless bits is 2 to 8.
    """
    _check(bits)
    if bits == 8:
        return codes.view(torch.uint8)
    count, width, dtype = _word(bits)
    fields = pad(codes.view(torch.uint8) & (2**bits - 1), (0, -codes.shape[-1] % count))
    shifted = fields.unflatten(-1, (-1, count)).to(dtype) << _shifts(count, bits, dtype, codes.device)
    # the fields do not overlap: their sum is their union
    words = shifted.sum(-1, dtype=dtype)
    if width == 1:
        return words
    stream = (words[..., None] >> _shifts(width, 8, dtype, codes.device)) & 255
    return stream.to(torch.uint8).flatten(-2)[..., : packed_length(codes.shape[-1], bits)]


def unpack(packed: Tensor, bits: int, length: int, signed: bool) -> Tensor:
    """The codes that `pack` packed.

    packed: uint8 [..., ceil(K * bits / 8)].  length: K.  Returns int8 [..., K] if signed, else uint8.
    Raises SpecError unless bits is 2 to 8 and packed is as long as K codes need.
    """
    _check(bits)
    if packed.shape[-1] != packed_length(length, bits):
        raise SpecError(
            f"{length} codes of {bits} bits fill {packed_length(length, bits)} bytes a row, "
            f"got shape {list(packed.shape)}; unpack with the K and bits that were packed"
        )
    if bits == 8:
        return packed.view(torch.int8) if signed else packed
    count, width, dtype = _word(bits)
    words = packed
    if width > 1:
        stream = pad(packed, (0, -packed.shape[-1] % width)).unflatten(-1, (-1, width)).to(dtype)
        words = (stream << _shifts(width, 8, dtype, packed.device)).sum(-1)
    fields = (words[..., None] >> _shifts(count, bits, dtype, packed.device)) & (2**bits - 1)
    codes = fields.flatten(-2)[..., :length].to(torch.int8 if signed else torch.uint8)
    # moves the sign bit of a narrow code up to that of the byte
    half = 2 ** (bits - 1)
    return (codes ^ half) - half if signed else codes


def as_bytes(rows: Tensor) -> Tensor:
    """What is in memory of rows [N, K] of any dtype, uint8 [N, bytes]."""
    # one row or column counts as contiguous whatever its stride is
    return rows.contiguous().reshape(-1).view(torch.uint8).reshape(len(rows), -1)


def packed_length(length: int, bits: int) -> int:
    """Bytes that `length` codes of one row fill."""
    return -(-length * bits // 8)


def _check(bits: int) -> None:
    if not 2 <= bits <= 8:
        raise SpecError(f"codes of {bits} bits cannot be packed; formats have 2 to 8 bits")


def _word(bits: int) -> tuple[int, int, torch.dtype]:
    """The fewest codes that fill whole bytes, how many bytes that is, and a dtype to hold them."""
    common = math.gcd(bits, 8)
    return 8 // common, bits // common, torch.uint8 if bits == common else torch.int64


def _shifts(count: int, bits: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.arange(0, count * bits, bits, dtype=dtype, device=device)
