"""Codes and scales of rows, found in one pass over memory together with the norm or activation before them.

    scale[m] = max |v[m, :]| / most, codes = round(v / scale)                      v = what `BEFORE` makes of x
    scale[m] = (max(v, 0) - min(v, 0)) / most, zero = round(-min(v, 0) / scale)    with a zero point

Outlier channels that stay in 16 bits (`split_outliers`) go to a tail as they are, and are 0 in the rest of the row.
Numbers of a float of fewer than 8 bits are those of E4M3, times 2**(raised - shift[k]), and scales times 2**-raised.
Those of E4M3 itself, which has no room for octaves, become pairs of rows beside the codes (`pairs`).
A program holds a whole row in registers, so a row's result depends on nothing but that row. v is rounded to the dtype
of x (`before_rows`): from the same v, codes are those of `qcompile.numerics` to the bit.
"""

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
from qcompile.backends.triton.float_grid import ROUNDER, divide_by_one, on_e4m3, on_grid, power_of_two
from qcompile.backends.triton.pairs import APART
from qcompile.numerics import SMALLEST_SCALE

SMALLEST = tl.constexpr(SMALLEST_SCALE)
RAISED_BY = tl.constexpr(2.0**APART)


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _smaller(a, b):
    return tl.minimum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _store_pair(pair, v, octaves, columns, inside, K):
    """Numbers of E4M3, lowered by octaves, as a pair of rows.

    They are rounded by their bits: of a cast to E4M3 and back ptxas 12.8 makes one that reads another register.
    """
    number = on_e4m3(v)
    lowered = number * power_of_two(-octaves.to(tl.int32))
    first = on_e4m3(lowered)
    is_held = first == lowered
    tl.store(pair + columns, tl.where(is_held, first, 0.0).to(tl.float8e4nv).to(tl.uint8, bitcast=True), mask=inside)
    second = tl.where(is_held, 0.0, lowered * RAISED_BY).to(tl.float8e4nv)
    tl.store(pair + K + columns, second.to(tl.uint8, bitcast=True), mask=inside)


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
        # a kernel before may make them, as 1 + weight, so that they are not read yet
        prefetch(weight, K, BLOCK)
        prefetch(bias, K, BLOCK)
        if not EARLY:
            prefetch(shift, K, BLOCK)
            prefetch(keep, K, BLOCK)
        gdc_wait()
        gdc_launch_dependents()
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
        bits = scaled.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
        if pairs is not None:
            if not EARLY:
                lowered = tl.load(shift + columns, mask=inside, other=0)
            _store_pair(pairs + row * 2 * K, scaled, lowered, columns, inside, K)
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
