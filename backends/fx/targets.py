"""Which calls of a torch.fx graph are which `Op`: one table for Dynamo's functions and methods, aten and qcompile.

A new spelling of an op is one line here. What no line names is `Op.OTHER`.
"""

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from inspect import signature
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx
from torch._ops import HigherOrderOperator, OpOverload, OpOverloadPacket
from torch.overrides import resolve_name

from qcompile.backends.fx import ops
from qcompile.graph import Op

aten = torch.ops.aten


@dataclass(frozen=True, kw_only=True)
class Spelling:
    """One way to call an op.

    parameters: names of the callee's leading parameters.
    operands: positions of those that are tensors, in the order that `Op` states.
    only: values that parameters must have, if given, for the call to mean `op`; by position.
    """

    op: Op
    parameters: tuple[str, ...]
    operands: tuple[int, ...]
    only: Mapping[int, Any]


def spelling(node: fx.Node, table: Mapping[Any, Spelling] | None = None) -> Spelling | None:
    """The line of the table for this call; None if it has none, or if its arguments make it mean something else."""
    found = (SPELLINGS if table is None else table).get(_target(node))
    if found is None:
        return None
    if any(argument(node, i, found) not in (None, value) for i, value in found.only.items()):
        return None
    # x.view(dtype) reads the bits as other numbers
    if found.op is Op.RESHAPE and any(isinstance(a, torch.dtype) for a in (*node.args, *node.kwargs.values())):
        return None
    return None if _normalizes_several(node, found) else found


def _normalizes_several(node: fx.Node, spelled: Spelling) -> bool:
    """True for a norm over more than the last dimension."""
    if "normalized_shape" not in spelled.parameters:
        return False
    shape = argument(node, spelled.parameters.index("normalized_shape"), spelled)
    return isinstance(shape, list | tuple) and len(shape) != 1


def argument(node: fx.Node, position: int, spelled: Spelling) -> Any:
    """The argument of the call at that position, also if it was given by keyword; None if left out."""
    return node.args[position] if position < len(node.args) else node.kwargs.get(spelled.parameters[position])


def operands(node: fx.Node, spelled: Spelling) -> list[fx.Node | None]:
    """The values that the op reads, in the order that `Op` states; None for a number or an argument left out."""
    given = (argument(node, i, spelled) for i in spelled.operands)
    return [value if isinstance(value, fx.Node) else None for value in given]


def set_operand(node: fx.Node, index: int, new: fx.Node, spelled: Spelling) -> None:
    """Make the call read `new` as its operand number `index`."""
    position = spelled.operands[index]
    if position < len(node.args):
        node.update_arg(position, new)
    else:
        node.update_kwarg(spelled.parameters[position], new)


def epsilon_of(node: fx.Node, spelled: Spelling) -> float | None:
    """The number `eps` of the call; None if it is computed, or the callee has no such parameter."""
    if "eps" not in spelled.parameters:
        return None
    given = argument(node, spelled.parameters.index("eps"), spelled)
    # source: torch.nn.functional.batch_norm
    given = 1e-5 if given is None else given
    return float(given) if isinstance(given, float | int) else None


def is_call(node: object, *targets: Any) -> bool:
    """True if `node` calls one of these functions, or one of these methods, given by name."""
    return isinstance(node, fx.Node) and _target(node) in targets


def label(node: fx.Node) -> str:
    """What torch calls the op: "aten.softmax", "torch.cumsum", "method view", "higher order: while_loop"."""
    target: Any = node.target
    if node.op != "call_function":
        return f"{_KINDS.get(node.op, node.op)} {target}"
    match target:
        case HigherOrderOperator():
            return f"higher order: {target.name()}"
        case OpOverload():
            namespace, name = target._schema.name.split("::")
        case OpOverloadPacket():
            namespace, name = target._qualified_op_name.split("::")
        case _:
            return resolve_name(target) or f"{(target.__module__ or '').lstrip('_')}.{target.__name__}"
    return f"aten.{name}" if namespace == "aten" else f"{namespace}::{name}"


def writes_to(node: fx.Node, value: fx.Node) -> bool:
    """True if the call changes the tensor `value` in place, as far as its schema or its name tells."""
    target: Any = node.target
    if isinstance(target, OpOverload):
        arguments = [*zip(target._schema.arguments, node.args, strict=False)]
        arguments += [(a, node.kwargs.get(a.name)) for a in target._schema.arguments[len(node.args) :]]
        return any(a.is_write and given is value for a, given in arguments)
    if node.kwargs.get("out") is value:
        return True
    if not node.args or node.args[0] is not value:
        return False
    flag = _inplace_position(target)
    if node.kwargs.get("inplace") is True or (flag is not None and node.args[flag : flag + 1] == (True,)):
        return True
    name = target if isinstance(target, str) else getattr(target, "__name__", "")
    return name in _IN_PLACE or (name.endswith("_") and not name.endswith("__"))


