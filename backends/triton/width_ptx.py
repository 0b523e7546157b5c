"""PTX that makes pairs of 16-bit floats of packed codes: text, written while a kernel is compiled.

One piece runs on what one lane holds of a few words: the results come first among its operands, then words, then the
table of a code book, then zero points and scales. It makes planes (`width_tiles`), a register of a pair each, or two
where four of the operands' elements come at once.
"""

from dataclasses import dataclass

import triton

from qcompile.backends.triton.widths import WIDTHS


@dataclass(frozen=True, kw_only=True)
class Piece:
    """What one piece reads. elements: of each operand at once; words: registers of words."""

    elements: int = 2
    words: int = 2


PIECES = {
    "int8": Piece(words=4),
    "int6": Piece(words=4),
    "int5": Piece(elements=4, words=8),
    "int4": Piece(),
    "book": Piece(),
    "int3": Piece(elements=4, words=8),
    "int2": Piece(),
} | {name: Piece(words=4) for name, width in WIDTHS.items() if width.mantissa is not None}
# Pairs of numbers for every byte of two codes, 32 times, so that each lane of a warp has a bank of its own. Gluon
# cannot read shared memory at places that a kernel finds out, so the table is declared here, once a kernel.
PAIRS = 256
TABLE_BYTES = PAIRS * 32 * 4
_TABLE = "qcompile_pairs"
DECLARE_TABLE = f".shared .align 128 .b8 {_TABLE}[{TABLE_BYTES}]; mov.b32 $0, $1;"
# four copies of a pair, at an offset
FILL_TABLE = f"{{ .reg .b32 a; mov.b32 a, {_TABLE}; add.u32 a, a, $1; "
FILL_TABLE += "st.shared.v4.b32 [a], {$2, $2, $2, $2}; mov.b32 $0, $1; }"
# of bfloat16 and float16: where codes of few bits stand in the mantissa, what they are added to, its bits
_PLACE = {False: (0, 128, 0x43004300), True: (4, 64, 0x54005400)}
_MINUS_ONE = 0xBF80BF80


@triton.constexpr_function
def offset(width: str, half: bool) -> int:
    """What is added to a code in its plane; to numbers none is."""
    return 0 if WIDTHS[width].numbers else -128 if width == "int8" else _PLACE[half][1]


@triton.constexpr_function
def planes_ptx(width: str, half: bool, first: int, count: int) -> str:
    """Planes first .. first + count.  half: floats are float16, else bfloat16."""
    return "{" + " ".join(_planes(width, half, first, count)) + "}"


@triton.constexpr_function
def weight_ptx(width: str, half: bool, first: int, count: int, zero: int | None, scales: int) -> str:
    """(plane - zero) * scale, the scale a sum of as many floats as `scales` says, or 1.

    zero: a number to subtract, or None: it is an operand, before the scales.
    """
    piece, name = PIECES[width], "f16x2" if half else "bf16x2"
    next_operand = _results(width, count) + piece.words + (piece.elements if width == "book" else 0)
    lines = _planes(width, half, first, count) + [".reg .b32 zero, more;"]
    if zero is None:
        lines.append(f"mov.b32 zero, ${next_operand};")
        next_operand += piece.elements
    elif zero:
        lines.append(f"mov.b32 zero, {_pair(zero, half):#x};")
    for i in range(_results(width, count)):
        if zero != 0:
            # exact, so that only the product rounds
            lines.append(f"sub.{name} ${i}, ${i}, zero;")
        if scales == 1:
            lines.append(f"mul.{name} ${i}, ${i}, ${next_operand};")
        elif scales == 2:
            lines.append(f"mul.{name} more, ${i}, ${next_operand + piece.elements};")
            lines.append(f"fma.rn.{name} ${i}, ${i}, ${next_operand}, more;")
    return "{" + " ".join(lines) + "}"


@triton.constexpr_function
def constraints(width: str, count: int, operands: int) -> str:
    """Of a piece that makes `count` planes and reads `operands` of 32 bits after the words."""
    piece = PIECES[width]
    # results are written while words are still read
    return ",".join(["=&r"] * _results(width, count) + ["r"] * (piece.words + piece.elements * operands))


@triton.constexpr_function
def _results(width: str, count: int) -> int:
    """Registers of results, the first operands."""
    return count * PIECES[width].elements // 2


@triton.constexpr_function
def _pair(number: int, half: bool) -> int:
    """Bits of a small whole number as float16 or bfloat16, twice."""
    sign, size = (0x8000 if number < 0 else 0), abs(number)
    exponent = size.bit_length() - 1
    digits, bias = (10, 15) if half else (7, 127)
    bits = sign | ((exponent + bias) << digits) | ((size << digits >> exponent) & ((1 << digits) - 1))
    return bits << 16 | bits


