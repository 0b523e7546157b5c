"""Which quantizations FUSE takes, and that the graph computes what it did, with the op in plain torch on the CPU."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from operator import getitem
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, library, nn
from torch._inductor.utils import fresh_cache, run_and_get_code

pytest.importorskip("triton")

from qcompile.backends.fx import fuse as fuse_module
from qcompile.backends.fx.fuse import fuse
from qcompile.backends.fx.graph import FxGraph
from qcompile.backends.fx.kernels import tail
from qcompile.backends.fx.kernels.int8 import OFFSET
from qcompile.backends.fx.lower import Target, lower
from qcompile.backends.fx.rows import QUANTIZE_ROWS, tail_width
from qcompile.backends.fx.values import attribute
from qcompile.calibrate import calibrate
from qcompile.graph import graph_text
from qcompile.numerics import find_qparams, quantize
from qcompile.pipeline import quantize as quantize_graph
from qcompile.plan import make_plan
from qcompile.presets import parse_recipe
from qcompile.sites import find_sites
from qcompile.spec import parse_spec
from tests.hosts import FX, result
from tests.passes.test_fold_exponent_bias import Net as Raised
from tests.passes.test_fold_exponent_bias import planned, shifts
from tests.passes.test_permute_outliers import PlainPacks
from tests.passes.test_split_outliers import with_outliers

HOPPER = (9, 0)
K = 32


_APPROXIMATE = {"gelu": "none", "gelu_tanh": "tanh"}


def plain(
    x: Tensor,
    second: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    before: str,
    eps: float,
    spec: str,
    offset: int,
    keep_total: bool,
    shift: Tensor | None = None,
    keep: Tensor | None = None,
    channels: Tensor | None = None,
) -> list[Tensor]:
    """What the op computes, in plain torch."""
    assert shift is None
    total = x if second is None else x + second
    match before:
        case "nothing":
            value = total
        case "layer_norm":
            value = F.layer_norm(total, total.shape[-1:], weight, bias, eps)
        case "rms_norm":
            value = F.rms_norm(total, total.shape[-1:], weight, eps)
        case "rms_norm_weight_last":
            value = F.rms_norm(total.float(), total.shape[-1:], None, eps).to(total.dtype)
            value = value if weight is None else weight * value
        case _:
            active = F.silu(x) if before == "silu" else F.gelu(x, approximate=_APPROXIMATE[before])
            value = active if second is None else active * second
    rest = value if keep is None else value * keep
    qparams = find_qparams(rest, parse_spec(spec))
    codes = quantize(rest, qparams)
    codes = (codes.int() - offset).to(torch.int8) if offset else codes
    found = [codes, qparams.scale, *([] if qparams.zero is None else [qparams.zero])]
    found += [total.clone()] if keep_total else []
    if channels is None:
        return found
    outliers = value.index_select(-1, channels)
    return [*found, F.pad(outliers, (0, tail_width(len(channels)) - len(channels)))]


@pytest.fixture(scope="module", autouse=True)
def op_on_cpu() -> Iterator[None]:
    added = library.Library("qcompile", "IMPL")
    added.impl("quantize_rows", plain, "CPU")
    yield
    added._destroy()


class RMSNorm(nn.Module):
    """Llama's."""

    def __init__(self, add_one: bool = False) -> None:
        super().__init__()
        self.weight, self.add_one = nn.Parameter(torch.randn(K)), add_one

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
        if self.add_one:
            return (normed * (1 + self.weight.float())).to(x.dtype)
        return self.weight * normed.to(x.dtype)


