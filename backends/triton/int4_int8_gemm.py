"""W4A8 on Hopper's wgmma: y[M, N] = dequantized(codes of x)[M, K] @ dequantized(codes[N, K]).T + bias.

    y = scale_x * (sum over groups g of scale[n, g] * dot_g(x, code - zero) - (zero_x - 128) * sums[n]) + bias

Operands are swapped: the weight is the first operand, out of registers, and x the second, out of shared memory. One
warp copies x, words and scales into a ring in shared memory (TMA); two groups of four warps unpack words to the bytes
code - zero, each for 64 rows of the weight, and multiply. A product of one group of K and at most 64 rows of x is exact
in int32; while the next one runs it is scaled and added, in float32 and in the order of the groups. Programs walk over
items: a tile of y on a slice of K, of which there are several where tiles are few.
"""

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

from qcompile.backends.triton.int4_int8_tiles import add, operands, take, unpacked
from qcompile.backends.triton.items import next_stage, place_of

# between the uint8 codes that `zero` counts from and the int8 codes of x
OFFSET = gl.constexpr(128.0)


@gluon.jit
def _copy_weight(w, s, ring, index, unit, block, B, wanted, UNITS: gl.constexpr, PIECES: gl.constexpr):
    """Ask for words and scales of a stage, and let its barrier wait for them and for x."""
    xs, ws, ss, full, _free = ring
    bar = full.index(index)
    BYTES: gl.constexpr = UNITS * (w.block_type.nbytes + s.block_type.nbytes)
    mbarrier.expect(bar, BYTES + PIECES * xs.shape[1] * xs.shape[2], pred=wanted)
    for u in gl.static_range(UNITS):
        at = (unit + u) * B + block
        tma.async_copy_global_to_shared(
            w, [at * w.block_type.shape[0], 0], bar, ws.index(index * UNITS + u), pred=wanted
        )
        tma.async_copy_global_to_shared(
            s, [at * s.block_type.shape[0], 0], bar, ss.index(index * UNITS + u), pred=wanted
        )


@gluon.jit
def _copy_all(
    x, w, s, ring, shape, UNITS: gl.constexpr, PIECES: gl.constexpr, STAGES: gl.constexpr, ROWS: gl.constexpr
):  # fmt: skip
    xs, _ws, _ss, full, free = ring
    tiles_m, tiles_n, parts, _blocks, B = shape
    items = tiles_m * tiles_n * parts
    row, column, first, end = place_of(gl.program_id(0), shape, ROWS)
    # weights never change, so that they need not wait for the kernel before
    early = gl.minimum(end - first, STAGES)
    for i in range(0, early):
        _copy_weight(w, s, ring, i, column * UNITS, first + i, B, True, UNITS, PIECES)
    gdc_wait()
    gdc_launch_dependents()
    index, phase = gl.to_tensor(0), gl.to_tensor(1)
    done = gl.to_tensor(0)
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        row, column, first, end = place_of(item, shape, ROWS)
        for block in range(first, end):
            mbarrier.wait(free.index(index), phase)
            _copy_weight(w, s, ring, index, column * UNITS, block, B, done >= early, UNITS, PIECES)
            for j in gl.static_range(PIECES):
                at = (row * PIECES + j) * x.block_type.shape[0]
                x_stage = xs.index(index * PIECES + j)
                tma.async_copy_global_to_shared(x, [at, block * x.block_type.shape[1]], full.index(index), x_stage)
            done += 1
            index, phase = next_stage(index, phase, STAGES)


