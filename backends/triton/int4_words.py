"""The weight that the W4A16 kernels read: nibbles in the order in which tensor cores take them, and one scale a group.

    y[m, n] = sum over groups g of scale[n, g] * sum over k in g of (code[n, k] - zero[n, g]) * x[m, k]

words: int32 [N / 64, K / 128, 1024]. Each block of 64 rows and 128 columns is one run of 4 KB: 4 parts of 16 rows,
one a warp; a part is 2 runs of 32 lanes, and a lane reads 16 bytes. Lane 4 * i + j of run q holds, of row 8 * q + i,
four words c, d in {0, 1}: c the half of 16 columns and d which planes, and word c, d holds the codes

    code[row, 64 * d + 16 * p + 8 * c + 2 * j + e]  in bits 4 * p + 16 * e ...,  p in 0..3, e in {0, 1},

so that one shift and one `lop3` make a pair of 16-bit floats, and 8 pairs are the first operand of m16n8k16 and of
wgmma as they stand: no shuffle and no shared memory between the load and the product.

scales: int32 [N / 64, K / g, 64]: the scale's bfloat16 bits above, the zero point below. Scales that bfloat16 does not
hold are two planes, int32 [N / 64, K / g, 2, 64]: float32 bits, zero points. N and K are filled up to whole blocks with
scales of 0.
Source of the trick with the bits of the mantissa: Kim 2022 (Who Says Elephants Can't Run); of the order: Marlin.
"""

from torch import Tensor

from qcompile.backends.triton.widths import COLUMNS, ROWS, SMALL_GROUPS, WIDTHS, pack_codes, pack_scales, unpack_codes

__all__ = ["COLUMNS", "ROWS", "SIGNED_ZERO", "SMALL_GROUPS", "pack_scales", "pack_words", "unpack_words"]

# the code of 0 where codes are signed: they are stored one higher than two's complement allows, as 1..15
SIGNED_ZERO = 8


def pack_words(codes: Tensor) -> Tensor:
    """Codes 0..15, uint8 [N, K], as words, int32 [ceil(N / 64), ceil(K / 128), 1024]."""
    return pack_codes(codes, WIDTHS["int4"])


def unpack_words(words: Tensor, N: int, K: int) -> Tensor:
    """The codes that `pack_words` packed, uint8 [N, K]."""
    return unpack_codes(words, WIDTHS["int4"], N, K)
