"""The weight that the W4A8 kernel reads: nibbles in the order of 8-bit tensor cores, a scale a group, a sum a row.

    y[m, n] = scale_x[m] * (sum over groups g of scale[n, g] * dot(x[m], code[n] - zero[n, g]) - zero_x[m] * sums[n])

words: int32 [N / 64, K / 128, 1024], as in `int4_words`, but of a row that lane 4 * i + j holds, word s has the codes

    code[row, 32 * s + 16 * h + 4 * j + b]  in bits 8 * b + 4 * h ...,  s and b in 0..3, h in {0, 1},

so that four codes are the bytes of one register after a shift and a mask, and 8 such registers are the first operand of
m16n8k32 and of wgmma as they stand. It is the order of `int4_words` for other columns: a permutation of the 128.

scales: as in `int4_words`.  sums: float32 [N], of scale[n, g] * (code[n, k] - zero[n, g]) over k.
"""

from torch import Tensor
from torch.nn.functional import pad

from qcompile.backends.triton import int4_words
from qcompile.backends.triton.int4_words import COLUMNS


def pack_words(codes: Tensor) -> Tensor:
    """Codes 0..15, uint8 [N, K], as words, int32 [ceil(N / 64), ceil(K / 128), 1024]."""
    N, K = codes.shape
    full = pad(codes, (0, -K % COLUMNS))
    # the bits of a column, highest first: c d p0 j e p1 here, d p1 p0 c j e there
    fields = full.view(N, -1, 2, 2, 2, 4, 2, 2).permute(0, 1, 3, 7, 4, 2, 5, 6)
    return int4_words.pack_words(fields.reshape(full.shape))


def unpack_words(words: Tensor, N: int, K: int) -> Tensor:
    """The codes that `pack_words` packed, uint8 [N, K]."""
    columns = words.shape[1] * COLUMNS
    fields = int4_words.unpack_words(words, N, columns).view(N, -1, 2, 2, 2, 2, 4, 2)
    return fields.permute(0, 1, 5, 2, 4, 6, 7, 3).reshape(N, columns)[:, :K].contiguous()
