"""Find the outliers of every activation that sites read. It looks and edits nothing."""

from collections.abc import Iterator, Mapping

from qcompile.edges import same_channels
from qcompile.graph import Graph, Op, V
from qcompile.observers import Stats
from qcompile.outliers import NORMS, Group, Outliers, find_outliers
from qcompile.sites import find_sites


def detect_outliers(graph: Graph[V], stats: Mapping[str, Stats]) -> Outliers:
    """Outlier channels, massive tokens and emergent features of the graph's activations.

    stats: of the inputs of sites, by site name; an activation of which there are none is left out.
    """
    return find_outliers(outlier_groups(graph, stats))


def outlier_groups(graph: Graph[V], stats: Mapping[str, Stats]) -> Iterator[Group]:
    """The groups of sites in graph order, with what makes their activation.

    Sites of one name (a module called twice) have one Stats, and stand in their first group only.
    """
    members: dict[int, list[tuple[str, V]]] = {}
    seen: set[str] = set()
    for found in find_sites(graph):
        site = found.site
        if site.op is Op.LINEAR and site.name in stats and site.name not in seen:
            seen.add(site.name)
            members.setdefault(site.group, []).append((site.name, found.value))
    returned = set(graph.outputs())
    for group in members.values():
        names, values = zip(*group, strict=True)
        x = graph.inputs(values[0])[0]
        yield Group(
            sites=names,
            maker=Op.OTHER if x is None else maker_of(graph, x),
            stats=stats[names[0]],
            feeds_head=any(value in returned for value in values),
        )


def maker_of(graph: Graph[V], value: V) -> Op:
    """The kind of op that makes these elements, seen through views, slices and casts.

    A norm is named only where its channels are still the value's.
    """
    channels_kept = True
    while True:
        source = same_channels(graph, value)
        if source is None and graph.op(value) in (Op.RESHAPE, Op.TRANSPOSE):
            source, channels_kept = graph.inputs(value)[0], False
        if source is None:
            break
        value = source
    op = graph.op(value)
    return Op.OTHER if op in NORMS and not channels_kept else op
