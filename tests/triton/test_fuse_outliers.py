"""Outlier channels of a split leave the op that quantizes, and the graph computes what it did, on the CPU."""

from collections.abc import Callable, Iterator, Sequence
from operator import getitem
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._inductor.utils import fresh_cache, run_and_get_code

pytest.importorskip("triton")

from qcompile.backends.fx.graph import FxGraph
from qcompile.backends.fx.kernels import tail
from qcompile.backends.fx.lower import lower
from qcompile.backends.fx.rows import QUANTIZE_ROWS
from qcompile.backends.fx.values import attribute
from qcompile.calibrate import calibrate
from qcompile.pipeline import quantize as quantize_graph
from qcompile.plan import make_plan
from qcompile.presets import parse_recipe
from qcompile.sites import find_sites
from tests.hosts import FX, result
from tests.passes.test_permute_outliers import PlainPacks
from tests.passes.test_split_outliers import with_outliers
from tests.triton.fused import CASES, OPS, K, Net, RMSNorm, fused, pair
from tests.triton.on_cpu import HOPPER, Packs, on_cpu

SPLIT = (3, 17, 30)


@pytest.fixture(scope="module", autouse=True)
def emulated() -> Iterator[None]:
    with on_cpu(**OPS):
        yield


def channels_of(arguments: tuple[Any, ...]) -> list[int]:
    """Of the tail, if just those are kept out of the codes."""
    keep, channels = (attribute(node) for node in arguments[10:])
    assert sorted(channels.tolist()) == (keep == 0).nonzero().flatten().tolist()
    return list(channels.tolist())


@pytest.mark.parametrize("recipe", ["int8", "fp8"])
@pytest.mark.parametrize("name", CASES)
def test_outliers_leave_the_op_that_quantizes(name: str, recipe: str) -> None:
    before, norm, kind, second, total = CASES[name]
    net = Net(before, norm)
    (arguments,) = fused(net, *pair(), recipe=recipe, outliers={"q": SPLIT, "k": SPLIT})
    assert arguments[4] == kind
    assert (arguments[1] is not None) is second
    assert arguments[8] is total
    assert channels_of(arguments) == list(SPLIT)


@pytest.mark.parametrize("channels", [(0,), (K - 1,), (4, 5, 6), range(8), range(K)])
def test_any_channels_leave_it(channels: Sequence[int]) -> None:
    net = Net(CASES["norm"][0], nn.RMSNorm(K, eps=1e-5), torch.bfloat16)
    (arguments,) = fused(net, *pair(torch.bfloat16), outliers={"q": channels, "k": channels})
    assert channels_of(arguments) == list(channels)


def test_other_outliers_of_one_input_are_other_codes() -> None:
    both = {"q": (1, 2), "k": (2,)}
    # of what stands in memory
    made = fused(Net(CASES["an input"][0], nn.Identity()), *pair(), outliers=both)
    assert sorted(map(channels_of, made)) == [[1, 2], [2]]
    # of a norm, which would be computed twice
    assert fused(Net(CASES["norm"][0], RMSNorm()), *pair(), outliers=both) == []


@pytest.mark.parametrize(
    "before",
    [
        pytest.param(lambda x, y, norm: (v := norm(x), v), id="norm read by others"),
        pytest.param(lambda x, y, norm: (v := F.silu(x) * y, v), id="product read by others"),
        pytest.param(lambda x, y, norm: x * y, id="another op"),
    ],
)
def test_outliers_of_what_is_left_to_inductor(before: Callable[..., Any]) -> None:
    assert fused(Net(before, RMSNorm()), *pair(), outliers={"q": SPLIT, "k": SPLIT}) == []


class Masked(nn.Module):
    """A linear behind a mask that is the model's own, and some channels beside it."""

    def __init__(self, keep: Tensor, channels: Tensor, *, also_masked: bool = False) -> None:
        super().__init__()
        self.norm, self.q, self.also_masked = nn.RMSNorm(K, eps=1e-5), nn.Linear(K, 16, bias=False), also_masked
        self.register_buffer("keep", keep)
        self.register_buffer("channels", channels)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        masked = x * self.keep
        selected = x.index_select(-1, self.channels)
        return torch.cat([self.q(masked), selected, *([masked] if self.also_masked else [])], -1)


def keep_of(*channels: int) -> Tensor:
    return torch.ones(K).index_fill(0, torch.tensor(channels, dtype=torch.int64), 0)


def test_channels_in_any_order_are_returned_in_it() -> None:
    (arguments,) = fused(Masked(keep_of(9, 2, 20), torch.tensor([9, 2, 20])), pair()[0])
    assert channels_of(arguments) == [9, 2, 20]


