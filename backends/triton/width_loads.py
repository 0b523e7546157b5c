"""Words, scales and tables of `widths` from memory into registers, for kernels of Gluon."""

import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from qcompile.backends.triton.width_ptx import DECLARE_TABLE, FILL_TABLE, PAIRS
from qcompile.backends.triton.widths import WIDTHS, WORDS

DECLARATION = gl.constexpr(DECLARE_TABLE)
FILLING = gl.constexpr(FILL_TABLE)
TABLE_PAIRS = gl.constexpr(PAIRS)


@triton.constexpr_function
def block_of(width):
    """Words of a block."""
    return WORDS * WIDTHS[width].bits


@triton.constexpr_function
def is_book(width):
    return WIDTHS[width].book


@triton.constexpr_function
def is_bytes(width):
    return WIDTHS[width].bits == 8


@triton.constexpr_function
def runs_of(width):
    """How many words of a lane's row stand together, and how many words of a block before them."""
    runs = WIDTHS[width].runs
    return tuple((run, WORDS * sum(runs[:i])) for i, run in enumerate(runs))


@triton.constexpr_function
def words_of_integers(groups, minimum):
    """Of a row and a block: one of float16, and those of scales and of minima."""
    return 1 + (groups + 3) // 4 * (2 if minimum else 1)


@gluon.jit
def load_words(words_ptr, start, B, UNITS: gl.constexpr, WIDTH: gl.constexpr):
    """Words of block `start` of UNITS units, of each run [4 * UNITS, 64 * run] by q, lane, word."""
    RUNS: gl.constexpr = runs_of(WIDTH)
    words = ()
    for r in gl.static_range(len(RUNS)):
        words = words + (load_run(words_ptr, start, B, UNITS, WIDTH, r),)
    return words


