"""Matmul of int8 codes for many rows on Hopper (sm_90), with the dequantization in the epilogue.

    y = (x - zero) @ w.T * (scale_x * scale_w) + x_tail @ w_tail + bias + residual

Operands as in `eight_bit`. One warp copies tiles of x and w into a ring in shared memory (TMA); two groups of four
warps multiply them (IGMMA), each `tokens` rows of a tile of 2 * tokens rows and `channels` columns. Every program stays
and takes tile after tile, so that the ring is full again when an epilogue ends. The 16-bit tail is more steps through
the same ring: 64 of its columns take the room of 128 codes; they are added to the scaled sums where these stand.

Written in Gluon, because Triton 3.6 specializes no warps on Hopper, and waits for the ring once a tile: 1510 us against
1190 us at M, N, K = 8192, 28672, 4096 on one H200 (floor 970, `torch._int_mm` alone 2110).
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

from qcompile.backends.triton.descriptors import described
from qcompile.backends.triton.eight_bit import Operands, can_describe, row_stride, step
from qcompile.backends.triton.eight_bit_table import HopperTiles
from qcompile.backends.triton.items import next_stage
from qcompile.backends.triton.launch import launch
from qcompile.backends.triton.table import processors_of

# groups of four warps that multiply; the kernel names two
GROUPS = 2
# bytes of a row of x in the ring, the widest swizzle of shared memory
ROW = 128
# the widest int8 instruction that Triton emits
WIDEST = gl.constexpr(128)
OFFSET = gl.constexpr(128)
# rows of tiles that walk the columns together, so that they share their weights in L2
ROWS_OF_TILES = 8
# bytes of shared memory for one group's part of y on its way out
STORE = 16384


@gluon.jit
def _place(tile, tiles_m, tiles_n, ROWS: gl.constexpr):
    """Row and column of a tile: ROWS rows of tiles walk the columns together."""
    band = ROWS * tiles_n
    first = tile // band * ROWS
    height = min(tiles_m - first, ROWS)
    return first + tile % band % height, tile % band // height


@gluon.jit
def _copy(x, w, ring, index, phase, m, k, w_at, GROUPS: gl.constexpr):
    """Fill one stage of the ring: columns k and on of the rows m and on of x; of w, what stands at `w_at`."""
    xs, ws, full, free = ring
    mbarrier.wait(free.index(index), phase)
    bar = full.index(index)
    mbarrier.expect(bar, GROUPS * x.block_type.nbytes + w.block_type.nbytes)
    w_stage = ws.index(index)._reinterpret(w.dtype, w.block_type.shape, w.layout)
    tma.async_copy_global_to_shared(w, w_at, bar, w_stage)
    for group in gl.static_range(GROUPS):
        x_stage = xs.index(index * GROUPS + group)._reinterpret(x.dtype, x.block_type.shape, x.layout)
        tma.async_copy_global_to_shared(x, [m + group * x.block_type.shape[0], k], bar, x_stage)


@gluon.jit
def _copy_all(
    x, w, x_tail, w_tail, ring, sizes, GROUPS: gl.constexpr, STAGES: gl.constexpr, ROWS: gl.constexpr
):  # fmt: skip
    M, N, K, T = sizes
    TOKENS: gl.constexpr = GROUPS * x.block_type.shape[0]
    CHANNELS: gl.constexpr = w.block_type.shape[0]
    DEPTH: gl.constexpr = w.block_type.shape[1]
    tiles_m, tiles_n = gl.cdiv(M, TOKENS), gl.cdiv(N, CHANNELS)
    index, phase = gl.to_tensor(0), gl.to_tensor(1)
    for tile in range(gl.program_id(0), tiles_m * tiles_n, gl.num_programs(0)):
        row, column = _place(tile, tiles_m, tiles_n, ROWS)
        m, n = row * TOKENS, column * CHANNELS
        for k in range(0, K, DEPTH):
            _copy(x, w, ring, index, phase, m, k, [n, k], GROUPS)
            index, phase = next_stage(index, phase, STAGES)
        if x_tail is not None:
            for t in range(0, T, w_tail.block_type.shape[0]):
                _copy(x_tail, w_tail, ring, index, phase, m, t, [t, n], GROUPS)
                index, phase = next_stage(index, phase, STAGES)


@gluon.jit
def _store(result, y, y_stage, bias, residual, stride_residual, m, n, M, N):
    """Add bias and residual, and write a group's part of y; halved until it fits its shared memory and registers."""
    TOKENS: gl.constexpr = result.shape[0]
    CHANNELS: gl.constexpr = result.shape[1]
    if y_stage.shape[1] < CHANNELS:
        left, right = result.reshape((TOKENS, 2, CHANNELS // 2)).permute((0, 2, 1)).split()
        _store(left, y, y_stage, bias, residual, stride_residual, m, n, M, N)
        _store(right, y, y_stage, bias, residual, stride_residual, m, n + CHANNELS // 2, M, N)
    else:
        channels = n + gl.arange(0, CHANNELS, gl.SliceLayout(0, result.type.layout))
        if bias is not None:
            channel_bias = gl.load(bias + channels, mask=channels < N, other=0.0)
            result += gl.expand_dims(channel_bias.to(gl.float32), 0)
        if residual is not None:
            tokens = m + gl.arange(0, TOKENS, gl.SliceLayout(1, result.type.layout))
            rows = gl.expand_dims(residual + tokens.to(gl.int64) * stride_residual, 1)
            inside = gl.expand_dims(tokens < M, 1) & gl.expand_dims(channels < N, 0)
            result += gl.load(rows + gl.expand_dims(channels, 0), mask=inside, other=0.0).to(gl.float32)
        tma.store_wait(pendings=0)
        y_stage.store(result.to(y.dtype))
        fence_async_shared()
        tma.async_copy_shared_to_global(y, [m, n], y_stage)


@gluon.jit
def _multiply_all(
    GROUP: gl.constexpr, ring, y_stage, y, x_tail, w_tail, vectors, residual, sizes, steps,
    GROUPS: gl.constexpr, STAGES: gl.constexpr, ROWS: gl.constexpr,
):  # fmt: skip
    xs, ws, full, free = ring
    scale_x, scale_w, zero, sum_w, bias = vectors
    M, N, K, T = sizes
    step_scale, step_zero, stride_residual = steps
    TOKENS: gl.constexpr = xs.shape[1]
    CHANNELS: gl.constexpr = ws.shape[1]
    DEPTH: gl.constexpr = ws.shape[2]
    WIDTH: gl.constexpr = CHANNELS if CHANNELS < WIDEST else WIDEST
    integers: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, WIDTH, 32]
    )
    floats: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, WIDTH, 16])
    tiles_m, tiles_n = gl.cdiv(M, GROUPS * TOKENS), gl.cdiv(N, CHANNELS)
    index, phase = gl.to_tensor(0), gl.to_tensor(0)
    for tile in range(gl.program_id(0), tiles_m * tiles_n, gl.num_programs(0)):
        row, column = _place(tile, tiles_m, tiles_n, ROWS)
        m, n = (row * GROUPS + GROUP) * TOKENS, column * CHANNELS
        sums = gl.zeros((TOKENS, CHANNELS), gl.int32, integers)
        for k in range(0, K, DEPTH):
            mbarrier.wait(full.index(index), phase)
            x_stage, w_stage = xs.index(index * GROUPS + GROUP), ws.index(index)
            sums = warpgroup_mma(x_stage, w_stage.permute((1, 0)), sums, is_async=True)
            # the product before this one is done, and its stage is free
            sums = warpgroup_mma_wait(num_outstanding=1, deps=(sums,))
            mbarrier.arrive(free.index(gl.where(index == 0, STAGES, index) - 1), count=1, pred=k > 0)
            index, phase = next_stage(index, phase, STAGES)
        tokens = m + gl.arange(0, TOKENS, gl.SliceLayout(1, integers))
        channels = n + gl.arange(0, CHANNELS, gl.SliceLayout(0, integers))
        is_token, is_channel = tokens < M, channels < N
        # read while the last product is made
        token_scale = gl.load(scale_x + tokens * step_scale, mask=is_token, other=0.0)
        channel_scale = gl.load(scale_w + channels, mask=is_channel, other=0.0)
        sums = warpgroup_mma_wait(num_outstanding=0, deps=(sums,))
        mbarrier.arrive(free.index(gl.where(index == 0, STAGES, index) - 1), count=1)
        if zero is not None:
            zeros = gl.load(zero + tokens * step_zero, mask=is_token, other=0.0).to(gl.int32) - OFFSET
            sum_channels = gl.load(sum_w + channels, mask=is_channel, other=0)
            sums -= gl.expand_dims(zeros, 1) * gl.expand_dims(sum_channels, 0)
        result = sums.to(gl.float32) * (gl.expand_dims(token_scale, 1) * gl.expand_dims(channel_scale, 0))
        if x_tail is not None:
            result = gl.convert_layout(result, floats, assert_trivial=True)
            for _ in range(0, T, w_tail.block_type.shape[0]):
                mbarrier.wait(full.index(index), phase)
                x_stage = xs.index(index * GROUPS + GROUP)._reinterpret(
                    x_tail.dtype, x_tail.block_type.shape, x_tail.layout
                )
                w_stage = ws.index(index)._reinterpret(w_tail.dtype, w_tail.block_type.shape, w_tail.layout)
                result = warpgroup_mma(x_stage, w_stage, result, is_async=True)
                result = warpgroup_mma_wait(num_outstanding=0, deps=(result,))
                mbarrier.arrive(free.index(index), count=1)
                index, phase = next_stage(index, phase, STAGES)
            result = gl.convert_layout(result, integers, assert_trivial=True)
        _store(result, y, y_stage, bias, residual, stride_residual, m, n, M, N)
    tma.store_wait(pendings=0)


