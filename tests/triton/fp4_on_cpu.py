"""What kernels of 4-bit floats compute, in plain torch, and a model that is lowered to them, without a GPU."""

import torch
from torch import Tensor

from qcompile.backends.fx.kernels.narrow_floats import widened
from qcompile.backends.triton.fp4_ptx import lowered_ptx
from qcompile.backends.triton.int4_int8_words import unpack_words
from qcompile.backends.triton.pairs import APART, MOST_ROWS
from qcompile.formats import parse_format
from tests.triton.fused import plain
from tests.triton.ptx import FULL, run

FORMATS = ("fp4_e2m1", "fp4_e1m2", "fp4_e3m0")


def bytes_of(words: Tensor, octaves: Tensor, mantissa: int) -> Tensor:
    """E5M2 [N, K] as kernels make it of packs of whole blocks, which are read as kernels read them."""
    units, blocks = words.shape[:2]
    # part q i j s, under j h s
    fields = (words.to(torch.int64) & FULL).view(units, blocks, 64, 4, 4)
    columns = (octaves[:1].to(torch.int64) & FULL).view(1, blocks, 1, 4, 2, 4).expand(units, -1, 64, -1, -1, -1)
    given: list[Tensor | None] = [None, None, fields, columns[..., 0, :], columns[..., 1, :]]
    run(lowered_ptx(mantissa), given)
    fours = torch.stack([t for t in given[:2] if t is not None], dim=-1)  # unit block row j s h
    made = torch.stack([fours >> (8 * b) & 255 for b in range(4)], dim=-1).to(torch.uint8)
    return made.permute(0, 2, 1, 4, 5, 3, 6).reshape(64 * units, 128 * blocks).view(torch.float8_e5m2)


def multiplied(
    codes: Tensor,
    scale: Tensor,
    words: Tensor,
    weight_scale: Tensor,
    mantissa: int,
    dtype: torch.dtype,
    octaves: Tensor | None = None,
    pairs: Tensor | None = None,
) -> Tensor:
    """What the op computes, in plain torch."""
    fmt = {form.mantissa: form for form in map(parse_format, FORMATS)}[mantissa]
    N, K = weight_scale.shape[0], codes.shape[1]
    if pairs is not None and codes.shape[0] <= MOST_ROWS:
        first, second = pairs[: 2 * codes.shape[0]].view(torch.float8_e4m3fn).double().view(-1, 2, K).unbind(1)
        weight = bytes_of(words, torch.zeros_like(octaves), mantissa)[:N, :K]
        x = (first + second * 2.0**-APART) * scale.double()
        return (x @ (weight.double() * weight_scale.double()).T).to(dtype)
    if octaves is None:
        weight = widened(unpack_words(words, N, K), fmt).view(torch.float8_e4m3fn)
    else:
        weight = bytes_of(words, octaves, mantissa)[:N, :K]
    x = codes.view(torch.float8_e4m3fn).double() * scale.double()
    return (x @ (weight.double() * weight_scale.double()).T).to(dtype)


OPS = {"fp4_mm": multiplied, "quantize_rows": plain}