@pytest.mark.parametrize(
    ("keep", "channels", "also_masked"),
    [
        pytest.param(keep_of(2, 9), (2,), False, id="fewer are selected"),
        pytest.param(keep_of(2), (2, 9), False, id="more are selected"),
        pytest.param(keep_of(2, 9), (2, 9, 9), False, id="one is selected twice"),
        pytest.param(keep_of(2) / 2, (2,), False, id="no mask"),
        pytest.param(keep_of(), (), False, id="no channels"),
        pytest.param(torch.zeros(()), (2,), False, id="a number"),
        pytest.param(torch.zeros(1), (0,), False, id="one for all channels"),
        pytest.param(keep_of(2, 9), (2, 9), True, id="the rest is read by others"),
    ],
)
def test_masks_that_are_no_split_stay(keep: Tensor, channels: tuple[int, ...], also_masked: bool) -> None:
    net = Masked(keep, torch.tensor(channels, dtype=torch.int64), also_masked=also_masked)
    assert fused(net, pair()[0]) == []


def targets_of(graph: FxGraph) -> list[Any]:
    return [node.target for node in graph.module.graph.nodes if node.op == "call_function"]


class Block(nn.Module):
    """A norm before two linears, and an activation times a gate before one; one channel of each is loud."""

    def __init__(self, H: int = 256) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(H, eps=1e-5)
        self.gate, self.up = (nn.Linear(H, 2 * H, bias=False) for _ in range(2))
        self.down = nn.Linear(2 * H, H, bias=False)
        self.bfloat16()
        with torch.no_grad():
            self.norm.weight[7] *= 60
            self.up.weight[40] *= 60

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.norm(x)
        return x + self.down(F.silu(self.gate(hidden)) * self.up(hidden))


def test_a_calibrated_split_masks_and_gathers_nothing() -> None:
    torch.manual_seed(0)
    model, x = Block(), torch.randn(2, 50, 256).bfloat16()
    plan = calibrate(model, [x], recipe="int8-split", progress=False)
    split = {name: d.outliers for name, d in plan.decisions.items()}
    assert 7 in split["gate"] == split["up"]
    assert 40 in split["down"]
    graph = FX.open(model, x)
    quantize_graph(graph, plan)
    lower(graph, HOPPER, PlainPacks())
    made = targets_of(graph)
    linear = torch.ops.qcompile.linear_int8_triton.default
    assert made.count(QUANTIZE_ROWS) == 2
    assert made.count(linear) == 3
    assert set(made) == {QUANTIZE_ROWS, linear, getitem, torch.ops.aten.add.Tensor}, "the sum is the model's"
    first, second = (node for node in graph.module.graph.nodes if node.target is QUANTIZE_ROWS)
    assert [first.args[4], second.args[4]] == ["rms_norm", "silu"]
    # moved to the end, where linears make the channels
    assert channels_of(second.args)[-1] == 511
    for node in graph.module.graph.nodes:
        if node.target is linear:
            outliers = node.args[7]
            assert outliers.target is getitem
            assert outliers.meta["example_value"].shape[-1] == 8


def test_a_tail_that_is_multiplied_apart_has_no_more_columns_than_its_weight() -> None:
    graph = FX.open(Net(CASES["norm"][0], nn.RMSNorm(K, eps=1e-5)), *pair())
    plan = make_plan([found.site for found in find_sites(graph)], parse_recipe("int8"))
    quantize_graph(graph, with_outliers(plan, {"q": SPLIT, "k": SPLIT}))
    lower(graph, HOPPER, Packs())
    tails = [node for node in graph.module.graph.nodes if node.target is tail.OP]
    assert len(tails) == 2
    for node in tails:
        assert node.args[0].target is torch.ops.aten.slice.Tensor
        assert node.args[0].args[1:] == (-1, 0, len(SPLIT))


@pytest.mark.parametrize("outliers", [(), (7,), (7, 50, 90), tuple(range(3, 99, 12))])
def test_inductor_is_left_no_more_of_a_split_than_of_plain_int8(outliers: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    model, x = Block(), torch.randn(2, 50, 256).bfloat16()
    graph = FX.open(model, x)
    plan = make_plan([found.site for found in find_sites(graph)], parse_recipe("int8"))
    quantize_graph(graph, with_outliers(plan, dict.fromkeys(("gate", "up", "down"), outliers)))
    expected = result(graph, x)
    lower(graph, HOPPER, Packs())
    torch._dynamo.reset()
    # caches of Inductor know ops by their names alone
    with torch.no_grad(), fresh_cache():
        found, codes = run_and_get_code(torch.compile(graph.module), x)
    # sums in another order, of values rounded to bfloat16 at other places
    assert (found - expected).float().norm() < 1e-2 * (expected - x).float().norm()
    assert "".join(codes).count("= async_compile.cpp") == 1, "the sum at the end"
