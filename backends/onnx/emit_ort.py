"""Linears as onnxruntime's CPU multiplies them fast: integer matmuls, and narrow weights.

    static input       QuantizeLinear, u8       com.microsoft::MatMulIntegerToFloat
    dynamic input      DynamicQuantizeLinear    the same, of normalized tokens if each has a scale of its own
    groups, no input                            com.microsoft::MatMulNBits, 2, 4, 8 bits

onnxruntime finds the integer kernel in standard operators, too, but then without the bias and not at every rank.

Floats of few bits are lifted to integers: E2M1's numbers times two are whole (0, 1 ... 12), and exact.  What is
narrower than a kernel wants is stored narrow, and widened by ops that onnxruntime computes once, when it loads.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from qcompile.backends.onnx.emit_portable import (
    center_of,
    clip_to_codes,
    finish_linear,
    one_number,
    zero_point,
)
from qcompile.backends.onnx.operands import (
    Array,
    Input,
    Weight,
    by_row,
    input_of,
    levels_of,
    optional,
    required,
    weight_of,
)
from qcompile.backends.onnx.planned import Planned
from qcompile.backends.onnx.storage import code_constant, is_whole, lift, pack_bytes, scale_constant, typed
from qcompile.backends.onnx.weights import dequantized_weight, float_weight
from qcompile.backends.onnx.writer import Writer
from qcompile.backends.onnx.writer import replace as replace_value
from qcompile.formats import Integer
from qcompile.numerics import SMALLEST_SCALE
from qcompile.spec import ALL, Zero

_D = ir.DataType
CONTRIB = "com.microsoft"
# the second is what onnxruntime makes of the first and of the DynamicQuantizeLinear before it
INTEGER, _DYNAMIC = "MatMulIntegerToFloat", "DynamicQuantizeMatMul"

# MatMulNBits takes blocks of 16, 32, 64 ... along K, and on the CPU rounds inputs by them: where more columns share the
# weight's scales, blocks of 32 keep inputs precise
_LEAST_BLOCK, _BLOCK, MOST_BLOCK = 16, 32, 256
# inputs are rounded to int8, block by block: the fast kernel of 4 bits, and the only one of 2 and 8 that is not slow
_INT8_ACCURACY = 4

# what a dynamic input gets, by whether tokens have scales of their own
_FOUND = {False: "8 bits, one scale and a zero point a call", True: "8 bits and a scale a token, around zero"}


@dataclass(frozen=True, kw_only=True, eq=False)
class Whole:
    """A weight whose numbers are integers times its scale.

    table: the int8 number of each code, None if the codes are their own numbers.  factor: of the scale.
    least_bits: that the kernel takes.  most_block: of the columns that share a scale in it.
    """

    weight: Weight
    table: Array | None = None
    factor: float = 1.0
    least_bits: int = 2
    most_block: int = _BLOCK

    @property
    def bits(self) -> int:
        """That a kernel's code needs: 2, 4 or 8."""
        bits = 8 if self.table is not None else self.weight.spec.format.bits
        return next(b for b in (2, 4, 8) if b >= max(bits, self.least_bits))

    @property
    def by_row(self) -> bool:
        """Whether all of a row shares one scale, so that sums over K can be scaled at the end."""
        return self.weight.spec.granularity.columns == ALL

    @property
    def block(self) -> int:
        """The block of MatMulNBits along K; 0 if none fits the groups."""
        columns = self.weight.spec.granularity.columns
        if columns == ALL:
            return _BLOCK if self.weight.codes.shape[1] > _LEAST_BLOCK else _LEAST_BLOCK
        block = min(columns & -columns, self.most_block)
        return block if block >= _LEAST_BLOCK else 0


