"""Matmul of 8-bit codes for few rows, int8 or fp8, with the dequantization in the epilogue: any device.

    y = (x - zero) @ w.T * (scale_x * scale_w) + x_tail @ w_tail + bias + residual

x: codes [M, K], w: codes [N, K], both int8 (summed exactly, in int32) or both fp8_e4m3 (of whose sums tensor cores keep
about 14 bits). The zero of int8 codes is taken out after the sum: (x - zero) @ w.T = x @ w.T - zero * sum_w. The tail
is what stays in 16 bits.

The operands are swapped: a program makes y.T [channels, tokens] of one tile. So the many channels fill the side of the
matrix unit that is at least 64 long on Hopper, and a single token is padded to 16 columns only. The weight is read
once, straight into shared memory; no partial sums leave a program, so a row's result depends on nothing but that row.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_wait
from triton.tools.tensor_descriptor import TensorDescriptor

from qcompile.backends.triton.dependent import is_dependent
from qcompile.backends.triton.eight_bit_table import Tiles
from qcompile.backends.triton.launch import launch

# what a copy by descriptor asks of addresses and strides, in bytes
ALIGNMENT = 16
# between the uint8 codes that `zero` counts from and the int8 codes of x
OFFSET = tl.constexpr(128)
TAIL_DEPTH = 64
# cache lines of each channel that a program asks for while the kernel before it still runs; many more only push out
# what is read first (examples/benchmarks/eight_bit.md)
AHEAD, LINE = tl.constexpr(8), tl.constexpr(128)


@dataclass(frozen=True, kw_only=True)
class Operands:
    """What is multiplied, and what the epilogue reads; the last dimension of each is contiguous.

    x [M, K] and w [N, K] of one dtype; scale_x and zero float32, one a row or one for all; scale_w float32, one a
    channel; sum_w int32 [N], read with zero; bias [N]; residual [M, N]; x_tail [M, at least T] and w_tail [T, N].
    is_made: w is what the kernel before makes, not a constant, so that nothing of it may be read sooner.
    """

    x: Tensor
    w: Tensor
    scale_x: Tensor
    scale_w: Tensor
    dtype: torch.dtype
    zero: Tensor | None = None
    sum_w: Tensor | None = None
    bias: Tensor | None = None
    residual: Tensor | None = None
    x_tail: Tensor | None = None
    w_tail: Tensor | None = None
    is_made: bool = False


@triton.jit
def _fetch(at):
    """Bring the cache lines of these addresses into the L2 cache."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [at.to(tl.int64)], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def _fetch_ahead(w, n, N, K, CHANNELS: tl.constexpr):
    """The first columns of some channels."""
    channels = tl.minimum(n + tl.arange(0, CHANNELS), N - 1)
    columns = tl.minimum(tl.arange(0, AHEAD) * LINE, K - 1)
    _fetch(w + channels.to(tl.int64)[:, None] * K + columns[None, :])


