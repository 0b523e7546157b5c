"""Stored weights in standard ONNX: DequantizeLinear where its axis and blocks say it, else a table and a product."""

import numpy as np
import onnx_ir as ir

from qcompile.backends.onnx.formulas import decode
from qcompile.backends.onnx.operands import Array, Weight, by_row
from qcompile.backends.onnx.storage import code_constant, code_type, integer_type, is_whole, scale_constant, typed
from qcompile.backends.onnx.writer import Writer, array_of
from qcompile.errors import GraphError
from qcompile.spec import ALL, Granularity, Zero

_D = ir.DataType


def float_weight(w: Writer, value: ir.Value) -> ir.Value:
    """A float weight [N, K] as [K, N].  It is stored so, save where others read it as it is."""
    linears = all(use.node.op_type == "Linear" and use.idx == 1 for use in value.uses())
    if value.const_value is None or not linears or value.is_graph_output():
        return w.once(("turned", value), lambda: w.op("Transpose", value, perm=[1, 0]))
    turned = ir.Tensor(_oriented(array_of(value), True), value.const_value.dtype)
    return w.once(("turned", value), lambda: w.constant(f"{value.name}_t", turned))


def dequantized_weight(w: Writer, weight: Weight, transposed: bool, fold: bool = False) -> ir.Value:
    """The weight's numbers in its dtype, [N, K] or transposed [K, N], from stored codes.

    fold: write a formula that a runtime computes once, when it loads the file, in place of DequantizeLinear.
    """
    known = code_type(weight.spec.format, weight.spec.symmetric, w) is not None
    write = _dequantize_linear if known and _has_axis(weight) and not fold else _formula
    key = ("dequantized", weight.value, weight.spec, weight.dtype, transposed, fold)
    return w.once(key, lambda: w.cast(write(w, weight, transposed), weight.dtype))


def _has_axis(weight: Weight) -> bool:
    """Whether DequantizeLinear can share scales as the weight does: along one axis, under whole zero points."""
    along_one = weight.codes.ndim == 2 or weight.spec.granularity.rows == ALL or weight.scale.size == len(weight.codes)
    return weight.spec.zero is not Zero.MINIMUM and is_whole(weight.zero) and along_one


def _oriented(array: Array, transposed: bool) -> Array:
    return np.ascontiguousarray(array.T) if transposed else array


def _dequantize_linear(w: Writer, weight: Weight, transposed: bool) -> ir.Value:
    codes, _ = code_constant(w, weight.name, _oriented(weight.codes, transposed), weight.spec)
    scale = scale_constant(w, f"{weight.name}_scale", _shared(weight.scale, weight, transposed), weight.spec)
    inputs = [codes, scale]
    if weight.zero is not None:
        zero = typed(_shared(weight.zero, weight, transposed), integer_type(weight.spec.format.bits, signed=False))
        inputs.append(w.constant(f"{weight.name}_zero", zero))
    axis, block = _axis(weight.spec.granularity, transposed)
    result = w.op("DequantizeLinear", *inputs, axis=axis, block_size=block)
    result.dtype, result.shape = _D.FLOAT, codes.shape
    return result


def _shared(parameter: Array, weight: Weight, transposed: bool) -> Array:
    """A scale or zero point as DequantizeLinear wants it: [], [N], [N, G] or [G, N]."""
    granularity = weight.spec.granularity
    if granularity.rows == ALL:
        return parameter.reshape(())
    if granularity.columns == ALL:
        return parameter.reshape(-1)
    return _oriented(by_row(parameter, weight), transposed)


def _axis(granularity: Granularity, transposed: bool) -> tuple[int, int]:
    """Axis and block size of DequantizeLinear; it ignores the axis of a scalar scale, and 0 is no block."""
    if granularity.columns == ALL:
        return int(transposed), 0
    return 1 - int(transposed), granularity.columns


def _formula(w: Writer, weight: Weight, transposed: bool) -> ir.Value:
    """What the spec makes of the numbers of codes, with the tiles spread out for broadcasting."""
    granularity = weight.spec.granularity
    if transposed and weight.codes.ndim != 2:
        raise GraphError(f"{w.site}: a linear's weight has shape [N, K], got {list(weight.codes.shape)}")
    stored, has_type = code_constant(w, weight.name, _oriented(weight.codes, transposed), weight.spec)
    values = decode(w, stored, weight.spec.format, weight.levels, has_type)
    blocked = granularity.columns != ALL
    if blocked:
        values = w.op("Reshape", values, w.number(_blocks(weight, transposed), _D.INT64))
    for name, kind, parameter in weight.steps:
        spread, place = _spread(parameter, weight, transposed), f"{weight.name}_{name}"
        scale = scale_constant(w, place, spread, weight.spec) if kind == "Mul" else None
        values = w.op(kind, values, w.constant(place, ir.Tensor(spread, _D.FLOAT)) if scale is None else scale)
    result = values
    if blocked:
        result = w.op("Reshape", values, w.number(list(_oriented(weight.codes, transposed).shape), _D.INT64))
    result.dtype, result.shape = _D.FLOAT, stored.shape
    return result


def _blocks(weight: Weight, transposed: bool) -> list[int]:
    shape, size = list(weight.codes.shape), weight.spec.granularity.columns
    along = [shape[-1] // size, size]
    return [*along, shape[0]] if transposed else [*shape[:-1], *along]


def _spread(parameter: Array, weight: Weight, transposed: bool) -> Array:
    """A scale or zero point that broadcasts over the codes, or over `_blocks` of them."""
    granularity = weight.spec.granularity
    if granularity.rows == ALL:
        return parameter.reshape(())
    if granularity.columns == ALL:
        return _oriented(parameter, transposed)
    if weight.codes.ndim == 2:
        parameter = by_row(parameter, weight)
    return _oriented(parameter, True)[:, None, :] if transposed else parameter[..., None]


def gathered_rows(w: Writer, weight: Weight, indices: ir.Value) -> ir.Value | None:
    """Rows of an embedding from rows of its codes and scales; None if the codes are no bytes or the rows have groups.

    So a lookup reads only what it needs, where a dequantized table would be all of it in each run.
    """
    granularity = weight.spec.granularity
    bytes_only = code_type(weight.spec.format, weight.spec.symmetric, w) in (_D.INT8, _D.UINT8)
    if not bytes_only or granularity.columns != ALL or weight.codes.ndim != 2:
        return None
    table = w.once(("rows", weight.value), lambda: code_constant(w, weight.name, weight.codes, weight.spec)[0])
    rows = w.cast(w.op("Gather", table, indices, axis=0), _D.FLOAT)
    for name, kind, parameter in weight.steps:
        rows = w.op(kind, rows, _rows_of(w, weight, name, parameter, indices))
    return w.cast(rows, weight.dtype)


def _rows_of(w: Writer, weight: Weight, name: str, parameter: Array, indices: ir.Value) -> ir.Value:
    stored = ir.Tensor(parameter, _D.FLOAT)
    own = w.once((name, weight.value, weight.spec), lambda: w.constant(f"{weight.name}_{name}", stored))
    return own if weight.spec.granularity.rows == ALL else w.op("Gather", own, indices, axis=0)