@triton.constexpr_function
def _planes(width: str, half: bool, first: int, count: int) -> list[str]:
    at = _results(width, count)
    if width == "book":
        return _book(first, count, at)
    if PIECES[width].elements == 4:
        pair = {"int3": _third, "int5": _fifth}[width]
        return [".reg .b32 t;"] + [line for i in range(2 * count) for line in pair(at, first + i // 2, i % 2, half, i)]
    lines = [".reg .b32 t, u, v;"]
    for i, plane in enumerate(range(first, first + count)):
        match width:
            case "int8":
                lines += _byte(f"${at + plane // 2}", 8 * (plane % 2), half, i)
            case _ if WIDTHS[width].mantissa is not None:
                lines += _float_byte(f"${at + plane // 2}", 8 * (plane % 2), width, half, i)
            case "int6":
                lines += _bits(f"${at + plane // 4}", 4 * (plane % 4), 15, half, i)
                lines += _more_bits(f"${at + 2}", 2 * plane, 3, 4, half, i)
            case "int4":
                lines += _bits(f"${at + plane // 4}", 4 * (plane % 4), 15, half, i)
            case _:
                lines += _bits(f"${at}", 2 * plane, 3, half, i)
    return lines


@triton.constexpr_function
def _moved(to: str, word: str, right: int) -> str:
    if right == 0:
        return f"mov.b32 {to}, {word};"
    return f"{'shr' if right > 0 else 'shl'}.b32 {to}, {word}, {abs(right)};"


@triton.constexpr_function
def _bits(word: str, start: int, mask: int, half: bool, to: int) -> list[str]:
    """code + offset, of codes in bits start.. of both halves of a word: put into the mantissa of the offset."""
    place, _, magic = _PLACE[half]
    pair = (mask << place) * 0x10001
    return [_moved("t", word, start - place), f"lop3.b32 ${to}, t, {pair:#x}, {magic:#x}, 0xea;"]


@triton.constexpr_function
def _third(at: int, plane: int, c: int, half: bool, to: int) -> list[str]:
    """A pair of 3-bit codes: five stand in each of three words, and of the last each word holds a bit."""
    words = (f"${at}", f"${at + 2}", f"${at + 4}")
    n = 8 * c + plane
    if n < 15:
        return _bits(words[n // 5], 3 * (n % 5), 7, half, to)
    lines = _bits(words[0], 15, 1, half, to)
    for bit in (1, 2):
        lines += _more_bits(words[bit], 15, 1, bit, half, to)
    return lines


@triton.constexpr_function
def _fifth(at: int, plane: int, c: int, half: bool, to: int) -> list[str]:
    """A pair of 5-bit codes: four bits of each stand as those of 4-bit codes, the last ones in a word of their own."""
    lines = _bits(f"${at + 2 * c + plane // 4}", 4 * (plane % 4), 15, half, to)
    return lines + _more_bits(f"${at + 4}", 8 * c + plane, 1, 4, half, to)


@triton.constexpr_function
def _more_bits(word: str, start: int, mask: int, bit: int, half: bool, to: int) -> list[str]:
    """Bits `bit`.. of the codes of a pair that `_bits` made, out of bits start.. of both halves of a word."""
    place = _PLACE[half][0] + bit
    pair = (mask << place) * 0x10001
    return [_moved("t", word, start - place), f"lop3.b32 ${to}, t, {pair:#x}, ${to}, 0xea;"]


@triton.constexpr_function
def _byte(word: str, start: int, half: bool, to: int) -> list[str]:
    """The numbers of bytes in two's complement, in bits start.. of both halves of a word."""
    if half:
        # 1024 + (byte + 128), less the 1152 of a byte of 0
        return [
            _moved("t", word, start),
            "lop3.b32 t, t, 0xff00ff, 0x64806480, 0x6a;",
            "mov.b32 u, 0x64806480;",
            f"sub.f16x2 ${to}, t, u;",
        ]
    # 128 + seven bits, less 128 or 256 as the sign is 0 or 1: a bit above the mantissa doubles
    return [
        _moved("t", word, start),
        "lop3.b32 u, t, 0x7f007f, 0x43004300, 0xea;",
        "lop3.b32 t, t, 0x800080, 0x43004300, 0xea;",
        f"mov.b32 v, {_MINUS_ONE:#x};",
        f"fma.rn.bf16x2 ${to}, t, v, u;",
    ]


@triton.constexpr_function
def _float_byte(word: str, start: int, width: str, half: bool, to: int) -> list[str]:
    """The numbers of bytes of sign, exponent and mantissa: moved to where theirs are, and times a power of two."""
    mantissa = WIDTHS[width].mantissa
    assert mantissa is not None
    digits, bias = (10, 15) if half else (7, 127)
    place = digits - mantissa
    pair = (127 << place) * 0x10001
    lines = [
        _moved("u", word, start - 8),
        "lop3.b32 u, u, 0x80008000, 0, 0xea;",
        _moved("t", word, start - place),
        f"lop3.b32 ${to}, t, {pair:#x}, u, 0xea;",
    ]
    power = 2 ** (bias - WIDTHS[width].bias)
    if power == 1:
        return lines
    name = "f16x2" if half else "bf16x2"
    # exact, subnormal numbers too; less 0, which keeps the sign of 0
    lines += [
        f"mov.b32 v, {_pair(power, half):#x};",
        "mov.b32 u, 0x80008000;",
        f"fma.rn.{name} ${to}, ${to}, v, u;",
    ]
    return lines


@triton.constexpr_function
def _book(first: int, count: int, at: int) -> list[str]:
    """Numbers of a table, two at once. The operand after the words is four times the number of the lane."""
    lines = [".reg .b32 a, b;"]
    for i, plane in enumerate(range(first, first + count)):
        lines += [
            _moved("a", f"${at + plane // 4}", 8 * (plane % 4) - 7),
            f"lop3.b32 a, a, 0x7f80, ${at + 2}, 0xea;",
            f"mov.b32 b, {_TABLE};",
            "add.u32 a, a, b;",
            f"ld.shared.b32 ${i}, [a];",
        ]
    return lines
