"""GELU and SiLU written by hand become one op each: qcompile::Gelu and qcompile::Silu."""

import math

import onnx_ir as ir

from qcompile.backends.onnx.edit import Editor, sole_user
from qcompile.backends.onnx.ops import GELU, SILU, attribute, is_op
from qcompile.backends.onnx.values import constant

# of constants that were rounded to half precision on their way
_CLOSE = 1e-3
_ERF, _TANH = "none", "tanh"


def make_activations(edit: Editor) -> int:
    """Replace x * sigmoid(x), Swish, and the erf and tanh forms of GELU; returns how many.

    Factors may stand in any order. A chain that something else reads is left alone.
    """
    return sum(_rewrite(edit, node) for node in list(edit.graph))


def _rewrite(edit: Editor, node: ir.Node) -> bool:
    if is_op(node, "Sigmoid", "Swish"):
        return _make_silu(edit, node)
    if is_op(node, "Erf"):
        x, form = _erf_argument(node.inputs[0]), _ERF
    elif is_op(node, "Tanh"):
        x, form = _tanh_argument(node.inputs[0]), _TANH
    else:
        return False
    last = None if x is None else _half_of_one_plus(node.outputs[0], x)
    if x is None or last is None:
        return False
    edit.replace(last, edit.node(GELU, [x], {"approximate": form}, name=str(last.name)))
    return True


def _make_silu(edit: Editor, node: ir.Node) -> bool:
    x, last = node.inputs[0], node.outputs[0]
    assert x is not None
    if is_op(node, "Swish"):
        if attribute(node, "alpha", 1.0) != 1:
            return False
    else:
        product = sole_user(last)
        if product is None or not is_op(product, "Mul") or set(product.inputs) != {x, last}:
            return False
        last = product.outputs[0]
    edit.replace(last, edit.node(SILU, [x], name=str(last.name)))
    return True


def _half_of_one_plus(value: ir.Value, x: ir.Value) -> ir.Value | None:
    """0.5 * x * (1 + value), multiplied in any order."""
    total = sole_user(value)
    if total is None or not is_op(total, "Add") or not _is_near(_other(total, value), 1):
        return None
    made, left = total.outputs[0], {"x", "half"}
    while left:
        product = sole_user(made)
        factor = None if product is None or not is_op(product, "Mul") else _other(product, made)
        if product is None or factor is None:
            return None
        if "half" in left and _is_near(factor, 0.5):
            left -= {"half"}
        elif left == {"x", "half"} and _is_half_of(factor, x):
            left = set()
        elif "x" in left and factor is x:
            left -= {"x"}
        else:
            return None
        made = product.outputs[0]
    return made


def _is_half_of(value: ir.Value, x: ir.Value) -> bool:
    return _scaled(value, x) is not None and abs((_scaled(value, x) or 0) - 0.5) < _CLOSE


def _erf_argument(value: ir.Value | None) -> ir.Value | None:
    """x of x / sqrt(2)."""
    node = None if value is None else value.producer()
    for x in [] if node is None else node.inputs:
        factor = None if value is None or x is None else _scaled(value, x)
        if x is not None and factor is not None and abs(factor - math.sqrt(0.5)) < _CLOSE:
            return x
    return None


def _tanh_argument(value: ir.Value | None) -> ir.Value | None:
    """x of sqrt(2 / pi) * (x + 0.044715 * x**3)."""
    node = None if value is None else value.producer()
    for total in [] if node is None else node.inputs:
        factor = None if value is None or total is None else _scaled(value, total)
        if total is None or factor is None or abs(factor - math.sqrt(2 / math.pi)) > _CLOSE:
            continue
        addition = total.producer()
        if addition is None or not is_op(addition, "Add"):
            return None
        a, b = addition.inputs
        if a is not None and b is not None:
            return a if _is_cubic(b, a) else b if _is_cubic(a, b) else None
    return None


def _is_cubic(value: ir.Value, x: ir.Value) -> bool:
    """True for 0.044715 * x**3, multiplied in any order."""
    factors, number = _factors(value)
    is_cube = [f is x for f in factors] == [True] * 3
    return is_cube and abs(number / 0.044715 - 1) < 10 * _CLOSE


def _factors(value: ir.Value) -> tuple[list[ir.Value], float]:
    """What a product multiplies, powers counted as often, and the product of its numbers."""
    node = value.producer()
    number = _number(value)
    if number is not None:
        return [], number
    if is_op(node, "Pow") and node is not None and _number(node.inputs[1]) in (2.0, 3.0):
        assert node.inputs[0] is not None
        return [node.inputs[0]] * int(_number(node.inputs[1]) or 0), 1.0
    if not is_op(node, "Mul") or node is None or None in node.inputs:
        return [value], 1.0
    parts = [_factors(v) for v in node.inputs if v is not None]
    return [f for factors, _ in parts for f in factors], math.prod(number for _, number in parts)


def _scaled(value: ir.Value, x: ir.Value) -> float | None:
    """The number that `value` is times x; None if it is no such product or quotient."""
    node = value.producer()
    if node is None or not is_op(node, "Mul", "Div") or x not in node.inputs:
        return None
    number = _number(_other(node, x))
    if number is None or (is_op(node, "Div") and (node.inputs[0] is not x or number == 0)):
        return None
    return 1 / number if is_op(node, "Div") else number


def _other(node: ir.Node, one: ir.Value) -> ir.Value | None:
    a, b = node.inputs
    return b if a is one else a


def _is_near(value: ir.Value | None, wanted: float) -> bool:
    number = _number(value)
    return number is not None and abs(number - wanted) < _CLOSE


def _number(value: ir.Value | None) -> float | None:
    held = None if value is None else constant(value)
    return float(held) if held is not None and held.numel() == 1 and held.is_floating_point() else None