@gluon.jit
def _finish(sums, vectors, first, n, m, M, N, WHOLE: gl.constexpr):
    """Scale and shift the sums [64, rows of x] of an item, and add the bias if it is the only one of its tile."""
    scale_x, step_scale, zero, step_zero, sums_w, bias = vectors
    mma: gl.constexpr = sums.type.layout
    across: gl.constexpr = gl.SliceLayout(0, mma)
    # one load a lane, and then through shared memory
    tokens = m + gl.arange(0, sums.shape[1], layout=gl.BlockedLayout([1], [32], [gl.num_warps()], [0]))
    is_token, is_channel = tokens < M, n < N
    scale = gl.load(scale_x + tokens * step_scale, mask=is_token, other=0.0)
    if zero is not None:
        zeros = gl.load(zero + tokens * step_zero, mask=is_token, other=0.0) - OFFSET
        shift = gl.load(sums_w + n, mask=is_channel & (first == 0), other=0.0)
        sums = sums - gl.expand_dims(shift, 1) * gl.expand_dims(gl.convert_layout(zeros, across), 0)
    y = sums * gl.expand_dims(gl.convert_layout(scale, across), 0)
    if WHOLE and bias is not None:
        y += gl.expand_dims(gl.load(bias + n, mask=is_channel, other=0.0).to(gl.float32), 1)
    return y


