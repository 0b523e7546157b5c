"""Outliers move to the end where linears make the activation, and nowhere else."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qcompile.backends.fx.graph import FxGraph
from qcompile.backends.fx.kernels import tail
from qcompile.backends.fx.lower import Target, lower
from qcompile.graph import Op, graph_text
from qcompile.passes.permute_outliers import permute_outliers
from qcompile.pipeline import quantize
from qcompile.plan import Plan
from qcompile.sites import find_sites
from tests.hosts import FX, Host, ordered_text, result
from tests.passes.test_split_outliers import plan_for, with_outliers

H = 24
OUT = (3, 17, 4)


class Gated(nn.Module):
    def __init__(self, H: int = H) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(16, H), nn.Linear(16, H, bias=False), nn.Linear(H, 8)
        self.scale = nn.Parameter(torch.rand(H))

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x) * self.scale)


class Branches(Gated):
    """Two readers, one of them through a reshape."""

    def forward(self, x: Tensor) -> Tensor:
        h = F.gelu(self.gate(x))
        return self.down(h.reshape(-1, h.shape[-1])).sum(0) + self.down(torch.relu(h + 1.0)).sum((0, 1))


class Residual(Gated):
    """Reads and makes the channels: what is added to them is numbered like them."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(H, H)

    def forward(self, x: Tensor) -> Tensor:
        h = self.gate(x)
        return self.down(h + self.mix(torch.relu(h)))


class Returned(Gated):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.relu(self.gate(x))
        return self.down(h), h


class Summed(Gated):
    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.gate(x))
        return self.down(h) + h.cumsum(-1).mean()


class Normed(Gated):
    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.rms_norm(self.gate(x), (H,)))


class Folded(Gated):
    """A reshape that takes channels for tokens."""

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.gate(x).reshape(-1, 2, H // 2, 2).transpose(1, 2).reshape(-1, H))


class Swapped(Gated):
    """Channels that were tokens: what was one channel is many."""

    def forward(self, x: Tensor) -> Tensor:
        h = x[..., :1].reshape(2, 5)
        return self.down(F.pad(h, (0, H - 5)))


class Raw(Gated):
    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(F.pad(x, (0, H - 16))))


def plan_of(graph: FxGraph) -> Plan:
    return with_outliers(plan_for(graph, "int8/token"), {"down": OUT, "mix": OUT})


@pytest.fixture
def x() -> Iterator[Tensor]:
    torch.manual_seed(0)
    with torch.no_grad():
        yield torch.randn(2, 5, 16)


@pytest.mark.parametrize("kind", [Gated, Branches, Residual])
def test_channels_are_numbered_anew(host: Host, kind: type[nn.Module], x: Tensor) -> None:
    model = kind()
    graph = host.open(model, x)
    plan = plan_of(graph)
    linears = [found.value for found in find_sites(graph) if plan.decisions[found.site.name].outliers]
    moved = permute_outliers(graph, plan, linears)
    assert moved == dict.fromkeys(linears, (H - 3, H - 2, H - 1))
    # sums in another order
    torch.testing.assert_close(result(graph, x), model(x))


@pytest.mark.parametrize("kind", [Returned, Summed, Normed, Folded, Swapped, Raw])
def test_channels_that_others_see_stay(host: Host, kind: type[nn.Module], x: Tensor) -> None:
    graph = host.open(kind(), x)
    before = ordered_text(graph)
    plan = plan_of(graph)
    linears = [found.value for found in find_sites(graph) if plan.decisions[found.site.name].outliers]
    assert len(linears) == 1
    assert permute_outliers(graph, plan, linears) == {}
    assert ordered_text(graph) == before


@pytest.mark.parametrize("left", ["gate", "up"])
def test_weights_that_stay_float_are_not_copied(host: Host, left: str, x: Tensor) -> None:
    graph = host.open(Gated(), x)
    plan = plan_of(graph)
    decisions = {name: d for name, d in plan.decisions.items() if name != left}
    linears = [found.value for found in find_sites(graph) if found.site.name == "down"]
    assert permute_outliers(graph, Plan(recipe=plan.recipe, decisions=decisions), linears) == {}


def test_channels_whose_importance_is_known_by_number_stay(host: Host, x: Tensor) -> None:
    model = Gated()
    graph = host.open(model, x)
    plan = plan_of(graph)
    down = replace(plan.decisions["down"], solver="imatrix", importance=torch.rand(H) + 0.1)
    plan = replace(plan, decisions={**plan.decisions, "down": down})
    linears = [found.value for found in find_sites(graph) if found.site.name == "down"]
    assert permute_outliers(graph, plan, linears) == {}
    quantize(graph, plan)
    assert float((result(graph, x) - model(x)).norm() / model(x).norm()) < 0.03


def test_the_whole_flow_as_text(host: Host, assert_text, x: Tensor) -> None:
    graph = host.open(Gated(), x)
    plan = with_outliers(plan_for(graph, "int8/token"), {"down": OUT, "gate": (2,), "up": (2,)})
    quantize(graph, plan)
    assert_text("split_permuted", ordered_text(graph))


def test_a_split_behind_permuted_linears_is_the_split_in_place(host: Host, x: Tensor) -> None:
    model = Gated()
    graph = host.open(model, x)
    plan = with_outliers(plan_for(graph, "int8/token"), {"down": OUT, "gate": (2,), "up": (2,)})
    quantize(graph, plan)
    assert "rows_" in ordered_text(graph)

    class Stays(Gated):
        def forward(self, x: Tensor) -> Tensor:
            # the cumulated sum sees how channels are numbered
            h = F.silu(self.gate(x)) * self.up(x) * self.scale
            return self.down(h) + 0 * h.cumsum(-1).mean()

    stays = Stays()
    stays.load_state_dict(model.state_dict())
    other = host.open(stays, x)
    quantize(other, plan)
    assert "rows_" not in ordered_text(other)
    # quantization commutes with a permutation, and sums are in another order
    torch.testing.assert_close(result(graph, x), result(other, x))


def test_readers_that_mean_other_channels_keep_them(host: Host, x: Tensor) -> None:
    class Two(Gated):
        def __init__(self) -> None:
            super().__init__()
            self.other = nn.Linear(H, 8)

        def forward(self, x: Tensor) -> Tensor:
            h = torch.relu(self.gate(x))
            return self.down(h) + self.other(h)

    model = Two()
    graph = host.open(model, x)
    quantize(graph, with_outliers(plan_for(graph, "int8/token"), {"down": (3,), "other": (5,)}))
    assert "rows_" not in ordered_text(graph)
    assert float((result(graph, x) - model(x)).norm() / model(x).norm()) < 0.03


def test_a_contiguous_tail_is_a_slice(x: Tensor) -> None:
    model = Gated()
    graph = FX.open(model, x)
    quantize(graph, with_outliers(plan_for(graph, "int8/token"), {"down": OUT, "gate": (2, 9), "up": (2, 9)}))
    expected = result(graph, x)
    lower(graph, Target(device="cpu"), PlainPacks())
    text = graph_text(graph)
    assert text.count("aten.slice") == 1
    # behind the input there is nothing to number anew
    assert sum(graph.op(value) is Op.SELECT for value in graph.values()) == 1
    torch.testing.assert_close(result(graph, x), expected)


class PlainPacks:
    def quantized(self, site, constant, kernel, problem, weight):
        return kernel.pack(weight.make(), weight.qparams, problem.dtype)

    def tail(self, site, constant, weight):
        return tail.pack(weight)
