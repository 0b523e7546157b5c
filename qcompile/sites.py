"""Sites: the ops of a graph whose weight and input may be quantized, and the weights that no site reaches."""

import hashlib
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Generic

from torch import Tensor

from qcompile.graph import Graph, Op, V

# ops with a weight as their input number 1; K runs along its last dimension, of a convolution along all but the first
SITE_OPS = (Op.LINEAR, Op.EMBEDDING, Op.CONV)
# those that every host has kernels for
COMMON_OPS = (Op.LINEAR, Op.EMBEDDING)
# of those whose input may be quantized, the dimension of its channels
CHANNEL_AXIS = {Op.LINEAR: -1, Op.CONV: 1}
_TAIL = ".outliers"


@dataclass(frozen=True, kw_only=True)
class Site:
    """One op with a weight.

    name: module path. weight: [N, K] ([V, D] of an embedding), on the meta device if its values are gone.
    group: equal for sites that read the same activation.
    positions: how many rows of one sample the weight multiplies, as far as its graph says: the pixels that a
        convolution makes, 1 for a token.
    """

    name: str
    op: Op
    weight: Tensor
    group: int = 0
    positions: int = 1


@dataclass(frozen=True, kw_only=True)
class LeftOver:
    """A weight of the graph that no site reads, with the op that reads it."""

    name: str
    weight: Tensor
    reader: str


@dataclass(frozen=True, kw_only=True)
class Found(Generic[V]):
    """A site and the graph's value that it makes."""

    site: Site
    value: V


def find_sites(graph: Graph[V], ops: Collection[Op] = COMMON_OPS) -> list[Found[V]]:
    """The sites of a graph that are of these kinds, in its order.  The weight [N, ...] of a convolution is [N, K]."""
    groups: dict[V | None, int] = {}
    found = []
    for value in graph.values():
        op = graph.op(value)
        if op not in ops:
            continue
        x, weight = graph.inputs(value)[:2]
        tensor = None if weight is None else graph.constant(weight)
        if tensor is None:
            continue
        site = Site(
            name=graph.name(value),
            op=op,
            weight=tensor.flatten(1) if op is Op.CONV else tensor,
            group=groups.setdefault(x, len(groups)),
            positions=_positions(graph, value) if op is Op.CONV else 1,
        )
        found.append(Found(site=site, value=value))
    return found


def _positions(graph: Graph[V], value: V) -> int:
    return prod(size or 1 for size in graph.shape(value)[2:])


def result_of(graph: Graph[V], value: V) -> V:
    """What others read of a site's op: its result, after the ReLU that alone reads it."""
    users = graph.users(value)
    alone = len(users) == 1 and graph.op(users[0]) is Op.RELU and value not in graph.outputs()
    return users[0] if alone else value


def op_path(running: str, weight: str | None) -> str:
    """The name of an op: its own module if it has one.

    running: path of the innermost module that runs the op; weight: qualified name of the weight that it reads.
    "layers.0.fc.weight" is read by "layers.0.fc", also if the module above calls it as a function. A weight that is
    not called "weight" keeps its name, because a module may have several. A weight that is borrowed from elsewhere
    (a tied lm_head reads "embed_tokens.weight") says nothing: the module that runs the op does.
    """
    if weight is None:
        return running
    owner, _, leaf = weight.rpartition(".")
    if running and owner != running and not owner.startswith(f"{running}."):
        return running
    return owner if leaf == "weight" else weight


def constant_name(graph: Graph[V], value: V) -> str:
    """Qualified name of the constant that `value` is, is a view of, or is computed from; the first of several."""
    while graph.op(value) is not Op.CONSTANT:
        value = next(v for v in graph.inputs(value) if v is not None)
    return graph.name(value)


def names_of(graph: Graph[V], found: Found[V]) -> frozenset[str]:
    """Names of a site and of its weight. It runs several times where either comes again: modules may share a weight."""
    weight = graph.inputs(found.value)[1]
    assert weight is not None
    return frozenset((found.site.name, constant_name(graph, weight)))


def digest(numbers: Sequence[float]) -> str:
    """A short text for numbers, the same everywhere: it tells apart the constants that passes make of one weight."""
    return hashlib.sha256(str(list(numbers)).encode()).hexdigest()[:8]


def tail_name(site: str) -> str:
    """Name of the thin linear beside a site, the one that multiplies its outlier channels."""
    return f"{site}{_TAIL}" if site else _TAIL.removeprefix(".")


def tail_owner(name: str) -> str | None:
    """The site beside which the linear of that name would stand; None if it is named like no such linear."""
    dotted = f".{name}"
    return dotted.removesuffix(_TAIL).removeprefix(".") if dotted.endswith(_TAIL) else None


def left_over(graph: Graph[V], ops: Collection[Op] = COMMON_OPS) -> Iterator[LeftOver]:
    """Float constants of two and more dimensions that no site of these kinds reads: what a recipe cannot reach."""
    for value in graph.values():
        tensor = graph.constant(value) if graph.op(value) is Op.CONSTANT else None
        if tensor is None or tensor.dim() < 2 or not tensor.is_floating_point():
            continue
        readers = list(_readers(graph, value))
        if readers and not any(graph.op(r) in ops for r in readers):
            yield LeftOver(name=graph.name(value), weight=tensor, reader=graph.label(readers[0]))


def _readers(graph: Graph[V], value: V) -> Iterator[V]:
    """The ops that read `value`, seen through transposes and reshapes."""
    for user in graph.users(value):
        if graph.op(user) in (Op.TRANSPOSE, Op.RESHAPE):
            yield from _readers(graph, user)
        else:
            yield user


def same_weight(a: Site, b: Site) -> bool:
    """Whether both read one tensor for one kind of op; told by its shape where it has no values."""
    if a.op is not b.op or a.weight.shape != b.weight.shape or a.weight.is_meta is not b.weight.is_meta:
        return False
    # a square weight and its transpose
    if a.weight.stride() != b.weight.stride():
        return False
    # a view of one parameter is a new tensor each time it is taken
    return a.weight.is_meta or a.weight.data_ptr() == b.weight.data_ptr()
