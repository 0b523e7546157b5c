"""Codes and scales of rows, found in one pass over memory together with the norm or activation before them.

    scale[m] = max |v[m, :]| / most, codes = round(v / scale)                      v = what `BEFORE` makes of x
    scale[m] = (max(v, 0) - min(v, 0)) / most, zero = round(-min(v, 0) / scale)    with a zero point

Outlier channels that stay in 16 bits (`split_outliers`) go to a tail as they are, and are 0 in the rest of the row.
Numbers of a float of fewer than 8 bits are those of E4M3, times 2**(raised - shift[k]), and scales times 2**-raised.
A program holds a whole row in registers, so a row's result depends on nothing but that row. v is rounded to the dtype
of x (`before_rows`): from the same v, codes are those of `qcompile.numerics` to the bit.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from qcompile.backends.triton.before_rows import (
    BEFORE,
    LAYER_NORM,
    RMS_NORM,
    combined,
    moments,
    normalized,
    weighted,
)
from qcompile.backends.triton.dependent import is_dependent
from qcompile.backends.triton.eight_bit_table import TAIL_MULTIPLE, tail_width
from qcompile.backends.triton.float_grid import ROUNDER, divide_by_one, on_grid, power_of_two
from qcompile.backends.triton.launch import launch
from qcompile.backends.triton.table import on_device, processors_of
from qcompile.formats import Float, Integer
from qcompile.numerics import SMALLEST_SCALE
from qcompile.spec import ALL, Spec

# of a program with registers for what a layer has of its own, beside the row
MOST_WARPS = 16
# longest row whose elements fit the registers of 32 warps beside what is computed of them
MAX_K = 32768
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# compute capability of the devices on which it was measured, and the first that has the cast to e4m3
MEASURED, FIRST_FP8 = (9, 0), (8, 9)
SMALLEST = tl.constexpr(SMALLEST_SCALE)


@dataclass(frozen=True, kw_only=True)
class Rows:
    """codes int8, uint8 or fp8_e4m3 [..., K]; scale and zero float32 [..., 1]; total: x + second, in x's dtype.

    tail: outlier channels in x's dtype, zeros behind them up to the next multiple of TAIL_MULTIPLE.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    total: Tensor | None
    tail: Tensor | None


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _smaller(a, b):
    return tl.minimum(a, b, propagate_nan=tl.PropagateNan.ALL)


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
    EARLY: hold what a layer has of its own, which is in no cache, before x is there. A few rows that wait for it are
    all that runs; many have other rows beside them, and no registers to spare.
    """
    dtype: tl.constexpr = x.dtype.element_ty
    NORM: tl.constexpr = BEFORE >= RMS_NORM and BEFORE <= LAYER_NORM
    row = tl.program_id(0).to(tl.int64)
    columns, places = tl.arange(0, BLOCK), tl.arange(0, TAIL)
    inside, is_outlier = columns < K, places < outliers
    if EARLY:
        own = tl.load(weight + columns, mask=inside, other=0.0) if weight is not None else None
        added = tl.load(bias + columns, mask=inside, other=0.0) if bias is not None else None
        lowered = tl.load(shift + columns, mask=inside, other=0) if shift is not None else None
        left = tl.load(keep + columns, mask=inside, other=0.0) if keep is not None else None
    if DEPENDENT:
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
    if not EARLY:
        own = tl.load(weight + columns, mask=inside, other=0.0) if weight is not None else None
        added = tl.load(bias + columns, mask=inside, other=0.0) if bias is not None else None
    if NORM:
        v = normalized(v, factor, own, added, dtype, BEFORE, INLINE)
    elif weight is not None:
        v = weighted(v, own, dtype, INLINE)
    if channels is not None:
        own = tl.load(weight + chosen, mask=is_outlier, other=0.0) if weight is not None else None
        added = tl.load(bias + chosen, mask=is_outlier, other=0.0) if bias is not None else None
        if NORM:
            u = normalized(u - mean, factor, own, added, dtype, BEFORE, INLINE)
        elif weight is not None:
            u = weighted(u, own, dtype, INLINE)
        u = tl.where(is_outlier, u, 0.0).to(dtype)
        tl.store(tail + row * stride_tail + places, u, mask=places < stride_tail)
        if not EARLY:
            left = tl.load(keep + columns, mask=inside, other=0.0)
        v *= left.to(tl.float32)

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
            octaves -= lowered.to(tl.int32)
        scaled = on_grid(scaled, MOST, MANTISSA, LOWEST) * power_of_two(octaves)
    if not INTEGER:
        # saturates; beyond the range is only what rounding put there
        bits = scaled.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
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


def why_not(spec: Spec, dtype: torch.dtype, K: int, capability: tuple[int, int]) -> str | None:
    """None if this is the fastest way known to quantize rows of K elements of `dtype`, else the reason."""
    if spec.granularity.rows != 1 or spec.granularity.columns != ALL or spec.scale != "fp32":
        return f"{spec} is not one float32 scale a row"
    whole = isinstance(spec.format, Integer) or spec.format.name == "fp8_e4m3"
    if not whole and not (isinstance(spec.format, Float) and spec.format.bits < 8):
        return f"{spec} is neither integers nor floats that E4M3 holds"
    if dtype not in DTYPES:
        return f"rows of {dtype} are not supported"
    if K > MAX_K:
        return f"a row of {K} elements does not fit into registers (most: {MAX_K})"
    if isinstance(spec.format, Float) and capability < FIRST_FP8:
        return f"casts to fp8 begin with sm_89, this is sm_{capability[0]}{capability[1]}"
    if capability != MEASURED:
        return f"the kernel was measured on sm_90, this is sm_{capability[0]}{capability[1]}"
    return None


def warps_for(K: int) -> int:
    """Warps of a program: 32 elements a thread, so that two programs of 16 warps share a multiprocessor."""
    return max(1, min(32, triton.next_power_of_2(K) // 1024))


def block_for(K: int) -> int:
    """Elements of a program: of a short row two for each thread of a warp, which are rounded together."""
    return max(64, triton.next_power_of_2(K))


def tail_block_for(outliers: int) -> int:
    """Columns of the tail that a program makes."""
    return max(TAIL_MULTIPLE, triton.next_power_of_2(outliers))


def quantize_rows(
    x: Tensor,
    spec: Spec,
    *,
    before: str = "nothing",
    second: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    shift: Tensor | None = None,
    keep: Tensor | None = None,
    channels: Tensor | None = None,
    eps: float = 0.0,
    offset: int = 0,
    raised: int = 0,
    keep_total: bool = False,
) -> Rows:
    """x [..., K], and second of its shape: added before a norm, or multiplied with after an activation.

    weight, bias: of a norm, [K]; weight without a norm: what channels are multiplied with at the end, in x's dtype.
    offset: 0, or 128 for codes with a zero as int8, less 128.
    shift, raised: octaves of numbers of fewer bits in E4M3, int8 [K], and of all.  keep_total: return the sum, too.
    keep: ones, and zeros for what is left out of the codes, [K] in x's dtype.  channels: of the tail, integers [T].
    """
    *batch, K = x.shape
    rows, other = _rows(x), None if second is None else _rows(second)
    M = rows.shape[0]
    integer = isinstance(spec.format, Integer)
    narrow = spec.format if isinstance(spec.format, Float) and spec.format.bits < 8 else None
    dtype = torch.int8 if integer and (spec.symmetric or offset) else torch.float8_e4m3fn if narrow else torch.uint8
    codes = torch.empty((*batch, K), dtype=dtype, device=x.device)
    scale = torch.empty((*batch, 1), dtype=torch.float32, device=x.device)
    zero = None if spec.symmetric else torch.empty_like(scale)
    total = torch.empty((*batch, K), dtype=x.dtype, device=x.device) if keep_total else None
    outliers = 0 if channels is None else channels.shape[0]
    width = tail_width(outliers)
    tail = None if channels is None else x.new_empty((*batch, width))
    result = Rows(codes=codes, scale=scale, zero=zero, total=total, tail=tail)
    if M == 0:
        return result
    dependent = x.is_cuda and is_dependent(x.device)
    given = (rows, other, *(None if t is None else t.contiguous() for t in (weight, bias)), shift, keep, channels)
    made = (codes.view(torch.uint8) if narrow else codes, scale, zero, total, tail)
    strides = (rows.stride(0), 0 if other is None else other.stride(0), width)
    with on_device(x.device):
        launch(
            quantize_rows_kernel,
            (M, 1, 1),
            (*given, *made, K, outliers, *strides, eps),
            {
                "BEFORE": BEFORE.index(before),
                "MOST": float(spec.code_range[1] if integer else spec.format.max),
                "INTEGER": integer,
                "OFFSET": float(offset),
                "MANTISSA": narrow.mantissa if narrow else -1,
                "LOWEST": 1 - narrow.bias if narrow else 0,
                "RAISED": raised,
                # the interpreter knows no assembly, and its fused multiply-add is not fused
                "INLINE": x.is_cuda,
                "DEPENDENT": dependent,
                "EARLY": dependent and processors_of(x.device) >= M and warps_for(K) <= MOST_WARPS,
                "BLOCK": block_for(K),
                "TAIL": tail_block_for(outliers),
            },
            num_warps=warps_for(K),
            # each operation rounds by itself, as it does in the oracle
            enable_fp_fusion=False,
            **({"launch_pdl": True} if dependent else {}),
        )
    return result


def _rows(x: Tensor) -> Tensor:
    """x as [M, K], whose elements of a row lie one behind the other; a copy only where they do not."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(-1) == 1 else rows.contiguous()
