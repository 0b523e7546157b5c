"""Matmul of 8-bit codes for few rows on Hopper (sm_90), which reads its weight before the kernel before it has ended.

    y = (x - zero) @ w.T * (scale_x * scale_w) + x_tail @ w_tail + bias + residual

Operands, and their swap, as in `eight_bit`. One warp copies tiles of w and x into a ring in shared memory (TMA); a
group of four warps multiplies them. Weights never change, so that the whole ring is filled with them at once, and only
x waits: what quantizes x for a few rows leaves memory idle. The 16-bit tail is more steps through the same ring, as in
`hopper`: 64 of its columns take the room of 128 codes.
"""

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from qcompile.backends.triton.descriptors import described
from qcompile.backends.triton.eight_bit import Operands, can_describe, row_stride, step
from qcompile.backends.triton.eight_bit_table import RingTiles
from qcompile.backends.triton.items import next_stage
from qcompile.backends.triton.launch import launch
from qcompile.backends.triton.table import processors_of

# bytes of a row of a stage, the widest swizzle of shared memory
ROW = 128
OFFSET = gl.constexpr(128)
# registers of a thread: of the warp that copies, and, by the programs of a multiprocessor, of all before they part
COPYING, LAUNCHED = 40, {1: 168, 2: 128}


@gluon.jit
def _copy_weight(w, ring, index, at, wanted):
    """Ask for a tile of w, and let its stage wait for that and for x."""
    xs, ws, full, _free = ring
    bar = full.index(index)
    mbarrier.expect(bar, w.block_type.nbytes + xs.shape[1] * xs.shape[2], pred=wanted)
    w_stage = ws.index(index)._reinterpret(w.dtype, w.block_type.shape, w.layout)
    tma.async_copy_global_to_shared(w, at, bar, w_stage, pred=wanted)


@gluon.jit
def _copy_input(x, ring, index, at):
    xs, _ws, full, _free = ring
    x_stage = xs.index(index)._reinterpret(x.dtype, x.block_type.shape, x.layout)
    tma.async_copy_global_to_shared(x, at, full.index(index), x_stage)