def whole(weight: Weight) -> Whole | None:
    """The weight as integers; None if its format does not fit into int8, or its zero points are no integers."""
    if weight.codes.ndim != 2 or weight.spec.zero is Zero.MINIMUM or not is_whole(weight.zero):
        return None
    if isinstance(weight.spec.format, Integer):
        return Whole(weight=weight)
    lifted = lift(weight.spec.format, levels_of(weight.spec.format, weight.levels))
    return None if lifted is None else Whole(weight=weight, table=lifted[0], factor=lifted[1])


def emit_cpu_linear(w: Writer, node: ir.Node) -> Planned:
    """The first form that fits the weight and the input."""
    weight, given = weight_of(required(node, 1)), input_of(required(node, 0))
    if weight is None:
        product = w.op("MatMul", required(node, 0), float_weight(w, required(node, 1)))
        return finish_linear(w, node, product, reason="the weight is not quantized")
    integers = whole(weight)
    integer_input = given is not None and isinstance(given.spec.format, Integer)
    if integers is None or not (integers.by_row or integers.block):
        return _emit_restored(w, node, weight, given)
    if given is not None and integer_input and integers.by_row and _one_scale(given):
        form: Callable[..., Planned] = _emit_static if given.static else _emit_dynamic
        return form(w, node, integers, given)
    if given is None and integers.by_row and _serves_integers(node):
        return _emit_beside(w, node, integers)
    planned = "float" if given is None else given.spec
    w.note(f"inputs become int8 in blocks of {integers.block} inside MatMulNBits (planned: {planned})")
    if given is not None and not integer_input:
        _note_slow(w, given)
    return emit_narrow(w, node, integers, given if integer_input else None, _D.FLOAT, _INT8_ACCURACY)


def keep_norm_alone(w: Writer, node: ir.Node) -> None:
    """Write a sum before a norm so that onnxruntime leaves the two alone.

    It fuses Add and LayerNormalization to one op, which takes longer than the two by themselves. A Sum of two is an Add
    that its optimizer does not know.
    """
    total = required(node, 0)
    added = total.producer()
    if added is not None and (added.domain, added.op_type) == ("", "Add"):
        w.anchor = added
        replace_value(total, w.op("Sum", *added.inputs))


def _one_scale(given: Input) -> bool:
    return given.scale is None or (given.scale.size == 1 and is_whole(given.zero))


def _emit_restored(w: Writer, node: ir.Node, weight: Weight, given: Input | None) -> Planned:
    """A float matmul: the weight is small on disk, and restored when the file is loaded."""
    x = required(node, 0)
    reason = f"no kernel multiplies {weight.spec}: the weight becomes float when the file is loaded"
    if given is not None:
        _note_slow(w, given)
    product = w.op("MatMul", x, dequantized_weight(w, weight, transposed=True, fold=True))
    return finish_linear(w, node, product, reason=reason)


def _serves_integers(node: ir.Node) -> bool:
    """Whether another linear multiplies the same weight by integers."""
    readers = (use.node for use in required(node, 1).uses() if use.node is not node and use.node.op_type == "Linear")
    inputs = (input_of(required(reader, 0)) for reader in readers)
    return any(given is not None and isinstance(given.spec.format, Integer) for given in inputs)


def _emit_beside(w: Writer, node: ir.Node, integers: Whole) -> Planned:
    """A float matmul of a weight that is stored for an integer one: the outliers of LLM.int8 are not rounded."""
    matrix, zero = integer_matrix(w, integers)
    values = w.cast(matrix, _D.FLOAT)
    values = values if zero is None else w.op("Sub", values, w.cast(zero, _D.FLOAT))
    restored = w.op("Mul", values, row_scale(w, integers))
    product = w.op("MatMul", w.cast(required(node, 0), _D.FLOAT), restored, makes=_D.FLOAT)
    reason = "the weight is stored for an integer matmul, and becomes float here when the file is loaded"
    return finish_linear(w, node, product, reason=reason)


def _note_slow(w: Writer, given: Input) -> None:
    w.note(f"inputs are rounded to {given.spec} in float: right, but not fast")


