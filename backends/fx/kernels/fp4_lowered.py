"""4-bit floats whose columns are lowered by octaves, under inputs that need all of E4M3: `fp4_linear` lowers the codes.

Operands as for `fp4`, but the octaves are the weight's alone: words, and octaves int32 [1, K / 128, 32], as
`qcompile.backends.triton.fp4_words` packs them; weight_scale float32 [N, 1], of the numbers at the top of E4M3. What
multiplies makes E5M2 of a code and the octaves of its column, so that a weight takes 4 bits a number and a byte a
column. FUSE gives it pairs, uint8 [2 * MOST_ROWS, K], by which few rows of the input take the octaves
(`qcompile.backends.triton.pairs`).
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from qcompile.backends.fx.kernels import fp4
from qcompile.backends.fx.kernels.fp8 import as_e4m3, narrow_name
from qcompile.backends.fx.kernels.problem import Kernel, Problem
from qcompile.backends.fx.registry import REGISTRY
from qcompile.backends.triton import fp4_words
from qcompile.numerics import QParams
from qcompile.shifts import raised, room

REGISTRY.define(
    "linear_fp4_lowered(Tensor codes, Tensor scale, Tensor words, Tensor weight_scale, Tensor octaves, Tensor? bias,"
    " str weight, str narrow, ScalarType dtype, Tensor? pairs=None) -> Tensor"
)


def _linear_fp4_lowered(
    codes: Tensor,
    scale: Tensor,
    words: Tensor,
    weight_scale: Tensor,
    octaves: Tensor,
    bias: Tensor | None,
    weight: str,
    narrow: str,
    dtype: torch.dtype,
    pairs: Tensor | None = None,
) -> Tensor:
    codes, scale = as_e4m3(codes, scale, narrow)
    return fp4.multiplied(codes, scale, words, weight_scale, octaves, bias, weight, dtype, pairs)


REGISTRY.impl("linear_fp4_lowered", _linear_fp4_lowered, "CompositeImplicitAutograd")


def why_not(p: Problem) -> str | None:
    """None if the kernel can run `p`, else the reason."""
    if p.lowered is None:
        return "no columns of the weight are lowered"
    return fp4.unfit(p) or _no_room(p) or fp4.absent(p)


def _no_room(p: Problem) -> str | None:
    """Why the weight cannot be lowered as far, None if it can."""
    assert p.lowered is not None
    shift, fmt = p.lowered.shift, p.lowered.narrow.spec.format
    if min(shift) >= 0 and max(shift) <= room(fmt):
        return None
    return f"columns are lowered by {min(shift)} to {max(shift)} octaves, and {fmt.name} can be by 0 to {room(fmt)}"


def pack(codes: Tensor, qparams: QParams, dtype: torch.dtype) -> dict[str, Tensor]:
    """Words of 4-bit codes, scales and octaves of a weight whose columns were lowered."""
    codes, narrow, shift = fp4.before(codes, qparams)
    assert shift is not None
    scale = narrow.scale.expand(codes.shape[0], 1) * 2.0 ** -raised(narrow.spec.format)
    octaves = fp4_words.packed_octaves(shift)
    return {"words": fp4_words.lowered_words(codes), "scale": scale.contiguous(), "octaves": octaves}


def _arguments(p: Problem, x: tuple[Any, ...], packed: Mapping[str, Any], bias: Any) -> tuple[Any, ...]:
    codes, scale, _ = x
    assert p.input is not None
    weight, narrow = fp4.stored(p).format.name, narrow_name(p.input)
    return (codes, scale, packed["words"], packed["scale"], packed["octaves"], bias, weight, narrow, p.dtype, None)


KERNEL = Kernel(
    name="fp4-lowered",
    why_not=why_not,
    pack=pack,
    op=torch.ops.qcompile.linear_fp4_lowered.default,
    arguments=_arguments,
    takes_codes=True,
    device="cuda",
    joins=fp4.KERNEL.joins,
)
