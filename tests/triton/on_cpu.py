"""Models that are lowered for a Hopper GPU and run without one: their opaque ops are given what they compute."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, library, nn

from qcompile.backends.fx.kernels.problem import Problem
from qcompile.backends.fx.lower import Target, lower
from qcompile.graph import graph_text
from qcompile.pipeline import quantize
from qcompile.plan import Plan
from qcompile.recipe import Recipe
from tests.hosts import FX, result
from tests.passes.test_permute_outliers import PlainPacks

HOPPER = Target(device="cuda", capability=(9, 0))


@contextmanager
def on_cpu(**ops: Callable[..., Any]) -> Iterator[None]:
    """Within it, the ops of these names run on the CPU, by these functions."""
    added = library.Library("qcompile", "IMPL")
    for name, op in ops.items():
        added.impl(name, op, "CPU")
    yield
    added._destroy()


class Packs(PlainPacks):
    """The packs of a graph, joined as the store joins them."""

    def __init__(self) -> None:
        self._made: dict[str, dict[str, Tensor]] = {}

    def quantized(self, site: str, constant: str, kernel: Any, problem: Problem, weight: Any) -> dict[str, Tensor]:
        self._made[site] = super().quantized(site, constant, kernel, problem, weight)
        return self._made[site]

    def joined(self, members: Any, kernel: Any, problem: Problem) -> dict[str, Tensor]:
        packs = [self._made[site] for site, _ in members]
        return {name: torch.cat([pack[name] for pack in packs]) for name in packs[0]}


class Heads(nn.Module):
    """A norm whose channels are far apart, and linears that read it."""

    def __init__(self, K: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(K, eps=1e-6)
        self.q, self.k = nn.Linear(K, 128, bias=False), nn.Linear(K, 64, bias=False)
        self.v = nn.Linear(K, 48)
        self.norm.weight.data = torch.exp2(torch.linspace(-4, 4, K))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        return torch.cat([self.q(h), self.k(h), self.v(h)], -1)


def lowered_for_hopper(decided: Plan | Recipe, model: nn.Module, x: Tensor) -> tuple[str, float]:
    """The lowered graph, and how far its results are from those of the planned one, relatively."""
    graph = FX.open(model, x)
    quantize(graph, decided)
    expected = result(graph, x).float()
    graph = FX.open(model, x)
    quantize(graph, decided, lower=lambda graph, plan: len(lower(graph, HOPPER, Packs())))
    y = result(graph, x).float()
    return graph_text(graph), float((y - expected).norm() / expected.norm())
