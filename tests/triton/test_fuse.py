"""Which quantizations FUSE takes, and that the graph computes what it did, with the op in plain torch on the CPU."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

pytest.importorskip("triton")

from qcompile.backends.fx import fuse as fuse_module
from qcompile.backends.fx.fuse import fuse
from qcompile.backends.fx.lower import Target, lower
from qcompile.backends.fx.rows import QUANTIZE_ROWS
from qcompile.graph import graph_text
from qcompile.pipeline import quantize as quantize_graph
from qcompile.presets import parse_recipe
from tests.hosts import FX
from tests.passes.test_fold_exponent_bias import Net as Raised
from tests.passes.test_fold_exponent_bias import planned, shifts
from tests.passes.test_permute_outliers import PlainPacks
from tests.triton.fused import CASES, OPS, K, Net, RMSNorm, fused, pair
from tests.triton.on_cpu import HOPPER, Packs, on_cpu


@pytest.fixture(scope="module", autouse=True)
def emulated() -> Iterator[None]:
    with on_cpu(**OPS):
        yield


@pytest.mark.parametrize("recipe", ["int8", "fp8"])
@pytest.mark.parametrize("name", CASES)
def test_what_is_fused(name: str, recipe: str) -> None:
    before, norm, kind, second, total = CASES[name]
    (arguments,) = fused(Net(before, norm), *pair(), recipe=recipe)
    assert arguments[4] == kind
    assert (arguments[1] is not None) is second
    assert arguments[8] is total


def test_attention_without_what_surrounds_it() -> None:
    def attention(x: Tensor, y: Tensor, norm: nn.Module) -> Tensor:
        heads = x.unflatten(-1, (4, -1)).transpose(1, 2)
        return F.scaled_dot_product_attention(heads, heads, heads).transpose(1, 2).reshape(x.shape)

    (arguments,) = fused(Net(attention, nn.Identity()), *pair())
    assert arguments[4] == "nothing"


@pytest.mark.parametrize(
    "before",
    [
        pytest.param(lambda x, y, norm: x * y, id="another op"),
        pytest.param(lambda x, y, norm: torch.relu(x) * y, id="another activation"),
        pytest.param(lambda x, y, norm: F.gelu(x) * y, id="exact gelu times a gate, not measured"),
        pytest.param(lambda x, y, norm: (v := norm(x), v), id="norm read by others"),
        pytest.param(lambda x, y, norm: (v := F.silu(x) * y, v), id="product read by others"),
        pytest.param(lambda x, y, norm: F.silu(x.select(1, 0)[:, None]) * y, id="broadcast"),
        pytest.param(lambda x, y, norm: norm(x.double()).float(), id="cast"),
        pytest.param(lambda x, y, norm: F.rms_norm(x, (K,)), id="epsilon that torch chooses"),
        pytest.param(lambda x, y, norm: F.layer_norm(x, (3, K)), id="norm of several dimensions"),
    ],
)
def test_what_is_left_to_inductor(before: Callable[..., Any]) -> None:
    assert fused(Net(before, RMSNorm()), *pair()) == []


def test_an_activation_that_others_read_is_left() -> None:
    def before(x: Tensor, y: Tensor, norm: nn.Module) -> tuple[Tensor, Tensor]:
        active = F.silu(x)
        return active * y, active

    assert fused(Net(before, nn.Identity()), *pair()) == []


def test_a_sum_with_what_spreads_over_it_stays() -> None:
    (arguments,) = fused(Net(lambda x, y, norm: norm(x + y[:, :1]), RMSNorm()), *pair())
    assert arguments[1] is None


def test_what_is_written_in_place_stays() -> None:
    def before(x: Tensor, y: Tensor, norm: nn.Module) -> Tensor:
        total = x + y
        value = norm(total)
        total.mul_(2)
        return value

    class Written(Net):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return super().forward(x.clone(), y)

    assert fused(Written(before, RMSNorm()), *pair()) == []


@pytest.mark.parametrize("capability", [(8, 0), (10, 0)])
def test_other_devices_are_left(capability: tuple[int, int]) -> None:
    graph = FX.open(Net(CASES["norm"][0], RMSNorm()), *pair())
    quantize_graph(graph, parse_recipe("int8"))
    assert fuse(graph, capability) == 0


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = (nn.Linear(K, 2 * K, bias=False) for _ in range(2))
        self.down = nn.Linear(2 * K, K, bias=False)
        self.bfloat16()

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


def test_a_lowered_gate_is_read_where_it_lies() -> None:
    graph = FX.open(Gated(), torch.randn(3, K).bfloat16())
    quantize_graph(graph, parse_recipe("int8"))
    lower(graph, HOPPER, Packs())
    text = graph_text(graph)
    assert "aten.clone" not in text
    assert text.count("quantize_rows") == 2
    _, node = (n for n in graph.module.graph.nodes if n.target is QUANTIZE_ROWS)
    assert [operand.target for operand in node.args[:2]] == [torch.ops.aten.slice.Tensor] * 2
    # the matmul takes codes with a zero as int8
    assert node.args[7] == 128


def test_w4a8_takes_codes_from_the_pass_that_quantizes() -> None:
    graph = FX.open(nn.Linear(256, 64).bfloat16(), torch.randn(3, 256).bfloat16())
    quantize_graph(graph, parse_recipe("w4a8"))
    lower(graph, HOPPER, PlainPacks())
    (rows,) = (n for n in graph.module.graph.nodes if n.target is QUANTIZE_ROWS)
    assert any(n.target is torch.ops.qcompile.linear_int4_int8.default for n in graph.module.graph.nodes)
    assert rows.args[4] == "nothing"
    assert rows.args[7] == 128
    assert rows.meta["example_value"][0].dtype is torch.int8


def test_a_graph_for_another_device_is_not_fused() -> None:
    graph = FX.open(Gated(), torch.randn(3, K).bfloat16())
    quantize_graph(graph, parse_recipe("int8"))
    lower(graph, Target(device="cpu"), Packs())
    assert "quantize_rows" not in graph_text(graph)


@pytest.mark.parametrize("shift", [shifts(6), ()])
def test_floats_of_few_bits_are_quantized_to_e4m3_and_lowered_there(shift: tuple[int, ...]) -> None:
    graph = FX.open(Raised().bfloat16(), torch.randn(5, 48).bfloat16())
    plan = planned(graph, "fp4_e2m1", shift or (0,) * 48, "fp4_e2m1/token")
    plan = replace(plan, decisions={name: replace(d, shift=shift) for name, d in plan.decisions.items()})
    quantize_graph(graph, plan)
    lower(graph, HOPPER, PlainPacks())
    (rows,) = (n for n in graph.module.graph.nodes if n.target is QUANTIZE_ROWS)
    (linear,) = (n for n in graph.module.graph.nodes if n.target is torch.ops.qcompile.linear_fp4.default)
    assert rows.args[4:7] == ("rms_norm", 1e-6, "fp4_e2m1/token")
    octaves = [graph.constant(node) for node in rows.args[9:]]
    assert [list(t[0].tolist()) for t in octaves if t is not None] == ([list(shift)] if shift else [])
    # as it comes: neither to be lowered nor to be widened
    assert linear.args[4] is None
    assert linear.args[7] == ""
    assert rows.meta["example_value"][0].dtype is torch.float8_e4m3fn


def test_octaves_that_the_weight_takes_are_not_the_inputs() -> None:
    shift = shifts(12)
    graph = FX.open(Raised().bfloat16(), torch.randn(5, 48).bfloat16())
    plan = planned(graph, "fp4_e2m1", shift, "fp4_e3m0/token")
    quantize_graph(graph, plan)
    lower(graph, HOPPER, PlainPacks())
    (rows,) = (n for n in graph.module.graph.nodes if n.target is QUANTIZE_ROWS)
    op = torch.ops.qcompile.linear_fp4_lowered.default
    (linear,) = (n for n in graph.module.graph.nodes if n.target is op)
    assert rows.args[4:7] == ("rms_norm", 1e-6, "fp4_e3m0/token")
    assert not any(isinstance(node, torch.fx.Node) for node in rows.args[9:])
    # E4M3 as it comes, and the octaves beside the words
    assert linear.args[7] == ""
    assert graph.constant(linear.args[4]).shape == (1, 1, 32)


def test_octaves_that_differ_are_left_to_who_reads_them() -> None:
    readers = torch.fx.Graph()
    x, a, b = (readers.placeholder(name) for name in "xab")
    op = torch.ops.qcompile.linear_fp4.default
    same, other = (
        [readers.call_function(op, (x, x, x, x, shift, None, "fp4_e2m1", "fp4_e2m1", torch.bfloat16)) for shift in pair]
        for pair in ((a, a), (a, b))
    )
    tensors = {a: torch.zeros(1, 8, dtype=torch.int8), b: torch.ones(1, 8, dtype=torch.int8)}

    class Constants:
        constant = staticmethod(tensors.get)

    assert fuse_module._take_narrow(Constants(), same)  # type: ignore[arg-type]
    assert not fuse_module._take_narrow(Constants(), other)  # type: ignore[arg-type]
