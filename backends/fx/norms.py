"""RMSNorm written by hand, as most language models do, recognized and made one op with the very same result."""

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from qcompile.backends.fx import ops
from qcompile.backends.fx.targets import CASTS, aten, is_call, writes_to
from qcompile.backends.fx.values import dtype, example

_POWERS = (operator.pow, torch.pow, "pow", aten.pow.Tensor_Scalar)
_SQUARES = (torch.square, "square", aten.square.default)
_PRODUCTS = (operator.mul, torch.mul, "mul", aten.mul.Tensor)
_SUMS = (operator.add, torch.add, "add", aten.add.Tensor)
_MEANS = (torch.mean, "mean", aten.mean.dim)
_RSQRTS = (torch.rsqrt, "rsqrt", aten.rsqrt.default)
_SQRTS = (torch.sqrt, "sqrt", aten.sqrt.default)
_RECIPROCALS = (torch.reciprocal, "reciprocal", aten.reciprocal.default)
_QUOTIENTS = (operator.truediv, torch.div, torch.true_divide, "div", "true_divide", aten.div.Tensor)


@dataclass(frozen=True, kw_only=True)
class _Normed:
    """value = wide * rsqrt(mean(wide**2) + eps), where wide is x in float32; x is wide if nothing was cast.

    divides: it is wide / sqrt(...), which rounds otherwise.
    """

    value: fx.Node
    x: fx.Node
    wide: fx.Node
    eps: float | fx.Node
    divides: bool


def make_rms_norms(graph: fx.Graph) -> int:
    """Replace each RMSNorm written by hand by one qcompile.rms_norm; returns how many.

    Recognized are the float32 form with its casts before or after the weight, and the form without casts; a square
    in any spelling, rsqrt, 1 / sqrt or a division by sqrt, factors in either order. A chain that something else reads
    is left alone.
    """
    return sum(_rewrite(node) for node in list(graph.nodes) if is_call(node, *_RSQRTS, *_RECIPROCALS, *_QUOTIENTS))


def _rewrite(inverse: fx.Node) -> bool:
    normed = _normed(inverse)
    if normed is None:
        return False
    last, weight, narrow, weight_last = _tail(normed)
    x = normed.x if narrow else normed.wide
    arguments = (x, weight, normed.eps, weight_last, normed.divides)
    with last.graph.inserting_before(last):
        new = last.graph.call_function(ops.RMS_NORM, arguments)
    new.meta = dict(last.meta)
    last.replace_all_uses_with(new)
    _erase_unread(last)
    return True


def _normed(inverse: fx.Node) -> _Normed | None:
    """The norm, up to its weight, around a 1 / sqrt or a division by sqrt."""
    variance = _under_root(inverse)
    mean, eps = _mean_and_eps(variance)
    wide = _squared(_mean_of(mean))
    if wide is None or dtype(wide) is not torch.float32:
        return None
    x = wide.all_input_nodes[0] if is_call(wide, *CASTS) else wide
    if eps is None or (x is not wide and not _is_short_float(x)):
        return None
    # what is written between the two reads makes them differ
    if any(writes_to(user, read) for read in (x, wide) for user in read.users):
        return None
    divides = is_call(inverse, *_QUOTIENTS) and _stands_for(inverse.args[0], wide, x)
    value = inverse if divides else _product(inverse, wide, x)
    return None if value is None else _Normed(value=value, x=x, wide=wide, eps=eps, divides=divides)


def _stands_for(value: object, wide: fx.Node, x: fx.Node) -> bool:
    """True for the wide value, for another cast of the same, and for x itself: type promotion makes it wide."""
    if value is wide or value is x:
        return True
    if not isinstance(value, fx.Node) or not is_call(value, *CASTS):
        return False
    return value.all_input_nodes[0] is x and dtype(value) is torch.float32


def _product(inverse: fx.Node, wide: fx.Node, x: fx.Node) -> fx.Node | None:
    """The product of 1 / sqrt, `inverse`, and the wide value or x, if nothing else reads `inverse`."""
    if is_call(inverse, *_QUOTIENTS) and inverse.args[0] != 1:
        return None
    inverse, product = _past_one(inverse)
    if product is None or not is_call(product, *_PRODUCTS):
        return None
    other = next((arg for arg in product.args if arg is not inverse), None)
    return product if _stands_for(other, wide, x) else None


def _tail(normed: _Normed) -> tuple[fx.Node, fx.Node | None, bool, bool]:
    """Last node of the norm, its weight, whether it is cast back to x's dtype, and whether before the weight."""
    last, weight = normed.value, None
    cast_first = _cast_back(last, normed)
    last = cast_first or last
    product = _sole_user(last)
    if product is not None and (weight := _weight(product, last)) is not None:
        last = product
    cast_last = None if cast_first else _cast_back(last, normed)
    narrow = bool(cast_first or cast_last)
    # float32 throughout: the cast back is one to the same dtype, and its place makes no difference
    return cast_last or last, weight, narrow, bool(cast_first) or not narrow