@gluon.jit(do_not_specialize=["M"])
def hopper_kernel(
    x, w, y, x_tail, w_tail, scale_x, scale_w, zero, sum_w, bias, residual, M, N, K, T,
    stride_residual, step_scale, step_zero, GROUPS: gl.constexpr, STAGES: gl.constexpr, ROWS: gl.constexpr,
):  # fmt: skip
    # Triton's compiler knows no starred values
    xs = gl.allocate_shared_memory(x.dtype, [STAGES * GROUPS] + x.block_type.shape, x.layout)
    ws = gl.allocate_shared_memory(w.dtype, [STAGES] + w.block_type.shape, w.layout)
    ys = gl.allocate_shared_memory(y.dtype, [GROUPS] + y.block_type.shape, y.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(free.index(i), count=GROUPS)
    fence_async_shared()
    ring = (xs, ws, full, free)
    vectors = (scale_x, scale_w, zero, sum_w, bias)
    sizes = (M, N, K, T)
    steps = (step_scale, step_zero, stride_residual)
    # tuples of constants must not be named, which would make them values of the kernel
    gl.warp_specialize(
        [
            (
                _multiply_all,
                (0, ring, ys.index(0), y, x_tail, w_tail, vectors, residual, sizes, steps, GROUPS, STAGES, ROWS),
            ),
            (
                _multiply_all,
                (1, ring, ys.index(1), y, x_tail, w_tail, vectors, residual, sizes, steps, GROUPS, STAGES, ROWS),
            ),
            (_copy_all, (x, w, x_tail, w_tail, ring, sizes, GROUPS, STAGES, ROWS)),
        ],
        [4, 1],
        # registers a thread; the first group gets what is left
        [232, 40],
    )


def why_not(o: Operands) -> str | None:
    """None if this kernel can multiply `o`, else the reason."""
    if not can_describe(*(t for t in (o.x, o.w, o.x_tail, o.w_tail) if t is not None)):
        return f"rows of codes or of the tail are not multiples of 16 bytes, at K={o.x.shape[1]}"
    if o.w.shape[0] * o.dtype.itemsize % 16:
        return f"rows of y are not multiples of 16 bytes, at N={o.w.shape[0]}"
    if o.x_tail is not None and o.x_tail.element_size() != 2:
        return f"the tail is {o.x_tail.dtype}, not of 16 bits"
    return None


def matmul(o: Operands, tiles: HopperTiles) -> Tensor:
    """y [M, N] in o.dtype, where `why_not` has no objection."""
    (M, K), N = o.x.shape, o.w.shape[0]
    y = torch.empty(M, N, dtype=o.dtype, device=o.x.device)
    if M == 0:
        return y
    store = min(tiles.channels, STORE // tiles.tokens // o.dtype.itemsize)
    programs = triton.cdiv(M, GROUPS * tiles.tokens) * triton.cdiv(N, tiles.channels)
    matrices = (
        described(o.x, [tiles.tokens, ROW]),
        described(o.w, [tiles.channels, ROW]),
        described(y, [tiles.tokens, store]),
        None if o.x_tail is None else described(o.x_tail, [tiles.tokens, ROW // 2]),
        None if o.w_tail is None else described(o.w_tail, [ROW // 2, tiles.channels]),
    )
    tail = 0 if o.w_tail is None else o.w_tail.shape[0]
    steps = (row_stride(o.residual), step(o.scale_x), 0 if o.zero is None else step(o.zero))
    launch(
        hopper_kernel,
        (min(programs, processors_of(o.x.device)), 1, 1),
        (*matrices, o.scale_x, o.scale_w, o.zero, o.sum_w, o.bias, o.residual, M, N, K, tail, *steps),
        {"GROUPS": GROUPS, "STAGES": tiles.stages, "ROWS": ROWS_OF_TILES},
        num_warps=4,
        enable_fp_fusion=False,
    )
    return y
