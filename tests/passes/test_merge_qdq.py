"""Equal pairs become one, and a round trip through numbers is dropped; what differs stays."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qcompile.graph import Graph, Op
from qcompile.numerics import QParams
from qcompile.passes.merge_qdq import merge_qdq
from qcompile.spec import Spec, parse_spec
from tests.hosts import Host, ordered_text, result

TOKEN = parse_spec("int8/token")
X = torch.linspace(-3, 3, 12).reshape(3, 4)


class Fan(nn.Module):
    """An activation with three readers."""

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(x)
        return torch.softmax(y, -1) + torch.sigmoid(y) * torch.tanh(y)


def static(scale: float) -> QParams:
    return QParams(spec=parse_spec("int8/tensor"), scale=torch.tensor(scale))


def fan(host: Host, *qparams: QParams | Spec) -> Graph[Any]:
    """The graph of Fan, each reader of the activation behind a pair of its own."""
    graph = host.open(Fan(), X)
    relu = next(v for v in graph.values() if graph.op(v) is Op.RELU)
    for user, found in zip(list(graph.users(relu)), qparams, strict=True):
        graph.set_input(user, list(graph.inputs(user)).index(relu), graph.add_qdq(relu, found))
    return graph


def count(graph: Graph[Any]) -> tuple[int, int]:
    ops = [graph.op(v) for v in graph.values()]
    return ops.count(Op.QUANTIZE), ops.count(Op.DEQUANTIZE)


@pytest.mark.parametrize(
    ("qparams", "left"),
    [
        ([static(0.5), static(0.5), static(0.5)], 1),
        ([static(0.5), static(0.25), static(0.5)], 2),
        ([static(0.5), static(0.25), static(0.125)], 3),
        ([TOKEN, TOKEN, TOKEN], 1),
        ([TOKEN, parse_spec("int4/token"), TOKEN], 2),
        ([TOKEN, static(0.5), static(0.5)], 2),
    ],
)
def test_equal_pairs_on_one_value_become_one(host: Host, qparams: list[QParams | Spec], left: int) -> None:
    graph = fan(host, *qparams)
    before = result(graph, X)
    # a pair that goes is a quantize and a dequantize
    assert merge_qdq(graph) == 2 * (3 - left)
    graph.prune()
    assert count(graph) == (left, left)
    torch.testing.assert_close(result(graph, X), before, rtol=0, atol=0)


def test_a_second_run_finds_nothing(host: Host) -> None:
    graph = fan(host, static(0.5), static(0.5), TOKEN)
    assert merge_qdq(graph) == 2
    text = ordered_text(graph)
    assert merge_qdq(graph) == 0
    graph.prune()
    assert merge_qdq(graph) == 0
    assert len(ordered_text(graph)) < len(text)


def again(host: Host, first: QParams | Spec, second: QParams | Spec) -> Graph[Any]:
    """relu(x) quantized and dequantized twice in a row."""
    graph = host.open(nn.ReLU(), X)
    relu = next(v for v in graph.values() if graph.op(v) is Op.RELU)
    graph.replace_uses(relu, graph.add_qdq(relu, first))
    (once,) = graph.outputs()
    graph.replace_uses(once, graph.add_qdq(once, second))
    return graph


def test_a_round_trip_through_numbers_is_dropped(host: Host) -> None:
    graph = again(host, static(0.5), static(0.5))
    before = result(graph, X)
    assert count(graph) == (2, 2)
    # the second quantize, and the dequantize that then equals the first
    assert merge_qdq(graph) >= 1
    graph.prune()
    assert count(graph) == (1, 1)
    torch.testing.assert_close(result(graph, X), before, rtol=0, atol=0)


@pytest.mark.parametrize(("first", "second"), [(static(0.5), static(0.25)), (TOKEN, TOKEN), (TOKEN, static(0.5))])
def test_a_second_quantize_that_may_change_values_stays(
    host: Host, first: QParams | Spec, second: QParams | Spec
) -> None:
    graph = again(host, first, second)
    assert merge_qdq(graph) == 0
    assert count(graph) == (2, 2)


def test_a_graph_without_pairs_is_left_alone(host: Host) -> None:
    graph = host.open(Fan(), X)
    before = ordered_text(graph)
    assert merge_qdq(graph) == 0
    assert ordered_text(graph) == before
