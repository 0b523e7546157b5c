"""A weight of 4-bit integers as one of int8, for the matmul of 8-bit codes: no number is rounded.

    y[n, k] = (code[n, k] - zero[n, g]) * integer[n, g],  integer = scale[n, g] / row[n]

Reads words and scales of `int4_int8_words`, of scales that are integers times one number of the row, so small that
every y is an int8 (`u4row` of `qcompile.scales`). For many rows of x, where reading and writing the weight once costs
little beside the product. Source: QServe section 4.1.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from qcompile.backends.triton.launch import launch

WARPS = 4
# words of 64 rows and 128 columns, and of a row of these in int8
WORDS, ROW = tl.constexpr(1024), tl.constexpr(32)
# the low codes of a word, a byte of 1 four times, and of 128
CODES, ONES, CENTERS = tl.constexpr(0x0F0F0F0F), tl.constexpr(0x01010101), tl.constexpr(-2139062144)
SCALE_BITS, ZERO_BITS = tl.constexpr(-65536), tl.constexpr(0xFFFF)


@triton.jit
def unpack_kernel(
    words_ptr, scales_ptr, row_ptr, y_ptr, N, K, B, GROUPS: tl.constexpr, WIDE: tl.constexpr, BLOCKS: tl.constexpr
):
    """Unit program_id(1) of rows, and blocks program_id(0) * BLOCKS.. of columns; four numbers are one int32 of y."""
    PLANES: tl.constexpr = 2 if WIDE else 1
    unit = tl.program_id(1).to(tl.int64)
    row = tl.arange(0, 64)
    four = tl.arange(0, ROW)
    group = tl.arange(0, GROUPS)
    n = unit * 64 + row
    outer = tl.load(row_ptr + n, mask=n < N, other=1.0)
    for i in tl.static_range(BLOCKS):
        block = tl.program_id(0) * BLOCKS + i
        inside = block < B
        words = tl.load(words_ptr + (unit * B + block) * WORDS + tl.arange(0, WORDS), mask=inside, other=0)
        # part q i j s h -> rows part q i, columns s h j
        fours = tl.reshape(tl.join(words & CODES, (words >> 4) & CODES), [4, 2, 8, 4, 4, 2])
        fours = tl.reshape(tl.permute(fours, (0, 1, 2, 4, 5, 3)), [64, GROUPS, ROW // GROUPS])
        at = scales_ptr + ((unit * B + block) * GROUPS + group[None, :]) * (PLANES * 64) + row[:, None]
        bits = tl.load(at, mask=inside, other=0)
        zeros = tl.load(at + 64, mask=inside, other=0) if WIDE else bits & ZERO_BITS
        scale = (bits if WIDE else bits & SCALE_BITS).to(tl.float32, bitcast=True)
        integer = (scale / outer[:, None] + 0.5).to(tl.int32)
        # 128 more in every byte, so that none borrows from the next
        offset = CENTERS - zeros * integer * ONES
        made = (fours * integer[:, :, None] + offset[:, :, None]) ^ CENTERS
        k = block * ROW + four
        inside = (n[:, None] < N) & (k[None, :] < K // 4)
        tl.store(y_ptr + n[:, None] * (K // 4) + k[None, :], tl.reshape(made, [64, ROW]), mask=inside)


def unpack(words: Tensor, scales: Tensor, row: Tensor, K: int, blocks: int) -> Tensor:
    """int8 [N, K], for K a multiple of 4.

    words, scales: as `int4_int8_words` packs them; row: float32 [N, 1].  blocks: of 128 columns, a program.
    """
    units, B = words.shape[:2]
    y = torch.empty(row.shape[0], K // 4, dtype=torch.int32, device=words.device)
    launch(
        unpack_kernel,
        (triton.cdiv(B, blocks), units, 1),
        (words, scales, row, y, row.shape[0], K, B),
        {"GROUPS": scales.shape[1] // B, "WIDE": scales.dim() == 4, "BLOCKS": blocks},
        num_warps=WARPS,
    )
    return y.view(torch.int8)
