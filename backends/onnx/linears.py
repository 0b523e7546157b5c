"""Linear in all its spellings becomes qcompile::Linear(x [..., K], weight [N, K], bias [N])."""

from dataclasses import dataclass

import onnx_ir as ir
import torch
from torch import Tensor

from qcompile.backends.onnx.edit import Editor, sole_user
from qcompile.backends.onnx.ops import LINEAR, attribute, is_op
from qcompile.backends.onnx.values import constant, is_constant, lazy_tensor, qualified_name, set_qualified_name


@dataclass(frozen=True, kw_only=True)
class _Linear:
    """What a node reads.

    turned: the weight is [K, N].  rest: what a Gemm adds.  alpha, beta: factors of a Gemm's product and of its rest.
    columns: x is [K, M].
    """

    x: ir.Value
    weight: ir.Value
    turned: bool
    rest: ir.Value | None = None
    alpha: float = 1.0
    beta: float = 1.0
    columns: bool = False


def make_linears(edit: Editor) -> int:
    """Rewrite MatMul and Gemm with a constant weight, and the bias that is added to them, in place; returns how many.

    A weight [K, N], or one with a factor, becomes a new constant, which is made when somebody reads it. No constant
    changes.
    """
    made: dict[tuple[ir.Value, bool, float], ir.Value] = {}
    count = 0
    for node in list(edit.graph):
        found = _linear(node)
        if found is None:
            continue
        key = (found.weight, found.turned, found.alpha)
        if key not in made:
            made[key] = _prepared(edit, *key)
        _rewrite(edit, node, found, made[key])
        count += 1
    return count


def _linear(node: ir.Node) -> _Linear | None:
    if is_op(node, "MatMul"):
        x, weight = node.inputs
        found = _plain(weight)
        return None if x is None or found is None or is_constant(x) else _Linear(x=x, weight=found[0], turned=found[1])
    if not is_op(node, "Gemm"):
        return None
    x, weight, rest = (*node.inputs, None)[:3]
    found = _plain(weight)
    alpha, beta = (float(attribute(node, name, 1.0)) for name in ("alpha", "beta"))
    rest = None if beta == 0 else rest
    if x is None or found is None or is_constant(x) or not _stays_finite(found[0], alpha):
        return None
    if rest is not None and beta != 1 and rest.dtype is None:
        return None
    turned, columns = found[1] != bool(attribute(node, "transB", 0)), bool(attribute(node, "transA", 0))
    return _Linear(x=x, weight=found[0], turned=turned, rest=rest, alpha=alpha, beta=beta, columns=columns)


def _stays_finite(weight: ir.Value, alpha: float) -> bool:
    """Whether the weight has room for the factor; it is read only where it may have none."""
    if abs(alpha) <= 1:
        return True
    held = constant(weight)
    return held is not None and bool((_times(held, alpha).isfinite() == held.isfinite()).all())


def _times(tensor: Tensor, factor: float) -> Tensor:
    """The product, rounded once."""
    if tensor.dtype in (torch.float32, torch.float64):
        return tensor * factor
    return (tensor.double() * factor).to(tensor.dtype)


def _plain(weight: ir.Value | None) -> tuple[ir.Value, bool] | None:
    """The constant under transposes, and whether it is [K, N]: as MatMul reads it, if nothing turns it."""
    turned = True
    while weight is not None and is_op(node := weight.producer(), "Transpose"):
        assert node is not None
        if tuple(attribute(node, "perm", (1, 0))) == (1, 0):
            turned = not turned
        elif tuple(attribute(node, "perm", ())) != (0, 1):
            return None
        weight = node.inputs[0]
    held = None if weight is None or not is_constant(weight) else weight.const_value
    # of a weight without numbers there is nothing to quantize
    if weight is None or held is None or len(held.shape) != 2 or not held.size:
        return None
    return (weight, turned) if held.dtype.is_floating_point() else None


def _prepared(edit: Editor, weight: ir.Value, turned: bool, alpha: float) -> ir.Value:
    """The weight as [N, K] and times alpha: itself, or a new constant."""
    held = weight.const_value
    assert held is not None
    if not turned and alpha == 1:
        return weight
    sizes = [int(d) for d in held.shape]

    def change(tensor: Tensor) -> Tensor:
        scaled = tensor if alpha == 1 else _times(tensor, alpha)
        return scaled.t() if turned else scaled

    name = f"{weight.name}_t" if turned else f"{weight.name}_scaled"
    value = edit.constant(name, lazy_tensor(held, change, sizes[::-1] if turned else sizes), weight.metadata_props)
    set_qualified_name(value, qualified_name(weight))
    return value


