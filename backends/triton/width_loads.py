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
def rest_of(width):
    """Bits of a code behind four that stand as those of 4-bit codes; 0 where none stand apart."""
    fields = WIDTHS[width].fields
    return fields[1].bits if len(fields) > 1 else 0


@triton.constexpr_function
def words_of_integers(groups, minimum):
    """Of a row and a block: one of float16, and those of scales and of minima."""
    return 1 + (groups + 3) // 4 * (2 if minimum else 1)


@gluon.jit
def _lane(words_ptr, start, B, UNITS: gl.constexpr, WIDTH: gl.constexpr, SKIP: gl.constexpr, EACH: gl.constexpr):
    """Words of a block behind SKIP others, EACH a lane and row: [4 * UNITS, 64 * EACH] by q, lane, word."""
    BLOCK: gl.constexpr = block_of(WIDTH)
    layout: gl.constexpr = gl.BlockedLayout([1, 2 * EACH], [1, 32], [gl.num_warps(), 1], [1, 0])
    part = gl.arange(0, 4 * UNITS, layout=gl.SliceLayout(1, layout))
    word = gl.arange(0, 64 * EACH, layout=gl.SliceLayout(0, layout))
    inside = ((part // 4) * (B * BLOCK) + (part % 4) * (64 * EACH))[:, None] + word[None, :]
    found = gl.load(words_ptr + start * BLOCK + SKIP + inside, cache_modifier=".cg")
    found = gl.permute(gl.reshape(found, [4 * UNITS, 32, 2, EACH]), (0, 2, 1, 3))
    return gl.reshape(found, [4 * UNITS, 64 * EACH])


@gluon.jit
def load_words(words_ptr, start, B, UNITS: gl.constexpr, WIDTH: gl.constexpr):
    """Words of a block of UNITS units, tensors of 4 * UNITS parts by q, lane, word.  start: the block's number."""
    if WIDTH == "int2":
        return (_lane(words_ptr, start, B, UNITS, WIDTH, 0, 2),)
    elif WIDTH == "int3":
        return (
            _lane(words_ptr, start, B, UNITS, WIDTH, 0, 2),
            _lane(words_ptr, start, B, UNITS, WIDTH, 512, 1),
        )
    elif rest_of(WIDTH) > 0:
        return (
            load_run(words_ptr, start, B, UNITS, WIDTH, 0),
            _lane(words_ptr, start, B, UNITS, WIDTH, 1024, rest_of(WIDTH)),
        )
    elif is_bytes(WIDTH):
        return (load_run(words_ptr, start, B, UNITS, WIDTH, 0), load_run(words_ptr, start, B, UNITS, WIDTH, 1))
    else:
        return (load_run(words_ptr, start, B, UNITS, WIDTH, 0),)


@gluon.jit
def load_run(words_ptr, start, B, UNITS: gl.constexpr, WIDTH: gl.constexpr, RUN: gl.constexpr):
    """A run of 256 words of each part of a block, tensor [4 * UNITS, 256]."""
    BLOCK: gl.constexpr = block_of(WIDTH)
    PART: gl.constexpr = 512 if is_bytes(WIDTH) else 256
    layout: gl.constexpr = gl.BlockedLayout([1, 4], [1, 32], [gl.num_warps(), 1], [1, 0])
    part = gl.arange(0, 4 * UNITS, layout=gl.SliceLayout(1, layout))
    word = gl.arange(0, 256, layout=gl.SliceLayout(0, layout))
    inside = ((part // 4) * (B * BLOCK) + (part % 4) * PART)[:, None] + word[None, :]
    return gl.load(words_ptr + start * BLOCK + (RUN * 256) + inside, cache_modifier=".cg")


@gluon.jit
def spread(words, WIDTH: gl.constexpr):
    """Words as pieces take them, [4 * UNITS, 256] each: a word stands for every element that it has codes of."""
    if WIDTH == "int2":
        return (_twice(words[0]),)
    elif WIDTH == "int3":
        first = _twice(words[0])
        last = _twice(_twice(words[1]))
        return (first, gl.convert_layout(last, first.type.layout, assert_trivial=True))
    elif rest_of(WIDTH) > 0:
        last = _twice(words[1])
        if rest_of(WIDTH) == 1:
            last = _twice(last)
        return (words[0], gl.convert_layout(last, words[0].type.layout, assert_trivial=True))
    else:
        return words


@gluon.jit
def _twice(words):
    return gl.reshape(gl.join(words, words), [words.shape[0], 2 * words.shape[1]])


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