def _emit_static(w: Writer, node: ir.Node, integers: Whole, given: Input) -> Planned:
    """u8 input under the calibrated scale; linears that read the same input share its codes."""
    assert given.scale is not None
    spec, scale, zero = given.spec, given.scale, given.zero
    # symmetric codes move by 128: x86 multiplies unsigned by signed bytes
    offset = 128 if spec.symmetric else 0

    def make() -> Sequence[ir.Value]:
        x = w.cast(given.x, _D.FLOAT)
        # 8 bits saturate by themselves; that a symmetric input may reach -128 only loses less
        x = x if spec.format.bits == 8 else clip_to_codes(w, x, spec, scale, zero)
        pair = (one_number(w, scale), zero_point(w, center_of(zero) + offset, _D.UINT8))
        return [w.op("QuantizeLinear", x, *pair), *pair]

    codes = w.many(("static", given.x, str(spec), scale.tobytes(), center_of(zero)), make)
    product = _integer_product(w, integers, codes, optional(node, 2))
    return finish_linear(w, node, product, kernel=INTEGER, biased=True)


def _integer_product(w: Writer, integers: Whole, codes: Sequence[ir.Value], bias: ir.Value | None) -> ir.Value:
    """The product in float32.  codes: of the input, with their scale and zero point."""
    values, scale, zero = codes
    matrix, weight_zero = integer_matrix(w, integers)
    addend = None if bias is None else w.cast(bias, _D.FLOAT)
    inputs = [values, matrix, scale, row_scale(w, integers), zero, weight_zero, addend]
    return w.op(INTEGER, *inputs, domain=CONTRIB, makes=_D.FLOAT)


def _emit_dynamic(w: Writer, node: ir.Node, integers: Whole, given: Input) -> Planned:
    """u8 input under a scale found for the whole input, once for all linears that read it.

    Where tokens have scales of their own, each is first divided by its largest magnitude, and its results multiplied
    by it: under the one scale that onnxruntime finds then, each has all the codes.
    """
    by_token = given.spec.granularity.rows != ALL
    if str(given.spec) not in ("int8/tensor/asym", "int8/token"):
        w.note(f"inputs get {_FOUND[by_token]} (planned: {given.spec}), as onnxruntime's kernel finds them")

    def make() -> Sequence[ir.Value]:
        x = w.cast(given.x, _D.FLOAT)
        if not by_token:
            return w.ops("DynamicQuantizeLinear", [x], 3)
        peak = w.op("ReduceMax", w.op("Abs", x), w.number([-1], _D.INT64), keepdims=1)
        peak = w.op("Max", peak, w.number(SMALLEST_SCALE))
        return [*w.ops("DynamicQuantizeLinear", [w.op("Div", x, peak)], 3), peak]

    found = w.many(("dynamic", given.x, by_token), make)
    if not by_token:
        product = _integer_product(w, integers, found, optional(node, 2))
        return finish_linear(w, node, product, kernel=_DYNAMIC, biased=True)
    *codes, peak = found
    inner = _integer_product(w, integers, codes, None)
    return finish_linear(w, node, w.op("Mul", inner, peak, makes=_D.FLOAT), inner=inner, kernel=_DYNAMIC)


def row_scale(w: Writer, integers: Whole) -> ir.Value:
    weight = integers.weight
    scale = weight.scale * np.float32(integers.factor)
    shaped = scale.reshape(()) if weight.spec.granularity.rows == ALL else scale.reshape(-1)
    key = ("row scale", weight.value, weight.spec)
    return w.once(key, lambda: scale_constant(w, f"{weight.name}_scale", shaped, weight.spec))


