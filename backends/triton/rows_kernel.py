"""Codes and scales of rows, found in one pass over memory together with the norm or activation before them.

    scale[m] = max |v[m, :]| / most, codes = round(v / scale)                      v = what `BEFORE` makes of x
    scale[m] = (max(v, 0) - min(v, 0)) / most, zero = round(-min(v, 0) / scale)    with a zero point

Outlier channels that stay in 16 bits (`split_outliers`) go to a tail as they are, and are 0 in the rest of the row.
Numbers of a float of fewer than 8 bits are those of E4M3, times 2**(raised - shift[k]), and scales times 2**-raised.
Those of E4M3 itself, which has no room for octaves, become pairs of rows beside the codes (`pairs`).
A program holds a whole row in registers, so a row's result depends on nothing but that row. v is rounded to the dtype
of x (`before_rows`): from the same v, codes are those of `qcompile.numerics` to the bit.
"""

from math import log2

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from qcompile.backends.triton.before_rows import (
    LAYER_NORM,
    RMS_NORM,
    combined,
    moments,
    normalized,
    weighted,
)
from qcompile.backends.triton.dependent import prefetch
from qcompile.backends.triton.float_grid import ROUNDER, divide_by_one, on_grid, power_of_two
from qcompile.backends.triton.pairs import APART
from qcompile.numerics import SMALLEST_SCALE

SMALLEST = tl.constexpr(SMALLEST_SCALE)


def _halves(power: float) -> str:
    """A power of two as float16, twice in a word."""
    exponent = (round(log2(power)) + 15) << 10
    return f"{exponent << 16 | exponent:#x}"


# Of four float32 in $3 ... $6 and octaves in the bytes of $7: $0 is the numbers of E4M3, $1 those of them that are
# normal there when lowered, $2 the others, raised. In between they are float16, which holds all of them. Casts swap
# neighbours: of one to E4M3 and back that does not, ptxas 12.8 makes one that reads another register.
PAIR_PTX = tl.constexpr(f"""{{ .reg .b16 a, b; .reg .b32 f, l, h, p, q, least, raise;
cvt.rn.satfinite.e4m3x2.f32 a, $3, $4; cvt.rn.satfinite.e4m3x2.f32 b, $5, $6;
mov.b32 f, {{a, b}}; prmt.b32 $0, f, 0, 0x2301;
cvt.rn.f16x2.e4m3x2 l, a; cvt.rn.f16x2.e4m3x2 h, b;
shl.b32 f, $7, 2; sub.u32 f, 0x3C3C3C3C, f;
prmt.b32 p, f, 0, 0x0414; prmt.b32 q, f, 0, 0x2434;
mul.rn.f16x2 l, l, p; mul.rn.f16x2 h, h, q;
mov.b32 least, {_halves(2.0**-6)}; mov.b32 raise, {_halves(2.0**APART)};
abs.f16x2 p, l; abs.f16x2 q, h;
set.ge.u32.f16x2 p, p, least; set.ge.u32.f16x2 q, q, least;
and.b32 f, l, p; cvt.rn.satfinite.e4m3x2.f16x2 a, f;
and.b32 f, h, q; cvt.rn.satfinite.e4m3x2.f16x2 b, f;
mov.b32 f, {{a, b}}; prmt.b32 $1, f, 0, 0x2301;
lop3.b32 l, l, p, 0, 0x30; lop3.b32 h, h, q, 0, 0x30;
mul.rn.f16x2 l, l, raise; mul.rn.f16x2 h, h, raise;
cvt.rn.satfinite.e4m3x2.f16x2 a, l; cvt.rn.satfinite.e4m3x2.f16x2 b, h;
mov.b32 f, {{a, b}}; prmt.b32 $2, f, 0, 0x2301; }}""")


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _smaller(a, b):
    return tl.minimum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _pair_of(v, octaves):
    """Numbers of E4M3, and the two that hold them lowered by octaves: bytes."""
    return tl.inline_asm_elementwise(
        PAIR_PTX, "=&r,=&r,=&r,r,r,r,r,r", [v, octaves], dtype=(tl.uint8, tl.uint8, tl.uint8), is_pure=True, pack=4
    )


