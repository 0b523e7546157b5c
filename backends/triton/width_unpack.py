"""The floats of a weight of 2 to 8 bits, for the library's matmul: w[n, k] = (code[n, k] - zero[n, g]) * scale[n, g],
or code[n, k] * scale[n, g] + minimum[n, g].

Computed in float32 and rounded once to the dtype of x, as `qcompile.numerics.dequantize` does. Reads words of
`widths`. For many rows of x, where reading and writing the weight once costs little beside the product.
"""

import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from qcompile.backends.triton.launch import launch
from qcompile.backends.triton.width_loads import load_integers, load_scales, load_table, load_words
from qcompile.backends.triton.width_table import Unpack
from qcompile.backends.triton.width_tiles import (
    float_zero_of,
    group_minimum,
    group_scale,
    held_zero,
    offset_of,
    operand,
    planes,
)
from qcompile.backends.triton.widths import Packed

WARPS = 4


@gluon.jit
def unpack_kernel(
    words_ptr,
    scales_ptr,
    levels_ptr,
    y_ptr,
    N,
    K,
    B,
    WIDTH: gl.constexpr,
    GROUPS: gl.constexpr,
    WIDE: gl.constexpr,
    ZERO: gl.constexpr,
    MINIMUM: gl.constexpr,
    INTEGERS: gl.constexpr,
    BLOCKS: gl.constexpr,
):
    """Unit program_id(1) of rows, and blocks program_id(0) * BLOCKS.. of columns."""
    W: gl.constexpr = gl.num_warps()
    dtype: gl.constexpr = y_ptr.dtype.element_ty
    SPANS: gl.constexpr = max(GROUPS, 1)
    PLANES: gl.constexpr = 8 // SPANS
    mma: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [W, 1], [16, 8])
    out: gl.constexpr = gl.BlockedLayout([1, 8], [16 // PLANES, 2 * PLANES], [W, 1], [1, 0])
    row = gl.arange(0, 64, layout=gl.SliceLayout(1, out))
    column = gl.arange(0, 16 * PLANES, layout=gl.SliceLayout(0, out))
    unit = gl.program_id(1).to(gl.int64)
    n = unit * 64 + row
    table = load_table(levels_ptr, 1, WIDTH)
    gl.thread_barrier()
    for i in gl.static_range(BLOCKS):
        block = gl.program_id(0) * BLOCKS + i
        at = gl.minimum(block, B - 1)
        made = planes(load_words(words_ptr, unit * B + at, B, 1, WIDTH), table, WIDTH, False, dtype)
        if INTEGERS:
            scales = load_integers(scales_ptr, unit, at, B, row // 64, row, GROUPS, MINIMUM)
            zeros = ()
        else:
            scales, zeros = load_scales(scales_ptr, unit, at, B, row // 64, row, GROUPS, WIDE, ZERO)
        for g in gl.static_range(SPANS):
            codes = gl.convert_layout(operand(made, g * PLANES, PLANES, 4, mma), out).to(gl.float32)
            scale = group_scale(scales, g, WIDE, INTEGERS)[:, None]
            if MINIMUM:
                minimum = group_minimum(scales, zeros, g, GROUPS, INTEGERS)
                value = (codes - offset_of(WIDTH, dtype)) * scale + minimum[:, None]
            elif INTEGERS:
                value = (codes - float_zero_of(WIDTH, dtype)) * scale
            else:
                zero = held_zero(zeros[g], WIDTH, ZERO, dtype)
                value = (codes - (zero[:, None] if ZERO else zero)) * scale
            k = block * 128 + g * (16 * PLANES) + column
            inside = (n[:, None] < N) & (k[None, :] < K)
            gl.store(y_ptr + n[:, None] * K + k[None, :], value.to(dtype), mask=inside)


def unpack(weight: Packed, y: Tensor, config: Unpack) -> None:
    """Write the weight to y [N, K], contiguous, in the dtype of that."""
    (N, K), (units, B) = y.shape, weight.words.shape[:2]
    levels = weight.words if weight.levels is None else weight.levels
    launch(
        unpack_kernel,
        (triton.cdiv(B, config.blocks), units, 1),
        (weight.words, weight.scales, levels, y, N, K, B),
        {
            "WIDTH": weight.width,
            "GROUPS": weight.groups,
            "WIDE": weight.wide,
            "ZERO": weight.zero,
            "MINIMUM": weight.minimum,
            "INTEGERS": weight.integers > 0,
            "BLOCKS": config.blocks,
        },
        num_warps=WARPS,
    )
