"""Writes in place: what stands right after a value must not be read by what comes after a write to it."""

from torch import Tensor, fx

from qcompile.backends.fx.linears import LINEAR
from qcompile.backends.fx.targets import MOVES, aten, is_call, spelling, writes_to
from qcompile.backends.fx.values import example, fake_mode, infer
from qcompile.graph import Op


def pin_inputs(graph: fx.Graph) -> int:
    """Give each linear whose input is written to after it was made an alias of it, made right before the linear.

    What is inserted right after the linear's input then sees what the linear would. Returns how many were made.
    """
    made: dict[fx.Node, int] = {}
    written: dict[object, int] = {}
    count = 0
    for position, node in enumerate(list(graph.nodes)):
        made[node] = position
        if node.target is LINEAR:
            x = node.args[0]
            assert isinstance(x, fx.Node)
            if written.get(_memory(x), -1) > made[x]:
                node.update_arg(0, _alias(x, node))
                count += 1
        for read in node.all_input_nodes:
            if writes_to(node, read):
                written[_memory(read)] = position
    return count


def is_written(value: fx.Node) -> bool:
    """True if something writes in place to the value, or to what may share its memory."""
    while _may_be_view(value) and isinstance(value.args[0], fx.Node):
        value = value.args[0]
    waiting, seen = [value], set[fx.Node]()
    while waiting:
        node = waiting.pop()
        if any(writes_to(user, node) for user in node.users):
            return True
        seen.add(node)
        waiting += [user for user in node.users if user not in seen and _may_be_view(user)]
    return False


def _may_be_view(node: fx.Node) -> bool:
    found = spelling(node)
    return bool(node.args) and (is_call(node, *MOVES) or (found is not None and found.op in (Op.RESHAPE, Op.TRANSPOSE)))


def _alias(x: fx.Node, reader: fx.Node) -> fx.Node:
    with reader.graph.inserting_before(reader):
        alias = reader.graph.call_function(aten.alias.default, (x,))
    alias.meta["example_value"] = infer(aten.alias.default, (x,), fake_mode(reader.graph))
    return alias


def _memory(node: fx.Node) -> object:
    """What a value shares with its views."""
    value = example(node)
    try:
        return value.untyped_storage()._cdata if isinstance(value, Tensor) else node
    except NotImplementedError:
        # inside of vmap a tensor has no storage of its own
        return node
