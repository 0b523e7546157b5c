"""Weights of 2 to 8 bits, few rows: y[M, N] = x[M, K] @ dequantized(codes[N, K]).T + bias, x bfloat16 or float16.

Operands are swapped: the weight is the first operand of m16n8k16, the few rows of x are the second, padded to 8, 16
or 32 columns. Weights go from memory to registers in the order of the tensor cores (`widths`), so the main loop has no
barrier and no shuffle. Of integers a code n becomes the float n + offset, by one `lop3` and at times a shift, and
nothing else is done to single weights; numbers of a table have no offset. With sums[m, g] of x[m, k] over group g,

    y[m, n] = sum over g of scale[n, g] * (dot[m, n, g] - (offset + zero[n, g]) * sums[m, g]),

or with a minimum  scale[n, g] * (dot[m, n, g] - offset * sums[m, g]) + minimum[n, g] * sums[m, g]. What is the same for
all n the product begins at.

Of 2 and 3 bits in bfloat16 several codes lie side by side in the mantissa, so that one shift serves them: the float is
n * 2**p + offset, p by column (`width_ptx.powers`), x in shared memory is x * 2**-p, and the product begins at -offset
times the sums of that.

A program keeps one slice of K of x in shared memory and walks over tiles of N. Slices are added by a second kernel in
a fixed order, so the result is deterministic. A program fetches its first weights before it waits for the kernel
before it (programmatic dependent launch): they never change.

Weights of several kinds under one x (`few_rows`) are a kernel each, which run at the same time: one that follows
another starts when all programs of that have what they wait for, and so waits for nothing itself until it ends.
"""

from collections.abc import Sequence
from math import gcd

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from qcompile.backends.triton.add_parts import add_parts
from qcompile.backends.triton.dependent import is_dependent
from qcompile.backends.triton.launch import launch
from qcompile.backends.triton.table import processors_of
from qcompile.backends.triton.width_inputs import take
from qcompile.backends.triton.width_loads import load_integers, load_scales, load_table, load_words
from qcompile.backends.triton.width_table import FewRows, Member
from qcompile.backends.triton.width_tiles import (
    center_of,
    group_minimum,
    group_scale,
    offset_of,
    operand,
    planes,
    powers_of,
    scale_of,
    zero_code,
)


@gluon.jit
def _block(
    words_ptr, scales_ptr, unit, block, B, UNITS: gl.constexpr, WIDTH: gl.constexpr, GROUPS: gl.constexpr,
    WIDE: gl.constexpr, ZERO: gl.constexpr, MINIMUM: gl.constexpr, INTEGERS: gl.constexpr,
):  # fmt: skip
    """Words of units unit.. at a block of columns, and the scales of its groups."""
    words = load_words(words_ptr, unit.to(gl.int64) * B + block, B, UNITS, WIDTH)
    if GROUPS == 0:
        return words, (), ()
    else:
        scales, zeros = _scales(scales_ptr, unit, block, B, UNITS, GROUPS, WIDE, ZERO, MINIMUM, INTEGERS)
        return words, scales, zeros


