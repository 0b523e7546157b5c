"""Which parameter stands behind a site, and what of it the site reads."""

from collections.abc import Iterator
from dataclasses import dataclass

from torch.fx import Node

from qcompile.backends.fx.graph import FxGraph
from qcompile.graph import Op


@dataclass(frozen=True, kw_only=True)
class WeightSource:
    """Where a site's weight comes from: a parameter, and how the graph views it."""

    name: str
    view: str

    def variant(self, constant: str) -> str:
        """What passes did to the weight before it became that constant: "" for "a.weight_codes".

        Passes name what they make of "a.weight": "a.weight.without_" and a digest, for instance.
        """
        return constant.removeprefix(self.name).partition("_codes")[0]


def weight_source(graph: FxGraph, site: Node) -> WeightSource:
    """The parameter behind the transposes and reshapes that a site reads it through."""
    value: Node | None = graph.inputs(site)[1]
    views = []
    while value is not None and graph.op(value) is not Op.CONSTANT:
        views.append(f"{value.target}{[a for a in value.args if not isinstance(a, Node)]}")
        value = graph.inputs(value)[0]
    assert value is not None
    return WeightSource(name=graph.name(value), view=" ".join(views))


def without_parameter(graph: FxGraph) -> Iterator[str]:
    """A note for each linear that is no site, because its weight is no parameter."""
    for value in graph.values():
        weight = graph.inputs(value)[1] if graph.op(value) is Op.LINEAR else None
        if weight is not None and graph.constant(weight) is None:
            name = graph.name(value) or graph.label(value)
            yield f"{name!r} is left alone: its weight is no parameter, but computed or an input of the graph"
