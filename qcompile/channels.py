"""Where an activation's channels come from and go to, as far as nothing but elementwise ops and linears see them."""

from dataclasses import dataclass, field
from typing import Generic

from qcompile.graph import Graph, Op, V

# ops that leave every channel in its place
_ELEMENTWISE = (Op.ADD, Op.MUL, Op.SILU, Op.GELU, Op.RELU)


@dataclass(kw_only=True)
class Way(Generic[V]):
    """All that shares one numbering of K channels.

    producers, consumers: linears.  constants: elementwise ops, each with the number of its input that is a constant
    per channel.
    """

    K: int
    producers: list[V] = field(default_factory=list)
    consumers: list[V] = field(default_factory=list)
    constants: list[tuple[V, int]] = field(default_factory=list)


def find_way(graph: Graph[V], start: V) -> Way[V] | None:
    """All that numbers its channels like `start` [..., K]; None if anything else sees the numbers, such as a norm."""
    K = next(iter(graph.shape(start)[-1:]), None)
    # with one channel, what has the channels and what is broadcast over them look alike
    if K is None or K == 1:
        return None
    way, returned, passed, waiting = Way[V](K=K), graph.outputs(), set[V](), [start]
    while waiting:
        value = waiting.pop()
        if value in passed:
            continue
        passed.add(value)
        before, after = _before(graph, value, way), _after(graph, value, way)
        if value in returned or graph.shape(value)[-1:] != (K,) or before is None or after is None:
            return None
        waiting += [*before, *after]
    return way


def _before(graph: Graph[V], value: V, way: Way[V]) -> list[V] | None:
    """The values of K channels that `value` is made of elementwise; None if it is made in another way."""
    if graph.op(value) is Op.LINEAR:
        way.producers.append(value)
        return []
    if graph.op(value) is Op.RESHAPE:
        # the same elements in the same order, and K of them in the last dimension before and after
        return [source for source in graph.inputs(value) if source is not None]
    if graph.op(value) not in _ELEMENTWISE:
        return None
    found = []
    for index, source in enumerate(graph.inputs(value)):
        if source is None or graph.shape(source)[-1:] in ((), (1,)):
            continue
        if graph.constant(source) is None:
            found.append(source)
        else:
            way.constants.append((value, index))
    return found


def _after(graph: Graph[V], value: V, way: Way[V]) -> list[V] | None:
    """The elementwise ops that read `value`; None if something reads it that is neither such an op nor a linear."""
    found = []
    for user in graph.users(value):
        if graph.op(user) is Op.LINEAR and value not in graph.inputs(user)[1:]:
            way.consumers.append(user)
        elif graph.op(user) in (*_ELEMENTWISE, Op.RESHAPE):
            found.append(user)
        else:
            return None
    return found
