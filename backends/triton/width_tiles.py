"""From words of `widths` to operands of tensor cores, for kernels of Gluon.

A plane is 16 columns. Its floats are codes + `offset_of`, exactly, or numbers of a code book. `weight_operand` makes of
them the weight in the dtype of x: codes less their zero point, exactly, and times the scale, rounded once.
"""

import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from qcompile.backends.triton.width_loads import is_book, is_bytes, spread
from qcompile.backends.triton.width_ptx import (
    constraints,
    elements,
    offset,
    planes_ptx,
    powers,
    weight_ptx,
)
from qcompile.backends.triton.widths import WIDTHS

# float32 2**23: an integer or-ed into its mantissa is added exactly
INTEGER_BITS = gl.constexpr(0x4B000000)
INTEGER_OFFSET = gl.constexpr(8388608.0)
SCALE_BITS = gl.constexpr(-65536)
ZERO_BITS = gl.constexpr(0xFFFF)


@triton.constexpr_function
def is_half(dtype):
    return dtype == gl.float16


@triton.constexpr_function
def offset_of(width, dtype):
    """What is added to a code in its plane."""
    return float(offset(width, dtype == gl.float16))


@triton.constexpr_function
def zero_of(width, dtype):
    """What a plane holds where a signed code is 0."""
    return offset(width, dtype == gl.float16) + WIDTHS[width].center


@triton.constexpr_function
def center_of(width):
    """The code of 0 where no zero points are stored."""
    return float(WIDTHS[width].center)


@triton.constexpr_function
def float_zero_of(width, dtype):
    return float(zero_of(width, dtype))


@triton.constexpr_function
def powers_of(width, dtype):
    """`powers`, of 4 bits each, of the pairs n = 0 .. 15 of a lane's row."""
    return sum(power << (4 * n) for n, power in enumerate(powers(width, dtype == gl.float16)))


@triton.constexpr_function
def types_of(dtype, count):
    return (dtype,) * count


@gluon.jit
def planes(words, table, WIDTH: gl.constexpr, RAISED: gl.constexpr, dtype: gl.constexpr):
    """The eight planes of words that `load_words` loaded.  RAISED: their codes are times powers of two, `powers_of`."""
    return gl.inline_asm_elementwise(
        planes_ptx(WIDTH, is_half(dtype), RAISED),
        constraints(WIDTH, 8, len(table)),
        spread(words, WIDTH) + table,
        dtype=types_of(dtype, 8),
        # reads what was put into shared memory
        is_pure=not is_book(WIDTH),
        pack=elements(WIDTH),
    )


@gluon.jit
def scale_of(bits, WIDE: gl.constexpr):
    """Float32 scales of what `load_scales` found."""
    return (bits if WIDE else bits & SCALE_BITS).to(gl.float32, bitcast=True)


@gluon.jit
def _times(integers, outer, g: gl.constexpr):
    """Integer g of words of four, times the float16 in the low half of `outer`."""
    integer = (integers << (24 - 8 * (g % 4))) >> 24
    half = outer.to(gl.int16).to(gl.float16, bitcast=True)
    return integer.to(gl.float32) * half.to(gl.float32)


