"""From planes of floats to operands of tensor cores, for kernels of Gluon; and constants of what packs hold."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

# float32 2**23: an integer or-ed into its mantissa is added exactly
INTEGER_BITS = gl.constexpr(0x4B000000)
INTEGER_OFFSET = gl.constexpr(8388608.0)
SCALE_BITS = gl.constexpr(-65536)
ZERO_BITS = gl.constexpr(0xFFFF)


@gluon.jit
def operand(planes, first: gl.constexpr, count: gl.constexpr, parts: gl.constexpr, mma: gl.constexpr):
    """Planes first.., [parts, 256] each, as the first operand [16 * parts, 16 * count]: registers get other names."""
    if count == 2:
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