@cache
def _inplace_position(target: Any) -> int | None:
    """Position of the parameter `inplace` of a function, None if it has none."""
    try:
        names = list(signature(target).parameters)
    except (TypeError, ValueError):
        return None
    return names.index("inplace") if "inplace" in names else None


def _target(node: fx.Node) -> Any:
    """What the table knows the call by: the overload, the function, the name of the method, or ".attribute"."""
    target: Any = node.target
    if node.op == "call_method":
        return target
    if node.op != "call_function":
        return None
    if target is getattr:
        return f".{node.args[1]}"
    return getattr(target, "default", target) if isinstance(target, OpOverloadPacket) else target


def _spell(op: Op, parameters: str, *targets: Any, operands: str | None = None, **only: Any) -> dict[Any, Spelling]:
    names = parameters.split()
    positions = tuple(names.index(name) for name in (operands or parameters).split())
    required = {names.index(name): value for name, value in only.items()}
    return {
        target: Spelling(op=op, parameters=_own_names(target, names), operands=positions, only=required)
        for target in targets
    }


def _own_names(target: Any, names: list[str]) -> tuple[str, ...]:
    # an overload states its own parameter names
    own = [a.name for a in target._schema.arguments] if isinstance(target, OpOverload) else []
    return tuple([*own[: len(names)], *names[len(own) :]])


_KINDS = {"call_method": "method", "call_module": "module", "get_attr": "subgraph", "placeholder": "input"}
_IN_PLACE = frozenset(("setitem", "iadd", "isub", "imul", "itruediv", "ifloordiv", "ipow", "iand", "ior", "ixor"))
_CONVOLUTIONS = [overload for op in (aten.conv1d, aten.conv2d, aten.conv3d) for overload in (op.default, op.padding)]

SPELLINGS: dict[Any, Spelling] = {
    **_spell(Op.LINEAR, "input weight bias", F.linear, aten.linear.default),
    **_spell(Op.MATMUL, "input other", operator.matmul, torch.matmul, "matmul", aten.matmul.default),
    **_spell(Op.MATMUL, "input mat2", torch.mm, torch.bmm, "mm", "bmm", aten.mm.default, aten.bmm.default),
    **_spell(Op.CONV, "input weight bias", F.conv1d, F.conv2d, F.conv3d, *_CONVOLUTIONS),
    **_spell(Op.EMBEDDING, "input weight padding_idx max_norm", F.embedding, operands="input weight", max_norm=None),
    **_spell(Op.EMBEDDING, "weight indices", torch.embedding, aten.embedding.default, operands="indices weight"),
    **_spell(
        Op.RMS_NORM,
        "input normalized_shape weight",
        *(F.rms_norm, torch.rms_norm, aten.rms_norm.default),
        operands="input weight",
    ),
    **_spell(Op.RMS_NORM, "x weight", ops.RMS_NORM),
    **_spell(
        Op.LAYER_NORM,
        "input normalized_shape weight bias",
        *(F.layer_norm, torch.layer_norm, aten.layer_norm.default),
        operands="input weight bias",
    ),
    **_spell(
        Op.BATCH_NORM,
        "input running_mean running_var weight bias training momentum eps",
        F.batch_norm,
        operands="input weight bias running_mean running_var",
        training=False,
    ),
    **_spell(
        Op.BATCH_NORM,
        "input weight bias running_mean running_var training momentum eps",
        *(torch.batch_norm, aten.batch_norm.default),
        operands="input weight bias running_mean running_var",
        training=False,
    ),
    **_spell(Op.ADD, "input other", operator.add),
    **_spell(Op.ADD, "input other alpha", torch.add, "add", aten.add.Tensor, operands="input other", alpha=1),
    **_spell(Op.MUL, "input other", operator.mul, torch.mul, torch.multiply, "mul", "multiply", aten.mul.Tensor),
    **_spell(Op.SILU, "input inplace", F.silu, operands="input", inplace=False),
    **_spell(Op.SILU, "input", aten.silu.default),
    **_spell(Op.GELU, "input", F.gelu, aten.gelu.default),
    **_spell(Op.RELU, "input inplace", F.relu, operands="input", inplace=False),
    **_spell(Op.RELU, "input", torch.relu, "relu", aten.relu.default),
    **_spell(Op.LEAKY_RELU, "input negative_slope inplace", F.leaky_relu, operands="input", inplace=False),
    **_spell(Op.LEAKY_RELU, "input", aten.leaky_relu.default),
    **_spell(Op.LEAKY_RELU, "input weight", F.prelu, torch.prelu, "prelu", aten.prelu.default),
    **_spell(Op.SOFTMAX, "input", F.softmax, torch.softmax, "softmax", aten.softmax.int, aten._softmax.default),
    **_spell(
        Op.ATTENTION,
        "query key value",
        *(F.scaled_dot_product_attention, aten.scaled_dot_product_attention.default),
    ),
    **_spell(
        Op.RESHAPE,
        "input",
        *("view", "reshape", "view_as", "reshape_as", "flatten", "unflatten", "squeeze", "unsqueeze"),
        *("contiguous", "clone", "detach", torch.clone, torch.detach),
        *(torch.reshape, torch.flatten, torch.unflatten, torch.squeeze, torch.unsqueeze),
        *(aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten.flatten.using_ints),
        *(aten.unflatten.int, aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.unsqueeze.default),
        *(aten.contiguous.default, aten.clone.default, aten.detach.default, aten.alias.default, aten.view_as.default),
        *(aten.reshape_as.default, aten.lift_fresh_copy.default),
    ),
    **_spell(
        Op.TRANSPOSE,
        "input",
        *("t", "transpose", "permute", "swapaxes", "swapdims", ".T", ".mT"),
        *(torch.t, torch.transpose, torch.permute, torch.swapaxes, torch.swapdims),
        *(aten.t.default, aten.transpose.int, aten.permute.default, aten.numpy_T.default, aten.mT.default),
    ),
    **_spell(
        Op.SELECT, "input dim index", torch.index_select, aten.index_select.default, operands="input index", dim=-1
    ),
    **_spell(Op.OUTLIERS, "x threshold", ops.OUTLIERS),
    **_spell(Op.QUANTIZE, "x", ops.QUANTIZE, ops.QUANTIZE_DYNAMIC),
    **_spell(Op.DEQUANTIZE, "codes", ops.DEQUANTIZE),
}

