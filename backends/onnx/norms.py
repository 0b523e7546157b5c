"""RMSNorm in both its forms becomes qcompile::RMSNorm(x, weight [K]) with `epsilon`."""

from dataclasses import dataclass

import onnx_ir as ir
import torch

from qcompile.backends.onnx.edit import Editor, sole_user
from qcompile.backends.onnx.ops import RMS_NORM, attribute, is_op
from qcompile.backends.onnx.values import constant, is_float, shape


@dataclass(frozen=True, kw_only=True)
class _Norm:
    """value = x / sqrt(mean(x**2) + epsilon) times weight, if it has one; x is what is normalized, before any cast."""

    value: ir.Value
    x: ir.Value
    epsilon: float
    weight: ir.Value | None = None


def make_rms_norms(edit: Editor) -> int:
    """Replace RMSNormalization, and the chains that exporters write for it, over the last axis; returns how many.

    Of a chain the square may be Pow or Mul, the root Sqrt with Reciprocal or Div or Pow(-0.5), its factors may stand
    in either order, and casts may stand before or after the weight. A chain that something else reads is left alone.
    """
    return sum(_rewrite(edit, node) for node in list(edit.graph))


def _rewrite(edit: Editor, node: ir.Node) -> bool:
    norm = _standard(node) if is_op(node, "RMSNormalization") else _chain(node)
    if norm is None:
        return False
    weight = norm.weight if norm.weight is not None else _ones(edit, norm)
    if weight is None:
        return False
    new = edit.node(RMS_NORM, [norm.x, weight], {"epsilon": norm.epsilon}, name=str(norm.value.name))
    edit.replace(norm.value, new)
    return True


def _standard(node: ir.Node) -> _Norm | None:
    x, weight = node.inputs[:2]
    last = -1 if x is None or x.shape is None else len(x.shape) - 1
    if x is None or weight is None or attribute(node, "axis", -1) not in (-1, last):
        return None
    # of a norm without weight, torch's exporter makes ones of the shape of x
    if not _is_ones(weight) and len(shape(weight)) != 1:
        return None
    epsilon = attribute(node, "epsilon", 1e-5)
    return _Norm(value=node.outputs[0], x=x, weight=None if _is_ones(weight) else weight, epsilon=epsilon)


def _is_ones(weight: ir.Value) -> bool:
    node = weight.producer()
    value = None if node is None or not is_op(node, "ConstantOfShape") else attribute(node, "value")
    return value is not None and float(value.numpy().item()) == 1


def _ones(edit: Editor, norm: _Norm) -> ir.Value | None:
    """The weight of a norm that has none."""
    width = shape(norm.value)[-1:]
    if width in ((), (None,)) or norm.value.dtype is None or not is_float(norm.value):
        return None
    assert width[0] is not None
    ones = ir.tensor([1.0] * width[0], dtype=norm.value.dtype)
    return edit.constant(f"{norm.value.name}_weight", ones)


def _chain(mean: ir.Node) -> _Norm | None:
    """The norm around a mean of squares."""
    wide = _squared(mean)
    if wide is None or wide.dtype is not ir.DataType.FLOAT:
        return None
    variance = sole_user(mean.outputs[0])
    epsilon = _other_number(variance, mean.outputs[0], "Add")
    product = None if variance is None or epsilon is None else _under_one(variance.outputs[0], wide)
    if product is None or epsilon is None:
        return None
    value, x, weight = _tail(product, wide)
    return _Norm(value=value, x=x, weight=weight, epsilon=epsilon)


def _tail(product: ir.Value, wide: ir.Value) -> tuple[ir.Value, ir.Value, ir.Value | None]:
    """The last value of the norm, what it reads, and its weight: past the cast back, if the weight is as narrow."""
    x = _narrow(wide)
    if (cast := _cast_back(product, x)) is not None:
        value, weight = _weighted(cast)
        return value, x, weight
    value, weight = _weighted(product)
    source = None if weight is None else _narrow(weight)
    cast = None if source is weight else _cast_back(value, x)
    if cast is not None and source is not None and source.dtype == x.dtype:
        return cast, x, source
    return value, wide, weight