def integer_matrix(w: Writer, integers: Whole) -> tuple[ir.Value, ir.Value | None]:
    """The weight [K, N] as int8 or uint8, stored in as many bits as its codes have, and its zero points."""
    weight = integers.weight
    signed = integers.table is not None or weight.spec.symmetric
    wide = _D.INT8 if signed else _D.UINT8

    def make() -> ir.Value:
        codes = np.ascontiguousarray(weight.codes.T)
        if integers.table is not None:
            return looked_up(w, weight, codes, integers.table)
        return w.cast(code_constant(w, weight.name, codes, weight.spec)[0], wide)

    matrix = w.once(("matrix", weight.value, weight.spec), make)
    if weight.zero is None:
        return matrix, None
    zero = weight.zero.reshape(()) if weight.spec.granularity.rows == ALL else weight.zero.reshape(-1)
    key = ("matrix zero", weight.value, weight.spec)
    return matrix, w.once(key, lambda: w.constant(f"{weight.name}_zero", typed(zero, wide)))


def looked_up(w: Writer, weight: Weight, codes: Array, table: Array) -> ir.Value:
    """table[codes], computed when the file is loaded; where codes fill bytes anyway, stored as it is."""
    if weight.spec.format.bits > 4:
        return w.constant(weight.name, ir.Tensor(table[codes]))
    stored = w.constant(weight.name, typed(codes, _D.UINT4))
    return w.op("Gather", w.constant(f"{weight.name}_numbers", ir.Tensor(table)), w.cast(stored, _D.INT32))


def emit_narrow(
    w: Writer, node: ir.Node, integers: Whole, given: Input | None, compute: ir.DataType, accuracy: int
) -> Planned:
    """com.microsoft::MatMulNBits: codes [N, blocks, bytes], scales [N, blocks], zero points packed or absent.

    given: the input's quantization that is left out.  compute: the dtype of input, scales and result.
    """
    weight = integers.weight
    n, k = weight.codes.shape
    key = ("narrow", weight.value, weight.spec, compute)
    constants = w.many(key, lambda: _narrow_constants(w, integers, compute))
    x = w.cast(required(node, 0) if given is None else given.x, compute)
    attributes = {"K": k, "N": n, "bits": integers.bits, "block_size": integers.block, "accuracy_level": accuracy}
    product = w.op("MatMulNBits", x, *constants, domain=CONTRIB, makes=compute, **attributes)
    return finish_linear(w, node, product, kernel="MatMulNBits")


def _narrow_constants(w: Writer, integers: Whole, compute: ir.DataType) -> list[ir.Value]:
    weight, bits, block = integers.weight, integers.bits, integers.block
    n, k = weight.codes.shape
    blocks = -(-k // block)
    middle = 2 ** (bits - 1)
    padded = np.pad(weight.codes.astype(np.int16), ((0, 0), (0, blocks * block - k))).reshape(n, blocks, block)
    if integers.table is not None:
        table = (integers.table.astype(np.int16) + middle).astype(np.uint8)
        packed = looked_up(w, weight, padded.astype(np.uint8), table)
    else:
        shifted = padded + (middle if weight.spec.symmetric else 0)
        packed = w.constant(weight.name, ir.Tensor(pack_bytes(shifted.astype(np.uint8), bits)))
    constants = [packed, w.cast(_block_scale(w, integers, blocks), compute)]
    if weight.zero is not None:
        zero = np.repeat(by_row(weight.zero, weight), blocks // by_row(weight.zero, weight).shape[1], 1)
        constants.append(w.constant(f"{weight.name}_zero", ir.Tensor(pack_bytes(zero.astype(np.uint8), bits))))
    return constants


def _block_scale(w: Writer, integers: Whole, blocks: int) -> ir.Value:
    """Scales [N, blocks]; where blocks share them, repeated when the file is loaded."""
    weight = integers.weight
    scale = by_row(weight.scale * np.float32(integers.factor), weight)
    n, groups = scale.shape
    stored = scale_constant(w, f"{weight.name}_scale", np.ascontiguousarray(scale), weight.spec)
    if groups == blocks:
        return stored
    apart = w.op("Unsqueeze", stored, w.number([-1], _D.INT64))
    repeated = w.op("Expand", apart, w.number([n, groups, blocks // groups], _D.INT64))
    return w.op("Reshape", repeated, w.number([n, blocks], _D.INT64))