# how a new op is called, with a place for each of its inputs
NEW_CALLS: dict[Op, Callable[..., tuple[Any, tuple[Any, ...]]]] = {
    Op.LINEAR: lambda x, weight, bias=None: (aten.linear.default, (x, weight, bias)),
    Op.MUL: lambda a, b: (aten.mul.Tensor, (a, b)),
    Op.ADD: lambda a, b: (aten.add.Tensor, (a, b)),
    Op.SELECT: lambda x, channels: (aten.index_select.default, (x, -1, channels)),
    Op.OUTLIERS: lambda x, threshold: (ops.OUTLIERS, (x, threshold)),
}

# input + mat1 @ mat2 in one call, where mat2 is [K, N]; the door makes a linear of it
ADDMM = _spell(
    Op.LINEAR,
    "input mat1 mat2 beta alpha",
    *(torch.addmm, "addmm", aten.addmm.default),
    operands="mat1 mat2 input",
    beta=1,
    alpha=1,
)

DROPOUT = {
    **_spell(Op.OTHER, "input p training", F.dropout),
    **_spell(Op.OTHER, "input p train", torch.dropout, aten.dropout.default),
}

CASTS: tuple[Any, ...] = (
    *("to", "float", "half", "bfloat16", "double", "type", "type_as"),
    *(aten.to.dtype, aten.to.dtype_layout, aten.to.device, aten.to.other, aten.type_as.default, aten._to_copy.default),
)

# they copy elements of their first argument to other places, or look at some of them, beside reshapes and transposes
MOVES: tuple[Any, ...] = (
    *(operator.getitem, "select", "narrow", "split", "split_with_sizes", "chunk", "tensor_split", "unbind", "movedim"),
    *("expand", "expand_as", "broadcast_to", "repeat", "repeat_interleave", "unsafe_chunk", "unsafe_split"),
    *(torch.select, torch.narrow, torch.split, torch.split_with_sizes, torch.chunk),
    *(torch.tensor_split, torch.unbind, torch.movedim, torch.broadcast_to, torch.repeat_interleave),
    *("index_select", torch.index_select, aten.index_select.default, aten.index.Tensor),
    *(aten.slice.Tensor, aten.select.int, aten.narrow.default, aten.split.Tensor, aten.split_with_sizes.default),
    *(aten.split.sizes, aten.chunk.default, aten.unbind.int, aten.movedim.int, aten.movedim.intlist),
    *(aten.expand.default, aten.expand_as.default, aten.broadcast_to.default, aten.repeat.default),
    aten.repeat_interleave.self_int,
)

# they read the shape and dtype of a tensor and none of its elements
LOOKS: tuple[Any, ...] = (
    *("size", "dim", "numel", "stride", ".shape", ".ndim", ".dtype", ".device", torch.numel),
    *(aten.sym_size.int, aten.sym_size.default, aten.sym_numel.default, aten.sym_stride.int),
    *("new_empty", "new_zeros", "new_ones", "new_full", aten.new_empty.default, aten.new_zeros.default),
    *(aten.new_ones.default, aten.new_full.default, torch.empty_like, torch.zeros_like, torch.ones_like),
    *(torch.full_like, aten.empty_like.default, aten.zeros_like.default, aten.ones_like.default),
    aten.full_like.default,
)
