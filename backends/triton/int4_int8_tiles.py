"""Words of `int4_int8_words` as operands of 8-bit tensor cores, and their products as sums, for kernels of Gluon."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from qcompile.backends.triton.width_tiles import SCALE_BITS, ZERO_BITS

# PTX that makes the low and the high four codes of a word $2 bytes code - zero, given four bytes zero $3
UNPACK = gl.constexpr(
    "shr.b32 $1, $2, 4;"
    "lop3.b32 $0, $2, 0x0F0F0F0F, 0x80808080, 0xEA;"
    "lop3.b32 $1, $1, 0x0F0F0F0F, 0x80808080, 0xEA;"
    "sub.u32 $0, $0, $3;"
    "sub.u32 $1, $1, $3;"
    # the bit that kept the bytes apart
    "xor.b32 $0, $0, 0x80808080;"
    "xor.b32 $1, $1, 0x80808080;"
)


@gluon.jit
def take(words, scales, GROUPS: gl.constexpr, WIDE: gl.constexpr, mma: gl.constexpr):
    """A block out of shared memory: words [4, 2, 8, 4, 4], and of each group zeros [4, 2, 8] and scales [64]."""
    by_words: gl.constexpr = gl.DistributedLinearLayout(
        [[0, 1], [0, 2], [4, 0]], [[0, 4], [0, 8], [0, 16], [1, 0], [2, 0]], [[8, 0], [16, 0]], [], [32, 32]
    )
    by_rows: gl.constexpr = gl.DistributedLinearLayout(
        [[1, 0]], [[0, 0], [0, 0], [0, 1], [0, 2], [0, 4]], [[2, 0], [4, 0]], [], [8, 8]
    )
    PLANES: gl.constexpr = 2 if WIDE else 1
    zeros = ()
    factors = ()
    for g in gl.static_range(GROUPS):
        bits = scales.slice(8 * PLANES * g, 8, dim=0).load(by_rows)
        low = scales.slice(16 * g + 8, 8, dim=0).load(by_rows) if WIDE else bits
        zeros = zeros + (gl.reshape((low & ZERO_BITS) * 0x01010101, [4, 2, 8]),)
        scale = gl.reshape((bits if WIDE else bits & SCALE_BITS).to(gl.float32, bitcast=True), [64])
        factors = factors + (gl.convert_layout(scale, gl.SliceLayout(1, mma), assert_trivial=True),)
    return gl.reshape(words.load(by_words), [4, 2, 8, 4, 4]), zeros, factors


@gluon.jit
def _joined(zeros, GROUPS: gl.constexpr):
    """The zeros of each group, [4, 2, 8], behind each other: [4, 2, 8, GROUPS]."""
    if GROUPS == 1:
        return gl.reshape(zeros[0], [4, 2, 8, 1])
    elif GROUPS == 2:
        return gl.join(zeros[0], zeros[1])
    else:
        both = gl.join(gl.join(zeros[0], zeros[1]), gl.join(zeros[2], zeros[3]))
        return gl.reshape(gl.permute(both, (0, 1, 2, 4, 3)), [4, 2, 8, 4])


@gluon.jit
def unpacked(words, zeros, GROUPS: gl.constexpr):
    """Bytes code - zero, by fours: two int32 [4, 2, 8, 4, 4]."""
    fields = gl.reshape(words, [4, 2, 8, 4, GROUPS, 4 // GROUPS])
    zero = _joined(zeros, GROUPS)
    rows: gl.constexpr = gl.SliceLayout(3, gl.SliceLayout(5, fields.type.layout))
    zero = gl.expand_dims(gl.expand_dims(gl.convert_layout(zero, rows, assert_trivial=True), 3), 5)
    low, high = gl.inline_asm_elementwise(
        UNPACK, "=&r,=&r,r,r", [fields, zero], dtype=(gl.int32, gl.int32), is_pure=True, pack=1
    )
    return gl.reshape(low, [4, 2, 8, 4, 4]), gl.reshape(high, [4, 2, 8, 4, 4])


@gluon.jit
def _bytes(fours):
    """Int32 [4, 2, 8, 4, 4] as int8 [4, 2, 8, 4, 4, 4]: registers get other names."""
    layout: gl.constexpr = gl.DistributedLinearLayout(
        [[0, 0, 0, 0, 0, 1], [0, 0, 0, 0, 0, 2], [0, 0, 0, 0, 1, 0], [0, 0, 0, 0, 2, 0], [0, 1, 0, 0, 0, 0]],
        [[0, 0, 0, 1, 0, 0], [0, 0, 0, 2, 0, 0], [0, 0, 1, 0, 0, 0], [0, 0, 2, 0, 0, 0], [0, 0, 4, 0, 0, 0]],
        [[1, 0, 0, 0, 0, 0], [2, 0, 0, 0, 0, 0]],
        [],
        [4, 2, 8, 4, 4, 4],
    )
    fours = gl.expand_dims(gl.convert_layout(fours, gl.SliceLayout(5, layout), assert_trivial=True), 5)
    four = gl.zeros([1, 1, 1, 1, 1, 4], gl.int32, layout=layout)
    return gl.inline_asm_elementwise(
        "mov.b32 $0, $1;", "=r,r,r,r,r,r,r,r,r", [fours, four], dtype=gl.int8, is_pure=True, pack=4
    )


@gluon.jit
def operands(low, high, GROUPS: gl.constexpr, layout: gl.constexpr):
    """The first operands [64, 128 / GROUPS], int8, one a group."""
    # warp q i j s b h -> rows warp q i, columns s h j b
    a = gl.permute(gl.join(_bytes(low), _bytes(high)), (0, 1, 2, 4, 6, 3, 5))
    parts = _columns(gl.reshape(a, [64, 128]), GROUPS)
    found = ()
    for g in gl.static_range(GROUPS):
        found = found + (gl.convert_layout(parts[g], layout, assert_trivial=True),)
    return found


@gluon.jit
def _columns(a, PARTS: gl.constexpr):
    """The columns in that many parts."""
    if PARTS == 1:
        return (a,)
    else:
        left, right = gl.split(gl.permute(gl.reshape(a, [a.shape[0], 2, a.shape[1] // 2]), (0, 2, 1)))
        return _columns(left, PARTS // 2) + _columns(right, PARTS // 2)


# PTX that adds a product $1, scaled by $2, to the sum $3
ADD = gl.constexpr("{ .reg .f32 t; cvt.rn.f32.s32 t, $1; fma.rn.f32 $0, t, $2, $3; }")


@gluon.jit
def add(acc, j: gl.constexpr, dot, scale):
    """The sums with a product added to the j-th."""
    # not pure, so that LLVM leaves it where it stands, while the next product runs
    scaled = gl.inline_asm_elementwise(
        ADD, "=f,r,f,f", [dot, gl.expand_dims(scale, 1), acc[j]], dtype=gl.float32, is_pure=False, pack=1
    )
    return acc[:j] + (scaled,) + acc[j + 1 :]
