"""Linears as TensorRT reads them: symmetric Q/DQ, int8 or fp8 inputs under a calibrated scale, int4 blocks of weights.

Source: TensorRT documentation, "Working with Quantized Types" and IQuantizeLayer: zero points absent or zero, scales
positive, int4 for weights alone in blocks of 64 or 128 along K; trtexec, which refuses int8 and fp8 in one network.
Nothing here was run by TensorRT itself.
"""

from dataclasses import replace as with_fields

import numpy as np
import onnx_ir as ir

from qcompile.backends.onnx import emit_portable
from qcompile.backends.onnx.emit_portable import finish_linear, zero_point
from qcompile.backends.onnx.operands import Array, Input, Weight, by_row, input_of, required, weight_of
from qcompile.backends.onnx.planned import Planned
from qcompile.backends.onnx.storage import code_type, typed
from qcompile.backends.onnx.weights import float_weight
from qcompile.backends.onnx.writer import Writer, replace
from qcompile.recipe import Recipe, Rule
from qcompile.spec import ALL, Spec, Zero

_D = ir.DataType

_INPUTS = ("int8", "fp8_e4m3")
_BLOCKS = (64, 128)
_STATIC = "use a calibrated recipe with one symmetric scale an input: input 'int8/tensor' or 'fp8_e4m3/tensor'"
_WEIGHT = "use weight 'int8/channel', 'fp8_e4m3/channel', or 'int4/g128' without an input spec"


def without_zero_points(recipe: Recipe) -> Recipe:
    """The recipe with symmetric calibrated inputs and results, and none of another spec where those stay poor.

    A rescue finds scales while running, or puts floats beside integers.
    """
    return with_fields(recipe, rules=tuple(_without_zero_points(rule) for rule in recipe.rules))


def _without_zero_points(rule: Rule) -> Rule:
    if not rule.static_input or rule.input is None:
        return rule
    output = None if rule.output is None else with_fields(rule.output, zero=Zero.SYMMETRIC)
    return with_fields(rule, input=with_fields(rule.input, zero=Zero.SYMMETRIC), output=output, rescue=None)


def emit_linear(w: Writer, node: ir.Node) -> Planned:
    """MatMul between DequantizeLinears.

    Raises UnsupportedError for what TensorRT refuses.
    """
    weight, given = weight_of(required(node, 1)), input_of(required(node, 0))
    if weight is None:
        product = w.op("MatMul", required(node, 0), float_weight(w, required(node, 1)))
        return finish_linear(w, node, product, reason="the weight is not quantized")
    require_symmetric(w, weight, given)
    product = w.op("MatMul", required(node, 0), _stored(w, weight))
    return finish_linear(w, node, product, reason="TensorRT fuses when it builds its engine")


def require_symmetric(w: Writer, weight: Weight, given: Input | None) -> None:
    """Raise UnsupportedError for a weight or an input that TensorRT does not multiply."""
    if weight.dtype == _D.DOUBLE:
        raise w.unsupported("TensorRT has no quantized float64", "export the model in float32")
    if (why := _weight_refusal(weight.spec, given)) is not None:
        raise w.unsupported(f"TensorRT takes no weight {weight.spec}{why}", _WEIGHT)
    if given is not None and (why := _input_refusal(given)) is not None:
        raise w.unsupported(f"TensorRT takes no input {given.spec} here: {why}", _STATIC)
    if given is not None and given.spec.format != weight.spec.format:
        raise w.unsupported(f"TensorRT multiplies no {given.spec} by {weight.spec}", "give both sites the same format")


def stored_rows(w: Writer, weight: Weight) -> ir.Value:
    """A weight [N, ...] from codes under one scale a row or a tensor."""
    dtype = code_type(weight.spec.format, True, w)
    if dtype is None or weight.spec.format.name not in _INPUTS:
        raise w.unsupported(f"TensorRT convolves no weight {weight.spec}", "use weight 'int8/channel'")
    codes = w.constant(weight.name, typed(weight.codes, dtype))
    one = weight.spec.granularity.rows == ALL
    scale = _scale(w, weight.name, weight.scale.reshape(() if one else -1), weight.dtype)
    return w.op("DequantizeLinear", codes, scale, axis=0)


