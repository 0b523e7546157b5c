"""PTX that makes bytes of 8-bit floats of a word of 4-bit ones: $0 and $1 of the codes h = 0 and 1 of word $2.

Words are those of `int4_int8_words` or, where columns are lowered, those of `fp4_words`, with octaves in $3 and $4 if
it is the weight that takes them.
mantissa: bits of it, 0 to 2, of 4.
"""

import triton

# of the largest number of each format: that of E4M3, from whose top the exponents of columns are lowered
TOP = 8
# of E5M2
BIAS, MANTISSA = 15, 2
E4M3_BIAS = 7


@triton.constexpr_function
def unpack_ptx(mantissa: int) -> str:
    """Bytes of E4M3, of 2**(bias - 7) times the numbers.

    A magnitude moves to the top of E4M3's mantissa, a sign to the top of the byte.
    """
    left = 3 - mantissa
    mask = f"{(7 << left) * 0x01010101:#x}"
    return (
        "{ .reg .b32 t, u;"
        f"shl.b32 t, $2, {left}; and.b32 t, t, {mask}; shl.b32 u, $2, 4; lop3.b32 $0, u, 0x80808080, t, 0xEA;"
        f"shr.b32 t, $2, {4 - left}; and.b32 t, t, {mask}; lop3.b32 $1, $2, 0x80808080, t, 0xEA; }}"
    )


@triton.constexpr_function
def whole_ptx(mantissa: int) -> str:
    """The same bytes, of words of `fp4_words`, by a table."""
    low, high = (int.from_bytes(bytes(i << (3 - mantissa) for i in four), "little") for four in (range(4), range(4, 8)))
    return (
        "{ .reg .b32 m, t, u;"
        "and.b32 m, $2, 0x77777777;"
        f"prmt.b32 t, {low:#x}, {high:#x}, m; lop3.b32 $0, $2, 0x80808080, t, 0xEA;"
        f"shr.b32 m, m, 16; prmt.b32 t, {low:#x}, {high:#x}, m;"
        "shl.b32 u, $2, 4; lop3.b32 $1, u, 0x80808080, t, 0xEA; }"
    )


@triton.constexpr_function
def raised_over(mantissa: int) -> int:
    """Octaves from the numbers that bytes of E4M3 stand for to those at its top."""
    return TOP - ((7 >> mantissa) - E4M3_BIAS)


@triton.constexpr_function
def lowered_ptx(mantissa: int) -> str:
    """Bytes of E5M2, of the numbers at the top of E4M3 (`qcompile.shifts.raised`) less octaves.

    The exponents of zeros stay as they are: what is subtracted is masked by bytes of a second table.
    """
    low, high = _table(mantissa)
    return (
        "{ .reg .b32 m, t, u, v;"
        "and.b32 m, $2, 0x77777777;"
        f"prmt.b32 t, {low:#x}, {high:#x}, m; prmt.b32 u, 0xFFFFFF00, 0xFFFFFFFF, m;"
        "and.b32 u, u, $3; sub.u32 t, t, u;"
        "shr.b32 m, m, 16;"
        f"prmt.b32 u, {low:#x}, {high:#x}, m; prmt.b32 v, 0xFFFFFF00, 0xFFFFFFFF, m;"
        "and.b32 v, v, $4; sub.u32 u, u, v;"
        "shl.b32 v, $2, 4;"
        "lop3.b32 $0, $2, 0x80808080, t, 0xEA; lop3.b32 $1, v, 0x80808080, u, 0xEA; }"
    )


@triton.constexpr_function
def narrowed_ptx() -> str:
    """Bytes $0 of E4M3 of bytes $1 of E5M2, which are the high ones of float16."""
    return (
        "{ .reg .b32 t, u; .reg .b16 l, h;"
        "prmt.b32 t, $1, 0, 0x1404; prmt.b32 u, $1, 0, 0x3424;"
        "cvt.rn.satfinite.e4m3x2.f16x2 l, t; cvt.rn.satfinite.e4m3x2.f16x2 h, u;"
        "mov.b32 $0, {l, h}; }"
    )


@triton.constexpr_function
def _table(mantissa: int) -> tuple[int, int]:
    """Bytes of E5M2 for the eight magnitudes of a float, four in each number."""
    steps = [_steps(code, mantissa) for code in range(8)]
    top = steps[-1].bit_length()
    exponents = [TOP + BIAS + n.bit_length() - top for n in steps]
    fractions = [(n << MANTISSA) >> max(n.bit_length() - 1, 0) & ((1 << MANTISSA) - 1) for n in steps]
    found = [e << MANTISSA | f if n else 0 for n, e, f in zip(steps, exponents, fractions, strict=True)]
    low, high = (int.from_bytes(bytes(found[i : i + 4]), "little") for i in (0, 4))
    return low, high


@triton.constexpr_function
def _steps(code: int, mantissa: int) -> int:
    """A magnitude over the smallest number."""
    exponent, fraction = code >> mantissa, code & ((1 << mantissa) - 1)
    return fraction if exponent == 0 else (fraction | 1 << mantissa) << (exponent - 1)