@gluon.jit
def load_run(words_ptr, start, B, UNITS: gl.constexpr, WIDTH: gl.constexpr, RUN: gl.constexpr):
    """One of the runs of a block."""
    BLOCK: gl.constexpr = block_of(WIDTH)
    EACH: gl.constexpr = runs_of(WIDTH)[RUN][0]
    SKIP: gl.constexpr = runs_of(WIDTH)[RUN][1]
    # where a lane has fewer than four words of a row, those of both rows stand together
    TOGETHER: gl.constexpr = 1 if EACH == 4 else 2
    layout: gl.constexpr = gl.BlockedLayout([1, TOGETHER * EACH], [1, 32], [gl.num_warps(), 1], [1, 0])
    part = gl.arange(0, 4 * UNITS, layout=gl.SliceLayout(1, layout))
    word = gl.arange(0, 64 * EACH, layout=gl.SliceLayout(0, layout))
    inside = ((part // 4) * (B * BLOCK) + (part % 4) * (64 * EACH))[:, None] + word[None, :]
    found = gl.load(words_ptr + start * BLOCK + SKIP + inside, cache_modifier=".cg")
    if EACH < 4:
        found = gl.permute(gl.reshape(found, [4 * UNITS, 32, 2, EACH]), (0, 2, 1, 3))
        found = gl.reshape(found, [4 * UNITS, 64 * EACH])
    return found


@gluon.jit
def spread(words, WIDTH: gl.constexpr):
    """Words as pieces take them, [4 * UNITS, 256] each: a word stands for every element that it has codes of."""
    RUNS: gl.constexpr = runs_of(WIDTH)
    first = _repeated(words[0], 4 // RUNS[0][0])
    found = (first,)
    for r in gl.static_range(1, len(RUNS)):
        run = _repeated(words[r], 4 // RUNS[r][0])
        found = found + (gl.convert_layout(run, first.type.layout, assert_trivial=True),)
    return found


@gluon.jit
def _repeated(words, TIMES: gl.constexpr):
    """Each word 1, 2 or 4 times."""
    if TIMES == 1:
        return words
    else:
        twice = gl.reshape(gl.join(words, words), [words.shape[0], 2 * words.shape[1]])
        return _repeated(twice, TIMES // 2)


@gluon.jit
def load_table(levels_ptr, UNITS: gl.constexpr, WIDTH: gl.constexpr):
    """Put the table of a code book into shared memory: a barrier has to follow.

    Returns what pieces read of it: 4 * lane for each element, or nothing where codes are numbers.
    """
    if is_book(WIDTH):
        W: gl.constexpr = gl.num_warps()
        flat: gl.constexpr = gl.BlockedLayout([1], [32], [W], [0])
        thread = gl.arange(0, 32 * W, layout=flat)
        gl.inline_asm_elementwise(DECLARATION, "=r,r", [thread], dtype=gl.int32, is_pure=False, pack=1)
        i = gl.arange(0, 8 * TABLE_PAIRS, layout=flat)
        pair = gl.load(levels_ptr + i // 8)
        gl.inline_asm_elementwise(FILLING, "=r,r,r", [i * 16, pair], dtype=gl.int32, is_pure=False, pack=1)
        layout: gl.constexpr = gl.BlockedLayout([1, 4], [1, 32], [W, 1], [1, 0])
        lane = gl.arange(0, 256, layout=gl.SliceLayout(0, layout)) & 124
        return (gl.zeros([4 * UNITS, 256], gl.int32, layout=layout) + lane[None, :],)
    else:
        return ()


@gluon.jit
def load_scales(scales_ptr, unit, block, B, beside, row, GROUPS: gl.constexpr, WIDE: gl.constexpr, ZERO: gl.constexpr):
    """Scales and zero points of each group of a block, or of whole rows where GROUPS is 0; tuples of int32.

    beside: how many units after `unit`, row: within that; tensors.
    """
    PLANES: gl.constexpr = 2 if WIDE and ZERO else 1
    scales_ptr += (unit * (B * GROUPS if GROUPS > 0 else 1) + block * GROUPS) * (PLANES * 64)
    inside = beside * ((B * GROUPS if GROUPS > 0 else 1) * (PLANES * 64)) + row
    scales = ()
    zeros = ()
    for g in gl.static_range(max(GROUPS, 1)):
        scales = scales + (gl.load(scales_ptr + g * (PLANES * 64) + inside),)
        zeros = zeros + ((gl.load(scales_ptr + g * 128 + 64 + inside) if WIDE and ZERO else scales[g]),)
    return scales, zeros


@gluon.jit
def load_integers(scales_ptr, unit, block, B, beside, row, GROUPS: gl.constexpr, MINIMUM: gl.constexpr):
    """The words of scales that are integers, of a block: a tuple of int32.  beside, row: as of `load_scales`."""
    PLANES: gl.constexpr = words_of_integers(GROUPS, MINIMUM)
    inside = (beside * B + block) * (PLANES * 64) + row
    words = ()
    for p in gl.static_range(PLANES):
        words = words + (gl.load(scales_ptr + unit * (B * PLANES * 64) + p * 64 + inside),)
    return words


@gluon.jit
def by_rows(tensors, UNITS: gl.constexpr):
    """Tensors [4 * UNITS, 256] as [4 * UNITS, 2, 8, 16]: by part and row."""
    shaped = ()
    for n in gl.static_range(len(tensors)):
        shaped = shaped + (gl.reshape(tensors[n], [4 * UNITS, 2, 8, 16]),)
    return shaped


@gluon.jit
def scales_by_rows(
    scales_ptr,
    unit,
    block,
    B,
    UNITS: gl.constexpr,
    GROUPS: gl.constexpr,
    WIDE: gl.constexpr,
    ZERO: gl.constexpr,
    layout: gl.constexpr,
):
    """What `load_scales` finds, [4 * UNITS, 2, 8], laid out as tensors of `by_rows` are, `layout`."""
    rows: gl.constexpr = gl.SliceLayout(3, layout)
    part = gl.arange(0, 4 * UNITS, layout=gl.SliceLayout(1, gl.SliceLayout(2, rows)))[:, None, None]
    q = gl.arange(0, 2, layout=gl.SliceLayout(0, gl.SliceLayout(2, rows)))[None, :, None]
    i = gl.arange(0, 8, layout=gl.SliceLayout(0, gl.SliceLayout(1, rows)))[None, None, :]
    return load_scales(scales_ptr, unit, block, B, part // 4, (part % 4) * 16 + q * 8 + i, GROUPS, WIDE, ZERO)
