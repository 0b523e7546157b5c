"""Every op of the canonical form in standard ONNX: what the reference evaluator and any runtime can run.

Static inputs become QuantizeLinear and DequantizeLinear, weights DequantizeLinear of stored codes; what ONNX has no
quantizing op for is written as the formula of `qcompile.numerics`.
"""

import numpy as np
import onnx_ir as ir

from qcompile.backends.onnx.formulas import decode, encode, find_qparams, over, tiled, untiled
from qcompile.backends.onnx.operands import Array, dtype_of, float_type, optional, required, spec_of, weight_of
from qcompile.backends.onnx.planned import Planned
from qcompile.backends.onnx.storage import code_type, is_whole, typed
from qcompile.backends.onnx.weights import dequantized_weight, float_weight, gathered_rows
from qcompile.backends.onnx.writer import Writer, array_of, replace
from qcompile.formats import Integer
from qcompile.spec import Spec

_D = ir.DataType


def emit_linear(w: Writer, node: ir.Node) -> Planned:
    """MatMul with the weight [K, N] as stored, and Add of the bias."""
    x, weight = required(node, 0), weight_of(required(node, 1))
    stored = float_weight(w, required(node, 1)) if weight is None else dequantized_weight(w, weight, transposed=True)
    product = w.op("MatMul", x, stored)
    return finish_linear(w, node, product, reason="portable: what a runtime fuses is its own affair")


def finish_linear(
    w: Writer,
    node: ir.Node,
    product: ir.Value,
    *,
    inner: ir.Value | None = None,
    kernel: str | None = None,
    reason: str = "",
    biased: bool = False,
) -> Planned:
    """Add the bias, cast to the linear's dtype, replace the linear, and say what was planned.

    product: its dtype, where known, is the one that the bias is added in.  biased: it holds the bias already.
    inner: what the kernel makes, where product is more than that.
    """
    bias, made = optional(node, 2), [product]
    if bias is not None and not biased:
        addend = bias if product.dtype is None else w.cast(bias, product.dtype)
        made.append(w.op("Add", made[-1], addend, makes=product.dtype))
    dtype = node.outputs[0].dtype or float_type(required(node, 0))
    if product.dtype is not None and dtype is not None and product.dtype != dtype:
        made.append(w.cast(made[-1], dtype))
    kernels = made if inner is None else [inner, *made]
    maker = kernels[0].producer()
    assert maker is not None
    replace(node.outputs[0], made[-1])
    return Planned(
        site=w.site,
        node=maker.name or "",
        outputs=tuple(value.name or "" for value in kernels),
        kernel=kernel,
        reason=reason,
    )


def emit_embedding(w: Writer, node: ir.Node) -> Planned | None:
    """Gather of rows of codes and of their scales; None, and nothing done, for a Gather of anything else."""
    axis = node.attributes.get("axis")
    weight = weight_of(required(node, 0))
    if weight is None or (axis is not None and axis.as_int() != 0):
        return None
    rows = gathered_rows(w, weight, required(node, 1))
    if rows is None:
        w.note(f"rows of {weight.spec} cannot be looked up one by one: the whole table is dequantized in each run")
        rows = w.op("Gather", dequantized_weight(w, weight, transposed=False), required(node, 1), axis=0)
    name = node.outputs[0].name or ""
    replace(node.outputs[0], rows)
    return Planned(site=w.site, node=name, outputs=(name,), reason="a lookup has no kernel to fuse")


def emit_rms_norm(w: Writer, node: ir.Node) -> None:
    """RMSNorm in the form that onnxruntime fuses to SimplifiedLayerNormalization, in float32."""
    x, weight = required(node, 0), required(node, 1)
    epsilon = node.attributes["epsilon"].as_float() if "epsilon" in node.attributes else 1e-5
    dtype = node.outputs[0].dtype or float_type(x) or _D.FLOAT
    wide = w.cast(x, _D.FLOAT)
    square = w.op("ReduceMean", w.op("Pow", wide, w.number(2.0)), w.number([-1], _D.INT64), keepdims=1)
    root = w.op("Sqrt", w.op("Add", square, w.number(epsilon)))
    normal = w.op("Div", wide, root)
    if dtype != _D.FLOAT:
        normal = w.cast(normal, dtype)
    replace(node.outputs[0], w.op("Mul", normal, weight))


def emit_silu(w: Writer, node: ir.Node) -> None:
    """x * sigmoid(x)."""
    x = required(node, 0)
    replace(node.outputs[0], w.op("Mul", x, w.op("Sigmoid", x)))


def emit_gelu(w: Writer, node: ir.Node) -> None:
    """Gelu, in the form that the node says: exact, or through tanh."""
    form = node.attributes["approximate"].as_string() if "approximate" in node.attributes else "none"
    replace(node.outputs[0], w.op("Gelu", required(node, 0), approximate=form))


def emit_outliers(w: Writer, node: ir.Node) -> None:
    """x where its column reaches the threshold anywhere, else 0."""
    x, threshold = required(node, 0), required(node, 1)
    reached = w.cast(w.op("GreaterOrEqual", w.op("Abs", x), threshold), _D.INT32)
    width = w.op("Shape", x, start=-1)
    flat = w.op("Reshape", reached, w.op("Concat", w.number([-1], _D.INT64), width, axis=0))
    # a sum, unlike a maximum, has a value over no rows at all
    mask = w.cast(w.op("ReduceSum", flat, w.number([0], _D.INT64), keepdims=0), _D.BOOL)
    replace(node.outputs[0], w.op("Where", mask, x, w.number(0.0, float_type(x) or _D.FLOAT)))


