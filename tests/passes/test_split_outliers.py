"""Outlier channels leave the quantization, as text; and what must hold of the numbers whatever the channels."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qcompile.calibrate import calibrate
from qcompile.errors import PlanError
from qcompile.graph import Graph, Op
from qcompile.numerics import fake_quantize
from qcompile.passes.split_outliers import split_outliers
from qcompile.pipeline import quantize
from qcompile.plan import Decision, Plan, make_plan
from qcompile.recipe import Recipe, Rule
from qcompile.sites import find_sites, tail_name, tail_owner
from qcompile.spec import parse_spec
from tests.hosts import FX, Host, ordered_text, result

CHANNEL = parse_spec("int8/channel")


class Pair(nn.Module):
    """Two linears behind one norm."""

    def __init__(self, K: int = 32, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(K, dtype=dtype)
        self.q = nn.Linear(K, 16, dtype=dtype)
        self.k = nn.Linear(K, 16, bias=False, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        return F.silu(self.q(x)) + self.k(x)


def with_outliers(plan: Plan, outliers: Mapping[str, Sequence[int]], threshold: float | None = None) -> Plan:
    decisions = {
        name: replace(d, outliers=tuple(outliers.get(name, ())), threshold=threshold)
        for name, d in plan.decisions.items()
    }
    return replace(plan, decisions=decisions)


def plan_for(graph: Graph[Any], given: str | None, weight: str = "int8/channel") -> Plan:
    rule = Rule(weight=parse_spec(weight), input=None if given is None else parse_spec(given))
    return make_plan([found.site for found in find_sites(graph)], Recipe(name="r", rules=(rule,)))


def quantized(
    host: Host,
    model: nn.Module,
    x: Tensor,
    outliers: Mapping[str, Sequence[int]],
    *,
    given: str = "int8/token",
    **more: float,
) -> Tensor:
    """What the model gives with those channels split."""
    graph = host.open(model, x)
    quantize(graph, with_outliers(plan_for(graph, given), outliers, **more))
    return result(graph, x)


def fc(K: int = 48, N: int = 24, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    return nn.Sequential(nn.Linear(K, N, dtype=dtype)).eval()


def outlying(K: int, channels: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
    x = torch.randn(3, 5, K, dtype=dtype)
    x[..., list(channels)] *= 40
    return x


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    torch.manual_seed(0)
    with torch.no_grad():
        yield


def test_calibrated_channels(host: Host, assert_text) -> None:
    model, x = Pair(), torch.randn(2, 5, 32)
    graph = host.open(model, x)
    plan = with_outliers(plan_for(graph, "int8/token"), {"q": (3, 30), "k": (3, 30)})
    before = result(graph, x)
    assert split_outliers(graph, plan) == 2
    graph.prune()
    assert_text("split_channels", ordered_text(graph))
    # so far nothing is quantized: two sums in place of one
    torch.testing.assert_close(result(graph, x), before)


def test_channels_found_while_running(host: Host, assert_text) -> None:
    model, x = Pair(), torch.randn(2, 5, 32)
    graph = host.open(model, x)
    quantize(graph, with_outliers(plan_for(graph, "int8/token"), {}, threshold=2.5))
    assert_text("split_found", ordered_text(graph))


def test_a_static_input_needs_no_mask(host: Host) -> None:
    model, x = Pair(), torch.randn(2, 5, 32)
    plan = with_outliers(calibrate(model, [x], "int8-static", progress=False), {"q": (0,), "k": (7, 9)})
    graph = host.open(model, x)
    assert split_outliers(graph, plan) == 2
    assert "mul" not in ordered_text(graph)
    # other channels are another selection
    assert ordered_text(graph).count("= select") == 2


@pytest.mark.parametrize("given", ["int8/token", "int8/token/asym", "int8/g16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_the_graph_computes_what_the_formula_says(host: Host, given: str, dtype: torch.dtype) -> None:
    channels = [5, 1, 40]
    model, x = fc(dtype=dtype), outlying(48, channels, dtype)
    keep = torch.ones(48, dtype=dtype)
    keep[channels] = 0
    W, b = model[0].weight.detach(), model[0].bias.detach()
    expected = F.linear(fake_quantize(x * keep, parse_spec(given)), fake_quantize(W * keep, CHANNEL), b)
    expected = expected + F.linear(x[..., sorted(channels)], W[:, sorted(channels)])
    host.assert_equal(quantized(host, model, x, {"0": channels}, given=given), expected)


def test_weight_only_sites_are_split_too(host: Host) -> None:
    model, x = fc(), torch.randn(4, 48)
    graph = host.open(model, x)
    quantize(graph, with_outliers(plan_for(graph, None, "int4/g16/asym"), {"0": (7,)}))
    W = model[0].weight.detach()
    rest = W.index_fill(1, torch.tensor([7]), 0)
    expected = F.linear(x, fake_quantize(rest, parse_spec("int4/g16/asym")), model[0].bias) + x[:, 7:8] @ W[:, 7:8].T
    torch.testing.assert_close(result(graph, x), expected)


def test_no_channel_is_plain(host: Host) -> None:
    model, x = Pair(), torch.randn(2, 5, 32)
    graph = host.open(model, x)
    assert split_outliers(graph, with_outliers(plan_for(graph, "int8/token"), {})) == 0
    assert torch.equal(quantized(host, model, x, {}, threshold=1e6), quantized(host, model, x, {}))


@pytest.mark.parametrize("K", [1, 7, 48])
def test_all_channels_are_the_float_model(host: Host, K: int) -> None:
    model, x = fc(K), torch.randn(4, K)
    torch.testing.assert_close(quantized(host, model, x, {"0": range(K)}), model(x))
    # outliers that are found while running meet the dequantized weight
    dequantized = F.linear(x, fake_quantize(model[0].weight.detach(), CHANNEL), model[0].bias)
    torch.testing.assert_close(quantized(host, model, x, {}, threshold=0.0), dequantized)


@pytest.mark.parametrize("given", ["int8/token", "int8/token/asym"])
def test_permuting_the_channels_of_both_is_a_no_op(host: Host, given: str) -> None:
    order, channels = torch.randperm(48), [3, 20, 21]
    model, x = fc(), outlying(48, channels)
    other = fc()
    with torch.no_grad():
        other[0].weight.copy_(model[0].weight[:, order])
        other[0].bias.copy_(model[0].bias)
    there = [order.tolist().index(channel) for channel in channels]
    expected = quantized(host, model, x, {"0": channels}, given=given)
    # sums in another order
    torch.testing.assert_close(quantized(host, other, x[..., order], {"0": there}, given=given), expected)


def test_a_channel_of_zeros_changes_nothing(host: Host) -> None:
    model, x, wider = fc(), outlying(48, [3]), fc(49)
    with torch.no_grad():
        wider[0].weight.copy_(F.pad(model[0].weight, (0, 1)))
        wider[0].bias.copy_(model[0].bias)
    expected = quantized(host, model, x, {"0": [3]})
    for outliers in ([3], [3, 48]):
        torch.testing.assert_close(quantized(host, wider, F.pad(x, (0, 1)), {"0": outliers}), expected)


@pytest.mark.parametrize("given", ["int8/token", "int8/token/asym"])
def test_splitting_outliers_lowers_the_error(host: Host, given: str) -> None:
    model, x = fc(), outlying(48, [3, 20])
    exact = model(x)
    error = {
        name: float((quantized(host, model, x, outliers, given=given, **more) - exact).norm())
        for name, outliers, more in (
            ("plain", {}, {}),
            ("split", {"0": [3, 20]}, {}),
            ("found", {}, {"threshold": 10.0}),
        )
    }
    assert error["split"] < error["plain"] / 2
    assert error["found"] < error["plain"] / 2


@pytest.mark.parametrize("given", ["int8/token", "int8-static"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("channel", [3, 4])
def test_nan_reaches_its_row_and_no_other(host: Host, given: str, bad: float, channel: int) -> None:
    model, x = fc(), outlying(48, [3])
    graph = host.open(model, x)
    plan = calibrate(model, [x], given, progress=False) if given == "int8-static" else plan_for(graph, given)
    quantize(graph, with_outliers(plan, {"0": (3,)}))
    poisoned = x.clone()
    poisoned[1, 2, channel] = bad
    y, clean = result(graph, poisoned), result(graph, x)
    # a static scale clips what is no outlier
    if given == "int8/token" or channel == 3:
        assert not y[1, 2].isfinite().any()
    y[1, 2] = clean[1, 2]
    assert torch.equal(y, clean)


def test_sites_that_cannot_be_split_stay(host: Host) -> None:
    model, x = Pair(), torch.randn(2, 5, 32)
    graph = host.open(model, x)
    plan = plan_for(graph, "int8/token")
    decisions = {
        # a weight that stays float has nothing to be kept out of
        "q": replace(plan.decisions["q"], weight=None, outliers=(1,)),
        # no range of the input to be kept out of
        "k": replace(plan.decisions["k"], input=None, threshold=6.0),
    }
    before = ordered_text(graph)
    assert split_outliers(graph, replace(plan, decisions=decisions)) == 0
    assert ordered_text(graph) == before


@pytest.mark.parametrize("outliers", [(32,), (-1,), (3, 3)])
def test_impossible_channels_are_refused(outliers: tuple[int, ...]) -> None:
    with pytest.raises(PlanError, match=r"'q' must be distinct channels from 0 to 31.*calibrate again"):
        Decision(name="q", op=Op.LINEAR, shape=(16, 32), weight=CHANNEL, outliers=outliers)


def test_weights_that_are_only_shapes() -> None:
    # an ONNX file has its weights
    model, x = Pair().to("meta"), torch.randn(2, 5, 32, device="meta")
    graph = FX.open(model, x)
    quantize(graph, with_outliers(plan_for(graph, "int8/token"), {"q": (3,), "k": (3,)}))
    assert ordered_text(graph).count('.outliers" :') == 2


@pytest.mark.parametrize(("site", "name"), [("a.b", "a.b.outliers"), ("", "outliers")])
def test_names_of_thin_linears(site: str, name: str) -> None:
    assert tail_name(site) == name
    assert tail_owner(name) == site
    assert tail_owner(f"{site}x") is None
