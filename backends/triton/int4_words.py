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

import torch
from torch import Tensor
from torch.nn.functional import pad

ROWS, COLUMNS, WORDS = 64, 128, 1024
# groups of fewer columns than a block; others are whole blocks
SMALL_GROUPS = (32, 64)
# the code of 0 where codes are signed: they are stored one higher than two's complement allows, as 1..15
SIGNED_ZERO = 8


def pack_words(codes: Tensor) -> Tensor:
    """Codes 0..15, uint8 [N, K], as words, int32 [ceil(N / 64), ceil(K / 128), 1024]."""
    N, K = codes.shape
    full = pad(codes, (0, -K % COLUMNS, 0, -N % ROWS)).view(torch.uint8)
    units, blocks = full.shape[0] // ROWS, full.shape[1] // COLUMNS
    # unit part q i block d p c j e -> unit block part q i j c d, p and e within the word
    fields = full.view(units, 4, 2, 8, blocks, 2, 4, 2, 4, 2).permute(0, 4, 1, 2, 3, 8, 7, 5, 6, 9)
    words = torch.zeros(fields.shape[:-2], dtype=torch.int32, device=codes.device)
    for p in range(4):
        for e in range(2):
            words |= fields[..., p, e].to(torch.int32) << (4 * p + 16 * e)
    return words.reshape(units, blocks, WORDS)


def unpack_words(words: Tensor, N: int, K: int) -> Tensor:
    """The codes that `pack_words` packed, uint8 [N, K]."""
    units, blocks = words.shape[:2]
    lanes = words.view(units, blocks, 4, 2, 8, 4, 2, 2)
    shifts = torch.arange(0, 32, 4, dtype=torch.int32, device=words.device).view(2, 4).t()
    fields = (lanes[..., None, None] >> shifts) & 15  # unit block part q i j c d p e
    codes = fields.permute(0, 2, 3, 4, 1, 7, 8, 6, 5, 9).reshape(units * ROWS, blocks * COLUMNS)
    return codes[:N, :K].to(torch.uint8)


def pack_scales(scale: Tensor, zero: Tensor, *, narrow: bool) -> Tensor:
    """Scales and zero points of small groups or of whole blocks, as the module states.

    scale: float32 [N, G].  zero: integers, [N, G].  narrow: bfloat16 holds the scales.
    """
    rows = -scale.shape[0] % ROWS
    bits = pad(scale.float(), (0, 0, 0, rows)).view(torch.int32)
    zeros = pad(zero.to(torch.int32), (0, 0, 0, rows))
    if narrow:
        return _by_unit(bits | zeros)
    return torch.stack([_by_unit(bits), _by_unit(zeros)], dim=2).contiguous()


def _by_unit(values: Tensor) -> Tensor:
    """[N, G] as [N / 64, G, 64]."""
    return values.view(-1, ROWS, values.shape[1]).transpose(1, 2).contiguous()
