"""PTX that makes pairs of 16-bit floats of packed codes: text, written while a kernel is compiled.

One piece runs on what one lane holds of a few words: the results come first among its operands, then words, then the
table of a code book, then zero points and scales. It makes planes (`width_tiles`), a register of a pair each, or two
where four of the operands' elements come at once: both c of a row.
"""

import triton

from qcompile.backends.triton.widths import WIDTHS, Bits

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
# of bfloat16
_MANTISSA = 7
_MINUS_ONE = 0xBF80BF80


@triton.constexpr_function
def elements(width: str) -> int:
    """How many elements of each operand a piece takes: two, where no word has codes of both c, else four."""
    return 2 if 16 % WIDTHS[width].bits == 0 else 4


@triton.constexpr_function
def registers(width: str) -> int:
    """How many registers of words a piece reads."""
    return elements(width) * len(WIDTHS[width].runs)


@triton.constexpr_function
def powers(width: str, half: bool) -> list[int]:
    """Of each pair of a lane's row: codes of planes may be 2**power times as large, and cost fewer instructions.

    So many stand side by side in the mantissa of bfloat16 that one shift does for them. Those of float16 stay: x, which
    then has to be smaller, would lose bits among its subnormals.
    """
    kind = WIDTHS[width]
    if half or kind.numbers:
        return [0] * 16
    side_by_side = max(1, _MANTISSA // kind.bits)
    return [kind.bits * (parts[0].start // kind.bits % side_by_side) if len(parts) == 1 else 0 for parts in kind.places]


@triton.constexpr_function
def offset(width: str, half: bool) -> int:
    """What is added to a code in its plane; to numbers none is."""
    return 0 if WIDTHS[width].numbers else -128 if width == "int8" else _PLACE[half][1]


@triton.constexpr_function
def planes_ptx(width: str, half: bool, raised: bool) -> str:
    """All eight planes.  half: floats are float16, else bfloat16.  raised: codes are times powers of two, `powers`."""
    return "{" + " ".join(_planes(width, half, 0, 8, raised)) + "}"


@triton.constexpr_function
def weight_ptx(width: str, half: bool, first: int, count: int, zero: int | None, scales: int) -> str:
    """(plane - zero) * scale, the scale a sum of as many floats as `scales` says, or 1.

    zero: a number to subtract, or None: it is an operand, before the scales.
    """
    name = "f16x2" if half else "bf16x2"
    next_operand = _results(width, count) + registers(width) + (elements(width) if width == "book" else 0)
    lines = _planes(width, half, first, count, False) + [".reg .b32 zero, more;"]
    if zero is None:
        lines.append(f"mov.b32 zero, ${next_operand};")
        next_operand += elements(width)
    elif zero:
        lines.append(f"mov.b32 zero, {_pair(zero, half):#x};")
    for i in range(_results(width, count)):
        if zero != 0:
            # exact, so that only the product rounds
            lines.append(f"sub.{name} ${i}, ${i}, zero;")
        if scales == 1:
            lines.append(f"mul.{name} ${i}, ${i}, ${next_operand};")
        elif scales == 2:
            lines.append(f"mul.{name} more, ${i}, ${next_operand + elements(width)};")
            lines.append(f"fma.rn.{name} ${i}, ${i}, ${next_operand}, more;")
    return "{" + " ".join(lines) + "}"


@triton.constexpr_function
def constraints(width: str, count: int, operands: int) -> str:
    """Of a piece that makes `count` planes and reads `operands` of 32 bits after the words."""
    # results are written while words are still read
    return ",".join(["=&r"] * _results(width, count) + ["r"] * (registers(width) + elements(width) * operands))


@triton.constexpr_function
def _results(width: str, count: int) -> int:
    """Registers of results, the first operands."""
    return count * elements(width) // 2


@triton.constexpr_function
def _pair(number: int, half: bool) -> int:
    """Bits of a small whole number as float16 or bfloat16, twice."""
    sign, size = (0x8000 if number < 0 else 0), abs(number)
    exponent = size.bit_length() - 1
    digits, bias = (10, 15) if half else (7, 127)
    bits = sign | ((exponent + bias) << digits) | ((size << digits >> exponent) & ((1 << digits) - 1))
    return bits << 16 | bits


@triton.constexpr_function
def _planes(width: str, half: bool, first: int, count: int, raised: bool) -> list[str]:
    kind, at = WIDTHS[width], _results(width, count)
    if kind.book:
        return _book(first, count, at)
    up = powers(width, half) if raised else [0] * 16
    lines = [".reg .b32 t, u, v;"]
    rows = elements(width) // 2
    for to in range(count * rows):
        n = 8 * (to % rows) + first + to // rows
        words = [(f"${at + _register(width, part.word)}", part) for part in kind.places[n]]
        if kind.bits < 8:
            lines += [line for word, part in words for line in _bits(word, part, up[n], half, to)]
        elif kind.mantissa is None:
            lines += _byte(words[0][0], words[0][1].start, half, to)
        else:
            lines += _float_byte(words[0][0], words[0][1].start, width, half, to)
    return lines


@triton.constexpr_function
def _register(width: str, word: int) -> int:
    """Among the registers of words: a run has one for each element, of the words of a row or, of two elements, a c."""
    before = 0
    for run in WIDTHS[width].runs:
        if word < run:
            return before + word * 4 // run % elements(width)
        word -= run
        before += elements(width)
    raise AssertionError(f"{width} has no word {word}")


@triton.constexpr_function
def _moved(to: str, word: str, right: int) -> str:
    if right == 0:
        return f"mov.b32 {to}, {word};"
    return f"{'shr' if right > 0 else 'shl'}.b32 {to}, {word}, {abs(right)};"


@triton.constexpr_function
def _bits(word: str, part: Bits, up: int, half: bool, to: int) -> list[str]:
    """code * 2**up + offset of a pair, put into the mantissa of the offset; or more bits of codes, above others."""
    place, _, magic = _PLACE[half]
    start = place + up + part.low
    pair = ((2**part.count - 1) << start) * 0x10001
    with_these = f"${to}" if part.low else f"{magic:#x}"
    return [_moved("t", word, part.start - start), f"lop3.b32 ${to}, t, {pair:#x}, {with_these}, 0xea;"]


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
