"""What is known of a node before its graph runs: an example of its value, and its constant if it has one."""

from collections.abc import Mapping
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from qcompile.backends.fx.targets import CASTS, argument, is_call, spelling, writes_to
from qcompile.graph import Op

_VIEWS = (Op.RESHAPE, Op.TRANSPOSE)
_ARITHMETIC = (Op.ADD, Op.MUL)


def example(node: fx.Node) -> Any:
    """A value of the right type, shape and dtype, of no storage; None if unknown."""
    return node.meta.get("example_value")


def dtype(node: fx.Node) -> torch.dtype | None:
    """Of the tensor that the node makes; None if it makes none, or if unknown."""
    value = example(node)
    return value.dtype if isinstance(value, Tensor) else None


def fake_mode(graph: fx.Graph) -> FakeTensorMode | None:
    """The mode that the graph's examples were made under."""
    examples = (example(node) for node in graph.nodes)
    return next((value.fake_mode for value in examples if isinstance(value, FakeTensor)), None)


def fake_constant(tensor: Tensor, graph: fx.Graph) -> Tensor | None:
    """An example for a constant of the graph."""
    mode = fake_mode(graph)
    if mode is None:
        return None
    if not tensor.is_meta:
        return mode.from_tensor(tensor, static_shapes=True)
    # only the values are gone: the graph still reads it where its other tensors are
    device = next(value.device for value in map(example, graph.nodes) if isinstance(value, FakeTensor))
    with mode:
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)


def infer(target: Any, args: tuple[Any, ...], mode: FakeTensorMode | None) -> Any:
    """An example of what the call will make; None if an argument has none."""
    nodes: list[fx.Node] = []
    fx.map_arg(args, nodes.append)
    if mode is None or any(example(node) is None for node in nodes):
        return None
    # aten.linear without a bias asks in C++ for sizes, which symbols have not in torch 2.11
    with torch.no_grad(), mode, enable_python_dispatcher():
        return target(*fx.map_arg(args, example))


def attribute(node: fx.Node) -> Any:
    """What a get_attr node reads from the module that owns its graph."""
    return attrgetter(str(node.target))(node.graph.owning_module)


def is_constant(node: fx.Node) -> bool:
    """True for a get_attr of a tensor."""
    return node.op == "get_attr" and isinstance(attribute(node), Tensor)


def constant_source(node: fx.Node) -> fx.Node | None:
    """The get_attr that `node` reads through nothing but transposes, reshapes and casts that change no dtype."""
    while not is_constant(node):
        below = _viewed(node)
        if below is None:
            return None
        node = below
    return None if any(writes_to(user, node) for user in node.users) else node


def constant(node: fx.Node) -> Tensor | None:
    """The tensor that `node` always makes, None if it depends on the inputs or is written to.

    A vector may be computed, as the 1 + weight of a norm is: by casts, sums and products of other constants.
    """
    source = constant_source(node)
    return _computed(node) if source is None else _through_views(node, source)


def named_source(node: fx.Node) -> fx.Node | None:
    """The get_attr that a constant is, is a view of, or is computed from; the first of several."""
    source = constant_source(node)
    while source is None and _computed(node) is not None:
        node = node.all_input_nodes[0]
        source = constant_source(node)
    return source


def _computed(node: fx.Node) -> Tensor | None:
    known = example(node)
    if not isinstance(known, Tensor) or known.dim() > 1 or not _is_arithmetic(node):
        return None
    found = {read: constant(read) for read in node.all_input_nodes}
    held = {read: tensor for read, tensor in found.items() if tensor is not None}
    if not held or len(held) < len(found) or any(writes_to(user, node) for user in node.users):
        return None
    if any(tensor.is_meta for tensor in held.values()):
        held = {read: tensor.to("meta") for read, tensor in held.items()}
    if is_call(node, *CASTS):
        # where it lies does not matter here
        return next(iter(held.values())).detach().to(known.dtype)
    return _called(node, held)


def _is_arithmetic(node: fx.Node) -> bool:
    found = spelling(node)
    return is_call(node, *CASTS) or (found is not None and found.op in _ARITHMETIC)


def _called(node: fx.Node, held: Mapping[fx.Node, Tensor]) -> Tensor:
    """What the call makes of these tensors in place of the nodes that it reads."""
    with torch.no_grad():
        args, kwargs = fx.map_arg((node.args, node.kwargs), held.__getitem__)
        if node.op == "call_method":
            result = getattr(args[0], str(node.target))(*args[1:], **kwargs)
        else:
            assert callable(node.target)
            result = node.target(*args, **kwargs)
    assert isinstance(result, Tensor)
    return result


def _viewed(node: fx.Node) -> fx.Node | None:
    """What `node` is a view of, if the arguments of the view are all known."""
    if is_call(node, *CASTS):
        return _cast_of_nothing(node)
    spelled = spelling(node)
    if spelled is None or spelled.op not in _VIEWS or len(node.all_input_nodes) != 1:
        return None
    viewed = argument(node, 0, spelled)
    return viewed if isinstance(viewed, fx.Node) else None


def _cast_of_nothing(node: fx.Node) -> fx.Node | None:
    source = node.all_input_nodes[0]
    return source if dtype(node) is not None and dtype(node) == dtype(source) else None


def _through_views(node: fx.Node, source: fx.Node) -> Tensor:
    if node is source:
        return attribute(node)
    below = _viewed(node)
    assert below is not None
    tensor = _through_views(below, source)
    if is_call(node, *CASTS):
        # where it lies does not matter here; a tensor on the meta device could not move
        return tensor
    return _called(node, {below: tensor})