@triton.jit
def _fetch_tail(w_tail, n, N, T, CHANNELS: tl.constexpr, TAIL: tl.constexpr):
    """All of the tail's weight for some channels: it is read last, in few steps that nothing else covers."""
    LINES: tl.constexpr = CHANNELS * 2 // LINE if CHANNELS * 2 > LINE else 1
    channels = tl.minimum(n + tl.arange(0, LINES) * (LINE // 2), N - 1)
    for t in tl.range(0, T, TAIL, num_stages=1):
        columns = tl.minimum(t + tl.arange(0, TAIL), T - 1)
        _fetch(w_tail + columns.to(tl.int64)[:, None] * N + channels[None, :])


@triton.jit
def _add_tail(
    result, x_tail, w_tail, N, T, stride_x_tail, channels, tokens, is_channel, is_token, TAIL: tl.constexpr
):  # fmt: skip
    """result + (x_tail @ w_tail).T, in one tile."""
    for t in tl.range(0, T, TAIL, num_stages=1):
        columns = t + tl.arange(0, TAIL)
        inside = columns < T
        w_at = w_tail + columns.to(tl.int64)[None, :] * N + channels[:, None]
        x_at = x_tail + tokens.to(tl.int64)[None, :] * stride_x_tail + columns[:, None]
        w_part = tl.load(w_at, mask=is_channel[:, None] & inside[None, :], other=0.0)
        x_part = tl.load(x_at, mask=is_token[None, :] & inside[:, None], other=0.0)
        result = tl.dot(w_part, x_part, result, input_precision="ieee")
    return result


@triton.jit(do_not_specialize=["M"])
def eight_bit_kernel(
    x,
    w,
    weights,
    y,
    scale_x,
    scale_w,
    zero,
    sum_w,
    bias,
    residual,
    x_tail,
    w_tail,
    M,
    N,
    K,
    T,
    stride_x,
    stride_residual,
    stride_x_tail,
    step_scale,
    step_zero,
    TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
    DEPTH: tl.constexpr,
    TAIL: tl.constexpr,
    INTEGER: tl.constexpr,
    DESCRIBED: tl.constexpr,
    EVEN: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """weights: the memory of w, which may be a descriptor."""
    n, m = tl.program_id(0) * CHANNELS, tl.program_id(1) * TOKENS
    if DEPENDENT:
        # weights never change
        _fetch_ahead(weights, n, N, K, CHANNELS)
        if w_tail is not None:
            _fetch_tail(w_tail, n, N, T, CHANNELS, TAIL)
        gdc_wait()
    channels, tokens = n + tl.arange(0, CHANNELS), m + tl.arange(0, TOKENS)
    is_channel, is_token = channels < N, tokens < M
    SUM: tl.constexpr = tl.int32 if INTEGER else tl.float32
    sums = tl.zeros((CHANNELS, TOKENS), SUM)
    if not DESCRIBED:
        depth = tl.arange(0, DEPTH)
        w_at = w + channels.to(tl.int64)[:, None] * K + depth[None, :]
        x_at = x + tokens.to(tl.int64)[None, :] * stride_x + depth[:, None]
    for k in range(0, K, DEPTH):
        if DESCRIBED:
            w_tile = w.load([n, k])
            x_tile = x.load([m, k]).T
        elif EVEN:
            w_tile = tl.load(w_at + k, cache_modifier=".cg")
            x_tile = tl.load(x_at + k, mask=is_token[None, :], other=0.0)
        else:
            w_tile = tl.load(w_at + k, mask=is_channel[:, None] & (depth < K - k)[None, :], other=0.0)
            x_tile = tl.load(x_at + k, mask=is_token[None, :] & (depth < K - k)[:, None], other=0.0)
        sums = tl.dot(w_tile, x_tile, sums, out_dtype=SUM)
    if zero is not None:
        zeros = tl.load(zero + tokens * step_zero, mask=is_token, other=0.0).to(tl.int32) - OFFSET
        sums -= tl.load(sum_w + channels, mask=is_channel, other=0)[:, None] * zeros[None, :]
    scale = tl.load(scale_x + tokens * step_scale, mask=is_token, other=0.0)[None, :]
    result = sums.to(tl.float32) * (scale * tl.load(scale_w + channels, mask=is_channel, other=0.0)[:, None])
    if x_tail is not None:
        result = _add_tail(result, x_tail, w_tail, N, T, stride_x_tail, channels, tokens, is_channel, is_token, TAIL)
    if bias is not None:
        result += tl.load(bias + channels, mask=is_channel, other=0.0).to(tl.float32)[:, None]
    inside = is_channel[:, None] & is_token[None, :]
    if residual is not None:
        at = residual + tokens.to(tl.int64)[None, :] * stride_residual + channels[:, None]
        result += tl.load(at, mask=inside, other=0.0).to(tl.float32)
    at = y + tokens.to(tl.int64)[None, :] * N + channels[:, None]
    tl.store(at, result.to(y.dtype.element_ty), mask=inside)


def can_describe(*tensors: Tensor) -> bool:
    """Whether the copy engine takes rows of these matrices."""
    return all(
        t.data_ptr() % ALIGNMENT == 0 and t.stride(0) * t.element_size() % ALIGNMENT == 0 and t.stride(1) == 1
        for t in tensors
    )


def step(scale: Tensor) -> int:
    """How far apart the scales of two rows are: 0 if all rows share one."""
    return 0 if scale.numel() == 1 else scale.stride(0)


def row_stride(matrix: Tensor | None) -> int:
    return 0 if matrix is None else matrix.stride(0)


def matmul(o: Operands, tiles: Tiles) -> Tensor:
    """y [M, N] in o.dtype."""
    (M, K), N = o.x.shape, o.w.shape[0]
    y = torch.empty(M, N, dtype=o.dtype, device=o.x.device)
    if M == 0:
        return y
    described = tiles.described and can_describe(o.x, o.w)
    x, w = o.x, o.w
    if described:
        x = TensorDescriptor.from_tensor(o.x, [tiles.tokens, tiles.depth])
        w = TensorDescriptor.from_tensor(o.w, [tiles.channels, tiles.depth])
    dependent = is_dependent(o.x.device)
    tail = 0 if o.w_tail is None else o.w_tail.shape[0]
    strides = (row_stride(o.x), row_stride(o.residual), row_stride(o.x_tail))
    steps = (step(o.scale_x), 0 if o.zero is None else step(o.zero))
    vectors = (o.scale_x, o.scale_w, o.zero, o.sum_w, o.bias)
    launch(
        eight_bit_kernel,
        (triton.cdiv(N, tiles.channels), triton.cdiv(M, tiles.tokens), 1),
        (x, w, o.w, y, *vectors, o.residual, o.x_tail, o.w_tail, M, N, K, tail, *strides, *steps),
        {
            "TOKENS": tiles.tokens,
            "CHANNELS": tiles.channels,
            "DEPTH": tiles.depth,
            "TAIL": TAIL_DEPTH,
            "INTEGER": o.x.dtype is torch.int8,
            "DESCRIBED": described,
            "EVEN": N % tiles.channels == 0 and K % tiles.depth == 0,
            "DEPENDENT": dependent,
        },
        num_warps=tiles.warps,
        num_stages=tiles.stages,
        # each operation rounds by itself, as it does in the oracle
        enable_fp_fusion=False,
        **({"launch_pdl": True} if dependent else {}),
    )
    return y
