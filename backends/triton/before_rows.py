"""What comes before the quantization of a row, for a program that holds it in registers: norms, activations, factors.

v and every step on the way to it that has a name in the model are rounded to the dtype of x, as eager torch rounds what
it writes to memory. v itself may differ from eager torch's in its last bit, because sums are added in another order,
and exp and rsqrt are approximated by other instructions.
"""

import triton
import triton.language as tl

# what may come before the quantization; kernels tell them apart by number
BEFORE = ("nothing", "rms_norm", "rms_norm_weight_last", "layer_norm", "silu", "gelu", "gelu_tanh")
NOTHING, RMS_NORM, RMS_NORM_WEIGHT_LAST, LAYER_NORM, SILU, GELU = (tl.constexpr(i) for i in range(6))


@triton.jit
def kept(v, dtype: tl.constexpr, INLINE: tl.constexpr):
    """v rounded to dtype, as float32. INLINE: two at a time, which Triton's own cast does not do."""
    if INLINE and dtype == tl.bfloat16:
        v = tl.inline_asm_elementwise("cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,f,f", [v], tl.bfloat16, is_pure=True, pack=2)
    elif INLINE and dtype == tl.float16:
        v = tl.inline_asm_elementwise("cvt.rn.f16x2.f32 $0, $2, $1;", "=r,f,f", [v], tl.float16, is_pure=True, pack=2)
    return v.to(dtype).to(tl.float32)


@triton.jit
def _sigmoid(u, INLINE: tl.constexpr):
    """INLINE: without the instructions that keep numbers below 2**-126."""
    u *= -1.4426950408889634
    if INLINE:
        e = tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [u], tl.float32, is_pure=True, pack=1) + 1.0
        return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [e], tl.float32, is_pure=True, pack=1)
    return 1.0 / (1.0 + tl.exp2(u))


@triton.jit
def _activated(v, BEFORE: tl.constexpr, INLINE: tl.constexpr):
    """Eager torch cancels digits in 1 + tanh where the sigmoid does not."""
    if BEFORE == SILU:
        return v * _sigmoid(v, INLINE)
    elif BEFORE == GELU:
        return v * 0.5 * (1.0 + tl.erf(v * 0.7071067811865476))
    else:
        return v * _sigmoid(1.5957691216057308 * (v + 0.044715 * v * v * v), INLINE)


@triton.jit
def combined(x, second, columns, inside, dtype: tl.constexpr, BEFORE: tl.constexpr, INLINE: tl.constexpr):
    """Columns of x + second, or of the activation of x times second; x and second: of one row."""
    v = tl.load(x + columns, mask=inside, other=0.0).to(tl.float32)
    if BEFORE >= SILU:
        v = kept(_activated(v, BEFORE, INLINE), dtype, INLINE)
    if second is not None:
        other = tl.load(second + columns, mask=inside, other=0.0).to(tl.float32)
        v = kept(v * other if BEFORE >= SILU else v + other, dtype, INLINE)
    return v


@triton.jit
def weighted(v, weight, columns, inside, dtype: tl.constexpr, INLINE: tl.constexpr):
    """Columns times the weights of their channels."""
    return kept(v * tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32), dtype, INLINE)


@triton.jit
def moments(v, inside, K, eps, BEFORE: tl.constexpr):
    """What a norm takes off a row, the row less that, and what the norm multiplies it with."""
    mean = 0.0
    if BEFORE == LAYER_NORM:
        mean = tl.sum(v, 0) / K
        v = tl.where(inside, v - mean, 0.0)
    return mean, v, tl.rsqrt(tl.sum(v * v, 0) / K + eps)


@triton.jit
def normalized(
    v, factor, weight, bias, columns, inside, dtype: tl.constexpr, BEFORE: tl.constexpr, INLINE: tl.constexpr
):
    """Columns of a norm.  v: less what the norm takes off."""
    v = v * factor
    if BEFORE == RMS_NORM_WEIGHT_LAST:
        v = kept(v, dtype, INLINE)
    if weight is not None:
        v = v * tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    if bias is not None:
        v += tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)
    return kept(v, dtype, INLINE)
