"""The floats of a 4-bit weight, in a buffer for the library's matmul: w[n, k] = (code[n, k] - zero[n, g]) * scale[n, g].

Computed in float32 and rounded once to the dtype of x, as `qcompile.numerics.dequantize` does. Reads words of
`int4_words`, writes rows of 128 columns. For many rows of x, where reading and writing the weight once costs little
beside the product.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from qcompile.backends.triton.int4_table import Unpack
from qcompile.backends.triton.int4_words import ROWS


@triton.jit
def unpack_kernel(
    words_ptr, scales_ptr, y_ptr, N, K, B, GROUPS: tl.constexpr, WIDE: tl.constexpr, UNIT: tl.constexpr
):
    """Rows unit * 64.. and columns block * 128.. of the weight."""
    start = tl.program_id(1).to(tl.int64) * B + tl.program_id(0)
    row = tl.arange(0, UNIT)[:, None]
    column = tl.arange(0, 128)[None, :]
    plane, c, j, e = column // 16, (column // 8) % 2, (column // 2) % 4, column % 2
    word = (row // 8) * 128 + (row % 8) * 16 + j * 4 + c * 2 + plane // 4
    code = (tl.load(words_ptr + start * 1024 + word) >> ((plane % 4) * 4 + e * 16)) & 15
    PLANES: tl.constexpr = 2 if WIDE else 1
    group = (start * GROUPS + column // (128 // GROUPS)) * (64 * PLANES) + row
    bits = tl.load(scales_ptr + group)
    scale = (bits if WIDE else bits & -65536).to(tl.float32, bitcast=True)
    zero = (tl.load(scales_ptr + group + 64) if WIDE else bits) & 0xFFFF
    n, k = tl.program_id(1).to(tl.int64) * 64 + row, tl.program_id(0) * 128 + column
    value = (code - zero).to(tl.float32) * scale
    tl.store(y_ptr + n * K + k, value.to(y_ptr.dtype.element_ty), mask=(n < N) & (k < K))


def unpack(words: Tensor, scales: Tensor, N: int, K: int, dtype: torch.dtype, config: Unpack) -> Tensor:
    """The weight [N, K] in `dtype`."""
    units, B = words.shape[:2]
    y = torch.empty(N, K, dtype=dtype, device=words.device)
    unpack_kernel[(B, units)](
        words,
        scales,
        y,
        N,
        K,
        B,
        GROUPS=scales.shape[1] // B,
        WIDE=scales.dim() == 4,
        UNIT=ROWS,
        num_warps=config.warps,
    )
    return y