class Net(nn.Module):
    """Linears q and k that read what `before` makes of (x, y, norm); what they give, and whatever else it returns."""

    def __init__(self, before: Callable[..., Any], norm: nn.Module, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.before, self.norm = before, norm
        self.q, self.k = nn.Linear(K, 16, bias=False), nn.Linear(K, 16)
        self.to(dtype)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        made = self.before(x, y, self.norm)
        value, *others = made if isinstance(made, tuple) else (made,)
        return torch.cat([self.q(value), self.k(value), *others], -1)


def fused(
    net: nn.Module, *given: Tensor, recipe: str = "int8", outliers: Mapping[str, Sequence[int]] | None = None
) -> list[tuple[Any, ...]]:
    """The arguments of each op that was made; raises AssertionError if the graph's result changed.

    outliers: channels that are split off, by the linear's name.
    """
    graph = FX.open(net, *given)
    plan = make_plan([found.site for found in find_sites(graph)], parse_recipe(recipe))
    quantize_graph(graph, plan if outliers is None else with_outliers(plan, outliers))
    expected = result(graph, *given)
    count = fuse(graph, HOPPER)
    nodes = [node for node in graph.module.graph.nodes if node.target is QUANTIZE_ROWS]
    assert len(nodes) == count
    torch.testing.assert_close(result(graph, *given), expected, rtol=1e-6, atol=1e-6)
    return [node.args for node in nodes]


def pair(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return torch.randn(2, 3, K).to(dtype), torch.randn(2, 3, K).to(dtype)


CASES: dict[str, tuple[Callable[..., Any], nn.Module, str, bool, bool]] = {
    # before, norm, kind, a second operand, the sum kept
    "norm": (lambda x, y, norm: norm(x), nn.RMSNorm(K, eps=1e-5), "rms_norm", False, False),
    "sum": (lambda x, y, norm: norm(x + y), nn.RMSNorm(K, eps=1e-5), "rms_norm", True, False),
    "sum read": (lambda x, y, norm: (norm(z := x + y), z), nn.RMSNorm(K, eps=1e-5), "rms_norm", True, True),
    "sum of one": (lambda x, y, norm: norm(x + x), nn.LayerNorm(K), "layer_norm", True, False),
    "by hand": (lambda x, y, norm: norm(x), RMSNorm(), "rms_norm_weight_last", False, False),
    "plus one": (lambda x, y, norm: norm(x + y), RMSNorm(add_one=True), "rms_norm_weight_last", True, False),
    "layer norm": (lambda x, y, norm: (norm(z := x + y), z), nn.LayerNorm(K), "layer_norm", True, True),
    "no weight": (lambda x, y, norm: norm(x), nn.LayerNorm(K, elementwise_affine=False), "layer_norm", False, False),
    "silu": (lambda x, y, norm: F.silu(x), nn.Identity(), "silu", False, False),
    "gate": (lambda x, y, norm: F.silu(x) * y, nn.Identity(), "silu", True, False),
    "gate first": (lambda x, y, norm: y * F.silu(x), nn.Identity(), "silu", True, False),
    "gelu": (lambda x, y, norm: F.gelu(x), nn.Identity(), "gelu", False, False),
    "gelu, tanh": (lambda x, y, norm: F.gelu(x, approximate="tanh"), nn.Identity(), "gelu_tanh", False, False),
    "gelu gate": (lambda x, y, norm: nn.GELU("tanh")(x) * y, nn.Identity(), "gelu_tanh", True, False),
    "an input": (lambda x, y, norm: x, nn.Identity(), "nothing", False, False),
    "a linear": (lambda x, y, norm: F.linear(x, y[0, :1].expand(K, K)), nn.Identity(), "nothing", False, False),
    "two active": (lambda x, y, norm: F.silu(x) * F.silu(y), nn.Identity(), "silu", True, False),
}


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


class JoinedPacks(PlainPacks):
    def __init__(self) -> None:
        self.made: dict[str, dict[str, Tensor]] = {}

    def quantized(self, site: Any, *rest: Any) -> dict[str, Tensor]:
        self.made[site] = super().quantized(site, *rest)
        return self.made[site]

    def joined(self, members: Any, kernel: Any, problem: Any) -> dict[str, Tensor]:
        packs = [self.made[site] for site, _ in members]
        return {name: torch.cat([pack[name] for pack in packs]) for name in packs[0]}


def test_a_lowered_gate_is_read_where_it_lies() -> None:
    graph = FX.open(Gated(), torch.randn(3, K).bfloat16())
    quantize_graph(graph, parse_recipe("int8"))
    lower(graph, Target(device="cuda", capability=HOPPER), JoinedPacks())
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
    lower(graph, Target(device="cuda", capability=HOPPER), PlainPacks())
    (rows,) = (n for n in graph.module.graph.nodes if n.target is QUANTIZE_ROWS)
    assert any(n.target is torch.ops.qcompile.linear_int4_int8.default for n in graph.module.graph.nodes)
    assert rows.args[4] == "nothing"
    assert rows.args[7] == 128
    assert rows.meta["example_value"][0].dtype is torch.int8


def test_a_graph_for_another_device_is_not_fused() -> None:
    graph = FX.open(Gated(), torch.randn(3, K).bfloat16())
    quantize_graph(graph, parse_recipe("int8"))
    lower(graph, Target(device="cpu"), JoinedPacks())
    assert "quantize_rows" not in graph_text(graph)


@pytest.mark.parametrize("shift", [shifts(6), ()])
def test_floats_of_few_bits_are_quantized_to_e4m3_and_lowered_there(shift: tuple[int, ...]) -> None:
    graph = FX.open(Raised().bfloat16(), torch.randn(5, 48).bfloat16())
    plan = planned(graph, "fp4_e2m1", shift or (0,) * 48, "fp4_e2m1/token")
    plan = replace(plan, decisions={name: replace(d, shift=shift) for name, d in plan.decisions.items()})
    quantize_graph(graph, plan)
    lower(graph, Target(device="cuda", capability=HOPPER), PlainPacks())
    (rows,) = (n for n in graph.module.graph.nodes if n.target is QUANTIZE_ROWS)
    (linear,) = (n for n in graph.module.graph.nodes if n.target is torch.ops.qcompile.linear_fp4.default)
    assert rows.args[4:7] == ("rms_norm", 1e-6, "fp4_e2m1/token")
    octaves = [graph.constant(node) for node in rows.args[9:]]
    assert [list(t[0].tolist()) for t in octaves if t is not None] == ([list(shift)] if shift else [])
    # as it comes: neither to be lowered nor to be widened
    assert linear.args[4] is None
    assert linear.args[7] == ""
    assert rows.meta["example_value"][0].dtype is torch.float8_e4m3fn


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


SPLIT = (3, 17, 30)


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
    lower(graph, Target(device="cuda", capability=HOPPER), PlainPacks())
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
    lower(graph, Target(device="cuda", capability=HOPPER), PlainPacks())
    tails = [node for node in graph.module.graph.nodes if node.target is tail.OP]
    assert len(tails) == 2
    for node in tails:
        assert node.args[0].target is torch.ops.aten.slice.Tensor
        assert node.args[0].args[1:] == (-1, 0, len(SPLIT))


def matmul_on_cpu(
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    weight: Tensor,
    weight_scale: Tensor,
    weight_sum: Tensor,
    bias: Tensor | None,
    x_tail: Tensor | None,
    weight_tail: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """What the int8 kernel computes."""
    assert bias is None
    x = codes.float() if zero is None else codes.float() + OFFSET - zero
    y = x @ weight.float().T * (scale * weight_scale.T)
    if x_tail is not None and weight_tail is not None:
        y += x_tail[:, : len(weight_tail)].float() @ weight_tail.float()
    return y.to(dtype)


@pytest.fixture(scope="module")
def int8_matmul_on_cpu() -> Iterator[None]:
    added = library.Library("qcompile", "IMPL")
    added.impl("int8_matmul", matmul_on_cpu, "CPU")
    yield
    added._destroy()


@pytest.mark.parametrize("outliers", [(), (7,), (7, 50, 90), tuple(range(3, 99, 12))])
@pytest.mark.usefixtures("int8_matmul_on_cpu")
def test_inductor_is_left_no_more_of_a_split_than_of_plain_int8(outliers: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    model, x = Block(), torch.randn(2, 50, 256).bfloat16()
    graph = FX.open(model, x)
    plan = make_plan([found.site for found in find_sites(graph)], parse_recipe("int8"))
    quantize_graph(graph, with_outliers(plan, dict.fromkeys(("gate", "up", "down"), outliers)))
    expected = result(graph, x)
    lower(graph, Target(device="cuda", capability=HOPPER), JoinedPacks())
    torch._dynamo.reset()
    # caches of Inductor know ops by their names alone
    with torch.no_grad(), fresh_cache():
        found, codes = run_and_get_code(torch.compile(graph.module), x)
    # sums in another order, of values rounded to bfloat16 at other places
    assert (found - expected).float().norm() < 1e-2 * (expected - x).float().norm()
    assert "".join(codes).count("= async_compile.cpp") == 1, "the sum at the end"