def keep_quantize(w: Writer, node: ir.Node) -> None:
    """Nothing: `emit_dequantize` writes both halves of a pair, in the model's float."""


def emit_dequantize(w: Writer, node: ir.Node) -> None:
    """The pair of an activation without casts between, which would keep TensorRT from fusing; a constant as everywhere.

    Raises UnsupportedError for what TensorRT refuses.
    """
    given = input_of(node.outputs[0])
    if given is None:
        emit_portable.emit_dequantize(w, node)
        return
    if (why := _input_refusal(given)) is not None:
        raise w.unsupported(f"TensorRT takes no {given.spec} of {given.x.name!r}: {why}", _STATIC)
    replace(node.outputs[0], _pair(w, given))


def _weight_refusal(spec: Spec, given: Input | None) -> str | None:
    if not spec.symmetric:
        return ": it has a zero point"
    if spec.format.name == "int4":
        if given is not None:
            return f" beside an input {given.spec}: int4 is for weights alone"
        fits = spec.granularity.rows == 1 and spec.granularity.columns in _BLOCKS
        return None if fits else ": int4 comes in blocks of 64 or 128 along K"
    if spec.format.name not in _INPUTS:
        return ""
    return None if spec.granularity.columns == ALL else ": 8 bits have a scale a channel or a tensor"


def _input_refusal(given: Input) -> str | None:
    if not given.spec.symmetric:
        return "it has a zero point"
    if given.spec.format.name not in _INPUTS:
        return "inputs are int8 or fp8_e4m3"
    if given.scale is None:
        return "its scale is found while running"
    return None if given.scale.size == 1 else "inputs have one scale"


def _scale(w: Writer, name: str, scale: Array, dtype: ir.DataType) -> ir.Value:
    """A scale in the model's float, which DequantizeLinear then returns.  Raises UnsupportedError if it rounds to 0."""
    rounded = scale.astype(dtype.numpy())
    if not (np.isfinite(rounded.astype(np.float32)).all() and (rounded.astype(np.float32) > 0).all()):
        raise w.unsupported(
            f"a scale of {name!r} is not positive and finite in {dtype.name.lower()}", "export the model in float32"
        )
    return w.constant(f"{name}_scale", ir.Tensor(rounded, dtype))


def _pair(w: Writer, given: Input) -> ir.Value:
    assert given.scale is not None
    scale_of = given.scale.reshape(())

    def make() -> ir.Value:
        scale = _scale(w, given.x.name or "input", scale_of, given.dtype)
        dtype = code_type(given.spec.format, True, w)
        assert dtype is not None
        # it says the type of the codes, which is uint8 without it
        zero = zero_point(w, 0, dtype)
        return w.op("DequantizeLinear", w.op("QuantizeLinear", given.x, scale, zero), scale, zero)

    return w.once(("pair", given.x, str(given.spec), scale_of.tobytes()), make)


def _stored(w: Writer, weight: Weight) -> ir.Value:
    def make() -> ir.Value:
        dtype = code_type(weight.spec.format, True, w)
        assert dtype is not None
        codes = w.constant(weight.name, typed(np.ascontiguousarray(weight.codes.T), dtype))
        granularity = weight.spec.granularity
        if granularity.rows == ALL:
            return w.op("DequantizeLinear", codes, _scale(w, weight.name, weight.scale.reshape(()), weight.dtype))
        if granularity.columns == ALL:
            scale = _scale(w, weight.name, weight.scale.reshape(-1), weight.dtype)
            return w.op("DequantizeLinear", codes, scale, axis=1)
        blocks = np.ascontiguousarray(by_row(weight.scale, weight).T)
        scale = _scale(w, weight.name, blocks, weight.dtype)
        return w.op("DequantizeLinear", codes, scale, axis=0, block_size=granularity.columns)

    return w.once(("tensorrt", weight.value, weight.spec), make)
