"""A weight of 4-bit floats whose columns are lowered by octaves, as `fp4_gemm` and `fp4_unpack` read it.

words: int32 [N / 64, K / 128, 1024], as in `int4_int8_words`, but that of code[row, 32 * s + 16 * h + 4 * j + b] in
word s of lane 4 * i + j

    the magnitude stands in bits 16 * h + 4 * b ... + 2, and the sign in bit 8 * b + 7 - 4 * h

so that each half of a word has the four selectors of a byte permutation, which finds four bytes in a table, and signs
are where the bytes want them after a shift at most.
octaves: int32 [1, K / 128, 32], 4 * octaves of that column in byte b of word 8 * j + 4 * h + s: what is subtracted from
the byte of E5M2 that the table has, whose exponent begins at bit 2. E5M2 holds the numbers of all 4-bit floats, lowered
by as many octaves as E4M3 has room for, and none of them is subnormal there.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from qcompile.backends.triton.int4_int8_words import pack_words
from qcompile.backends.triton.widths import COLUMNS

# of an exponent of E5M2
OCTAVE = 4
# words of a block's octaves
OCTAVES = 32


def lowered_words(codes: Tensor) -> Tensor:
    """Codes 0..15, uint8 [N, K], as words."""
    plain = pack_words(codes)
    words = torch.zeros_like(plain)
    for h in range(2):
        for b in range(4):
            code = (plain >> (8 * b + 4 * h)) & 15
            words |= (code & 7) << (16 * h + 4 * b)
            words |= (code >> 3) << (8 * b + 7 - 4 * h)
    return words


def packed_octaves(shift: Tensor) -> Tensor:
    """Octaves as the module states.  shift: int8 [K], from 0 to 31."""
    full = pad(shift * OCTAVE, (0, -len(shift) % COLUMNS)).view(-1, 4, 2, 4, 4)
    # block s h j b -> block j h s b
    return full.permute(0, 3, 2, 1, 4).contiguous().view(torch.int32).view(1, -1, OCTAVES)


def unpacked_octaves(octaves: Tensor, K: int) -> Tensor:
    """int8 [1, K], of what `packed_octaves` makes."""
    full = octaves[:1].contiguous().view(torch.int8).view(-1, 4, 2, 4, 4)
    return (full.permute(0, 3, 2, 1, 4) // OCTAVE).reshape(1, -1)[:, :K].contiguous()
