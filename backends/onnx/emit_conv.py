"""Convolutions for every target: standard Q/DQ, QLinearConv of onnxruntime's CPU, and TensorRT's rules.

    portable  the convolution between standard Q/DQ
    ort-cpu   u8 input, int8 weight and int32 bias, between Q/DQ on both sides   -> QLinearConv
    ort-cuda  no kernel reads codes: small in the file, float when it is loaded
    tensorrt  Q/DQ where a convolution reads, symmetric; of what a sum adds, the convolution's own result stays float

The pairs that a kernel reads and makes are brought to its form before: see `qcompile.backends.onnx.pairs`.
"""

from dataclasses import replace

import numpy as np
import onnx_ir as ir

from qcompile.backends.onnx.emit_ort import looked_up, whole
from qcompile.backends.onnx.emit_portable import clip_to_codes
from qcompile.backends.onnx.emit_tensorrt import require_symmetric, stored_rows
from qcompile.backends.onnx.operands import Array, Input, Weight, input_of, optional, required, weight_of
from qcompile.backends.onnx.pairs import is_byte_pair
from qcompile.backends.onnx.planned import Planned
from qcompile.backends.onnx.storage import code_constant, scale_constant
from qcompile.backends.onnx.weights import dequantized_weight
from qcompile.backends.onnx.writer import Writer, array_of

_D = ir.DataType
# a bias in int32 stays below half of its range, so that the sums that it starts have the other half
_MOST_BIAS = np.float32(2.0**30)


def emit_portable_conv(w: Writer, node: ir.Node) -> Planned | None:
    """The convolution as it is; None if its weight is float."""
    if weight_of(required(node, 1)) is None:
        return None
    return _planned(w, node, reason="portable: what a runtime fuses is its own affair")


def emit_cpu_conv(w: Writer, node: ir.Node) -> Planned | None:
    """QLinearConv where input, weight and result have codes that it takes, else a float one; None as above."""
    weight, given = weight_of(required(node, 1)), input_of(required(node, 0))
    if weight is None:
        return None
    if reason := _obstacle(node, weight, given):
        if given is not None:
            w.note(f"the convolution is computed in float, from inputs rounded to {given.spec}: {reason}")
            node.replace_input_with(0, _apart(w, given))
        return _restored(w, node, weight, reason)
    assert given is not None
    assert given.scale is not None
    step, bias = np.float32(given.scale.reshape(())), optional(node, 2)
    offset = None if bias is None else array_of(bias)
    codes, scale = _integers(w, weight, step, offset)
    node.replace_input_with(1, w.op("DequantizeLinear", codes, scale_constant(w, *scale, weight.spec), axis=0))
    if bias is not None and offset is not None:
        node.replace_input_with(2, _integer_bias(w, bias, offset, scale[1] * step))
    result = next(iter(node.outputs[0].uses())).node.outputs[0]
    return _planned(w, node, result, kernel="QLinearConv")


def emit_cuda_conv(w: Writer, node: ir.Node) -> Planned | None:
    """A float convolution of a weight that is small in the file; None as above."""
    weight = weight_of(required(node, 1))
    if weight is None:
        return None
    return _restored(w, node, weight, "no CUDA kernel of onnxruntime convolves codes, so that inputs stay float")


def emit_tensorrt_conv(w: Writer, node: ir.Node) -> Planned | None:
    """The convolution between DequantizeLinears, of its weight along axis 0; None as above.

    Raises UnsupportedError for what TensorRT refuses.
    """
    weight, given = weight_of(required(node, 1)), input_of(required(node, 0))
    if weight is None:
        return None
    require_symmetric(w, weight, given)
    node.replace_input_with(1, stored_rows(w, weight))
    return _planned(w, node, reason="TensorRT fuses when it builds its engine")


def _planned(
    w: Writer, node: ir.Node, result: ir.Value | None = None, *, kernel: str | None = None, reason: str = ""
) -> Planned:
    # onnxruntime calls the result of a fused convolution by the node's name, or as what quantized it was called
    node.name = node.name or w.fresh(f"{w.site}/Conv")
    outputs = (node.name, str((result or node.outputs[0]).name))
    return Planned(site=w.site, node=node.name, outputs=outputs, kernel=kernel, reason=reason)


