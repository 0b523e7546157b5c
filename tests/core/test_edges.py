"""Which factors may move where, found from the flow of data alone."""

from collections.abc import Callable

import pytest

from qcompile.backends.fx.graph import FxGraph
from qcompile.edges import Edge, find_edges
from tests.edges import CASES, built
from tests.fx.capture import dynamo_graph, exported_graph


def first(edge: Edge) -> str:
    return edge.consumers[0].site.name


@pytest.mark.parametrize("opened", [dynamo_graph, exported_graph])
@pytest.mark.parametrize("name", CASES)
def test_what_may_be_folded_and_why_not(name: str, opened: Callable[..., FxGraph]) -> None:
    case = CASES[name]
    edges = find_edges(opened(*built(name)))
    assert {first(e): e.into for e in edges if not e.reason} == case.folds
    reasons = {first(e): e.reason for e in edges if e.reason}
    assert reasons.keys() == case.refused.keys()
    for consumer, says in case.refused.items():
        assert says in reasons[consumer]
    assert tuple(first(e) for e in edges if e.multiply) == case.multiplied