def emit_quantize(w: Writer, node: ir.Node) -> None:
    """QuantizeLinear under one scale of the tensor, else the formula."""
    spec, x = spec_of(node), w.cast(required(node, 0), _D.FLOAT)
    scale, zero, levels = array_of(required(node, 1)), _array(node, 2), _array(node, 3)
    if (dtype := plain_type(w, spec, scale, zero)) is not None:
        replace(node.outputs[0], quantize_linear(w, x, spec, scale, zero, dtype), same_type=False)
        return
    own = [
        None if p is None else w.constant("qparam", ir.Tensor(p.astype(np.float32), _D.FLOAT)) for p in (scale, zero)
    ]
    assert own[0] is not None
    replace(node.outputs[0], _codes(w, x, spec, own[0], own[1], levels, required(node, 0)), same_type=False)


def _array(node: ir.Node, index: int) -> Array | None:
    value = optional(node, index)
    return None if value is None else array_of(value)


def plain_type(w: Writer, spec: Spec, scale: Array, zero: Array | None) -> ir.DataType | None:
    """The type of codes if QuantizeLinear says what the spec does to an input, else None."""
    one = scale.size == 1 and is_whole(zero)
    return code_type(spec.format, spec.symmetric, w) if one else None


def quantize_linear(
    w: Writer, x: ir.Value, spec: Spec, scale: Array, zero: Array | None, dtype: ir.DataType
) -> ir.Value:
    """QuantizeLinear of float32 x to codes of dtype; x is clipped first where the type holds more codes than the spec.

    scale, zero: of one element.
    """
    if isinstance(spec.format, Integer) and (dtype.min, dtype.max) != spec.code_range:
        x = clip_to_codes(w, x, spec, scale, zero)
    return w.op("QuantizeLinear", x, one_number(w, scale), zero_point(w, center_of(zero), dtype))


def clip_to_codes(w: Writer, x: ir.Value, spec: Spec, scale: Array, zero: Array | None) -> ir.Value:
    """x between the numbers of the least and the greatest code."""
    bounds = [np.float32(code - center_of(zero)) * np.float32(scale.reshape(())) for code in spec.code_range]
    return w.op("Clip", x, *(w.number(float(bound)) for bound in bounds))


def one_number(w: Writer, scale: Array) -> ir.Value:
    """A scale of one element as a scalar."""
    return w.number(float(scale.reshape(())))


def center_of(zero: Array | None) -> int:
    """A zero point of one element; 0 if there is none."""
    return 0 if zero is None else int(zero.reshape(()))


def zero_point(w: Writer, center: int, dtype: ir.DataType) -> ir.Value:
    """A scalar zero point, which also says the type of the codes."""
    if not dtype.is_floating_point():
        return w.number(center, dtype)
    key = ("zero", dtype)
    return w.once(key, lambda: w.constant(f"zero_{dtype.name.lower()}", typed(np.zeros((), np.uint8), dtype)))


def emit_quantize_dynamic(w: Writer, node: ir.Node) -> None:
    """Scale, zero point and codes by the formula."""
    spec, source = spec_of(node), required(node, 0)
    if getattr(spec.format, "levels", ()) is None:
        raise w.unsupported(
            f"{spec} learns its levels from each input, which a file cannot", "use nf4 or an integer format for inputs"
        )
    x = w.cast(source, _D.FLOAT)
    scale, zero = find_qparams(w, x, spec, source)
    codes = _codes(w, x, spec, scale, zero, None, source)
    replace(node.outputs[0], codes, same_type=False)
    replace(node.outputs[1], scale)
    if zero is not None:
        replace(node.outputs[2], zero)


def _codes(
    w: Writer, x: ir.Value, spec: Spec, scale: ir.Value, zero: ir.Value | None, levels: Array | None, like: ir.Value
) -> ir.Value:
    granularity = spec.granularity
    scaled = w.op("Div", tiled(w, x, granularity, like), over(w, scale, granularity))
    spread = None if zero is None else over(w, zero, granularity)
    return untiled(w, encode(w, scaled, spec, spread, levels), granularity, like)


def emit_dequantize(w: Writer, node: ir.Node) -> None:
    """DequantizeLinear of a constant or of an input under one scale, else the formula; cast to the dtype it says."""
    weight = weight_of(node.outputs[0])
    if weight is not None:
        replace(node.outputs[0], dequantized_weight(w, weight, transposed=False))
        return
    spec, codes = spec_of(node), required(node, 0)
    scale = required(node, 1)
    known = scale.const_value is not None
    plain = plain_type(w, spec, array_of(scale), _array(node, 2)) if known else None
    if plain is not None:
        center = center_of(_array(node, 2))
        value = w.op("DequantizeLinear", codes, one_number(w, array_of(scale)), zero_point(w, center, plain))
    else:
        value = _values(w, node, spec)
    replace(node.outputs[0], w.cast(value, dtype_of(node)))


def _values(w: Writer, node: ir.Node, spec: Spec) -> ir.Value:
    codes, scale, zero = required(node, 0), required(node, 1), optional(node, 2)
    has_type = code_type(spec.format, spec.symmetric, w) is not None
    values = decode(w, codes, spec.format, _array(node, 3), has_type)
    values = tiled(w, values, spec.granularity, node.outputs[0])
    if zero is not None and not spec.symmetric:
        values = w.op("Sub", values, over(w, w.cast(zero, _D.FLOAT), spec.granularity))
    values = w.op("Mul", values, over(w, scale, spec.granularity))
    return untiled(w, values, spec.granularity, codes)