@gluon.jit
def _multiply_all(
    UNIT: gl.constexpr, ring, ys, y, parts_ptr, vectors, sizes, shape, UNITS: gl.constexpr, PIECES: gl.constexpr,
    WIDTH: gl.constexpr, STAGES: gl.constexpr, ROWS: gl.constexpr, GROUPS: gl.constexpr, WIDE: gl.constexpr,
    WHOLE: gl.constexpr, PENDING: gl.constexpr,
):  # fmt: skip
    xs, ws, ss, full, free = ring
    M, N = sizes
    tiles_m, tiles_n, parts, _blocks, _B = shape
    PIECE: gl.constexpr = xs.shape[1]
    INSIDE: gl.constexpr = PIECE // WIDTH
    # products of a block and a group
    SUBS: gl.constexpr = PIECES * INSIDE
    DEPTH: gl.constexpr = 128 // GROUPS
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH, 32])
    gdc_wait()
    index, phase = gl.to_tensor(0), gl.to_tensor(0)
    for item in range(gl.program_id(0), tiles_m * tiles_n * parts, gl.num_programs(0)):
        row, column, first, end = place_of(item, shape, ROWS)
        acc = ()
        for _ in gl.static_range(SUBS):
            acc = acc + (gl.zeros([64, WIDTH], gl.float32, layout=mma),)
        mbarrier.wait(full.index(index), phase)
        place = index * UNITS + UNIT
        words, zeros, scales = take(ws.index(place), ss.index(place), GROUPS, WIDE, mma)
        for block in range(first, end):
            low, high = unpacked(words, zeros, GROUPS)
            weight = operands(low, high, GROUPS, gl.DotOperandLayout(0, mma, 4))
            factors = scales
            next_index, next_phase = next_stage(index, phase, STAGES)
            dots = ()
            for i in gl.static_range(GROUPS * SUBS):
                x = xs.index(index * PIECES + i % SUBS // INSIDE).slice(i % INSIDE * WIDTH, WIDTH, dim=0)
                x = x.slice(i // SUBS * DEPTH, DEPTH, dim=1).permute((1, 0))
                nothing = gl.zeros([64, WIDTH], gl.int32, layout=mma)
                dot = warpgroup_mma(weight[i // SUBS], x, nothing, use_acc=False, is_async=True)
                if PENDING == 1 and i > 0:
                    # the product before this one, which runs meanwhile
                    before, dot = warpgroup_mma_wait(1, deps=[dots[i - 1], dot])
                    acc = add(acc, (i - 1) % SUBS, before, factors[(i - 1) // SUBS])
                if i == GROUPS * SUBS - 1:
                    mbarrier.wait(full.index(next_index), next_phase, pred=block + 1 < end)
                    place = next_index * UNITS + UNIT
                    words, zeros, scales = take(ws.index(place), ss.index(place), GROUPS, WIDE, mma)
                if PENDING == 0 or i == GROUPS * SUBS - 1:
                    dot = warpgroup_mma_wait(0, deps=[dot])
                    if i == GROUPS * SUBS - 1:
                        mbarrier.arrive(free.index(index), count=1)
                    acc = add(acc, i % SUBS, dot, factors[i // SUBS])
                dots = dots + (dot,)
            index = next_index
            phase = next_phase
        n = (column * UNITS + UNIT) * 64 + gl.arange(0, 64, layout=gl.SliceLayout(1, mma))
        for j in gl.static_range(SUBS):
            at = row * (SUBS * WIDTH) + j * WIDTH
            result = _finish(acc[j], vectors, first, n, at, M, N, WHOLE)
            if WHOLE:
                stage = ys.index(UNIT * 2 + j % 2)
                tma.store_wait(pendings=1)
                stage.permute((1, 0)).store(result.to(y.dtype))
                fence_async_shared()
                tma.async_copy_shared_to_global(y, [at, (column * UNITS + UNIT) * 64], stage)
            else:
                m = at + gl.arange(0, WIDTH, layout=gl.SliceLayout(0, mma))
                to = gl.expand_dims((item % parts * M + m).to(gl.int64) * N, 0) + gl.expand_dims(n, 1)
                gl.store(parts_ptr + to, result, mask=gl.expand_dims(n < N, 1) & gl.expand_dims(m < M, 0))
    tma.store_wait(pendings=0)


@gluon.jit(do_not_specialize=["M", "tiles_m", "parts", "blocks"])
def int4_int8_kernel(
    x, w, s, y, parts_ptr, scale_x, zero, sums_w, bias, M, N, B, step_scale, step_zero, tiles_m, tiles_n, parts, blocks,
    UNITS: gl.constexpr, PIECES: gl.constexpr, WIDTH: gl.constexpr, STAGES: gl.constexpr, ROWS: gl.constexpr,
    GROUPS: gl.constexpr, WIDE: gl.constexpr, WHOLE: gl.constexpr, PENDING: gl.constexpr,
    REGISTERS: gl.constexpr, COPYING: gl.constexpr,
):  # fmt: skip
    """Items pid, pid + programs, ...: each a tile on a slice of `blocks` blocks of K.

    They go to y if WHOLE, else to their part of it.
    """
    # Triton's compiler knows no starred values
    xs = gl.allocate_shared_memory(x.dtype, [STAGES * PIECES] + x.block_type.shape, x.layout)
    ws = gl.allocate_shared_memory(w.dtype, [STAGES * UNITS] + w.block_type.shape, w.layout)
    ss = gl.allocate_shared_memory(s.dtype, [STAGES * UNITS] + s.block_type.shape, s.layout)
    ys = gl.allocate_shared_memory(y.dtype, [UNITS * 2] + y.block_type.shape, y.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(free.index(i), count=UNITS)
    fence_async_shared()
    ring = (xs, ws, ss, full, free)
    vectors = (scale_x, step_scale, zero, step_zero, sums_w, bias)
    sizes = (M, N)
    shape = (tiles_m, tiles_n, parts, blocks, B)
    # tuples of constants must not be named, which would make them values of the kernel
    gl.warp_specialize(
        [
            (_multiply_all, (
                0, ring, ys, y, parts_ptr, vectors, sizes, shape,
                UNITS, PIECES, WIDTH, STAGES, ROWS, GROUPS, WIDE, WHOLE, PENDING,
            )),
            (_multiply_all, (
                1, ring, ys, y, parts_ptr, vectors, sizes, shape,
                UNITS, PIECES, WIDTH, STAGES, ROWS, GROUPS, WIDE, WHOLE, PENDING,
            )),
            (_copy_all, (x, w, s, ring, shape, UNITS, PIECES, STAGES, ROWS)),
        ],
        [4, 1],
        # registers a thread; the first group gets what is left
        [REGISTERS, COPYING],
    )  # fmt: skip