def _past_one(inverse: fx.Node) -> tuple[fx.Node, fx.Node | None]:
    """`inverse` and its only user, past a factor of 1: torch.export writes 1 / y as reciprocal(y) * 1."""
    product = _sole_user(inverse)
    if product is None or not is_call(product, *_PRODUCTS) or 1 not in product.args:
        return inverse, product
    return product, _sole_user(product)


def _under_root(inverse: fx.Node) -> fx.Node | None:
    if inverse.kwargs:
        return None
    root = inverse.args[-1]
    if is_call(inverse, *_RSQRTS):
        return _sole_reader_of(root, inverse)
    if not is_call(root, *_SQRTS) or _sole_reader_of(root, inverse) is None:
        return None
    assert isinstance(root, fx.Node)
    return None if root.kwargs else _sole_reader_of(root.args[0], root)


def _mean_and_eps(variance: fx.Node | None) -> tuple[fx.Node | None, float | fx.Node | None]:
    if variance is None or not is_call(variance, *_SUMS) or variance.kwargs:
        return None, None
    for mean, eps in (variance.args, variance.args[::-1]):
        if not is_call(mean, *_MEANS):
            continue
        if isinstance(eps, float | int):
            return _sole_reader_of(mean, variance), float(eps)
        if isinstance(eps, fx.Node) and isinstance(example(eps), float | torch.SymFloat):
            return _sole_reader_of(mean, variance), eps
    return None, None


def _mean_of(mean: fx.Node | None) -> fx.Node | None:
    """What the mean is taken of, if along the last dimension and kept."""
    if mean is None:
        return None
    named: dict[str, Any] = dict(zip(("input", "dim", "keepdim"), mean.args, strict=False)) | dict(mean.kwargs)
    square, dim = named.pop("input", None), named.pop("dim", None)
    dim = dim[0] if isinstance(dim, list | tuple) and len(dim) == 1 else dim
    value = example(square) if isinstance(square, fx.Node) else None
    if not isinstance(value, Tensor) or dim not in (-1, value.dim() - 1) or named != {"keepdim": True}:
        return None
    return _sole_reader_of(square, mean)


def _squared(square: fx.Node | None) -> fx.Node | None:
    if square is None or square.kwargs:
        return None
    wide, *rest = square.args
    if is_call(square, *_SQUARES):
        squares = True
    elif is_call(square, *_POWERS):
        squares = rest == [2]
    else:
        squares = is_call(square, *_PRODUCTS) and rest == [wide]
    return wide if squares and isinstance(wide, fx.Node) else None


def _weight(product: fx.Node, normed: fx.Node) -> fx.Node | None:
    """The other factor, if it is one number for each element of the last dimension."""
    if not is_call(product, *_PRODUCTS) or len(product.args) != 2:
        return None
    other = product.args[1] if product.args[0] is normed else product.args[0]
    value, whole = (example(v) if isinstance(v, fx.Node) else None for v in (other, normed))
    if not isinstance(value, Tensor) or not isinstance(whole, Tensor) or value.shape != whole.shape[-1:]:
        return None
    return other if isinstance(other, fx.Node) else None


def _cast_back(node: fx.Node, normed: _Normed) -> fx.Node | None:
    cast = _sole_user(node)
    if normed.x is normed.wide or cast is None or not is_call(cast, *CASTS) or cast.args[0] is not node:
        return None
    return cast if dtype(cast) == dtype(normed.x) and _changes_dtype_only(cast) else None


def _changes_dtype_only(cast: fx.Node) -> bool:
    before, after = example(cast.all_input_nodes[0]), example(cast)
    return bool(before.device == after.device and "memory_format" not in cast.kwargs)


def _is_short_float(x: fx.Node) -> bool:
    return dtype(x) in (torch.bfloat16, torch.float16)


def _sole_reader_of(value: object, reader: fx.Node) -> fx.Node | None:
    """`value`, if it is a node that nothing but `reader` reads."""
    return value if isinstance(value, fx.Node) and list(value.users) == [reader] else None


def _sole_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _erase_unread(last: fx.Node) -> None:
    """Erase `last` and what only it read: the new op reads the norm's inputs, and so keeps them."""
    waiting, erased = [last], set()
    while waiting:
        node = waiting.pop()
        if node in erased or node.users or node.op not in ("call_function", "call_method"):
            continue
        erased.add(node)
        waiting += node.all_input_nodes
        node.graph.erase_node(node)
