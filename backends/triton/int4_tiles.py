"""From words of `int4_words` to operands of tensor cores, for kernels of Gluon."""

import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

# float32 2**23: an integer or-ed into its mantissa is added exactly
INTEGER_BITS = gl.constexpr(0x4B000000)
INTEGER_OFFSET = gl.constexpr(8388608.0)
SCALE_BITS = gl.constexpr(-65536)
# eight results, written while the two words are still read
UNPACK_OPERANDS = gl.constexpr("=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r,r")
ZERO_BITS = gl.constexpr(0xFFFF)


@triton.constexpr_function
def offset_of(dtype):
    """What a nibble in the mantissa is added to: 0x4300 is 128 with a last place of 1, 0x5400 is 64 of 1 / 16."""
    return 64.0 if dtype == gl.float16 else 128.0


@triton.constexpr_function
def planes_assembly(dtype, word, first, count, target):
    """PTX that makes planes first.. of operand `word` pairs of floats n + offset, in operands target.. ."""
    place, mask, magic = (4, 0x00F000F0, 0x54005400) if dtype == gl.float16 else (0, 0x000F000F, 0x43004300)
    lines = [".reg .b32 t;"]
    for i in range(count):
        shift = 4 * (first + i) - place
        moved = f"{'shr' if shift > 0 else 'shl'}.b32 t, ${word}, {abs(shift)};" if shift else f"mov.b32 t, ${word};"
        lines += [moved, f"lop3.b32 ${target + i}, t, {mask:#x}, {magic:#x}, 0xea;"]
    return "{" + " ".join(lines) + "}"


@triton.constexpr_function
def unpack_assembly(dtype):
    """PTX that makes two neighbouring words eight planes."""
    first, second = (planes_assembly(dtype, 8 + d, 0, 4, 4 * d) for d in range(2))
    return first + second


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


@gluon.jit
def unpacked(words, dtype: gl.constexpr):
    """The eight planes of words, floats n + offset."""
    if dtype == gl.float16:
        planes = gl.inline_asm_elementwise(
            unpack_assembly(gl.float16), UNPACK_OPERANDS, [words], dtype=(gl.float16,) * 8, is_pure=True, pack=2
        )
    else:
        planes = gl.inline_asm_elementwise(
            unpack_assembly(gl.bfloat16), UNPACK_OPERANDS, [words], dtype=(gl.bfloat16,) * 8, is_pure=True, pack=2
        )
    return planes


@triton.constexpr_function
def exact_assembly(dtype, step, steps):
    """PTX that makes planes 8 / steps * step.. of two words (n - zero) * scale, given pairs of each."""
    count = 8 // steps
    first = step * count
    source = count + first // 4
    product = planes_assembly(dtype, source, first % 4, count, 0)
    name = "f16x2" if dtype == gl.float16 else "bf16x2"
    for i in range(count):
        # subtracting is exact, so that only the product rounds, as the oracle does
        product += f" sub.{name} ${i}, ${i}, ${count + 4}; mul.{name} ${i}, ${i}, ${count + 2};"
    return product


@triton.constexpr_function
def exact_constraints(steps):
    return ",".join(["=&r"] * (8 // steps) + ["r"] * 6)


@gluon.jit
def _pair(low):
    """The low half of each word, twice."""
    return (low << 16) | (low & 65535)


@gluon.jit
def exact_operand(
    words,
    scales,
    step: gl.constexpr,
    steps: gl.constexpr,
    parts: gl.constexpr,
    mma: gl.constexpr,
    dtype: gl.constexpr,
):
    """Step of a block as the first operand [16 * parts, 128 / steps], dequantized.

    words: [parts, 2, 8, 16].  scales: bfloat16 above a zero point, [parts, 2, 8].
    """
    if dtype == gl.float16:
        scale = (scales & SCALE_BITS).to(gl.float32, bitcast=True).to(gl.float16)
        scale = _pair(scale.to(gl.int16, bitcast=True).to(gl.int32))
        zero = _pair(((scales & ZERO_BITS) << 4) | 0x5400)
    else:
        scale = _pair((scales >> 16) & ZERO_BITS)
        zero = _pair((scales & ZERO_BITS) | 0x4300)
    COUNT: gl.constexpr = 8 // steps
    operands = [words, gl.expand_dims(scale, 3), gl.expand_dims(zero, 3)]
    if dtype == gl.float16:
        planes = gl.inline_asm_elementwise(
            exact_assembly(gl.float16, step, steps),
            exact_constraints(steps),
            operands,
            dtype=(gl.float16,) * COUNT,
            is_pure=True,
            pack=2,
        )
    else:
        planes = gl.inline_asm_elementwise(
            exact_assembly(gl.bfloat16, step, steps),
            exact_constraints(steps),
            operands,
            dtype=(gl.bfloat16,) * COUNT,
            is_pure=True,
            pack=2,
        )
    return operand(planes, 0, COUNT, parts, mma)
