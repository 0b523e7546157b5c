"""A slice of the few rows of x in shared memory, and its sums, for the kernel of `width_few_rows`."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def take(
    xs, sums, starts, x_ptr, first, M, K, ROWS: gl.constexpr, GROUPS: gl.constexpr, SUMS: gl.constexpr,
    STARTS: gl.constexpr, OFFSET: gl.constexpr, CENTER: gl.constexpr, POWERS: gl.constexpr, CACHE: gl.constexpr,
):  # fmt: skip
    """Store the first ROWS rows of a slice of x, less POWERS, in xs [BLOCKS, ROWS_OF_X, 128].

    And of each group, in [BLOCKS * GROUPS, ROWS_OF_X], the sum if SUMS, and if STARTS what products begin at: less what
    OFFSET, that of planes, and CENTER, the code of 0, add.  CACHE: where x may come from, as of `gl.load`.
    """
    BLOCKS: gl.constexpr = xs.shape[0]
    ROWS_OF_X: gl.constexpr = xs.shape[1]
    # so many that a thread has 32 elements at once
    MOST: gl.constexpr = max(1, 8 * gl.num_warps() // ROWS)
    CHUNK: gl.constexpr = min(BLOCKS & -BLOCKS, 1 << (MOST.bit_length() - 1))
    lx: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [gl.num_warps(), 1], [1, 0])
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    if ROWS == 1:
        # where one row lies nothing is swizzled
        to = xs._reinterpret(xs.dtype, [BLOCKS, ROWS_OF_X * 128], flat).slice(0, 128, dim=1)
    else:
        to = xs._reinterpret(xs.dtype, [BLOCKS * ROWS_OF_X, 128], xs.layout)
    row = gl.arange(0, CHUNK * ROWS, layout=gl.SliceLayout(1, lx))[:, None]
    k = gl.arange(0, 128, layout=gl.SliceLayout(0, lx))[None, :]
    for i in gl.static_range(BLOCKS // CHUNK):
        m = row % ROWS
        column = (first + i * CHUNK + row // ROWS) * 128 + k
        x = gl.load(x_ptr + m * K + column, mask=(m < M) & (column < K), other=0.0, cache_modifier=CACHE)
        total = _by_group(x, CHUNK, GROUPS)
        start = total * -CENTER
        if SUMS:
            sums.slice(i * CHUNK * GROUPS, CHUNK * GROUPS, dim=0).slice(0, ROWS, dim=1).store(total)
        if POWERS != 0:
            n = 8 * (k // 8 % 2) + k // 16
            power = (gl.full([1, 128], POWERS, gl.int64, layout=lx) >> (4 * n).to(gl.int64)).to(gl.int32) & 15
            x = (x.to(gl.float32) * ((127 - power) << 23).to(gl.float32, bitcast=True)).to(x.dtype)
            total = _by_group(x, CHUNK, GROUPS)
        to.slice(i * CHUNK * ROWS, CHUNK * ROWS, dim=0).store(x)
        if STARTS:
            start -= total * OFFSET
            starts.slice(i * CHUNK * GROUPS, CHUNK * GROUPS, dim=0).slice(0, ROWS, dim=1).store(start)


@gluon.jit
def _by_group(x, BLOCKS: gl.constexpr, GROUPS: gl.constexpr):
    """Sums of x [BLOCKS * rows, 128] over each group, float32 [BLOCKS * GROUPS, rows]."""
    ROWS: gl.constexpr = x.shape[0] // BLOCKS
    total = gl.sum(gl.reshape(x.to(gl.float32), [BLOCKS, ROWS, GROUPS, 128 // GROUPS]), axis=3)
    return gl.reshape(gl.permute(total, (0, 2, 1)), [BLOCKS * GROUPS, ROWS])
