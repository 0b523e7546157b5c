"""The floats of a 4-bit weight, for the library's matmul: w[n, k] = (code[n, k] - zero[n, g]) * scale[n, g].

Computed in float32 and rounded once to the dtype of x, as `qcompile.numerics.dequantize` does. Reads words of
`int4_words`. For many rows of x, where reading and writing the weight once costs little beside the product.
"""

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from qcompile.backends.triton.int4_table import Unpack
from qcompile.backends.triton.int4_tiles import SCALE_BITS, ZERO_BITS, offset_of, operand, unpacked
from qcompile.backends.triton.launch import launch

WARPS = 4


@gluon.jit
def unpack_kernel(
    words_ptr, scales_ptr, y_ptr, N, K, B, GROUPS: gl.constexpr, WIDE: gl.constexpr, BLOCKS: gl.constexpr
):
    """Unit program_id(1) of rows, and blocks program_id(0) * BLOCKS.. of columns."""
    W: gl.constexpr = gl.num_warps()
    dtype: gl.constexpr = y_ptr.dtype.element_ty
    PLANES: gl.constexpr = 8 // GROUPS
    HALVES: gl.constexpr = 2 if WIDE else 1
    mma: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [W, 1], [16, 8])
    lw: gl.constexpr = gl.BlockedLayout([1, 4], [1, 32], [W, 1], [1, 0])
    out: gl.constexpr = gl.BlockedLayout([1, 8], [16 // PLANES, 2 * PLANES], [W, 1], [1, 0])
    part = gl.arange(0, 4, layout=gl.SliceLayout(1, lw))
    word = gl.arange(0, 256, layout=gl.SliceLayout(0, lw))
    row = gl.arange(0, 64, layout=gl.SliceLayout(1, out))
    column = gl.arange(0, 16 * PLANES, layout=gl.SliceLayout(0, out))
    unit = gl.program_id(1).to(gl.int64)
    n = unit * 64 + row
    for i in gl.static_range(BLOCKS):
        block = gl.program_id(0) * BLOCKS + i
        start = unit * B + gl.minimum(block, B - 1)
        words = gl.load(words_ptr + start * 1024 + part[:, None] * 256 + word[None, :], cache_modifier=".cg")
        planes = unpacked(words, dtype)
        for g in gl.static_range(GROUPS):
            codes = gl.convert_layout(operand(planes, g * PLANES, PLANES, 4, mma), out).to(gl.float32)
            at = scales_ptr + (start * GROUPS + g) * (HALVES * 64) + row
            bits = gl.load(at)
            scale = (bits if WIDE else bits & SCALE_BITS).to(gl.float32, bitcast=True)
            zero = ((gl.load(at + 64) if WIDE else bits) & ZERO_BITS).to(gl.float32) + offset_of(dtype)
            value = (codes - zero[:, None]) * scale[:, None]
            k = block * 128 + g * (16 * PLANES) + column
            inside = (n[:, None] < N) & (k[None, :] < K)
            gl.store(y_ptr + n[:, None] * K + k[None, :], value.to(dtype), mask=inside)


def unpack(words: Tensor, scales: Tensor, N: int, K: int, dtype: torch.dtype, config: Unpack) -> Tensor:
    """The weight [N, K] in `dtype`."""
    units, B = words.shape[:2]
    y = torch.empty(N, K, dtype=dtype, device=words.device)
    launch(
        unpack_kernel,
        (triton.cdiv(B, config.blocks), units, 1),
        (words, scales, y, N, K, B),
        {"GROUPS": scales.shape[1] // B, "WIDE": scales.dim() == 4, "BLOCKS": config.blocks},
        num_warps=WARPS,
    )
    return y
