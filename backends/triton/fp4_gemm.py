"""4-bit floats times 8-bit ones on Hopper's wgmma: y[M, N] = scale_x[m] * scale_w[n] * (x[M, K] @ w[N, K].T).

Operands are swapped: the weight is the first operand, out of registers, and x the second, out of shared memory. One
warp copies x and words of codes into a ring in shared memory (TMA); two groups of four warps move the bits of codes to
where E4M3 has them, each for 64 rows of the weight, and multiply. Where columns are lowered by octaves, codes become
numbers of E5M2, which holds what E4M3 does, none of it subnormal: exponents are subtracted from byte by byte. Of few
rows x takes the octaves, as pairs of rows (`pairs`), whose sums are added at the end. The next words are unpacked while
a product runs, and scales wait until the end. Programs walk over items: a tile of y on a slice of K, of which there are
several where tiles are few; `add_parts` adds those in a fixed order.
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

from qcompile.backends.triton.fp4_ptx import lowered_ptx, raised_over, unpack_ptx, whole_ptx
from qcompile.backends.triton.int4_int8_tiles import operands
from qcompile.backends.triton.items import next_stage, place_of
from qcompile.backends.triton.pairs import APART

SECOND = gl.constexpr(2.0**-APART)


@gluon.jit
def _copy_words(w, ring, index, unit, block, B, wanted, UNITS: gl.constexpr):
    """Ask for words of a stage, and let its barrier wait for them and for x."""
    xs, ws, full, _free = ring
    bar = full.index(index)
    mbarrier.expect(bar, UNITS * w.block_type.nbytes + xs.shape[1] * xs.shape[2], pred=wanted)
    for u in gl.static_range(UNITS):
        row = ((unit + u) * B + block) * w.block_type.shape[0]
        tma.async_copy_global_to_shared(w, [row, 0], bar, ws.index(index * UNITS + u), pred=wanted)


@gluon.jit
def _copy_all(x, w, ring, shape, UNITS: gl.constexpr, STAGES: gl.constexpr, ROWS: gl.constexpr):
    xs, _ws, full, free = ring
    tiles_m, tiles_n, parts, _blocks, B = shape
    row, column, first, end = place_of(gl.program_id(0), shape, ROWS)
    # weights never change, so that they need not wait for the kernel before
    early = gl.minimum(end - first, STAGES)
    for i in range(0, early):
        _copy_words(w, ring, i, column * UNITS, first + i, B, True, UNITS)
    gdc_wait()
    gdc_launch_dependents()
    index, phase = gl.to_tensor(0), gl.to_tensor(1)
    done = gl.to_tensor(0)
    for item in range(gl.program_id(0), tiles_m * tiles_n * parts, gl.num_programs(0)):
        row, column, first, end = place_of(item, shape, ROWS)
        for block in range(first, end):
            mbarrier.wait(free.index(index), phase)
            _copy_words(w, ring, index, column * UNITS, block, B, done >= early, UNITS)
            at = [row * x.block_type.shape[0], block * x.block_type.shape[1]]
            tma.async_copy_global_to_shared(x, at, full.index(index), xs.index(index))
            done += 1
            index, phase = next_stage(index, phase, STAGES)


@gluon.jit
def _octaves_of(octaves, block):
    """Of the columns of a block by fours, h = 0 and h = 1: two int32 [4, 4]; none where no column is lowered."""
    if octaves is None:
        return ()
    else:
        by_lanes: gl.constexpr = gl.DistributedLinearLayout(
            [[1], [2], [4]], [[8], [16], [0], [0], [0]], [[0], [0]], [], [32]
        )
        loaded = gl.load(octaves + block * 32 + gl.arange(0, 32, layout=by_lanes))
        # j h s -> j s of h = 0 and 1
        return gl.split(gl.permute(gl.reshape(loaded, [4, 2, 4]), (0, 2, 1)))


@gluon.jit
def _of_rows(octaves, words):
    """Octaves [4, 4] as those of all rows, [1, 1, 1, 4, 4], as the words lie."""
    columns: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(0, gl.SliceLayout(0, words.type.layout)))
    found = gl.convert_layout(octaves, columns, assert_trivial=True)
    return gl.expand_dims(gl.expand_dims(gl.expand_dims(found, 0), 0), 0)


@gluon.jit
def _unpacked(words, lowering, LOWERED: gl.constexpr, MANTISSA: gl.constexpr, PAIRED: gl.constexpr):
    """A block [64, 128] of the weight out of shared memory: bytes of 8-bit floats by fours, two int32 [4, 2, 8, 4, 4].

    They are floats of E4M3 or, if LOWERED, of E5M2.  PAIRED: of words as they are where columns are lowered.
    """
    by_words: gl.constexpr = gl.DistributedLinearLayout(
        [[0, 1], [0, 2], [4, 0]], [[0, 4], [0, 8], [0, 16], [1, 0], [2, 0]], [[8, 0], [16, 0]], [], [32, 32]
    )
    loaded = gl.reshape(words.load(by_words), [4, 2, 8, 4, 4])
    if LOWERED:
        low, high = lowering
        operands: gl.constexpr = "=&r,=&r,r,r,r"
        given = [loaded, _of_rows(low, loaded), _of_rows(high, loaded)]
        return gl.inline_asm_elementwise(
            lowered_ptx(MANTISSA), operands, given, dtype=(gl.int32, gl.int32), is_pure=True, pack=1
        )
    else:
        return gl.inline_asm_elementwise(
            whole_ptx(MANTISSA) if PAIRED else unpack_ptx(MANTISSA), "=&r,=&r,r", [loaded], dtype=(gl.int32, gl.int32),
            is_pure=True, pack=1,
        )  # fmt: skip


@gluon.jit
def _operand(low, high, LOWERED: gl.constexpr, mma: gl.constexpr):
    """The first operand, of what `_unpacked` gives: registers get other names."""
    (codes,) = operands(low, high, 1, gl.DotOperandLayout(0, mma, 4))
    return codes.to(gl.float8e5 if LOWERED else gl.float8e4nv, bitcast=True)


@gluon.jit
def _scaled(sums, vectors, n, m, M, N, MANTISSA: gl.constexpr, PAIRED: gl.constexpr):
    """The sums [64, rows of y] of an item, scaled."""
    ROWS: gl.constexpr = 2 if PAIRED else 1
    scale_x, step_scale, scale_w, _octaves = vectors
    mma: gl.constexpr = sums.type.layout
    across: gl.constexpr = gl.SliceLayout(0, mma)
    # one load a lane, and then through shared memory
    tokens = m * ROWS + gl.arange(0, sums.shape[1], layout=gl.BlockedLayout([1], [32], [gl.num_warps()], [0]))
    scale = gl.load(scale_x + tokens // ROWS * step_scale, mask=tokens < M * ROWS, other=0.0)
    if PAIRED:
        # scales of the weight are those of numbers at the top of E4M3
        scale *= gl.where(tokens % 2 == 0, 1.0, SECOND) * (2.0 ** raised_over(MANTISSA))
    scale = gl.convert_layout(scale, across)
    scaled = sums * (gl.expand_dims(scale, 0) * gl.expand_dims(gl.load(scale_w + n, mask=n < N, other=0.0), 1))
    if PAIRED:
        first, second = gl.split(gl.reshape(scaled, [64, sums.shape[1] // 2, 2]))
        return first + second
    else:
        return scaled


@gluon.jit
def _multiply(
    acc, low, high, index, phase, block, use_acc, end, ring, octaves, UNIT: gl.constexpr, UNITS: gl.constexpr,
    STAGES: gl.constexpr, MANTISSA: gl.constexpr, PAIRED: gl.constexpr,
):  # fmt: skip
    """Add the product of a block that is unpacked, and unpack the next one meanwhile: sums, that block, its stage."""
    xs, ws, full, free = ring
    LOWERED: gl.constexpr = octaves is not None
    mma: gl.constexpr = acc.type.layout
    x = xs.index(index).permute((1, 0))
    acc = warpgroup_mma(_operand(low, high, LOWERED, mma), x, acc, use_acc=use_acc, is_async=True)
    next_index, next_phase = next_stage(index, phase, STAGES)
    # asked for before the wait; behind the last block they are not used
    lowering = _octaves_of(octaves, gl.minimum(block + 1, end - 1))
    mbarrier.wait(full.index(next_index), next_phase, pred=block + 1 < end)
    next_low, next_high = _unpacked(ws.index(next_index * UNITS + UNIT), lowering, LOWERED, MANTISSA, PAIRED)
    # all that the product reads, and what is unpacked while it runs
    acc, low, high, next_low, next_high = warpgroup_mma_wait(0, deps=[acc, low, high, next_low, next_high])
    mbarrier.arrive(free.index(index), count=1)
    return acc, next_low, next_high, next_index, next_phase


@gluon.jit
def _multiply_all(
    UNIT: gl.constexpr, ring, ys, y, parts_ptr, vectors, sizes, shape, UNITS: gl.constexpr, STAGES: gl.constexpr,
    ROWS: gl.constexpr, MANTISSA: gl.constexpr, PAIRED: gl.constexpr, WHOLE: gl.constexpr,
):  # fmt: skip
    xs, ws, full, free = ring
    M, N = sizes
    tiles_m, tiles_n, parts, _blocks, _B = shape
    TOKENS: gl.constexpr = xs.shape[1]
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TOKENS, 32])
    octaves = vectors[3]
    LOWERED: gl.constexpr = octaves is not None
    gdc_wait()
    index, phase = gl.to_tensor(0), gl.to_tensor(0)
    for item in range(gl.program_id(0), tiles_m * tiles_n * parts, gl.num_programs(0)):
        row, column, first, end = place_of(item, shape, ROWS)
        acc = gl.zeros([64, TOKENS], gl.float32, layout=mma)
        lowering = _octaves_of(octaves, first)
        mbarrier.wait(full.index(index), phase)
        low, high = _unpacked(ws.index(index * UNITS + UNIT), lowering, LOWERED, MANTISSA, PAIRED)
        # two blocks at a time, so that the next one's registers are never copied to those of the product that runs:
        # ptxas would let no product overlap with unpacking (C7513)
        for block in range(first, end - 1, 2):
            acc, odd_low, odd_high, odd_index, odd_phase = _multiply(
                acc, low, high, index, phase, block, block > first, end, ring, octaves, UNIT, UNITS, STAGES, MANTISSA,
                PAIRED,
            )  # fmt: skip
            acc, low, high, index, phase = _multiply(
                acc, odd_low, odd_high, odd_index, odd_phase, block + 1, True, end, ring, octaves, UNIT, UNITS, STAGES,
                MANTISSA, PAIRED,
            )  # fmt: skip
        if (end - first) % 2 == 1:
            x = xs.index(index).permute((1, 0))
            acc = warpgroup_mma(_operand(low, high, LOWERED, mma), x, acc, use_acc=end - 1 > first, is_async=True)
            acc, low, high = warpgroup_mma_wait(0, deps=[acc, low, high])
            mbarrier.arrive(free.index(index), count=1)
            index, phase = next_stage(index, phase, STAGES)
        n = (column * UNITS + UNIT) * 64 + gl.arange(0, 64, layout=gl.SliceLayout(1, mma))
        m = row * (TOKENS // 2 if PAIRED else TOKENS)
        result = _scaled(acc, vectors, n, m, M, N, MANTISSA, PAIRED)
        if WHOLE:
            stage = ys.index(UNIT)
            tma.store_wait(pendings=0)
            stage.permute((1, 0)).store(result.to(y.dtype))
            fence_async_shared()
            tma.async_copy_shared_to_global(y, [m, (column * UNITS + UNIT) * 64], stage)
        else:
            by_sums: gl.constexpr = result.type.layout
            n = (column * UNITS + UNIT) * 64 + gl.arange(0, 64, layout=gl.SliceLayout(1, by_sums))
            tokens = m + gl.arange(0, result.shape[1], layout=gl.SliceLayout(0, by_sums))
            to = gl.expand_dims((item % parts * M + tokens).to(gl.int64) * N, 0) + gl.expand_dims(n, 1)
            inside = gl.expand_dims(n < N, 1) & gl.expand_dims(tokens < M, 0)
            gl.store(parts_ptr + to, result.to(parts_ptr.dtype.element_ty), mask=inside)
    tma.store_wait(pendings=0)


@gluon.jit(do_not_specialize=["M", "tiles_m", "parts", "blocks"])
def fp4_kernel(
    x, w, y, parts_ptr, scale_x, scale_w, octaves, M, N, B, step_scale, tiles_m, tiles_n, parts, blocks,
    UNITS: gl.constexpr, STAGES: gl.constexpr, ROWS: gl.constexpr, MANTISSA: gl.constexpr, PAIRED: gl.constexpr,
    WHOLE: gl.constexpr, REGISTERS: gl.constexpr, COPYING: gl.constexpr,
):  # fmt: skip
    """Items pid, pid + programs, ...: each a tile on a slice of `blocks` blocks of K.

    They go to y if WHOLE, else to their part of it.  PAIRED: x has two rows for each of y.
    """
    # Triton's compiler knows no starred values
    xs = gl.allocate_shared_memory(x.dtype, [STAGES] + x.block_type.shape, x.layout)
    ws = gl.allocate_shared_memory(w.dtype, [STAGES * UNITS] + w.block_type.shape, w.layout)
    ys = gl.allocate_shared_memory(y.dtype, [UNITS] + y.block_type.shape, y.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(free.index(i), count=UNITS)
    fence_async_shared()
    ring = (xs, ws, full, free)
    vectors = (scale_x, step_scale, scale_w, octaves)
    sizes = (M, N)
    shape = (tiles_m, tiles_n, parts, blocks, B)
    # tuples of constants must not be named, which would make them values of the kernel
    gl.warp_specialize(
        [
            (_multiply_all, (
                0, ring, ys, y, parts_ptr, vectors, sizes, shape, UNITS, STAGES, ROWS, MANTISSA, PAIRED, WHOLE,
            )),
            (_multiply_all, (
                1, ring, ys, y, parts_ptr, vectors, sizes, shape, UNITS, STAGES, ROWS, MANTISSA, PAIRED, WHOLE,
            )),
            (_copy_all, (x, w, ring, shape, UNITS, STAGES, ROWS)),
        ],
        [4, 1],
        # registers a thread; the first group gets what is left
        [REGISTERS, COPYING],
    )  # fmt: skip