@gluon.jit
def _copy_all(x, w, x_tail, w_tail, ring, sizes, STAGES: gl.constexpr):
    free = ring[3]
    M, N, K, T = sizes
    TOKENS: gl.constexpr = x.block_type.shape[0]
    CHANNELS: gl.constexpr = w.block_type.shape[0]
    DEPTH: gl.constexpr = w.block_type.shape[1]
    tiles_m = gl.cdiv(M, TOKENS)
    tiles = tiles_m * gl.cdiv(N, CHANNELS)
    early = gl.minimum(gl.cdiv(K, DEPTH), STAGES)
    for i in range(0, early):
        _copy_weight(w, ring, i, [gl.program_id(0) // tiles_m * CHANNELS, i * DEPTH], True)
    gdc_wait()
    gdc_launch_dependents()
    index, phase, done = gl.to_tensor(0), gl.to_tensor(1), gl.to_tensor(0)
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        m, n = tile % tiles_m * TOKENS, tile // tiles_m * CHANNELS
        for k in range(0, K, DEPTH):
            mbarrier.wait(free.index(index), phase)
            _copy_weight(w, ring, index, [n, k], done >= early)
            _copy_input(x, ring, index, [m, k])
            done += 1
            index, phase = next_stage(index, phase, STAGES)
        if x_tail is not None:
            for t in range(0, T, w_tail.block_type.shape[0]):
                mbarrier.wait(free.index(index), phase)
                _copy_weight(w_tail, ring, index, [t, n], True)
                _copy_input(x_tail, ring, index, [m, t])
                index, phase = next_stage(index, phase, STAGES)


@gluon.jit
def _add_tail(result, x_tail, w_tail, ring, index, phase, T, STAGES: gl.constexpr):
    """result + (x_tail @ w_tail).T, of the stages behind those of codes."""
    xs, ws, full, free = ring
    for _ in range(0, T, w_tail.block_type.shape[0]):
        mbarrier.wait(full.index(index), phase)
        x_stage = xs.index(index)._reinterpret(x_tail.dtype, x_tail.block_type.shape, x_tail.layout)
        w_stage = ws.index(index)._reinterpret(w_tail.dtype, w_tail.block_type.shape, w_tail.layout)
        result = warpgroup_mma(w_stage.permute((1, 0)), x_stage.permute((1, 0)), result, is_async=True)
        result = warpgroup_mma_wait(num_outstanding=0, deps=(result,))
        mbarrier.arrive(free.index(index), count=1)
        index, phase = next_stage(index, phase, STAGES)
    return result, index, phase


@gluon.jit
def _store(result, y, bias, residual, stride_residual, n, m, M, N):
    """Add bias and residual, and write a tile [channels, tokens] of y.T, whose channels lie side by side."""
    ACROSS: gl.constexpr = result.shape[0] // 8
    lines: gl.constexpr = gl.BlockedLayout([8, 1], [ACROSS, 32 // ACROSS], [1, 4], [0, 1])
    result = gl.convert_layout(result, lines)
    channels = n + gl.arange(0, result.shape[0], gl.SliceLayout(1, lines))
    tokens = m + gl.arange(0, result.shape[1], gl.SliceLayout(0, lines))
    is_channel, is_token = channels < N, tokens < M
    inside = gl.expand_dims(is_channel, 1) & gl.expand_dims(is_token, 0)
    tokens = tokens.to(gl.int64)
    if bias is not None:
        result += gl.expand_dims(gl.load(bias + channels, mask=is_channel, other=0.0).to(gl.float32), 1)
    if residual is not None:
        at = gl.expand_dims(residual + tokens * stride_residual, 0) + gl.expand_dims(channels, 1)
        result += gl.load(at, mask=inside, other=0.0).to(gl.float32)
    to = gl.expand_dims(y + tokens * N, 0) + gl.expand_dims(channels, 1)
    gl.store(to, result.to(y.dtype.element_ty), mask=inside)


@gluon.jit
def _multiply_all(ring, y, x_tail, w_tail, vectors, residual, sizes, steps, STAGES: gl.constexpr):
    xs, ws, full, free = ring
    scale_x, scale_w, zero, sum_w, bias = vectors
    M, N, K, T = sizes
    step_scale, step_zero, stride_residual = steps
    TOKENS: gl.constexpr = xs.shape[1]
    CHANNELS: gl.constexpr = ws.shape[1]
    DEPTH: gl.constexpr = ws.shape[2]
    SUM: gl.constexpr = gl.int32 if xs.dtype == gl.int8 else gl.float32
    codes: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TOKENS, 32])
    floats: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TOKENS, 16])
    tiles_m = gl.cdiv(M, TOKENS)
    gdc_wait()
    index, phase = gl.to_tensor(0), gl.to_tensor(0)
    for tile in range(gl.program_id(0), tiles_m * gl.cdiv(N, CHANNELS), gl.num_programs(0)):
        m, n = tile % tiles_m * TOKENS, tile // tiles_m * CHANNELS
        channels = n + gl.arange(0, CHANNELS, gl.SliceLayout(1, codes))
        tokens = m + gl.arange(0, TOKENS, gl.SliceLayout(0, codes))
        is_channel, is_token = channels < N, tokens < M
        # asked for before the products, which they do not delay
        scale = gl.load(scale_x + tokens * step_scale, mask=is_token, other=0.0)
        channel_scale = gl.load(scale_w + channels, mask=is_channel, other=0.0)
        sums = gl.zeros((CHANNELS, TOKENS), SUM, codes)
        for k in range(0, K, DEPTH):
            mbarrier.wait(full.index(index), phase)
            sums = warpgroup_mma(ws.index(index), xs.index(index).permute((1, 0)), sums, is_async=True)
            # the product before this one is done, and its stage is free
            sums = warpgroup_mma_wait(num_outstanding=1, deps=(sums,))
            mbarrier.arrive(free.index(gl.where(index == 0, STAGES, index) - 1), count=1, pred=k > 0)
            index, phase = next_stage(index, phase, STAGES)
        sums = warpgroup_mma_wait(num_outstanding=0, deps=(sums,))
        mbarrier.arrive(free.index(gl.where(index == 0, STAGES, index) - 1), count=1)
        if zero is not None:
            zeros = gl.load(zero + tokens * step_zero, mask=is_token, other=0.0).to(gl.int32) - OFFSET
            sums -= gl.expand_dims(gl.load(sum_w + channels, mask=is_channel, other=0), 1) * gl.expand_dims(zeros, 0)
        result = sums.to(gl.float32) * (gl.expand_dims(scale, 0) * gl.expand_dims(channel_scale, 1))
        if x_tail is not None:
            result = gl.convert_layout(result, floats, assert_trivial=True)
            result, index, phase = _add_tail(result, x_tail, w_tail, ring, index, phase, T, STAGES)
        _store(result, y, bias, residual, stride_residual, n, m, M, N)


