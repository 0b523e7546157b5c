"""A weight of 4-bit floats as one of E4M3, for the library's matmul: bits are moved, and no number is rounded.

Reads words of `int4_int8_words` or, where columns are lowered, of `fp4_words`. For many rows of x, where reading and
writing the weight once costs little beside the product.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from qcompile.backends.triton.fp4_ptx import lowered_ptx, narrowed_ptx
from qcompile.backends.triton.launch import launch

WARPS = 4
# words of 64 rows and 128 columns, and of a row of these in E4M3
WORDS, ROW = tl.constexpr(1024), tl.constexpr(32)


@triton.jit
def _lowered(words, octaves_ptr, inside, MANTISSA: tl.constexpr):
    """Bytes of E4M3 by fours, of a block's words and octaves."""
    word = tl.arange(0, WORDS)
    # part q i j s -> j h s
    at = octaves_ptr + word // 4 % 4 * 8 + word % 4
    low, high = tl.inline_asm_elementwise(
        lowered_ptx(MANTISSA),
        "=&r,=&r,r,r,r",
        [words, tl.load(at, mask=inside, other=0), tl.load(at + 4, mask=inside, other=0)],
        dtype=(tl.int32, tl.int32),
        is_pure=True,
        pack=1,
    )
    return _narrowed(low), _narrowed(high)


@triton.jit
def _narrowed(fours):
    return tl.inline_asm_elementwise(narrowed_ptx(), "=r,r", [fours], dtype=tl.int32, is_pure=True, pack=1)


@triton.jit
def unpack_kernel(words_ptr, octaves_ptr, y_ptr, N, K, B, MANTISSA: tl.constexpr, BLOCKS: tl.constexpr):
    """Unit program_id(1) of rows, and blocks program_id(0) * BLOCKS.. of columns; four numbers are one int32 of y."""
    LEFT: tl.constexpr = 3 - MANTISSA
    MASK: tl.constexpr = (7 << LEFT) * 0x01010101
    unit = tl.program_id(1).to(tl.int64)
    row = tl.arange(0, 64)
    four = tl.arange(0, ROW)
    n = unit * 64 + row
    for i in tl.static_range(BLOCKS):
        block = tl.program_id(0) * BLOCKS + i
        inside = block < B
        words = tl.load(words_ptr + (unit * B + block) * WORDS + tl.arange(0, WORDS), mask=inside, other=0)
        if octaves_ptr is None:
            low = ((words << LEFT) & MASK) | ((words << 4) & -2139062144)
            high = ((words >> (4 - LEFT)) & MASK) | (words & -2139062144)
        else:
            low, high = _lowered(words, octaves_ptr + block * ROW, inside, MANTISSA)
        # part q i j s h -> rows part q i, columns s h j
        fours = tl.reshape(tl.join(low, high), [4, 2, 8, 4, 4, 2])
        fours = tl.reshape(tl.permute(fours, (0, 1, 2, 4, 5, 3)), [64, ROW])
        k = block * ROW + four
        tl.store(y_ptr + n[:, None] * (K // 4) + k[None, :], fours, mask=(n[:, None] < N) & (k[None, :] < K // 4))


def unpack(words: Tensor, octaves: Tensor | None, N: int, K: int, mantissa: int, blocks: int) -> Tensor:
    """fp8_e4m3 [N, K], 2**(bias - 7) times the numbers or, lowered by octaves, from the top of E4M3; K divides by 4.

    octaves: as `fp4_words` packs them; None if no column is lowered.  mantissa: bits of it.
    blocks: of 128 columns, a program.
    """
    units, B = words.shape[:2]
    y = torch.empty(N, K // 4, dtype=torch.int32, device=words.device)
    launch(
        unpack_kernel,
        (triton.cdiv(B, blocks), units, 1),
        (words, octaves, y, N, K, B),
        {"MANTISSA": mantissa, "BLOCKS": blocks},
        num_warps=WARPS,
    )
    return y.view(torch.float8_e4m3fn)
