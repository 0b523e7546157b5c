"""What checkpoints of integers have in common: packed codes, scales and zero points become what a plan stores."""

from collections.abc import Sequence
from math import gcd

import torch
from torch import Tensor

from qcompile.errors import UnsupportedError
from qcompile.packing import pack, unpack
from qcompile.solved import Solved, stored_as
from qcompile.spec import parse_spec

# how scales of these dtypes are kept
KINDS = {torch.float32: "", torch.float16: "/fp16", torch.bfloat16: "/bf16"}


def unsigned(
    packed: Tensor, bits: int, length: int, scale: Tensor, zero: Tensor, *, order: Tensor | None = None
) -> Solved:
    """A weight of codes from 0, w = (code - zero) * scale.

    packed: uint8 [N, bytes], as `qcompile.packing` lays codes out.  length: K.  scale, zero: [N, G].
    order: the channel that each column multiplies.  Where every zero point is the middle, the spec is symmetric.
    """
    half, groups = 2 ** (bits - 1), scale.shape[1]
    if bool((zero == half).all()):
        codes = unpack(packed, bits, length, signed=False)
        return signed(pack(codes ^ half, bits), bits, length, scale, order=order)
    name = f"int{bits}/{granularity(length, groups)}/asym{kind(scale)}"
    stored = {"weight": packed, "scale_scale": scale, "zero": zero.to(torch.uint8)}
    return stored_as(stored, parse_spec(name), (len(packed), length), order=order)


def signed(packed: Tensor, bits: int, length: int, scale: Tensor, *, order: Tensor | None = None) -> Solved:
    """A weight of codes in two's complement, w = code * scale; see `unsigned`."""
    name = f"int{bits}/{granularity(length, scale.shape[1])}{kind(scale)}"
    stored = {"weight": packed, "scale_scale": scale}
    return stored_as(stored, parse_spec(name), (len(packed), length), order=order)


def widths_of(length: int, size: int) -> list[int]:
    """How many of `length` columns each group of `size` has; below 1, all are one group."""
    full = [size] * (length // size) if size > 0 else [length]
    return [*full, length - sum(full)] if sum(full) < length else full


def evened(widths: Sequence[int], parameter: Tensor) -> Tensor:
    """Scales or zero points [N, G] of groups of such widths, as those of groups of one width that divides them all.

    The last group is the narrower one where groups do not divide K.
    """
    if len(set(widths)) < 2:
        return parameter
    width = gcd(*widths)
    return parameter.repeat_interleave(torch.tensor([each // width for each in widths]), 1)


def granularity(length: int, groups: int) -> str:
    """Of K columns in groups.  Raises UnsupportedError for groups of unequal width."""
    if length % groups:
        raise UnsupportedError(
            f"{length} columns in {groups} groups are groups of unequal width, which no spec describes; quantize the "
            "float model"
        )
    return "channel" if groups == 1 else f"g{length // groups}"


def kind(scale: Tensor) -> str:
    """The end of a spec that says how such scales are kept.  Raises UnsupportedError for other dtypes."""
    if scale.dtype not in KINDS:
        raise UnsupportedError(f"scales of {scale.dtype} are kept by no spec; convert them to float32")
    return KINDS[scale.dtype]