@triton.jit
def quantize_rows_kernel(
    x,
    second,
    weight,
    bias,
    shift,
    keep,
    channels,
    codes,
    scales,
    zeros,
    total,
    tail,
    pairs,
    K,
    outliers,
    stride_x,
    stride_second,
    stride_tail,
    eps,
    BEFORE: tl.constexpr,
    MOST: tl.constexpr,
    INTEGER: tl.constexpr,
    OFFSET: tl.constexpr,
    MANTISSA: tl.constexpr,
    LOWEST: tl.constexpr,
    RAISED: tl.constexpr,
    INLINE: tl.constexpr,
    DEPENDENT: tl.constexpr,
    EARLY: tl.constexpr,
    BLOCK: tl.constexpr,
    TAIL: tl.constexpr,
):
    """Row program_id(0). MOST: largest code, or number of the format.  OFFSET: is taken off codes with a zero.

    MANTISSA, LOWEST: of a float of fewer than 8 bits, those of its mantissa, and the exponent; else MANTISSA is -1.
    EARLY: hold constants of the graph, which are in no cache, before x is there. A few rows that wait for them are all
    that runs; many have other rows beside them, and no registers to spare.
    """
    dtype: tl.constexpr = x.dtype.element_ty
    NORM: tl.constexpr = BEFORE >= RMS_NORM and BEFORE <= LAYER_NORM
    row = tl.program_id(0).to(tl.int64)
    columns, places = tl.arange(0, BLOCK), tl.arange(0, TAIL)
    inside, is_outlier = columns < K, places < outliers
    if EARLY:
        lowered = tl.load(shift + columns, mask=inside, other=0) if shift is not None else None
        left = tl.load(keep + columns, mask=inside, other=0.0) if keep is not None else None
    if DEPENDENT:
        # a matmul that follows fills its room with weights, also while the kernel before this one still runs
        gdc_launch_dependents()
        # a kernel before may make them, as 1 + weight, so that they are not read yet
        prefetch(weight, K, BLOCK)
        prefetch(bias, K, BLOCK)
        if not EARLY:
            prefetch(shift, K, BLOCK)
            prefetch(keep, K, BLOCK)
        gdc_wait()
    x += row * stride_x
    if second is not None:
        second += row * stride_second
    if channels is not None:
        chosen = tl.load(channels + places, mask=is_outlier, other=0)
    v = combined(x, second, columns, inside, dtype, BEFORE, INLINE)
    if channels is not None:
        # made a second time: to hand them over from v would take a register and more for each of all columns
        u = combined(x, second, chosen, is_outlier, dtype, BEFORE, INLINE)
    if total is not None:
        tl.store(total + row * K + columns, v.to(dtype), mask=inside)
    if NORM:
        mean, v, factor = moments(v, inside, K, eps, BEFORE)
        v = normalized(v, factor, weight, bias, columns, inside, dtype, BEFORE, INLINE)
    elif weight is not None:
        v = weighted(v, weight, columns, inside, dtype, INLINE)
    if channels is not None:
        if NORM:
            u = normalized(u - mean, factor, weight, bias, chosen, is_outlier, dtype, BEFORE, INLINE)
        elif weight is not None:
            u = weighted(u, weight, chosen, is_outlier, dtype, INLINE)
        u = tl.where(is_outlier, u, 0.0).to(dtype)
        tl.store(tail + row * stride_tail + places, u, mask=places < stride_tail)
        if not EARLY:
            left = tl.load(keep + columns, mask=inside, other=0.0)
        v *= tl.cast(left, tl.float32)

    if zeros is None:
        low = 0.0
        extent = tl.reduce(tl.abs(v), 0, _larger)
    else:
        low = _smaller(tl.reduce(v, 0, _smaller), 0.0)
        extent = _larger(tl.reduce(v, 0, _larger), 0.0) - low
    scale = tl.div_rn(extent, MOST)
    scale = tl.where(scale == 0.0, 1.0, _larger(scale, SMALLEST))
    tl.store(scales + row, scale * power_of_two(tl.full((), -RAISED, tl.int32)))
    scaled = divide_by_one(v, scale) if INLINE and dtype != tl.float32 else tl.div_rn(v, scale)
    if MANTISSA >= 0:
        octaves = tl.full((BLOCK,), RAISED, tl.int32)
        if shift is not None:
            if not EARLY:
                lowered = tl.load(shift + columns, mask=inside, other=0)
            octaves -= tl.cast(lowered, tl.int32)
        scaled = on_grid(scaled, MOST, MANTISSA, LOWEST) * power_of_two(octaves)
    if not INTEGER:
        # saturates; beyond the range is only what rounding put there
        if pairs is None:
            bits = scaled.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
        else:
            if not EARLY:
                lowered = tl.load(shift + columns, mask=inside, other=0)
            bits, normal, rest = _pair_of(scaled, lowered)
            pairs += row * 2 * K
            tl.store(pairs + columns, normal, mask=inside)
            tl.store(pairs + K + columns, rest, mask=inside)
    elif zeros is None:
        # within the range, because scale was found from the row
        bits = (scaled + ROUNDER).to(tl.int32, bitcast=True).to(tl.int8)
    else:
        zero = (tl.div_rn(-low, scale) + ROUNDER) - ROUNDER
        zero = _smaller(_larger(zero, 0.0), MOST)
        tl.store(zeros + row, zero)
        ends: tl.constexpr = ROUNDER - OFFSET
        placed = tl.minimum(tl.maximum(scaled + ROUNDER + (zero - OFFSET), ends), ends + MOST)
        bits = placed.to(tl.int32, bitcast=True).to(codes.dtype.element_ty)
    tl.store(codes + row * K + columns, bits, mask=inside)
