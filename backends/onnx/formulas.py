"""`qcompile.numerics` in standard ONNX ops, for what has no quantizing op: scales found while running, code books.

All arithmetic is float32 in the oracle's order, so results agree bit for bit where a runtime's ops are exact.
"""

from itertools import pairwise

import numpy as np
import onnx_ir as ir
import torch

from qcompile import numerics
from qcompile.backends.onnx.operands import Array, levels_of
from qcompile.backends.onnx.storage import code_type
from qcompile.backends.onnx.writer import Writer
from qcompile.errors import GraphError
from qcompile.formats import CodeBook, Float, Format, Integer
from qcompile.spec import ALL, Granularity, Spec

_D = ir.DataType
# significant ones
_FLOAT32_BITS = 24

# smallest and largest positive number of what a scale is kept in (IEEE 754; OCP 8-bit floats v1.0)
_SCALE_LIMITS = {"fp16": (2.0**-24, 65504.0), "bf16": (2.0**-133, 2.0**128 - 2.0**120), "fp8_e4m3": (2.0**-9, 448.0)}


def tiled(w: Writer, x: ir.Value, granularity: Granularity, like: ir.Value) -> ir.Value:
    """x [..., K] as [..., K / g, g] for groups of g, else x itself.

    like: a value of x's shape whose rank and K are known.  Raises GraphError if they are not.
    """
    if granularity.columns == ALL:
        return x
    if like.shape is None or not isinstance(like.shape[-1], int):
        raise GraphError(
            f"{w.site}: groups of {granularity.columns} need a known rank and last dimension; infer shapes"
        )
    # 0 copies a dimension
    shape = [0] * (len(like.shape) - 1) + [like.shape[-1] // granularity.columns, granularity.columns]
    return w.op("Reshape", x, w.number(shape, _D.INT64))


def over(w: Writer, parameter: ir.Value, granularity: Granularity) -> ir.Value:
    """A scale or zero point, shaped as `QParams` says, in the shape that broadcasts over `tiled`."""
    if granularity.columns == ALL:
        return parameter
    return w.op("Unsqueeze", parameter, w.number([-1], _D.INT64))


def untiled(w: Writer, y: ir.Value, granularity: Granularity, like: ir.Value) -> ir.Value:
    """What `tiled` took apart, in the shape of `like`."""
    return y if granularity.columns == ALL else w.op("Reshape", y, w.op("Shape", like))


def find_qparams(w: Writer, x: ir.Value, spec: Spec, like: ir.Value) -> tuple[ir.Value, ir.Value | None]:
    """Scale and zero point of float32 x, as `numerics.find_qparams` finds them, shaped as `QParams` says."""
    if spec.granularity.rows > 1:
        raise w.unsupported(
            f"{spec} shares scales between rows of an input whose shape is found while running",
            f"use groups along the last dimension, as {spec.format.name}/g{spec.granularity.columns}",
        )
    low, high = _range(w, tiled(w, x, spec.granularity, like), spec.granularity)
    nothing = w.number(0.0)
    if spec.symmetric:
        amax = w.op("Max", high, w.op("Neg", low))
        top = spec.format.max
    else:
        low = w.op("Min", low, nothing)
        amax = w.op("Sub", w.op("Max", high, nothing), low)
        top = float(spec.code_range[1])
    exact = w.op("Div", amax, w.number(top))
    scale = w.op("Max", exact, w.number(numerics.SMALLEST_SCALE))
    scale = w.op("Where", w.op("Equal", exact, nothing), w.number(1.0), scale)
    scale = _keep_scale(w, scale, amax, spec)
    poison = _poison(w, x, spec, like)
    scale = w.op("Where", w.op("IsNaN", poison), poison, scale)
    if spec.symmetric:
        return scale, None
    zero = w.op("Round", w.op("Div", w.op("Neg", low), scale))
    return scale, w.op("Clip", zero, *(w.number(float(c)) for c in spec.code_range))


def _reduce(w: Writer, kind: str, x: ir.Value, granularity: Granularity) -> ir.Value:
    """Reduced over each tile of `tiled`: [], [..., 1] or [..., K / g]."""
    if granularity.rows == ALL:
        return w.op(kind, x, keepdims=0)
    return w.op(kind, x, w.number([-1], _D.INT64), keepdims=int(granularity.columns == ALL))


def _range(w: Writer, x: ir.Value, granularity: Granularity) -> tuple[ir.Value, ir.Value]:
    return _reduce(w, "ReduceMin", x, granularity), _reduce(w, "ReduceMax", x, granularity)


def _poison(w: Writer, x: ir.Value, spec: Spec, like: ir.Value) -> ir.Value:
    """NaN for each tile with NaN or Inf, which ReduceMax may skip: a sum does not, and 0 * Inf is NaN, too."""
    idle = w.op("Mul", x, w.number(0.0))
    poison = _reduce(w, "ReduceSum", tiled(w, idle, spec.granularity, like), spec.granularity)
    # under a scale of the tensor all tiles share it
    return w.op("ReduceSum", poison, keepdims=0) if spec.scale == "fp8_e4m3" else poison


def _keep_scale(w: Writer, scale: ir.Value, amax: ir.Value, spec: Spec) -> ir.Value:
    """The scale as storage of its kind gives it back.  Raises UnsupportedError for one that needs its neighbours."""
    match spec.scale:
        case "fp32":
            return scale
        case "fp16" | "bf16":
            dtype = _D.FLOAT16 if spec.scale == "fp16" else _D.BFLOAT16
            limits = _SCALE_LIMITS[spec.scale]
            clipped = w.op("Clip", scale, w.number(limits[0]), w.number(limits[1]))
            return w.cast(w.cast(clipped, dtype), _D.FLOAT)
        case "e8m0":
            return _power_of_two(w, amax, spec.format)
        case "fp8_e4m3":
            return _under_tensor_scale(w, scale, amax, spec.format)
    raise w.unsupported(
        f"{spec} finds its scales while running, and {spec.scale!r} scales are made when they are stored",
        "use fp32 or bf16 scales for inputs",
    )


def _element_max(fmt: Format) -> float:
    # see numerics.qparams_of_range: a code book's largest counts as just below 1
    return fmt.max * (1 - 2.0**-24) if isinstance(fmt, CodeBook) else fmt.max


def _power_of_two(w: Writer, amax: ir.Value, fmt: Format) -> ir.Value:
    """The power of two at or below amax, divided by that of the format's largest number."""
    two, half = w.number(2.0), w.number(0.5)
    exponent = w.op("Floor", w.op("Div", w.op("Log", amax), w.number(float(np.log(2.0)))))
    power = w.op("Pow", two, exponent)
    # a rounded logarithm is off by one next to powers of two
    power = w.op("Where", w.op("Greater", power, amax), w.op("Mul", power, half), power)
    double = w.op("Mul", power, two)
    power = w.op("Where", w.op("LessOrEqual", double, amax), double, power)
    element = 2.0 ** (int(np.frexp(_element_max(fmt))[1]) - 1)
    # 2**-127 is the smallest number of E8M0
    scale = w.op("Max", w.op("Mul", power, w.number(1 / element)), w.number(2.0**-127))
    return w.op("Where", w.op("Equal", amax, w.number(0.0)), w.number(1.0), scale)


def _under_tensor_scale(w: Writer, scale: ir.Value, amax: ir.Value, fmt: Format) -> ir.Value:
    low, high = _SCALE_LIMITS["fp8_e4m3"]
    top = w.op("ReduceMax", amax, keepdims=0)
    outer = w.op("Max", w.op("Div", top, w.number(high * _element_max(fmt))), w.number(numerics.SMALLEST_SCALE))
    outer = w.op("Where", w.op("Equal", top, w.number(0.0)), w.number(1.0), outer)
    inner = w.op("Clip", w.op("Div", scale, outer), w.number(low), w.number(high))
    return w.op("Mul", w.cast(w.cast(inner, _D.FLOAT8E4M3FN), _D.FLOAT), outer)


def encode(w: Writer, scaled: ir.Value, spec: Spec, zero: ir.Value | None, levels: Array | None) -> ir.Value:
    """Codes of x / scale, as `numerics.quantize` rounds them: of the ONNX type where there is one, else table codes."""
    fmt = spec.format
    if isinstance(fmt, Integer):
        codes = w.op("Round", scaled)
        codes = codes if zero is None else w.op("Add", codes, zero)
        codes = w.op("Clip", codes, *(w.number(float(c)) for c in spec.code_range))
        return w.cast(codes, _D.INT8 if spec.symmetric else _D.UINT8)
    dtype = code_type(fmt, spec.symmetric, w)
    if dtype is not None:
        return w.cast(w.op("Clip", scaled, w.number(-fmt.max), w.number(fmt.max)), dtype)
    order, edges = _edges(fmt, levels)
    table = w.constant(f"{fmt.name}_order", ir.Tensor(order))
    return w.op("Gather", table, _bucketize(w, scaled, edges, fmt))


def round_to_whole(w: Writer, scaled: ir.Value, fmt: Float) -> ir.Value:
    """The number of the format nearest to x / scale, as `encode` rounds it, over the smallest: whole, float32.

    Numbers are 1 apart up to 2**(mantissa + 1), and above have mantissa + 1 significant bits: those that are left when
    a multiple of x in which the others have no place comes and goes. Rounding to nearest, ties to even, both times.
    Source: Veltkamp (1968), in Boldo, "Pitfalls of a full floating-point proof" (2006); ties: the tests.
    """
    most, bits = fmt.max / fmt.step, fmt.mantissa + 1
    x = w.op("Clip", w.op("Mul", scaled, w.number(1 / fmt.step)), w.number(-most), w.number(most))
    multiple = w.op("Mul", x, w.number(2.0 ** (_FLOAT32_BITS - bits) + 1))
    coarse = w.op("Sub", multiple, w.op("Sub", multiple, x))
    return w.op("Where", w.op("Less", w.op("Abs", x), w.number(2.0**bits)), w.op("Round", x), coarse)


def decode(w: Writer, codes: ir.Value, fmt: Format, levels: Array | None, has_type: bool) -> ir.Value:
    """The float32 number of each code.  has_type: the codes' own type says it, else a table does."""
    if has_type:
        return w.cast(codes, _D.FLOAT)
    table = w.constant(f"{fmt.name}_levels", ir.Tensor(levels_of(fmt, levels), _D.FLOAT))
    return w.op("Gather", table, w.cast(codes, _D.INT32))


def _edges(fmt: Float | CodeBook, levels: Array | None) -> tuple[Array, Array]:
    """The codes by increasing number, and between each two the largest float32 that belongs to the lower one."""
    numbers = levels_of(fmt, levels)
    ordered, first = np.unique(numbers[np.isfinite(numbers)], return_index=True)
    # of equal numbers the lowest code is used
    codes = np.flatnonzero(np.isfinite(numbers))[first].astype(np.uint8)
    if isinstance(fmt, CodeBook) and fmt.levels is not None:
        exact = sorted(set(fmt.levels))
        return codes, np.asarray([(a + b) / 2 for a, b in pairwise(exact)], np.float32)
    edges = ((ordered[1:] + ordered[:-1]) / np.float32(2)).astype(np.float32)
    if isinstance(fmt, Float):
        # halves between two numbers are exact in float32: the oracle says whose they are
        tied = numbers[numerics.encode(torch.from_numpy(edges), fmt).numpy()]
        edges = np.where(tied == ordered[1:], np.nextafter(edges, np.float32(-np.inf)), edges)
    return codes, edges


def _bucketize(w: Writer, x: ir.Value, edges: Array, fmt: Format) -> ir.Value:
    """How many edges lie below each x, int32, found by halving: a step a bit, no memory beyond that of x."""
    padded = np.full(2**fmt.bits - 1, np.inf, np.float32)
    padded[: len(edges)] = edges
    table = w.constant(f"{fmt.name}_edges", ir.Tensor(padded, _D.FLOAT))
    index: ir.Value | None = None
    for bit in reversed(range(fmt.bits)):
        step = 2**bit
        probe = w.number(step - 1, _D.INT32)
        where = probe if index is None else w.op("Add", index, probe)
        above = w.cast(w.op("Greater", x, w.op("Gather", table, where)), _D.INT32)
        move = w.op("Mul", above, w.number(step, _D.INT32))
        index = move if index is None else w.op("Add", index, move)
    assert index is not None
    return index