def _restored(w: Writer, node: ir.Node, weight: Weight, reason: str) -> Planned:
    node.replace_input_with(1, dequantized_weight(w, weight, transposed=False, fold=True))
    return _planned(w, node, reason=f"{reason}: the weight becomes float when the file is loaded")


def _apart(w: Writer, given: Input) -> ir.Value:
    """The same numbers, clipped to the range that they have.

    onnxruntime 1.32 rounds a float weight to int8 under one scale of its own if DequantizeLinear stands right before
    the convolution and QuantizeLinear right behind it.
    """
    if given.scale is None:
        return given.dequantized
    scale = given.scale
    return w.once(("apart", given.dequantized), lambda: _clipped(w, given, scale))


def _clipped(w: Writer, given: Input, scale: Array) -> ir.Value:
    clipped = clip_to_codes(w, w.cast(given.dequantized, _D.FLOAT), given.spec, scale, given.zero)
    clipped.dtype, clipped.shape = _D.FLOAT, given.dequantized.shape
    return w.cast(clipped, given.dtype)


def _obstacle(node: ir.Node, weight: Weight, given: Input | None) -> str:
    """Why QLinearConv cannot run a convolution of this weight; empty if it can."""
    if given is None:
        return "its input is not quantized"
    if whole(_matrix(weight)) is None or weight.zero is not None:
        return f"no kernel convolves {weight.spec}"
    made = required(node, 0).producer()
    if made is None or not is_byte_pair(required(made, 0).producer()):
        return f"no kernel convolves inputs {given.spec}"
    if given.dtype != _D.FLOAT:
        return f"the model computes in {given.dtype.name.lower()}"
    bias, result = optional(node, 2), node.outputs[0]
    if bias is not None and bias.const_value is None:
        return "its bias is computed while running"
    readers = result.uses()
    if len(readers) != 1 or result.is_graph_output() or not is_byte_pair(next(iter(readers)).node):
        return "its result is not quantized alone"
    return ""


def _matrix(weight: Weight) -> Weight:
    """A weight [N, C, ...] as [N, K]."""
    rows = [None if p is None or p.size == 1 else p.reshape(-1, 1) for p in (weight.scale, weight.zero)]
    return replace(
        weight,
        codes=weight.codes.reshape(len(weight.codes), -1),
        scale=weight.scale if rows[0] is None else rows[0],
        zero=weight.zero if rows[1] is None else rows[1],
    )


def _integers(w: Writer, weight: Weight, step: np.float32, bias: Array | None) -> tuple[ir.Value, tuple[str, Array]]:
    """The codes of a weight as int8, and the name and scales [N] of its scale.

    step: of the input.  A channel whose weights are so small that its bias would not fit into int32 under their scale
    gets a larger scale: what its weights lose is less than the last bit of the bias.
    """
    integers = whole(_matrix(weight))
    assert integers is not None
    scale = np.broadcast_to(weight.scale.reshape(-1) * np.float32(integers.factor), len(weight.codes))
    name = f"{weight.name}_scale"
    least = np.zeros_like(scale) if bias is None else np.abs(bias.astype(np.float32)) / (step * _MOST_BIAS)
    if (scale < least).any():
        numbers = weight.codes if integers.table is None else integers.table[weight.codes]
        shrunk = numbers * np.minimum(scale / np.maximum(least, scale), 1).reshape(-1, *[1] * (weight.codes.ndim - 1))
        return w.constant(weight.name, ir.Tensor(np.round(shrunk).astype(np.int8))), (name, np.maximum(scale, least))
    if integers.table is not None:
        return looked_up(w, weight, weight.codes, integers.table), (name, scale)
    return w.cast(code_constant(w, weight.name, weight.codes, weight.spec)[0], _D.INT8), (name, scale)


def _integer_bias(w: Writer, bias: ir.Value, offset: Array, scale: Array) -> ir.Value:
    codes = np.round(offset.astype(np.float64) / scale).astype(np.int32)
    held = w.constant(f"{bias.name}_codes", ir.Tensor(codes))
    return w.op("DequantizeLinear", held, w.constant(f"{bias.name}_scale", ir.Tensor(scale, _D.FLOAT)), axis=0)