@gluon.jit(do_not_specialize=["M"])
def ring_kernel(
    x, w, y, x_tail, w_tail, scale_x, scale_w, zero, sum_w, bias, residual, M, N, K, T,
    stride_residual, step_scale, step_zero, STAGES: gl.constexpr, COPYING: gl.constexpr,
):  # fmt: skip
    """Programs walk over tiles [channels, tokens] of y.T."""
    # Triton's compiler knows no starred values
    xs = gl.allocate_shared_memory(x.dtype, [STAGES] + x.block_type.shape, x.layout)
    ws = gl.allocate_shared_memory(w.dtype, [STAGES] + w.block_type.shape, w.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(free.index(i), count=1)
    fence_async_shared()
    ring = (xs, ws, full, free)
    vectors = (scale_x, scale_w, zero, sum_w, bias)
    sizes = (M, N, K, T)
    steps = (step_scale, step_zero, stride_residual)
    # tuples of constants must not be named, which would make them values of the kernel
    gl.warp_specialize(
        [
            (_multiply_all, (ring, y, x_tail, w_tail, vectors, residual, sizes, steps, STAGES)),
            (_copy_all, (x, w, x_tail, w_tail, ring, sizes, STAGES)),
        ],
        [1],
        # registers a thread; the first group gets what is left
        [COPYING],
    )


def why_not(o: Operands) -> str | None:
    """None if this kernel can multiply `o`, else the reason."""
    if o.is_made:
        return "the weight is made by the kernel before, and would be read too soon"
    if not can_describe(*(t for t in (o.x, o.w, o.x_tail, o.w_tail) if t is not None)):
        return f"rows of codes or of the tail are not multiples of 16 bytes, at K={o.x.shape[1]}"
    if o.x_tail is not None and o.x_tail.element_size() != 2:
        return f"the tail is {o.x_tail.dtype}, not of 16 bits"
    return None


def options(tiles: RingTiles) -> dict[str, int]:
    """For Triton's compiler."""
    return {"num_warps": 4, "maxnreg": LAUNCHED[tiles.resident]}


def matmul(o: Operands, tiles: RingTiles) -> Tensor:
    """y [M, N] in o.dtype, where `why_not` has no objection."""
    (M, K), N = o.x.shape, o.w.shape[0]
    y = torch.empty(M, N, dtype=o.dtype, device=o.x.device)
    if M == 0:
        return y
    programs = triton.cdiv(M, tiles.tokens) * triton.cdiv(N, tiles.channels)
    matrices = (
        described(o.x, [tiles.tokens, ROW]),
        described(o.w, [tiles.channels, ROW]),
        y,
        None if o.x_tail is None else described(o.x_tail, [tiles.tokens, ROW // 2]),
        None if o.w_tail is None else described(o.w_tail, [ROW // 2, tiles.channels]),
    )
    tail = 0 if o.w_tail is None else o.w_tail.shape[0]
    steps = (row_stride(o.residual), step(o.scale_x), 0 if o.zero is None else step(o.zero))
    launch(
        ring_kernel,
        (min(programs, processors_of(o.x.device) * tiles.resident), 1, 1),
        (*matrices, o.scale_x, o.scale_w, o.zero, o.sum_w, o.bias, o.residual, M, N, K, tail, *steps),
        {"STAGES": tiles.stages, "COPYING": COPYING},
        **options(tiles),
        # each operation rounds by itself, as it does in the oracle
        enable_fp_fusion=False,
        launch_pdl=True,
    )
    return y
