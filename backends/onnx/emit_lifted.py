"""Floats of few bits on both sides of a linear on onnxruntime's CPU: its kernel of integers multiplies them exactly.

    x / scale rounded to the format, over its smallest number     u8, around 128
    the weight's numbers over a power of two                      s8
    com.microsoft::MatMulIntegerToFloat of both                   y

Numbers of an input beyond 8 bits are two or three digits to the base of 255, each of which the kernel multiplies: E4M3
has 18 bits. Digits go from -127 to 127, so that none is much larger than the number, and their sum as precise.

A weight whose columns were lowered by octaves is held by E4M3, of which int8 takes the columns that are multiples of
one power of two; the few others are zeros there, and a thin float matmul beside it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from qcompile.backends.onnx.emit_ort import CONTRIB, INTEGER, emit_cpu_linear, integer_matrix, row_scale, whole
from qcompile.backends.onnx.emit_portable import finish_linear
from qcompile.backends.onnx.formulas import find_qparams, round_to_whole
from qcompile.backends.onnx.operands import Array, Input, Weight, by_row, input_of, levels_of, required, weight_of
from qcompile.backends.onnx.planned import Planned
from qcompile.backends.onnx.writer import Writer
from qcompile.formats import Float
from qcompile.spec import ALL

_D = ir.DataType
_MOST, _MIDDLE = 127, 128
# an odd base leaves no number midway between two multiples of it
_BASE, _MOST_DIGITS = 255, 3
# beside more columns than these a float matmul of all is as fast
_MOST_BESIDE = 0.5


@dataclass(frozen=True, kw_only=True, eq=False)
class Lifted:
    """A weight [N, K] as whole numbers times `step` times the scale of its row, without the columns beside them.

    matrix: int8 [N, K], zeros where a column is beside.  beside: places of columns, ascending.
    """

    matrix: Array
    step: float
    beside: Array


def emit_linear(w: Writer, node: ir.Node) -> Planned:
    """A linear whose input is floats and weight of few bits; any other as `emit_cpu_linear` writes it."""
    weight, given = weight_of(required(node, 1)), input_of(required(node, 0))
    if weight is None or given is None or not _digits(given) or weight.spec.granularity.columns != ALL:
        return emit_cpu_linear(w, node)
    matrix, scale, beside = _operands(w, weight)
    if matrix is None:
        return emit_cpu_linear(w, node)
    numbers, codes, steps, found = _input(w, given)
    zero, (step, *_) = w.number(_MIDDLE, _D.UINT8), steps
    product, *more = (
        w.op(INTEGER, code, matrix, unit, scale, zero, domain=CONTRIB, makes=_D.FLOAT)
        for code, unit in zip(codes, steps, strict=True)
    )
    inner = product
    for digit in more:
        product = w.op("Add", product, digit, makes=_D.FLOAT)
    if more:
        w.note(
            f"inputs in {given.spec} are {len(codes)} digits, each multiplied alone: exact but for sums in float32, "
            "and slower than float for many rows and few channels"
        )
    if beside.size:
        places = w.once(("beside", weight.value), lambda: w.constant(f"{weight.name}_beside", ir.Tensor(beside)))
        columns = w.once(
            ("columns", weight.value), lambda: w.constant(f"{weight.name}_columns", _columns(weight, beside))
        )
        thin = w.op("MatMul", w.op("Mul", w.op("Gather", numbers, places, axis=-1), step), columns, makes=_D.FLOAT)
        product = w.op("Add", product, thin, makes=_D.FLOAT)
    if found:
        product = w.op("Mul", product, found[0], makes=_D.FLOAT)
    return finish_linear(w, node, product, inner=inner, kernel=INTEGER)


def lifted(weight: Weight) -> Lifted | None:
    """Whole numbers of as many columns as int8 takes together; None if those are too few."""
    fmt = weight.spec.format
    if weight.codes.ndim != 2 or not isinstance(fmt, Float):
        return None
    values = levels_of(fmt, None).astype(np.float64)[weight.codes] / fmt.step
    if not np.isfinite(values).all():
        return None
    numbers = values.astype(np.int64)
    digits, top = np.bitwise_or.reduce(np.abs(numbers), axis=0), np.abs(numbers).max(axis=0)
    powers = range(int(top.max()).bit_length())
    fits = [(digits & ((1 << power) - 1) == 0) & (top >> power <= _MOST) for power in powers]
    power = max(powers, key=lambda p: int(fits[p].sum()), default=0)
    if not fits or 1 - fits[power].mean() > _MOST_BESIDE:
        return None
    matrix = np.where(fits[power], numbers >> power, 0).astype(np.int8)
    return Lifted(matrix=matrix, step=fmt.step * 2.0**power, beside=np.flatnonzero(~fits[power]))


def _digits(given: Input) -> int:
    """Of the whole numbers of an input with one scale a token or tensor; 0 if it has none, or they are too long."""
    fmt, one = given.spec.format, given.scale is None or given.scale.size == 1
    if not isinstance(fmt, Float) or not one or given.spec.granularity.columns != ALL:
        return 0
    most = (_MOST * (_BASE**n - 1) // (_BASE - 1) for n in range(1, _MOST_DIGITS + 1))
    return next((digits for digits, number in enumerate(most, start=1) if fmt.max / fmt.step <= number), 0)


def _operands(w: Writer, weight: Weight) -> tuple[ir.Value | None, ir.Value | None, Array]:
    """The matrix [K, N] and the scale of its rows, and what stands beside it; None if it is not whole."""
    integers, nothing = whole(weight), np.zeros(0, np.int64)
    if integers is not None:
        matrix, zero = integer_matrix(w, integers)
        return (matrix if zero is None else None), row_scale(w, integers), nothing
    found = lifted(weight)
    if found is None:
        return None, None, nothing
    key, scale = ("lifted", weight.value, weight.spec), weight.scale * np.float32(found.step)
    matrix, own = w.many(
        key,
        lambda: [
            w.constant(weight.name, ir.Tensor(np.ascontiguousarray(found.matrix.T))),
            w.constant(f"{weight.name}_scale", ir.Tensor(scale.reshape(() if scale.size == 1 else -1))),
        ],
    )
    return matrix, own, found.beside


def _columns(weight: Weight, beside: Array) -> ir.Tensor:
    """Columns of the dequantized weight as rows [n, N]."""
    values = levels_of(weight.spec.format, None)[weight.codes[:, beside]] * by_row(weight.scale, weight)
    return ir.Tensor(np.ascontiguousarray(values.T.astype(np.float32)))


def _input(w: Writer, given: Input) -> tuple[ir.Value, Sequence[ir.Value], Sequence[ir.Value], Sequence[ir.Value]]:
    """The numbers as float, u8 codes of their digits, what one of each is worth, and a dynamic input's scales."""
    fmt, digits = given.spec.format, _digits(given)
    assert isinstance(fmt, Float)

    def make() -> Sequence[ir.Value]:
        x = w.cast(given.x, _D.FLOAT)
        if given.scale is None:
            scale, _ = find_qparams(w, x, given.spec, given.x)
            found, step = [scale], fmt.step
        else:
            scale = w.number(float(given.scale.reshape(())))
            found, step = [], float(given.scale.reshape(())) * fmt.step
        numbers = round_to_whole(w, w.op("Div", x, scale), fmt)
        steps = [w.number(step * float(_BASE) ** i) for i in range(digits)]
        return [numbers, *_codes(w, numbers, digits), *steps, *found]

    scale = b"" if given.scale is None else given.scale.tobytes()
    numbers, *rest = w.many(("whole", given.x, str(given.spec), scale), make)
    return numbers, rest[:digits], rest[digits : 2 * digits], rest[2 * digits :]


def _codes(w: Writer, numbers: ir.Value, digits: int) -> Sequence[ir.Value]:
    """Digits of whole numbers, the lowest first, u8 around 128."""
    parts, base = [], w.number(float(_BASE))
    for _ in range(digits - 1):
        above = w.op("Round", w.op("Mul", numbers, w.number(1 / _BASE)))
        parts.append(w.op("Sub", numbers, w.op("Mul", above, base)))
        numbers = above
    # takes less time than a sum and a Cast
    return [w.op("QuantizeLinear", part, w.number(1.0), w.number(_MIDDLE, _D.UINT8)) for part in (*parts, numbers)]
