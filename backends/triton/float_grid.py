"""Numbers over a scale, and those of floats of few bits, as float32, for kernels: rounded as in `qcompile.numerics`."""

import triton
import triton.language as tl

# of float32
BIAS, MANTISSA_BITS = tl.constexpr(127), tl.constexpr(23)
# 1.5 * 2**23: a float32 of this size has integers as its last bits, so that adding it rounds, ties to even
ROUNDER = tl.constexpr(12582912.0)
SIGN = tl.constexpr(-2147483648)
# below it the remainder of a division may be too small for float32; both sides times the inverse leave it as it is
SMALL, LIFT = tl.constexpr(2.0**-64), tl.constexpr(2.0**64)


@triton.jit
def divide(v, scale):
    """v / scale, correctly rounded, for v of 11 significant bits and fewer: tested for every such v and scale."""
    inverse = tl.div_rn(1.0, scale)
    quotient = v * inverse
    # with these signs -0 stays -0, which has a code of its own in fp8; Triton's own minus takes from +0, and loses it
    excess = tl.fma(quotient, scale, v * -1.0)
    return tl.fma(excess, inverse * -1.0, quotient)


@triton.jit
def divide_by_one(v, scale):
    """The same, for one scale that may be tiny."""
    if scale < SMALL:
        v *= LIFT
        scale *= LIFT
    return divide(v, scale)


@triton.jit
def power_of_two(exponent):
    """2**exponent, of a normal float32, by its bits."""
    return ((exponent + BIAS) << MANTISSA_BITS).to(tl.float32, bitcast=True)


@triton.jit
def on_grid(v, MOST: tl.constexpr, MANTISSA: tl.constexpr, LOWEST: tl.constexpr):
    """The number nearest to v that has MANTISSA bits behind its first, or less where it is below 2**LOWEST; -0 too.

    MOST: the largest magnitude.
    """
    magnitude = tl.minimum(tl.abs(v), MOST)
    exponent = tl.maximum((magnitude.to(tl.int32, bitcast=True) >> MANTISSA_BITS) - BIAS, LOWEST)
    steps = magnitude * power_of_two(MANTISSA - exponent)
    # rounding up to the next binade carries by itself
    rounded = ((steps + ROUNDER) - ROUNDER) * power_of_two(exponent - MANTISSA)
    return (rounded.to(tl.int32, bitcast=True) | (v.to(tl.int32, bitcast=True) & SIGN)).to(tl.float32, bitcast=True)
