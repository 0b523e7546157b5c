"""Integers where they serve and floats where they stay poor, in one model: from data to disk and to kernels."""

from collections.abc import Sequence
from dataclasses import replace
from math import inf
from pathlib import Path

import pytest
import torch
from torch import Tensor

import qcompile
from qcompile.folds import Fold
from qcompile.graph import Graph, V
from qcompile.passes.fold_smooth import fold_smooth
from qcompile.plan import Plan
from qcompile.presets import PRESETS
from qcompile.recipe import Recipe
from qcompile.smooth import Smooth
from tests.spiky import FLOATS, INTEGERS, SPIKE, Spiky, spikes, spiky


@pytest.fixture
def net() -> Spiky:
    return spiky()


def recipe(**more: object) -> Recipe:
    """The preset's rule of linears, with other fields."""
    return Recipe(name="mine", rules=(replace(PRESETS["int8-fp8-static"].rules[-1], **more),))  # type: ignore[arg-type]


def calibrated(net: Spiky, chosen: Recipe | str = "int8-fp8-static", **more: Path) -> Plan:
    return qcompile.calibrate(net, [spikes(1), spikes(2)], chosen, progress=False, **more)


def run(net: Spiky, plan: Plan, x: Tensor, **options: bool) -> Tensor:
    torch._dynamo.reset()
    with torch.no_grad():
        return torch.compile(net, backend="qcompile", options={"plan": plan, **options})(x)


def apart(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def specs(plan: Plan) -> dict[str, tuple[str, str]]:
    return {name: (str(d.weight), str(d.input)) for name, d in plan.decisions.items()}


@pytest.mark.parametrize(
    "chosen",
    ["int8-fp8-static", recipe(smooth=None, split=None), recipe(solver="gptq", split=None)],
    ids=["smoothed and split", "alone", "solved in turn"],
)
def test_only_the_poor_site_becomes_floats_with_one_scale(chosen: Recipe | str, net: Spiky, tmp_path: Path) -> None:
    plan = calibrated(net, chosen)
    assert specs(plan) == {"up": INTEGERS, "down": FLOATS}
    given = plan.decisions["down"].input_qparams
    assert given is not None
    assert (given.scale.numel(), given.zero) == (1, None)
    assert not plan.notes
    qcompile.save(plan, tmp_path / "plan")
    assert qcompile.load(tmp_path / "plan", spiky()) == plan


@pytest.mark.parametrize("free", [False, True])
def test_kernels_of_both_kinds_give_what_the_quantized_graph_gives(free: bool, net: Spiky) -> None:
    plan, x, expected = calibrated(net), spikes(3), net(spikes(3))
    integers = run(net, calibrated(net, recipe(rescue=None)), x, lower=False)
    graph = run(net, plan, x, lower=False)
    # rows without a spike, to which integers leave little
    calm = x.amax(-1) < SPIKE
    assert apart(graph[calm], expected[calm]) < apart(integers[calm], expected[calm]) / 3
    assert apart(run(net, plan, x, lower=True, free_weights=free), graph) < 1e-5


def test_a_fold_that_is_undone_takes_the_floats_with_it(
    net: Spiky, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def broken(graph: Graph[V], folds: Sequence[Fold]) -> int:
        if folds:
            raise KeyError("no such site")
        return fold_smooth(graph, folds)

    # whatever it gains
    monkeypatch.setattr("qcompile.choose.RESCUE_DB", inf)
    monkeypatch.setattr("qcompile.choose.RESCUE_GAIN", -inf)
    smoothed = recipe(smooth=Smooth(strength=0.5), split=None)
    whole = calibrated(net, smoothed)
    assert [fold.sites for fold in whole.folds] == [("up",)]
    assert specs(whole) == dict.fromkeys(("up", "down"), FLOATS)
    monkeypatch.setattr("qcompile.prepare.fold_smooth", broken)
    plan = calibrated(net, smoothed, failures=tmp_path)
    assert "KeyError" in plan.notes[0]
    # on both sides, or nothing multiplies them
    assert specs(plan) == {"up": INTEGERS, "down": FLOATS}