@gluon.jit
def group_scale(scales, g: gl.constexpr, WIDE: gl.constexpr, INTEGERS: gl.constexpr):
    """Float32 scale of group g of a block, of what `load_scales` or `load_integers` found."""
    if INTEGERS:
        return _times(scales[1 + g // 4], scales[0], g)
    else:
        return scale_of(scales[g], WIDE)


@gluon.jit
def group_minimum(scales, zeros, g: gl.constexpr, GROUPS: gl.constexpr, INTEGERS: gl.constexpr):
    """Float32 minimum of group g of a block."""
    if INTEGERS:
        return -_times(scales[1 + (GROUPS + 3) // 4 + g // 4], scales[0] >> 16, g)
    else:
        return zeros[g].to(gl.float32, bitcast=True)


@gluon.jit
def zero_code(zeros):
    """Stored zero points, float32."""
    return ((zeros & ZERO_BITS) | INTEGER_BITS).to(gl.float32, bitcast=True) - INTEGER_OFFSET


@gluon.jit
def held_zero(zeros, WIDTH: gl.constexpr, ZERO: gl.constexpr, dtype: gl.constexpr):
    """What planes hold at the code of 0, float32: a number if no zero points are stored."""
    if ZERO:
        return zero_code(zeros) + offset_of(WIDTH, dtype)
    else:
        return float_zero_of(WIDTH, dtype)


@gluon.jit
def _pair(low):
    """The low half of each word, twice."""
    return (low << 16) | (low & 65535)


@gluon.jit
def _bits(number, dtype: gl.constexpr):
    """Float32 as 16-bit floats twice in 32 bits, and these."""
    rounded = number.to(dtype)
    return _pair(rounded.to(gl.int16, bitcast=True).to(gl.int32)), rounded


@gluon.jit
def _zero_pair(zeros, WIDTH: gl.constexpr, dtype: gl.constexpr):
    if WIDTH == "int8":
        pair, _ = _bits(held_zero(zeros, WIDTH, True, dtype), dtype)
        return pair
    elif dtype == gl.float16:
        return _pair(((zeros & ZERO_BITS) << 4) | 0x5400)
    else:
        return _pair((zeros & ZERO_BITS) | 0x4300)


@gluon.jit
def _scale_pairs(scales, WIDE: gl.constexpr, dtype: gl.constexpr):
    """The scale as one pair, or as two whose sum it is."""
    if WIDE:
        pair, first = _bits(scale_of(scales, WIDE), dtype)
        more, _ = _bits(scale_of(scales, WIDE) - first.to(gl.float32), dtype)
        return (gl.expand_dims(pair, 3), gl.expand_dims(more, 3))
    elif dtype == gl.float16:
        pair, _ = _bits(scale_of(scales, WIDE), dtype)
        return (gl.expand_dims(pair, 3),)
    else:
        return (gl.expand_dims(_pair(scales >> 16), 3),)


@gluon.jit
def operand(planes, first: gl.constexpr, count: gl.constexpr, parts: gl.constexpr, mma: gl.constexpr):
    """Planes first.., [parts, 256] each, as the first operand [16 * parts, 16 * count]: registers get other names."""
    if count == 1:
        a = gl.permute(gl.reshape(planes[first], [parts, 2, 8, 4, 2, 2]), (0, 1, 2, 4, 3, 5))
    elif count == 2:
        a = gl.join(planes[first], planes[first + 1])
        a = gl.permute(gl.reshape(a, [parts, 2, 8, 4, 2, 2, 2]), (0, 1, 2, 6, 4, 3, 5))
    elif count == 4:
        a = gl.join(
            gl.join(planes[first], planes[first + 1]),
            gl.join(planes[first + 2], planes[first + 3]),
        )
        a = gl.permute(gl.reshape(a, [parts, 2, 8, 4, 2, 2, 2, 2]), (0, 1, 2, 7, 6, 4, 3, 5))
    else:
        a = gl.join(
            gl.join(gl.join(planes[0], planes[1]), gl.join(planes[2], planes[3])),
            gl.join(gl.join(planes[4], planes[5]), gl.join(planes[6], planes[7])),
        )
        a = gl.permute(gl.reshape(a, [parts, 2, 8, 4, 2, 2, 2, 2, 2]), (0, 1, 2, 8, 7, 6, 4, 3, 5))
    a = gl.reshape(a, [parts * 16, count * 16])
    return gl.convert_layout(a, gl.DotOperandLayout(0, mma, 2), assert_trivial=True)


@gluon.jit
def weight_operand(
    words,
    table,
    scales,
    zeros,
    step: gl.constexpr,
    steps: gl.constexpr,
    parts: gl.constexpr,
    mma: gl.constexpr,
    WIDTH: gl.constexpr,
    SCALED: gl.constexpr,
    WIDE: gl.constexpr,
    ZERO: gl.constexpr,
    dtype: gl.constexpr,
):
    """Step of a block as the first operand [16 * parts, 128 / steps]: the weight, without scales if not SCALED.

    words, table: of `spread` and `load_table`, [parts, 2, 8, 16].  scales, zeros: [parts, 2, 8].
    """
    COUNT: gl.constexpr = 8 // steps
    SCALES: gl.constexpr = (2 if WIDE else 1) if SCALED else 0
    FIXED: gl.constexpr = None if ZERO else zero_of(WIDTH, dtype)
    if is_bytes(WIDTH):
        # the run that has these planes alone: the other may be on its way
        operands = (words[step * COUNT // 4], words[step * COUNT // 4])
    else:
        operands = words + table
    if ZERO:
        operands = operands + (gl.expand_dims(_zero_pair(zeros, WIDTH, dtype), 3),)
    if SCALED:
        operands = operands + _scale_pairs(scales, WIDE, dtype)
    made = gl.inline_asm_elementwise(
        weight_ptx(WIDTH, is_half(dtype), step * COUNT, COUNT, FIXED, SCALES),
        constraints(WIDTH, COUNT, len(operands) - len(words)),
        operands,
        dtype=types_of(dtype, COUNT),
        is_pure=not is_book(WIDTH),
        pack=elements(WIDTH),
    )
    return operand(made, 0, COUNT, parts, mma)