def _scaled_rest(edit: Editor, node: ir.Node, rest: ir.Value, beta: float) -> ir.Value:
    """What a Gemm adds, times beta: a new constant of a constant, else a product before the node."""
    if beta == 1:
        return rest
    held = rest.const_value if is_constant(rest) else None
    if held is not None:
        sizes = [int(d) for d in held.shape]
        scaled = lazy_tensor(held, lambda tensor: _times(tensor, beta), sizes)
        value = edit.constant(f"{rest.name}_scaled", scaled, rest.metadata_props)
        set_qualified_name(value, qualified_name(rest))
        return value
    assert rest.dtype is not None
    factor = edit.constant(f"{rest.name}_factor", ir.tensor(beta, dtype=rest.dtype))
    product = edit.node("Mul", [rest, factor], name=f"{rest.name}_scaled", domain="")
    product.outputs[0].shape, product.outputs[0].type = rest.shape, rest.type
    edit.graph.insert_before(node, product)
    return product.outputs[0]


def _rows(edit: Editor, node: ir.Node, x: ir.Value) -> ir.Value:
    """x [M, K] of an x [K, M], which a node before this one turns."""
    turn = edit.node("Transpose", [x], {"perm": [1, 0]}, name=f"{x.name}_rows", domain="")
    rows = turn.outputs[0]
    rows.type, rows.shape = x.type, None if x.shape is None else ir.Shape(list(x.shape)[::-1])
    edit.graph.insert_before(node, turn)
    return rows


def _rewrite(edit: Editor, node: ir.Node, found: _Linear, weight: ir.Value) -> None:
    assert weight.const_value is not None
    size = int(weight.const_value.shape[0])
    last = node.outputs[0]
    _tell_type(weight.const_value.dtype, found.x, last)
    rest = None if found.rest is None else _scaled_rest(edit, node, found.rest, found.beta)
    x, bias = _rows(edit, node, found.x) if found.columns else found.x, None
    if rest is not None and (vector := _bias(edit, rest, size)) is not None:
        rest, bias = None, vector
    if found.rest is None and (total := _sum_of(last)) is not None:
        _tell_type(weight.const_value.dtype, total[0])
        bias = _bias(edit, total[1], size, rank=None if last.shape is None else len(last.shape))
        last = last if bias is None else total[0]
    new = edit.node(LINEAR, [x, weight, *([] if bias is None else [bias])], name=str(last.name))
    scopes, name = dict(node.metadata_props), node.name
    if rest is None:
        edit.replace(last, new)
        new.metadata_props.update(scopes)
        new.name = name or new.name
        return
    # what is added is no vector of one number for each column, and stays an addition
    value = new.outputs[0]
    value.shape, value.type = last.shape, last.type
    new.metadata_props.update(scopes)
    new.name = name or new.name
    edit.graph.insert_before(node, new)
    edit.replace(last, edit.node("Add", [value, rest], name=str(last.name), domain=""))


def _tell_type(dtype: ir.DataType, *values: ir.Value) -> None:
    """What a linear reads and makes is of its weight's type, also where an op that onnx does not know hides it."""
    for value in values:
        if value.type is None:
            value.type = ir.TensorType(dtype)


def _sum_of(product: ir.Value) -> tuple[ir.Value, ir.Value] | None:
    """The sum that alone reads a product, and what else it adds, if that is a constant."""
    total = sole_user(product)
    if total is None or not is_op(total, "Add") or total.graph is not product.graph:
        return None
    other = total.inputs[1] if total.inputs[0] is product else total.inputs[0]
    return None if other is None or other is product else (total.outputs[0], other)


def _bias(edit: Editor, value: ir.Value, size: int, rank: int | None = 2) -> ir.Value | None:
    """The constant [N], a new one if it has dimensions of one before."""
    held = value.const_value if is_constant(value) else None
    if held is None or rank is None:
        return None
    sizes = [int(d) for d in held.shape]
    if not sizes or sizes[-1] != size or set(sizes[:-1]) - {1} or len(sizes) > rank:
        return None
    if len(sizes) == 1:
        return value
    flat = edit.constant(f"{value.name}_flat", lazy_tensor(held, torch.flatten, [size]), value.metadata_props)
    set_qualified_name(flat, qualified_name(value))
    return flat