@gluon.jit
def _scales(
    scales_ptr, unit, block, B, UNITS: gl.constexpr, GROUPS: gl.constexpr, WIDE: gl.constexpr, ZERO: gl.constexpr,
    MINIMUM: gl.constexpr, INTEGERS: gl.constexpr,
):  # fmt: skip
    mma: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [gl.num_warps(), 1], [16, 8])
    row = gl.arange(0, 64 * UNITS, layout=gl.SliceLayout(1, mma))
    if INTEGERS:
        words = load_integers(scales_ptr, unit.to(gl.int64), block, B, row // 64, row % 64, GROUPS, MINIMUM)
        return words, ()
    else:
        return load_scales(scales_ptr, unit.to(gl.int64), block, B, row // 64, row % 64, GROUPS, WIDE, ZERO)


@gluon.jit
def few_rows_kernel(
    x_ptr,
    words_ptr,
    scales_ptr,
    levels_ptr,
    bias_ptr,
    y_ptr,
    M,
    N,
    K,
    stride,
    B,
    tiles,
    ROWS_OF_X: gl.constexpr,
    ONE: gl.constexpr,
    UNITS: gl.constexpr,
    DEPTH: gl.constexpr,
    BLOCKS: gl.constexpr,
    WIDTH: gl.constexpr,
    GROUPS: gl.constexpr,
    WIDE: gl.constexpr,
    ZERO: gl.constexpr,
    MINIMUM: gl.constexpr,
    INTEGERS: gl.constexpr,
    WHOLE: gl.constexpr,
    BIAS: gl.constexpr,
    DEPENDENT: gl.constexpr,
    FOLLOWS: gl.constexpr,
):
    """Tiles pid, pid + programs, ... of N on slice program_id(1) of K; to y if WHOLE, else to its part of y.

    stride: from a row of y to the next one.  ONE: x has one row, and nothing is done to those that it is padded with.
    FOLLOWS: the kernel before reads the same x, and no program of it lets this one start before that is written.
    """
    W: gl.constexpr = gl.num_warps()
    TILE: gl.constexpr = 64 * UNITS
    mma: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [W, 1], [16, 8])
    right: gl.constexpr = gl.DotOperandLayout(1, mma, 2)
    dtype: gl.constexpr = x_ptr.dtype.element_ty
    # of a block: one where a row has one scale, which is multiplied at the end
    SPANS: gl.constexpr = max(GROUPS, 1)
    # of 16 columns, in a group
    PLANES: gl.constexpr = 8 // SPANS
    SUMS: gl.constexpr = ZERO or MINIMUM
    OFFSET: gl.constexpr = offset_of(WIDTH, dtype)
    CENTER: gl.constexpr = 0.0 if SUMS else center_of(WIDTH)
    POWERS: gl.constexpr = powers_of(WIDTH, dtype)
    # where sums are subtracted in any case, the offset is with what stands beside them
    STARTS: gl.constexpr = (POWERS != 0 or not SUMS) and OFFSET + CENTER != 0
    HELD: gl.constexpr = 0.0 if STARTS else OFFSET
    pid = gl.program_id(0)
    programs = gl.num_programs(0)
    part = gl.program_id(1)
    first = part * BLOCKS
    total = ((tiles - pid + programs - 1) // programs) * BLOCKS

    # what is fetched: a tile and a block of its slice; past the end of K the last block again, against zeros of x
    tile = pid
    block = 0
    ring = ()
    for d in gl.static_range(DEPTH):
        at = gl.minimum(first + d, B - 1)
        ring = ring + (
            _block(words_ptr, scales_ptr, tile * UNITS, at, B, UNITS, WIDTH, GROUPS, WIDE, ZERO, MINIMUM, INTEGERS),
        )
    block = DEPTH
    table = load_table(levels_ptr, UNITS, WIDTH)
    if GROUPS == 0:
        row_scales, row_zeros = _scales(scales_ptr, tile * UNITS, 0, B, UNITS, GROUPS, WIDE, ZERO, False, False)

    if DEPENDENT:
        if not FOLLOWS:
            gdc_wait()
        gdc_launch_dependents()
    xs = gl.allocate_shared_memory(dtype, [BLOCKS, ROWS_OF_X, 128], gl.SwizzledSharedLayout(8, 1, 8, [1, 0]))
    PADDED: gl.constexpr = triton.next_power_of_2(BLOCKS) * SPANS
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    row_of_x: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    sums = gl.allocate_shared_memory(gl.float32, [PADDED, ROWS_OF_X], row_of_x)
    starts = gl.allocate_shared_memory(gl.float32, [PADDED, ROWS_OF_X], row_of_x)
    take(
        xs, sums._reinterpret(gl.float32, [PADDED, ROWS_OF_X], flat),
        starts._reinterpret(gl.float32, [PADDED, ROWS_OF_X], flat),
        x_ptr, first, M, K, 1 if ONE else ROWS_OF_X, SPANS, SUMS, STARTS, OFFSET, CENTER, POWERS,
        # who has not waited may find what was there before x in the cache of its multiprocessor
        ".cg" if FOLLOWS else "",
    )  # fmt: skip
    gl.thread_barrier()

    acc = gl.zeros([TILE, ROWS_OF_X], gl.float32, layout=mma)
    done = pid
    at_x = 0
    for _ in range(0, total, DEPTH):
        if block == BLOCKS:
            block = 0
            tile += programs
            # after the last tile the first again, whose words nobody uses
            if tile >= tiles:
                tile = pid
        for d in gl.static_range(DEPTH):
            words, scales, zeros = ring[d]
            made = planes(words, table, WIDTH, POWERS != 0, dtype)
            for g in gl.static_range(SPANS):
                a = operand(made, g * PLANES, PLANES, 4 * UNITS, mma)
                x = xs.index(at_x).slice(g * 16 * PLANES, 16 * PLANES, dim=1).permute((1, 0)).load(right)
                if STARTS:
                    start, _ = gl.broadcast(starts.index(at_x * SPANS + g).load(gl.SliceLayout(0, mma))[None, :], acc)
                else:
                    start = gl.zeros([TILE, ROWS_OF_X], gl.float32, layout=mma)
                if GROUPS == 0 and not STARTS:
                    acc = mma_v2(a, x, acc)
                elif GROUPS == 0:
                    acc += mma_v2(a, x, start)
                else:
                    scale = group_scale(scales, g, WIDE, INTEGERS)
                    acc += mma_v2(a, x, start) * scale[:, None]
                if SUMS:
                    total_x = sums.index(at_x * SPANS + g).load(gl.SliceLayout(0, mma))
                    if MINIMUM:
                        shift = scale * HELD - group_minimum(scales, zeros, g, GROUPS, INTEGERS)
                    elif GROUPS == 0:
                        shift = zero_code(row_zeros[0]) + HELD
                    else:
                        shift = scale * (zero_code(zeros[g]) + HELD)
                    acc -= shift[:, None] * total_x[None, :]
            at = gl.minimum(first + block + d, B - 1)
            ring = (
                ring[:d]
                + (
                    _block(
                        words_ptr, scales_ptr, tile * UNITS, at, B, UNITS, WIDTH, GROUPS, WIDE, ZERO, MINIMUM, INTEGERS
                    ),
                )
                + ring[d + 1 :]
            )
            at_x += 1
        block += DEPTH
        if at_x == BLOCKS:
            n = done * TILE + gl.arange(0, TILE, layout=gl.SliceLayout(1, mma))
            row = gl.arange(0, ROWS_OF_X, layout=gl.SliceLayout(0, mma))
            inside = (n[:, None] < N) & (row[None, :] < M)
            if GROUPS == 0:
                acc *= scale_of(row_scales[0], WIDE)[:, None]
            if BIAS and WHOLE:
                acc += gl.load(bias_ptr + n, mask=n < N, other=0.0).to(gl.float32)[:, None]
            to = (part * M + row).to(gl.int64)[None, :] * stride + n[:, None]
            gl.store(y_ptr + to, acc.to(y_ptr.dtype.element_ty), mask=inside)
            acc = gl.zeros([TILE, ROWS_OF_X], gl.float32, layout=mma)
            at_x = 0
            done += programs
            if GROUPS == 0:
                next_unit = gl.minimum(done, tiles - 1) * UNITS
                row_scales, row_zeros = _scales(scales_ptr, next_unit, 0, B, UNITS, GROUPS, WIDE, ZERO, False, False)

    if DEPENDENT and FOLLOWS:
        # who waits for this kernel waits for all of them
        gdc_wait()


def few_rows(x: Tensor, members: Sequence[Member[FewRows]], bias: Tensor | None, y: Tensor) -> None:
    """Write to y [M, sum of all N] the products of contiguous x [M, K], 1 <= M <= rows of each configuration.

    bias: None where there are several members, which cut K alike: as all their configurations do, or finer.
    """
    B = members[0].weight.words.shape[1]
    blocks = gcd(*(member.config.blocks for member in members))
    parts = triton.cdiv(B, blocks)
    to = y[None] if parts == 1 else x.new_empty(parts, *y.shape, dtype=torch.float32)
    resident = min(member.config.resident for member in members)
    tiles = sum(len(member.weight.words) // member.config.units for member in members)
    each = triton.cdiv(tiles * parts, processors_of(x.device) * resident)
    for i, (member, columns) in enumerate(zip(members, to.split([m.N for m in members], dim=2), strict=True)):
        _few_rows(x, member, bias, columns, blocks, each, follows=i > 0)
    if parts > 1:
        add_parts(to, bias, y)


def _few_rows(
    x: Tensor, member: Member[FewRows], bias: Tensor | None, to: Tensor, blocks: int, each: int, *, follows: bool
) -> None:
    """Write one member's product, [P, M, N], by slices of `blocks` blocks and programs of `each` tiles."""
    M, K = x.shape
    weight, config = member.weight, member.config
    units, B = weight.words.shape[:2]
    dependent = is_dependent(x.device)
    tiles, parts = units // config.units, len(to)
    given = x if bias is None else bias
    levels = weight.words if weight.levels is None else weight.levels
    launch(
        few_rows_kernel,
        (triton.cdiv(tiles, each), parts, 1),
        (x, weight.words, weight.scales, levels, given, to, M, member.N, K, to.stride(1), B, tiles),
        {
            "ROWS_OF_X": config.rows,
            "ONE": M == 1,
            "UNITS": config.units,
            "DEPTH": gcd(config.depth, blocks),
            "BLOCKS": blocks,
            "WIDTH": weight.width,
            "GROUPS": weight.groups,
            "WIDE": weight.wide,
            "ZERO": weight.zero,
            "MINIMUM": weight.minimum,
            "INTEGERS": weight.integers > 0,
            "WHOLE": parts == 1,
            "BIAS": bias is not None,
            "DEPENDENT": dependent,
            "FOLLOWS": follows,
        },
        num_warps=config.warps,
        **({"launch_pdl": True} if dependent else {}),
    )
