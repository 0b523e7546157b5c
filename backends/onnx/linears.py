"""Linear in all its spellings becomes qcompile::Linear(x [..., K], weight [N, K], bias [N])."""

from dataclasses import dataclass

import onnx_ir as ir
import torch

from qcompile.backends.onnx.edit import Editor, sole_user
from qcompile.backends.onnx.ops import LINEAR, attribute, is_op
from qcompile.backends.onnx.values import is_constant, lazy_tensor, qualified_name, set_qualified_name


@dataclass(frozen=True, kw_only=True)
class _Linear:
    """x and weight as a node reads them; turned: the weight is [K, N]. rest: what a Gemm adds."""

    x: ir.Value
    weight: ir.Value
    turned: bool
    rest: ir.Value | None = None


def make_linears(edit: Editor) -> int:
    """Rewrite MatMul and Gemm with a constant weight, and the bias that is added to them, in place; returns how many.

    A weight [K, N] becomes a new constant, which is turned when somebody reads it. No constant changes.
    """
    turned: dict[ir.Value, ir.Value] = {}
    count = 0
    for node in list(edit.graph):
        found = _linear(node)
        if found is None:
            continue
        weight = found.weight
        if found.turned:
            if weight not in turned:
                turned[weight] = transposed(edit, weight)
            weight = turned[weight]
        _rewrite(edit, node, found, weight)
        count += 1
    return count


def _linear(node: ir.Node) -> _Linear | None:
    if is_op(node, "MatMul"):
        x, weight = node.inputs
        found = _plain(weight)
        return None if x is None or found is None or is_constant(x) else _Linear(x=x, weight=found[0], turned=found[1])
    if not is_op(node, "Gemm") or attribute(node, "transA", 0) or attribute(node, "alpha", 1.0) != 1:
        return None
    x, weight, rest = (*node.inputs, None)[:3]
    found = _plain(weight)
    if x is None or found is None or is_constant(x) or (rest is not None and attribute(node, "beta", 1.0) != 1):
        return None
    return _Linear(x=x, weight=found[0], turned=found[1] != bool(attribute(node, "transB", 0)), rest=rest)


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
    if weight is None or not is_constant(weight) or weight.const_value is None or len(weight.const_value.shape) != 2:
        return None
    return (weight, turned) if weight.const_value.dtype.is_floating_point() else None


def transposed(edit: Editor, weight: ir.Value) -> ir.Value:
    """A new constant [N, K] of a weight [K, N]."""
    held = weight.const_value
    assert held is not None
    sizes = [int(d) for d in held.shape]
    value = edit.constant(f"{weight.name}_t", lazy_tensor(held, torch.t, sizes[::-1]), weight.metadata_props)
    set_qualified_name(value, qualified_name(weight))
    return value


def _rewrite(edit: Editor, node: ir.Node, found: _Linear, weight: ir.Value) -> None:
    assert weight.const_value is not None
    size = int(weight.const_value.shape[0])
    last = node.outputs[0]
    rest, bias = found.rest, None
    if rest is not None and (vector := _bias(edit, rest, size)) is not None:
        rest, bias = None, vector
    if found.rest is None and (total := _sum_of(last)) is not None:
        bias = _bias(edit, total[1], size, rank=None if last.shape is None else len(last.shape))
        last = last if bias is None else total[0]
    new = edit.node(LINEAR, [found.x, weight, *([] if bias is None else [bias])], name=str(last.name))
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
