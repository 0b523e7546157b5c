"""Checks of passes: what is kept, what is found broken, and what is needed to see it again."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from math import inf, nan

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from qcompile.backends.fx.graph import FxGraph
from qcompile.folds import Fold
from qcompile.graph import Op
from qcompile.passes.fold_smooth import fold_smooth
from qcompile.verify import TOLERANCES, check, difference, failing_part, run_graph
from tests.fx.capture import exported_graph
from tests.variants import variants

LAYERS, WIDTH = 9, 16


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(LAYERS))
        self.linears = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS))

    def forward(self, x: Tensor) -> Tensor:
        for norm, linear in zip(self.norms, self.linears, strict=True):
            x = x + linear(norm(x))
        return x


@pytest.fixture
def opened() -> Callable[[], FxGraph]:
    torch.manual_seed(0)
    model, x = Stack().eval(), inputs()
    return lambda: exported_graph(model, x)


def inputs() -> Tensor:
    return torch.randn(3, 5, WIDTH, generator=torch.Generator().manual_seed(1))


def folds() -> list[Fold]:
    scale = torch.linspace(0.5, 20.0, WIDTH)
    return [Fold(sites=(f"linears.{i}",), scale=scale, into=f"norms.{i}") for i in range(LAYERS)]


def breaking(*names: str) -> Callable[[FxGraph, Sequence[Fold]], int]:
    """The pass, but of these sites the weights of one feature change afterwards."""

    def run(graph: FxGraph, chosen: Sequence[Fold]) -> int:
        count = fold_smooth(graph, chosen)
        bad = {site for fold in chosen for site in fold.sites} & set(names)
        for value in [v for v in graph.values() if graph.op(v) is Op.LINEAR and graph.name(v) in bad]:
            weight = graph.constant(graph.inputs(value)[1]).clone()
            weight[3] += 0.5
            graph.set_input(value, 1, graph.add_constant(f"{graph.name(value)}.broken", weight))
        return count

    return run


@pytest.mark.parametrize(
    "bad",
    variants(
        [((),), ((0,),), ((LAYERS - 1,),), ((4,),), ((0, 1),), ((2, 5, 7),), (tuple(range(LAYERS)),)],
        quick=[((),), ((0,),), ((2, 5, 7),)],
    ),
)
def test_what_breaks_is_found_alone_among_many(bad: tuple[int, ...], opened: Callable[[], FxGraph]) -> None:
    items = folds()
    run = breaking(*(f"linears.{i}" for i in bad))
    with torch.no_grad():
        broken = check(opened, run, items, [inputs()], run_graph(opened(), [inputs()]))
    assert sorted(items.index(item) for (item,), _ in broken) == list(bad)
    assert all(distance > 1 for _, distance in broken)


def test_halves_need_few_runs(opened: Callable[[], FxGraph]) -> None:
    runs = []
    run = breaking("linears.6")

    def counted(graph: FxGraph, chosen: Sequence[Fold]) -> int:
        runs.append(len(chosen))
        return run(graph, chosen)

    with torch.no_grad():
        check(opened, counted, folds(), [inputs()], run_graph(opened(), [inputs()]))
    # all, then both halves of 9 down to 1, and all others
    assert runs[0] == LAYERS
    assert runs[-1] == LAYERS - 1
    assert len(runs) <= 1 + 2 * 4 + 1


def test_no_items_need_no_run() -> None:
    def never() -> FxGraph:
        raise AssertionError("the graph is not needed")

    assert check(never, lambda graph, chosen: 0, [], [], None) == []


def test_items_that_move_the_outputs_only_together_are_blamed_together(opened: Callable[[], FxGraph]) -> None:
    """Each moves them by 0.4 of what rounding may do."""
    step = 0.4 * TOLERANCES[torch.float32]

    def run(graph: FxGraph, chosen: Sequence[Fold]) -> int:
        (last,) = graph.outputs()
        factor = graph.add_constant("factor", torch.tensor(1.0 + step * len(chosen)), like=last)
        graph.replace_uses(last, graph.add_op(Op.MUL, [last, factor]))
        return len(chosen)

    with torch.no_grad():
        broken = check(opened, run, folds()[:4], [inputs()], run_graph(opened(), [inputs()]))
    assert [len(items) for items, _ in broken] == [4]
    assert broken[0][1] == pytest.approx(1.6, rel=0.1)


def test_what_is_broken_in_half_floats_is_seen() -> None:
    before = torch.full((100,), 0.01, dtype=torch.float16)
    # squares of differences of 1e-4 are below what float16 holds
    assert difference(before, before * 1.02) > 1


def test_many_broken_items_take_few_runs(opened: Callable[[], FxGraph], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qcompile.verify.MOST", 2)
    items = folds()
    run = breaking(*(f"linears.{i}" for i in range(LAYERS)))
    with torch.no_grad():
        broken = check(opened, run, items, [inputs()], run_graph(opened(), [inputs()]))
    assert [len(found) for found, _ in broken] == [1, 1, LAYERS - 2]


def test_running_a_graph_leaves_its_inputs() -> None:
    class Writes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x.add_(1.0))

    x = inputs()
    before = x.clone()
    graph = exported_graph(Writes(), x.clone())
    with torch.no_grad():
        first, second = (run_graph(graph, [x])[0] for _ in range(2))
    assert torch.equal(x, before)
    assert torch.equal(first, second)


ONES = torch.ones(4)


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        (ONES, ONES.clone(), 0.0),
        (ONES, torch.ones(5), inf),
        (ONES, torch.ones(4, 1), inf),
        (ONES, ONES.double(), inf),
        (ONES, torch.tensor([1.0, 1.0, 1.0, nan]), inf),
        (ONES, torch.tensor([1.0, 1.0, 1.0, inf]), inf),
        (torch.tensor([1.0, nan]), torch.tensor([1.0, nan]), 0.0),
        (torch.tensor([1.0, inf]), torch.tensor([1.0, inf]), 0.0),
        (torch.tensor([1.0, inf]), torch.tensor([1.0, -inf]), inf),
        (torch.tensor([1.0, nan]), torch.tensor([1.0, 2.0]), inf),
        (torch.arange(3), torch.arange(3), 0.0),
        (torch.arange(3), torch.tensor([0, 1, 3]), inf),
        (torch.tensor([True]), torch.tensor([False]), inf),
        (torch.zeros(3), torch.zeros(3), 0.0),
        (torch.ones(0), torch.ones(0), 0.0),
        ((), (), 0.0),
        (None, None, 0.0),
    ],
)
def test_difference(before: object, after: object, expected: float) -> None:
    assert difference(before, after) == expected


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_one_is_what_rounding_may_do(dtype: torch.dtype) -> None:
    before = torch.full((64,), 4.0, dtype=dtype)
    # representable in each dtype, and far from 1 on either side
    assert difference(before, before * (1 + 0.25)) == pytest.approx(0.25 / TOLERANCES[dtype])
    step = torch.finfo(dtype).eps
    assert difference(before, before * (1 + step)) < 1


def test_the_farthest_output_counts() -> None:
    before = {"a": ONES, "b": [ONES, (torch.arange(2), 7)]}
    after = {"a": ONES, "b": [ONES * 2, (torch.arange(2), 8)]}
    assert difference(before, before) == 0.0
    assert difference(before, after) == pytest.approx(1 / TOLERANCES[torch.float32])
    assert difference(before, {**after, "b": [ONES, (torch.arange(2) + 1, 7)]}) == inf
    with pytest.raises(ValueError, match="zip"):
        difference(before, {"a": ONES})


def rerun(tensors: dict[str, Tensor], norm: str, site: str) -> Tensor:
    """The site from saved tensors: what goes into the norm before it, and the constants of both."""
    (x,) = (t for key, t in tensors.items() if key.startswith("input.") and t.dim() == 3)
    held = {key.removeprefix("constant."): t for key, t in tensors.items() if key.startswith("constant.")}
    normed = F.layer_norm(x, (WIDTH,), held[f"{norm}.weight"], held[f"{norm}.bias"])
    return F.linear(normed, held[f"{site}.weight"], held[f"{site}.bias"])


def test_a_failing_part_can_be_run_again(opened: Callable[[], FxGraph]) -> None:
    run = breaking("linears.4")
    fold = folds()[4]

    def alone(graph: fx.Graph) -> int:
        return run(graph, [fold])

    with torch.no_grad():
        failure = failing_part(opened, alone, fold.sites, [inputs()])
        tensors = dict(failure.tensors)
        before, after = tensors["before.linears.4"], tensors["after.linears.4"]
        assert torch.equal(rerun(tensors, "norms.4", "linears.4"), before)
        again = dict(tensors)
        again["constant.linears.4.weight"] = tensors["constant.linears.4.weight"] * fold.scale
        again["constant.linears.4.weight"][3] += 0.5
        for kind in ("weight", "bias"):
            again[f"constant.norms.4.{kind}"] = tensors[f"constant.norms.4.{kind}"] / fold.scale
        torch.testing.assert_close(rerun(again, "norms.4", "linears.4"), after, rtol=1e-5, atol=1e-5)
    assert difference(before, after) > 1
    # the layers around it are no part of it
    assert not any("linears.3" in key or "linears.5" in key for key in tensors)
    first, second = failure.text.split("after the pass")
    assert first.startswith("before the pass\n")
    assert "linears.4.weight" in first
    assert "linears.4.broken" in second


@pytest.mark.parametrize("raises", ["pass", "graph"])
def test_a_pass_after_which_nothing_runs_is_found_and_shown(raises: str, opened: Callable[[], FxGraph]) -> None:
    items, site = folds(), "linears.4"

    def run(graph: FxGraph, chosen: Sequence[Fold]) -> int:
        count = fold_smooth(graph, chosen)
        if any(site in fold.sites for fold in chosen):
            if raises == "pass":
                raise KeyError("no such norm")
            (value,) = (v for v in graph.values() if graph.op(v) is Op.LINEAR and graph.name(v) == site)
            narrow = graph.constant(graph.inputs(value)[1])[:, 1:]
            graph.set_input(value, 1, graph.add_constant(f"{site}.narrow", narrow))
        return count

    with torch.no_grad():
        broken = check(opened, run, items, [inputs()], run_graph(opened(), [inputs()]))
        failure = failing_part(opened, lambda graph: run(graph, [items[4]]), [site], [inputs()])
    assert broken == [([items[4]], inf)]
    assert f"before.{site}" in failure.tensors
    assert failure.error.startswith({"pass": "KeyError: 'no such norm'", "graph": "RuntimeError: mat1 and"}[raises])
    before, after = failure.text.split("after the pass")
    assert f"{site}.weight" in before
    assert failure.error in after
    assert (f"{site}.narrow" in after) is (raises == "graph")


def test_a_fold_that_cannot_be_told_from_rounding_is_kept(opened: Callable[[], FxGraph]) -> None:
    items = [replace(fold, scale=torch.full((WIDTH,), 3.0)) for fold in folds()]
    with torch.no_grad():
        assert check(opened, fold_smooth, items, [inputs()], run_graph(opened(), [inputs()])) == []
