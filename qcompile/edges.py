"""Edges: activations that linears read, and the norm or linear that could take a factor of each of their channels.

Found from the flow of data alone. Sources: SmoothQuant (Xiao 2023) for norms; what is linear in its producer (a gated
product, attention in its values, a positively homogeneous activation) by plain algebra.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice, pairwise
from typing import Generic, Literal

import torch
from torch import Tensor

from qcompile.channels import Channels, numbered
from qcompile.graph import Graph, Op, V
from qcompile.sites import Found, find_sites, names_of

_NORMS = (Op.RMS_NORM, Op.LAYER_NORM)
# inputs whose factors pass to the result while the others stay
_CARRIERS = {Op.RELU: (0,), Op.LEAKY_RELU: (0,), Op.MUL: (0, 1), Op.MATMUL: (0, 1), Op.ATTENTION: (2,)}
# from an activation up; products of products could have more ways than time
_MOST_WAYS = 1000
_OBSTACLES = {
    Op.ADD: "a sum whose other terms would not be scaled",
    Op.RESHAPE: "which moves elements in a way that is not known, or whose input is written to in place",
    Op.TRANSPOSE: "which moves elements in a way that is not known, or whose input is written to in place",
    Op.MATMUL: "which mixes the channels",
    Op.ATTENTION: "whose heads do not match its values",
    Op.OTHER: "which is not known to be homogeneous",
}


@dataclass(frozen=True, kw_only=True)
class Edge(Generic[V]):
    """An activation [..., K], the linears that read it, and what could divide it by a scale [K].

    consumers: all linears with a constant weight that read `value`, or a view, slice or cast that keeps its channels.
    kind: what makes the value, if scales could go there or `multiply` is left. producer: the value it makes, and
    into: its name, both only if a fold is legal.
    channels: int64 [K], the producer's channel that each channel comes from; a scale has to be equal where they are.
    multiply: only a multiplication by 1 / scale is left, because the norm is read by others too.
    reason: why no fold is legal; empty if one is.
    """

    value: V
    consumers: tuple[Found[V], ...]
    kind: Literal["norm", "linear", "none"] = "none"
    producer: V | None = None
    into: str = ""
    channels: Tensor = field(hash=False, compare=False)
    multiply: bool = False
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class _Refusal:
    """Why a way is not legal.

    shared: only because others read the norm before the linears, too. elsewhere: no norm or linear was met on it.
    """

    reason: str
    shared: bool = False
    elsewhere: bool = False


@dataclass(frozen=True, kw_only=True)
class _Origin(Generic[V]):
    producer: V
    channels: Tensor


def find_edges(graph: Graph[V]) -> list[Edge[V]]:
    """The edges of a graph, in the order of their first consumers. Weights may be on the meta device."""
    groups: dict[V, list[Found[V]]] = {}
    for found in find_sites(graph):
        x = graph.inputs(found.value)[0]
        if found.site.op is Op.LINEAR and x is not None:
            groups.setdefault(_first(graph, x), []).append(found)
    search = _Search(graph, groups)
    return [search.edge(value) for value in groups]


def is_residual(graph: Graph[V], value: V) -> bool:
    """Whether a sum reads the value: then a norm makes the residual stream itself, as in post-norm models.

    Elsewhere a multiplication would only spare others that read the norm, such as experts, the scale.
    """
    views = [user for user in graph.users(value) if same_channels(graph, user) == value]
    return any(graph.op(user) is Op.ADD for user in graph.users(value)) or any(is_residual(graph, v) for v in views)


def same_channels(graph: Graph[V], value: V) -> V | None:
    """What `value` is a view, slice or cast of, with the same channels in its last dimension; None if it is none."""
    source = next(iter(graph.inputs(value)), None)
    shape = () if source is None else graph.shape(source)
    if source is None or not shape or shape[-1] is None or graph.shape(value)[-1:] != shape[-1:]:
        return None
    channels = numbered(len(shape), shape[-1])
    after = graph.moved(value, channels)
    if not isinstance(after, Tensor) or after.shape[-1:] != shape[-1:]:
        return None
    return source if torch.equal(after.flatten(), channels.flatten()) else None


def readings(graph: Graph[V], value: V, sites: Sequence[V]) -> Iterator[tuple[V, list[V]]]:
    """The fewest values, `value` or views of it, with those of their users that serve these of its consumers alone."""
    users = graph.users(value)
    mine = [user for user in users if _serves(graph, value, user, sites)]
    if mine:
        yield value, mine
    for user in users:
        if user not in mine and same_channels(graph, user) == value:
            yield from readings(graph, user, sites)


def _first(graph: Graph[V], value: V) -> V:
    """The activation that `value` is a view, slice or cast of."""
    while (source := same_channels(graph, value)) is not None:
        value = source
    return value


class _Search(Generic[V]):
    """What is looked up again and again while the edges of one graph are found."""

    def __init__(self, graph: Graph[V], groups: dict[V, list[Found[V]]]) -> None:
        self._graph, self._groups = graph, groups
        self._outputs = frozenset(graph.outputs())
        self._sites = {found.value: found.site.name for group in groups.values() for found in group}
        names = {found.site.name: names_of(graph, found) for group in groups.values() for found in group}
        times = Counter(name for group in groups.values() for found in group for name in names_of(graph, found))
        self._times = {site: max(times[name] for name in its) for site, its in names.items()}

    def edge(self, value: V) -> Edge[V]:
        consumers = tuple(self._groups[value])
        width = consumers[0].site.weight.shape[1]
        found = self._several(consumers) or self._origin(value, consumers)
        if isinstance(found, _Refusal):
            channels = numbered(1, width)
            return Edge(
                value=value,
                consumers=consumers,
                kind="norm" if found.shared else "none",
                channels=channels,
                multiply=found.shared,
                reason=found.reason,
            )
        producer = found.producer
        return Edge(
            value=value,
            consumers=consumers,
            kind="norm" if self._graph.op(producer) in _NORMS else "linear",
            producer=producer,
            into=self._graph.name(producer),
            channels=found.channels,
        )

    def _several(self, consumers: Sequence[Found[V]]) -> _Refusal | None:
        name = next((f.site.name for f in consumers if self._times[f.site.name] > 1), None)
        return None if name is None else _Refusal(reason=f"{name!r} is run several times, and a fold goes by names")

    def _origin(self, value: V, consumers: Sequence[Found[V]]) -> _Origin[V] | _Refusal:
        """The norm or linear that could take the factor, on the first way to one that is legal; else why none is."""
        refusals: list[_Refusal] = []
        for path in islice(self._ways(value), _MOST_WAYS):
            found = self._along(path, consumers)
            if isinstance(found, _Origin):
                return found
            refusals.append(found)
        # the best known is told: that a multiplication is left, or what stands after a norm or linear
        return min(refusals, key=lambda refusal: (not refusal.shared, refusal.elsewhere))

    def _ways(self, value: V) -> Iterator[tuple[V, ...]]:
        """Ways up from an activation, each to the first norm or linear, or to where nothing can be followed."""
        waiting: list[tuple[V, ...]] = [(value,)]
        while waiting:
            path = waiting.pop()
            sources = [] if self._is_producer(path[0]) else self._sources(path[0])
            waiting += [(source, *path) for source in reversed(sources)]
            if not sources:
                yield path

    def _is_producer(self, value: V) -> bool:
        return self._graph.op(value) in (Op.LINEAR, *_NORMS)

    def _sources(self, value: V) -> list[V]:
        """The inputs that a factor of `value` might come from; whether it does is seen on the way back."""
        inputs = self._graph.inputs(value)
        indices = _CARRIERS.get(self._graph.op(value), range(min(1, len(inputs))))
        sources = [inputs[i] for i in indices if i < len(inputs)]
        return [v for v in dict.fromkeys(sources) if v is not None and self._graph.op(v) is not Op.CONSTANT]

    def _along(self, path: Sequence[V], consumers: Sequence[Found[V]]) -> _Origin[V] | _Refusal:
        """The way from a norm or linear, path[0], to the activation path[-1], if factors can take it."""
        producer = path[0]
        if not self._is_producer(producer):
            return _Refusal(reason=self._elsewhere(path, consumers), elsewhere=True)
        if None in (self._graph.shape(producer)[-1:] or (None,)) + (self._graph.shape(path[-1])[-1:] or (None,)):
            return _Refusal(reason=f"the channels of {self._named(producer)} are not known before the graph runs")
        if problem := self._cannot_take(producer):
            return _Refusal(reason=problem)
        carried: list[Channels] = [numbered(*self._rank_and_width(producer))]
        for before, value in pairwise(path):
            if list(self._graph.inputs(value)).count(before) != 1:
                return _Refusal(reason=f"{self._named(producer)} is read twice by {self._described(value)}")
            after = _carried(self._graph, before, value, carried[-1])
            if after is None:
                return _Refusal(reason=self._obstacle(producer, value, consumers))
            carried.append(after)
        channels = _of_last_dimension(carried[-1], consumers[0].site.weight.shape[1])
        if channels is None:
            return _Refusal(
                reason=f"between {self._named(producer)} and {consumers[0].site.name!r} channels become tokens"
            )
        reason = self._others_on(path, carried, channels)
        if not reason and (other := self._other_reader(path[-1])):
            reason = f"what {consumers[0].site.name!r} reads is also {other}"
        if reason:
            return _Refusal(reason=reason, shared=self._graph.op(producer) in _NORMS)
        return _Origin(producer=producer, channels=channels)

    def _cannot_take(self, producer: V) -> str:
        """Why the norm or linear cannot be divided; empty if it can."""
        weight, *bias = self._graph.inputs(producer)[1:3]
        width = self._graph.shape(producer)[-1]
        is_norm = self._graph.op(producer) in _NORMS
        vectors = [weight, *bias] if is_norm else bias
        if width is None or not all(v is None or self._is_vector(v, width) for v in vectors):
            return f"the weight or bias of {self._named(producer)} is no constant of {width} numbers"
        if is_norm or self._times.get(self._sites.get(producer, "")) == 1:
            return ""
        return f"{self._named(producer)} has a weight that is no constant, or is run several times under one name"

    def _is_vector(self, value: V, width: int) -> bool:
        tensor = self._graph.constant(value)
        return tensor is not None and tensor.is_floating_point() and tuple(tensor.shape) == (width,)

    def _rank_and_width(self, value: V) -> tuple[int, int]:
        shape = self._graph.shape(value)
        assert shape[-1] is not None
        return len(shape), shape[-1]

    def _obstacle(self, producer: V, value: V, consumers: Sequence[Found[V]]) -> str:
        op = self._graph.op(value)
        what = self._graph.label(value) if op is Op.OTHER else op.value
        why = _OBSTACLES.get(op, "which is not homogeneous")
        return f"between {self._named(producer)} and {consumers[0].site.name!r} stands {what}, {why}"

    def _elsewhere(self, path: Sequence[V], consumers: Sequence[Found[V]]) -> str:
        passed = (*_CARRIERS, Op.RESHAPE, Op.TRANSPOSE)
        stands = next((v for v in reversed(path) if self._graph.op(v) not in passed), path[0])
        made = self._described(stands)
        return f"what {consumers[0].site.name!r} reads comes from {made}, not from a norm or another linear"

    def _named(self, value: V) -> str:
        return repr(self._graph.name(value)) if self._graph.name(value) else f"a {self._graph.op(value).value}"

    def _others_on(self, path: Sequence[V], carried: Sequence[Channels], channels: Tensor) -> str:
        """Who else sees what would be scaled on the way, before the activation itself; empty if nobody does."""
        for (before, value), numbers in zip(pairwise(path), carried, strict=False):
            users = [user for user in self._graph.users(before) if user != value]
            if other := self._reader(before, users, numbers, channels):
                return f"{self._named(path[0])} is also {other}"
        return ""

    def _reader(self, value: V, users: Sequence[V], numbers: Channels, channels: Tensor) -> str:
        """Who among the users of `value`, which carries `numbers`, sees any of these channels."""
        if not _holds(numbers, channels):
            return ""
        if value in self._outputs:
            return "an output of the graph"
        for user in users:
            after = self._moved(value, user, numbers)
            if after is None:
                return f"read by {self._described(user)}"
            if other := self._reader(user, self._graph.users(user), after, channels):
                return other
        return ""

    def _moved(self, value: V, user: V, numbers: Channels) -> Channels | None:
        """What `user` carries if all it does with `value` is to move its elements."""
        return self._graph.moved(user, numbers) if next(iter(self._graph.inputs(user)), None) == value else None

    def _other_reader(self, value: V) -> str:
        """Who reads the activation beside linears with a constant weight; empty if nobody does."""
        if value in self._outputs:
            return "an output of the graph"
        for user in self._graph.users(value):
            reads = list(self._graph.inputs(user))
            if user in self._sites and reads.count(value) == 1 and reads[0] == value:
                continue
            moved = self._moved(value, user, numbered(*self._rank_and_width(value)))
            if isinstance(moved, Tensor) and not moved.numel():
                continue
            if same_channels(self._graph, user) != value:
                return f"read by {self._described(user)}"
            if other := self._other_reader(user):
                return other
        return ""

    def _described(self, value: V) -> str:
        name, op = self._graph.name(value), self._graph.op(value)
        label = self._graph.label(value) if op is Op.OTHER else op.value
        return f"{label} in {name!r}" if name else label


def _serves(graph: Graph[V], value: V, user: V, sites: Sequence[V]) -> bool:
    """True for one of the sites, and for a view of `value` that nothing but they read."""
    if user in sites:
        return True
    readers = graph.users(user)
    is_view = bool(readers) and user not in graph.outputs() and same_channels(graph, user) == value
    return is_view and all(_serves(graph, user, reader, sites) for reader in readers)


def _carried(graph: Graph[V], source: V, value: V, channels: Channels) -> Channels | None:
    """The channels that `value` carries if its input `source` carries `channels`; None if factors do not pass."""
    op = graph.op(value)
    index = list(graph.inputs(value)).index(source)
    if op not in _CARRIERS:
        return graph.moved(value, channels) if index == 0 else None
    if not isinstance(channels, Tensor) or index not in _CARRIERS[op]:
        return None
    if op is Op.MATMUL:
        return _through_product(graph, value, channels, index)
    if op is Op.ATTENTION:
        return _through_attention(graph, source, value, channels)
    return _broadcast(channels, len(graph.shape(value)))


def _through_product(graph: Graph[V], value: V, channels: Tensor, index: int) -> Tensor | None:
    """Of a @ b, where the factor must be the same along the dimension that is summed over."""
    if any(v is None or len(graph.shape(v)) < 2 for v in graph.inputs(value)) or channels.shape[-1 - index] != 1:
        return None
    return _broadcast(channels, len(graph.shape(value)))


def _through_attention(graph: Graph[V], values: V, result: V, channels: Tensor) -> Tensor | None:
    """Each head of the result mixes the tokens of one head of the values; neighbours share one if there are fewer."""
    if channels.dim() < 2 or channels.shape[-2] != 1:
        return None
    if channels.dim() > 2 and channels.shape[-3] > 1:
        before, after = graph.shape(values)[-3], graph.shape(result)[-3]
        if before is None or after is None or after % before:
            return None
        channels = channels.repeat_interleave(after // before, -3)
    return _broadcast(channels, len(graph.shape(result)))


def _broadcast(channels: Tensor, rank: int) -> Tensor | None:
    if rank < channels.dim():
        return None
    return channels.reshape([1] * (rank - channels.dim()) + list(channels.shape))


def _of_last_dimension(channels: Channels, width: int) -> Tensor | None:
    """[width], if they differ along the last dimension alone."""
    if not isinstance(channels, Tensor) or channels.numel() != channels.shape[-1]:
        return None
    return channels.flatten().expand(width).contiguous()


def _holds(numbers: Channels, channels: Tensor) -> bool:
    several = numbers if isinstance(numbers, tuple) else (numbers,)
    return any(bool(torch.isin(n, channels).any()) for n in several)
