"""Weights of 2 to 8 bits on Hopper's wgmma: y[M, N] = x[M, K] @ dequantized(codes[N, K]).T + bias, x of 16 bits.

Operands are swapped: the weight is the first operand, out of registers, and x the second, out of shared memory, where
TMA puts it. Words go from memory to registers in the order of the tensor cores (`widths`) and become exactly the
dequantized weight in the dtype of x: (n - zero) * scale, rounded once. While a product runs, the next operand is
unpacked. Programs walk over tiles in groups of rows of x, so that what they read stays in the L2 cache; where tiles are
few, K is cut into slices, which `add_parts` adds in a fixed order.
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

from qcompile.backends.triton.add_parts import add_parts
from qcompile.backends.triton.descriptors import described
from qcompile.backends.triton.launch import launch
from qcompile.backends.triton.table import processors_of
from qcompile.backends.triton.width_loads import (
    by_rows,
    is_bytes,
    load_run,
    load_table,
    load_words,
    scales_by_rows,
    spread,
)
from qcompile.backends.triton.width_table import ManyRows, Member
from qcompile.backends.triton.width_tiles import scale_of, weight_operand

# columns of x in one stage: a row of them is the 128 bytes of the widest swizzle
STAGE = 64
# tiles of rows of x that programs share while they walk along N
TILES_IN_GROUP = 16


@gluon.jit
def _tile(item, tiles_n, tiles_m, GROUP: gl.constexpr):
    """The tile of N and of M of an item: M runs fastest, within groups of its tiles."""
    group = item // (GROUP * tiles_n)
    inside = item % (GROUP * tiles_n)
    height = gl.minimum(tiles_m - group * GROUP, GROUP)
    return inside // height, group * GROUP + inside % height


@gluon.jit
def many_rows_kernel(
    x_desc,
    y_desc,
    words_ptr,
    scales_ptr,
    levels_ptr,
    bias_ptr,
    parts_ptr,
    M,
    N,
    B,
    tiles_n,
    tiles_m,
    ROWS_OF_X: gl.constexpr,
    UNITS: gl.constexpr,
    STEPS: gl.constexpr,
    STAGES: gl.constexpr,
    PENDING: gl.constexpr,
    BLOCKS: gl.constexpr,
    PARTS: gl.constexpr,
    WIDTH: gl.constexpr,
    GROUPS: gl.constexpr,
    WIDE: gl.constexpr,
    ZERO: gl.constexpr,
    BIAS: gl.constexpr,
    GROUP: gl.constexpr,
    DEPENDENT: gl.constexpr,
):
    """Items pid, pid + programs, ...: each a tile on a slice of BLOCKS blocks of K."""
    W: gl.constexpr = gl.num_warps()
    TILE: gl.constexpr = 64 * UNITS
    dtype: gl.constexpr = x_desc.dtype
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [W, 1], [16, ROWS_OF_X, 16])
    BYTES: gl.constexpr = ROWS_OF_X * 128
    HALF: gl.constexpr = STEPS // 2
    item = gl.program_id(0)
    programs = gl.num_programs(0)
    items = tiles_n * tiles_m * PARTS
    total = ((items - item + programs - 1) // programs) * BLOCKS
    stages = total * 2

    xs = gl.allocate_shared_memory(dtype, [STAGES, ROWS_OF_X, 64], x_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
    fence_async_shared()
    table = by_rows(load_table(levels_ptr, UNITS, WIDTH), UNITS)
    gl.thread_barrier()

    tile_n, tile_m = _tile(item // PARTS, tiles_n, tiles_m, GROUP)
    block = 0
    # past the end of K the last block again, against zeros of x
    unit = (tile_n * UNITS).to(gl.int64)
    at = gl.minimum((item % PARTS) * BLOCKS, B - 1)
    loaded = load_words(words_ptr, unit * B + at, B, UNITS, WIDTH)
    words = by_rows(spread(loaded, WIDTH), UNITS)
    layout: gl.constexpr = words[0].type.layout
    # a row with one scale is multiplied by it at the end
    SCALED: gl.constexpr = GROUPS > 0
    PARTS_OF_TILE: gl.constexpr = 4 * UNITS
    scales, zeros = scales_by_rows(scales_ptr, unit, at, B, UNITS, GROUPS, WIDE, ZERO, layout)
    if DEPENDENT:
        gdc_wait()
        gdc_launch_dependents()

    # the next stage of x to ask for
    ahead = item
    x_row = tile_m * ROWS_OF_X
    x_column = (item % PARTS) * (BLOCKS * 128)
    x_end = x_column + BLOCKS * 128
    for i in gl.static_range(STAGES):
        wanted = i < stages
        mbarrier.expect(full.index(i), BYTES, pred=wanted)
        tma.async_copy_global_to_shared(x_desc, [x_row, x_column], full.index(i), xs.index(i), pred=wanted)
        x_column += 64
        if x_column == x_end:
            ahead += programs
            _, ahead_m = _tile(ahead // PARTS, tiles_n, tiles_m, GROUP)
            x_row = ahead_m * ROWS_OF_X
            x_column = (ahead % PARTS) * (BLOCKS * 128)
            x_end = x_column + BLOCKS * 128

    weight = weight_operand(
        words, table, scales[0], zeros[0], 0, STEPS, PARTS_OF_TILE, mma, WIDTH, SCALED, WIDE, ZERO, dtype
    )
    flying = weight
    acc = gl.zeros([TILE, ROWS_OF_X], gl.float32, layout=mma)
    for it in range(0, total):
        next_block = block + 1
        next_item = item
        next_n = tile_n
        next_m = tile_m
        if next_block == BLOCKS:
            next_block = 0
            next_item = item + programs
            next_n, next_m = _tile(gl.minimum(next_item, items - 1) // PARTS, tiles_n, tiles_m, GROUP)
        next_at = gl.minimum((gl.minimum(next_item, items - 1) % PARTS) * BLOCKS + next_block, B - 1)
        unit = (next_n * UNITS).to(gl.int64)
        words = by_rows(spread(loaded, WIDTH), UNITS)
        # of two runs of words, each takes the registers of the one before it as soon as that is unpacked
        RUNS: gl.constexpr = is_bytes(WIDTH)
        if not RUNS:
            next_loaded = load_words(words_ptr, unit * B + next_at, B, UNITS, WIDTH)
            next_words = by_rows(spread(next_loaded, WIDTH), UNITS)
        if SCALED or ZERO:
            next_scales, next_zeros = scales_by_rows(scales_ptr, unit, next_at, B, UNITS, GROUPS, WIDE, ZERO, layout)
        else:
            next_scales = scales
            next_zeros = zeros
        for step in gl.static_range(STEPS):
            stage = it * 2 + step // HALF
            if step % HALF == 0:
                mbarrier.wait(full.index(stage % STAGES), (stage // STAGES) & 1)
            x = xs.index(stage % STAGES).slice((step % HALF) * (128 // STEPS), 128 // STEPS, dim=1).permute((1, 0))
            acc = warpgroup_mma(weight, x, acc, use_acc=(block > 0) | (step > 0), is_async=True)
            if PENDING == 1:
                # the product before this one; this one runs while the next operand is unpacked
                acc, flying = warpgroup_mma_wait(1, deps=[acc, flying])
            if step % HALF == 0:
                # every warp is done with the stage before this one: ask for what comes into it
                gl.thread_barrier()
                before = stage - 1
                wanted = (before >= 0) & (before + STAGES < stages)
                slot = gl.maximum(before, 0) % STAGES
                mbarrier.expect(full.index(slot), BYTES, pred=wanted)
                tma.async_copy_global_to_shared(
                    x_desc, [x_row, x_column], full.index(slot), xs.index(slot), pred=wanted
                )
                if wanted:
                    x_column += 64
                    if x_column == x_end:
                        ahead += programs
                        _, ahead_m = _tile(ahead // PARTS, tiles_n, tiles_m, GROUP)
                        x_row = ahead_m * ROWS_OF_X
                        x_column = (ahead % PARTS) * (BLOCKS * 128)
                        x_end = x_column + BLOCKS * 128
            flying = weight
            if step < STEPS - 1:
                group_scales = scales[(step + 1) * GROUPS // STEPS]
                group_zeros = zeros[(step + 1) * GROUPS // STEPS]
                weight = weight_operand(
                    words, table, group_scales, group_zeros, step + 1, STEPS, PARTS_OF_TILE, mma,
                    WIDTH, SCALED, WIDE, ZERO, dtype,
                )  # fmt: skip
            else:
                weight = weight_operand(
                    next_words, table, next_scales[0], next_zeros[0], 0, STEPS, PARTS_OF_TILE, mma,
                    WIDTH, SCALED, WIDE, ZERO, dtype,
                )  # fmt: skip
            if RUNS and step == 0:
                first = load_run(words_ptr, unit * B + next_at, B, UNITS, WIDTH, 0)
                next_words = by_rows((first, first), UNITS)
            if RUNS and step == STEPS - 2:
                next_loaded = (first, load_run(words_ptr, unit * B + next_at, B, UNITS, WIDTH, 1))
            if PENDING == 0:
                acc, flying, weight = warpgroup_mma_wait(0, deps=[acc, flying, weight])
        if next_block == 0:
            acc, flying = warpgroup_mma_wait(0, deps=[acc, flying])
            rows: gl.constexpr = gl.SliceLayout(1, mma)
            n = tile_n * TILE + gl.arange(0, TILE, layout=rows)
            if not SCALED:
                unit = (tile_n * UNITS).to(gl.int64)
                found, _ = scales_by_rows(scales_ptr, unit, 0, B, UNITS, GROUPS, WIDE, ZERO, layout)
                scale = gl.convert_layout(gl.reshape(scale_of(found[0], WIDE), [TILE]), rows, assert_trivial=True)
                y = acc * scale[:, None]
            else:
                y = acc
            if PARTS > 1:
                m = tile_m * ROWS_OF_X + gl.arange(0, ROWS_OF_X, layout=gl.SliceLayout(0, mma))
                to = ((item % PARTS) * M + m).to(gl.int64)[None, :] * N + n[:, None]
                gl.store(parts_ptr + to, y, mask=(n[:, None] < N) & (m[None, :] < M))
            else:
                if BIAS:
                    y += gl.load(bias_ptr + n, mask=n < N, other=0.0).to(gl.float32)[:, None]
                ys = gl.allocate_shared_memory(dtype, [ROWS_OF_X, TILE], y_desc.layout)
                tma.store_wait(0)
                gl.thread_barrier()
                ys.permute((1, 0)).store(y.to(dtype))
                fence_async_shared()
                gl.thread_barrier()
                tma.async_copy_shared_to_global(y_desc, [tile_m * ROWS_OF_X, tile_n * TILE], ys)
        item = next_item
        tile_n = next_n
        tile_m = next_m
        block = next_block
        loaded = next_loaded
        scales = next_scales
        zeros = next_zeros
    tma.store_wait(0)


def many_rows(x: Tensor, member: Member[ManyRows], bias: Tensor | None, y: Tensor) -> None:
    """Write y [M, N] for contiguous x [M, K], M >= 1, and a weight whose scales, if many a row, x's dtype can hold.

    y: its rows start at multiples of 16 bytes.
    """
    (M, N), weight, config = y.shape, member.weight, member.config
    units, B = weight.words.shape[:2]
    tile = 64 * config.units
    tiles_n, tiles_m = units // config.units, triton.cdiv(M, config.rows)
    programs = processors_of(x.device) * config.resident
    parts = max(1, min(config.slices, B, programs // (tiles_n * tiles_m)))
    blocks = triton.cdiv(B, parts)
    parts = triton.cdiv(B, blocks)
    to = y if parts == 1 else x.new_empty(parts, M, N, dtype=torch.float32)
    descriptors = (described(x, [config.rows, STAGE]), described(y, [config.rows, tile]))
    levels = weight.words if weight.levels is None else weight.levels
    pointers = (weight.words, weight.scales, levels, x if bias is None else bias, to)
    launch(
        many_rows_kernel,
        (min(programs, tiles_n * tiles_m * parts), 1, 1),
        (*descriptors, *pointers, M, N, B, tiles_n, tiles_m),
        {
            "ROWS_OF_X": config.rows,
            "UNITS": config.units,
            "STEPS": max(config.steps, weight.groups),
            "STAGES": config.stages,
            # measured: with slices the accumulators of a product in flight are copied, which costs more than it hides
            "PENDING": 1 if parts == 1 else 0,
            "BLOCKS": blocks,
            "PARTS": parts,
            "WIDTH": weight.width,
            "GROUPS": weight.groups,
            "WIDE": weight.wide,
            "ZERO": weight.zero,
            "BIAS": bias is not None,
            "GROUP": TILES_IN_GROUP,
            "DEPENDENT": True,
        },
        num_warps=config.warps,
        launch_pdl=True,
    )
    if parts > 1:
        add_parts(to, bias, y)