def _cast_back(value: ir.Value, x: ir.Value) -> ir.Value | None:
    cast = sole_user(value)
    return cast.outputs[0] if is_op(cast, "Cast") and cast is not None and cast.outputs[0].dtype == x.dtype else None


def _weighted(normed: ir.Value) -> tuple[ir.Value, ir.Value | None]:
    """The product with a constant [K] that alone reads the normed value, and that constant; or the value itself."""
    product = sole_user(normed)
    if product is None or not is_op(product, "Mul"):
        return normed, None
    a, b = product.inputs
    other = b if a is normed else a
    held = None if other is None else constant(other)
    is_weight = held is not None and held.dim() == 1 and tuple(held.shape) == shape(normed)[-1:]
    return (product.outputs[0], other) if is_weight else (normed, None)


def _squared(mean: ir.Node) -> ir.Value | None:
    """What a mean over the last axis, which is kept, squares; None if that is not what the node is."""
    if not is_op(mean, "ReduceMean") or attribute(mean, "keepdims", 1) != 1 or mean.inputs[0] is None:
        return None
    square = mean.inputs[0]
    node = square.producer()
    axes = _axes(mean)
    if node is None or sole_user(square) is not mean or axes not in ([-1], [len(shape(square)) - 1]):
        return None
    x = node.inputs[0]
    if is_op(node, "Mul"):
        return x if x is node.inputs[1] else None
    return x if is_op(node, "Pow") and _number(node.inputs[1]) == 2 else None


def _axes(node: ir.Node) -> list[int]:
    if len(node.inputs) > 1 and node.inputs[1] is not None:
        found = constant(node.inputs[1])
        return [] if found is None else [int(axis) for axis in found.flatten()]
    return [int(axis) for axis in attribute(node, "axes", ())]


def _under_one(variance: ir.Value, wide: ir.Value) -> ir.Value | None:
    """wide / sqrt(variance), in any spelling."""
    root = sole_user(variance)
    if root is None:
        return None
    if is_op(root, "Sqrt"):
        inverse = sole_user(root.outputs[0])
        if inverse is not None and is_op(inverse, "Div") and inverse.inputs[1] is root.outputs[0]:
            if _stands_for(inverse.inputs[0], wide):
                return inverse.outputs[0]
            if _number(inverse.inputs[0]) != 1:
                return None
        elif inverse is None or not is_op(inverse, "Reciprocal"):
            return None
    elif is_op(root, "Pow") and _number(root.inputs[1]) == -0.5:
        inverse = root
    else:
        return None
    product = sole_user(inverse.outputs[0])
    if product is None or not is_op(product, "Mul"):
        return None
    a, b = product.inputs
    other = b if a is inverse.outputs[0] else a
    return product.outputs[0] if _stands_for(other, wide) else None


def _stands_for(value: ir.Value | None, wide: ir.Value) -> bool:
    """True for the wide value, and for another cast of the same."""
    return value is wide or (value is not None and value.dtype == wide.dtype and _narrow(value) is _narrow(wide))


def _narrow(wide: ir.Value) -> ir.Value:
    """What a half-precision value was, before it was cast to float32."""
    node = wide.producer()
    source = node.inputs[0] if node is not None and is_op(node, "Cast") else None
    short = source is not None and source.dtype in (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
    return source if source is not None and short and wide.dtype is ir.DataType.FLOAT else wide


def _other_number(node: ir.Node | None, one: ir.Value, op_type: str) -> float | None:
    """What is added to `one`, a positive number."""
    if node is None or not is_op(node, op_type):
        return None
    a, b = node.inputs
    number = _number(b if a is one else a)
    return number if number is not None and number > 0 else None


def _number(value: ir.Value | None) -> float | None:
    held = None if value is None else constant(value)
    return float(held) if held is not None and held.numel() == 1 and held.dtype is not torch.bool else None
