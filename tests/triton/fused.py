"""What the tests of FUSE share: its op in plain torch on the CPU, and linears behind what it may take."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qcompile.backends.fx.fuse import fuse
from qcompile.backends.fx.kernels.int8 import OFFSET
from qcompile.backends.fx.kernels.narrow_floats import is_narrow, lowered
from qcompile.backends.fx.rows import QUANTIZE_ROWS
from qcompile.backends.triton.eight_bit_table import tail_width
from qcompile.backends.triton.pairs import APART, MOST_ROWS
from qcompile.numerics import find_qparams, quantize
from qcompile.pipeline import quantize as quantize_graph
from qcompile.plan import make_plan
from qcompile.presets import parse_recipe
from qcompile.shifts import raised
from qcompile.sites import find_sites
from qcompile.spec import parse_spec
from tests.hosts import FX, result
from tests.passes.test_split_outliers import with_outliers

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
    if "norm" not in before:
        value = value if weight is None else value * weight
    rest = value if keep is None else value * keep
    qparams = find_qparams(rest, parse_spec(spec))
    codes, scale, fmt = quantize(rest, qparams), qparams.scale, qparams.spec.format
    if is_narrow(fmt):
        octaves = torch.zeros(x.shape[-1], dtype=torch.int8) if shift is None else shift[0]
        codes, scale = lowered(codes, fmt, octaves).view(torch.float8_e4m3fn), scale * 2.0 ** -raised(fmt)
    codes = (codes.int() - offset).to(torch.int8) if offset else codes
    found = [codes, scale, *([] if qparams.zero is None else [qparams.zero])]
    found += [total.clone()] if keep_total else []
    if channels is not None:
        outliers = value.index_select(-1, channels)
        found += [F.pad(outliers, (0, tail_width(len(channels)) - len(channels)))]
    return found if shift is None or is_narrow(fmt) else [*found, pairs_of(codes, shift[0])]


def pairs_of(codes: Tensor, octaves: Tensor) -> Tensor:
    """Pairs of a few rows in E4M3, uint8 [2 * MOST_ROWS, K]; NaN of many."""
    rows = codes.reshape(-1, codes.shape[-1])
    found = torch.full((2 * MOST_ROWS, rows.shape[1]), 0x7F, dtype=torch.uint8)
    if rows.shape[0] > MOST_ROWS:
        return found
    lowered_rows = rows.view(torch.float8_e4m3fn).double() * torch.exp2(-octaves.double())
    is_normal = lowered_rows.abs() >= 2.0**-6
    first, second = lowered_rows.masked_fill(~is_normal, 0), lowered_rows.masked_fill(is_normal, 0) * 2.0**APART
    pairs = torch.stack([first, second], dim=1).to(torch.float8_e4m3fn).view(torch.uint8)
    found[: 2 * rows.shape[0]] = pairs.flatten(0, 1)
    return found


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


# the op, and the int8 matmul that reads what it makes
OPS = {"quantize_rows": plain, "int8_matmul": matmul_on_cpu}


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
    count = fuse(graph, (9, 0))
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
