"""What is taken of a graph's weights is what the graph would have multiplied, and the graph reads no float for it."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from qcompile import pipeline
from qcompile.errors import PlanError
from qcompile.numerics import dequantize, fake_quantize
from qcompile.plan import Decision
from qcompile.presets import parse_recipe
from qcompile.solved import Solved
from qcompile.spec import parse_spec
from tests.hosts import open_fx

SPEC = "int8/channel"


class Words(nn.Module):
    """A table that two ops read, and a linear."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.inner = nn.Embedding(11, 16), nn.Linear(16, 16)

    def forward(self, ids: Tensor) -> Tensor:
        return nn.functional.linear(self.inner(self.table(ids)), self.table.weight)


def every(decision: Decision) -> bool:
    return True


def test_codes_stand_for_the_quantized_weight() -> None:
    model, ids = Words().eval(), torch.tensor([[1, 10, 4]])
    graph, taken = open_fx(model, ids), dict[str, Solved]()
    recipe = parse_recipe({"rules": [{"ops": ["linear", "embedding"], "weight": SPEC}]})
    pipeline.take(graph, recipe, taken, storable=every)
    names = {"inner": model.inner.weight, "table": model.table.weight, "table.weight": model.table.weight}
    assert taken.keys() == names.keys()
    for name, weight in names.items():
        qparams = taken[name].qparams
        assert qparams.codes is not None
        assert torch.equal(dequantize(qparams.codes, qparams), fake_quantize(weight, parse_spec(SPEC)))
        assert taken[name].snr_db is not None
    # one table, and no float matrix is left in the graph
    assert taken["table"] is taken["table.weight"]
    assert [t for t in graph.constants().values() if t.dim() > 1 and not t.is_meta] == []


def test_what_may_not_be_stored_stays() -> None:
    model, ids = Words().eval(), torch.tensor([[1, 10, 4]])
    graph, taken = open_fx(model, ids), dict[str, Solved]()
    recipe = parse_recipe({"rules": [{"weight": SPEC}]})
    pipeline.take(graph, recipe, taken, storable=lambda d: d.name == "inner")
    assert taken.keys() == {"inner"}
    left = [tuple(t.shape) for t in graph.constants().values() if not t.is_meta]
    assert (11, 16) in left
    assert (16, 16) not in left


def test_a_second_graph_takes_the_same_or_says_so() -> None:
    model, ids = Words().eval(), torch.tensor([[1, 10, 4]])
    recipe, taken = parse_recipe({"rules": [{"weight": SPEC}]}), dict[str, Solved]()
    pipeline.take(open_fx(model, ids), recipe, taken, storable=every)
    before = dict(taken)
    pipeline.take(open_fx(model, ids), recipe, taken, storable=every)
    assert all(taken[name] is before[name] for name in before)
    taken["inner"] = replace(before["inner"], source="inner.weight.folded_1")
    with pytest.raises(PlanError, match=r"'inner' as made of 'inner\.weight\.folded_1', and the graph asks for 'inner"):
        pipeline.take(open_fx(model, ids), recipe, taken, storable=every)


def test_a_weight_without_values_is_left() -> None:
    graph, taken = open_fx(Words().eval(), torch.tensor([[1, 10, 4]])), dict[str, Solved]()
    graph.module.inner_weight = nn.Parameter(graph.module.inner_weight.to("meta"))
    pipeline.take(graph, parse_recipe({"rules": [{"weight": SPEC}]}), taken, storable=every)
    assert taken.keys() == {"table.weight"}
