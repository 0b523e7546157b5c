"""Small nets, each a way that a factor of an activation may take, or may not."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

B, T, H, D, K, N = 2, 5, 4, 3, 12, 20
Part = Callable[[Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class Case:
    """A net on x [B, T, K].

    folds: the producer of each edge that can be folded, by its first consumer.
    refused: of the other edges, what their reasons say, by their first consumer.
    multiplied: first consumers of those for which only a multiplication is left.
    """

    build: Callable[[], nn.Module]
    folds: dict[str, str]
    refused: dict[str, str]
    multiplied: tuple[str, ...] = ()


class Net(nn.Module):
    """Linears of every shape that a case needs, and what it does with them."""

    def __init__(self, run: Callable[["Net", Tensor], object], **parts: nn.Module) -> None:
        super().__init__()
        self.run = run
        for name, part in parts.items():
            self.add_module(name, part)
        for parameter in self.parameters():
            # norms as they are trained: no ones and zeros
            nn.init.normal_(parameter, 0.3 if parameter.dim() == 1 else 0.0, 0.4)

    def forward(self, x: Tensor) -> object:
        return self.run(self, x)


def linear(k: int, n: int, bias: bool = True) -> nn.Linear:
    return nn.Linear(k, n, bias=bias)


def norm() -> nn.LayerNorm:
    return nn.LayerNorm(K)


class HandRms(nn.Module):
    """RMSNorm in float32; `offset`: the weight is kept less one, as in Gemma."""

    def __init__(self, offset: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(K))
        self.offset = offset

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
        if self.offset:
            return (wide * (self.offset + self.weight.float())).type_as(x)
        return self.weight * wide.to(x.dtype)


def heads(x: Tensor, count: int) -> Tensor:
    """[B, T, H * D] as [B, H, T, D]."""
    return x.view(*x.shape[:2], count, -1).transpose(1, 2)


def joined(x: Tensor) -> Tensor:
    """[B, H, T, D] as [B, T, H * D]."""
    return x.transpose(1, 2).reshape(x.shape[0], x.shape[2], -1)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    # the ONNX exporter refuses the flag where it changes nothing
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=q.shape[1] != k.shape[1])


def eager(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.matmul(torch.softmax(q @ k.transpose(-1, -2), -1), v)


def repeated(x: Tensor) -> Tensor:
    """Each head of [B, 2, T, D] twice, one after the other."""
    b, h, t, d = x.shape
    return x[:, :, None, :, :].expand(b, h, 2, t, d).reshape(b, 2 * h, t, d)


def attended(
    mix: Callable[[Tensor, Tensor, Tensor], Tensor] = attention, few: int = H, spread: Part = lambda v: v
) -> Case:
    """q, k, v, o, with `few` heads of keys and values."""

    def run(net: Net, x: Tensor) -> Tensor:
        q = heads(net.q(x), H)
        k, v = (spread(heads(part(x), few)) for part in (net.k, net.v))
        return net.o(joined(mix(q, k, v)))

    parts = {"q": (K, H * D), "k": (K, few * D), "v": (K, few * D), "o": (H * D, K)}
    build = partial(Net, run)
    return Case(
        build=lambda: build(**{name: linear(*shape) for name, shape in parts.items()}),
        folds={"o": "v"},
        refused={"q": "comes from input"},
    )


def fused(split: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]) -> Case:
    """q, k and v from one linear; `split` makes [B, H, T, D] of each."""
    return Case(
        build=lambda: Net(
            lambda net, x: net.o(joined(attention(*split(net.qkv(x))))), qkv=linear(K, 3 * H * D), o=linear(H * D, K)
        ),
        folds={"o": "qkv"},
        refused={"qkv": "comes from input"},
    )


def between(act: Part, refusal: str = "") -> Case:
    """fc1, something, fc2."""
    return Case(
        build=lambda: Net(lambda net, x: net.fc2(act(net.fc1(x))), fc1=linear(K, N), fc2=linear(N, K)),
        folds={} if refusal else {"fc2": "fc1"},
        refused={"fc1": "comes from input"} | ({"fc2": refusal} if refusal else {}),
    )


def gated(run: Callable[[Tensor, Tensor], Tensor], refusal: str = "", into: str = "up") -> Case:
    return Case(
        build=lambda: Net(
            lambda net, x: net.down(run(net.gate(x), net.up(x))),
            gate=linear(K, N, bias=False),
            up=linear(K, N),
            down=linear(N, K),
        ),
        folds={} if refusal else {"down": into},
        refused={"gate": "comes from input"} | ({"down": refusal} if refusal else {}),
    )


def normed(make: Callable[[], nn.Module], run: Callable[[Net, Tensor], object] | None = None, **kinds: str) -> Case:
    """A norm and two linears; kinds: what becomes of the edges, "" where the norm can be folded."""
    folds = {name: "norm" for name, refusal in kinds.items() if not refusal}
    refused = {name: refusal.removeprefix("x ") for name, refusal in kinds.items() if refusal}
    return Case(
        build=lambda: Net(run or _norm_then_both, norm=make(), a=linear(K, N), b=linear(K, K, bias=False)),
        folds=folds,
        refused=refused,
        multiplied=tuple(name for name, refusal in kinds.items() if refusal.startswith("x ")),
    )


def _norm_then_both(net: Net, x: Tensor) -> object:
    y = net.norm(x)
    return net.a(y), net.b(y)


def _thirds(qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = qkv.split(H * D, dim=2)
    return heads(q, H), heads(k, H), heads(v, H)


def _chunks_of_heads(qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """GPT-NeoX: each head holds its own q, k and v."""
    q, k, v = heads(qkv, H).chunk(3, dim=-1)
    return q, k, v


def _indexed(qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """BLOOM, ViT: a dimension of three, put first."""
    parts = qkv.reshape(qkv.shape[0], qkv.shape[1], 3, H, D).permute(2, 0, 3, 1, 4)
    return parts[0], parts[1], parts[2]


def _one_weight() -> nn.Module:
    net = Net(
        lambda net, x: net.out(net.b(net.a(net.norm(x)))),
        norm=nn.LayerNorm(K),
        a=linear(K, K),
        b=linear(K, K),
        out=linear(K, N),
    )
    net.b.weight = net.a.weight
    return net


def _sliced_twice(qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A view of everything for each part, of which it takes its own."""
    q, k, v = (qkv.view(qkv.shape[0], qkv.shape[1], 3, H, D)[:, :, i].transpose(1, 2) for i in range(3))
    return q, k, v


def _heads_last(x: Tensor) -> Tensor:
    """Channels as [D, H] instead of [H, D]."""
    return x.view(x.shape[0], x.shape[1], -1, H).permute(0, 3, 1, 2)


def _written(net: Net, x: Tensor) -> Tensor:
    y = net.norm(x)
    z = net.a(y)
    y.add_(1)
    return z + net.b(y).sum()


def _kept(net: Net, x: Tensor) -> object:
    v = heads(net.v(x), H)
    return net.o(joined(attention(torch.ones_like(v), torch.ones_like(v), v))), v


def _experts(net: Net, x: Tensor) -> Tensor:
    y = net.norm(x).view(-1, K)
    order = net.a(y).argmax(-1) % 2
    return torch.bmm(y[order][:, None], net.b.weight.expand(y.shape[0], K, K))


CASES: dict[str, Case] = {
    "layer norm": normed(norm, a=""),
    "layer norm without bias": normed(lambda: nn.LayerNorm(K, bias=False), a=""),
    "layer norm without weight": normed(lambda: nn.LayerNorm(K, elementwise_affine=False), a=""),
    "rms norm": normed(lambda: nn.RMSNorm(K), a=""),
    "rms norm without weight": normed(lambda: nn.RMSNorm(K, elementwise_affine=False), a=""),
    "rms norm by hand": normed(HandRms, a=""),
    "rms norm by hand, one plus weight": normed(lambda: HandRms(1.0), a=""),
    "norm of the last token": normed(norm, lambda net, x: net.a(net.norm(x)[:, -1:, :]), a=""),
    "norm, views of it": normed(
        norm, lambda net, x: (net.a((y := net.norm(x)).view(-1, K)), net.b(y.unsqueeze(1))), a=""
    ),
    "norm, scaled": normed(norm, lambda net, x: net.a(net.norm(x) * 0.25), a=""),
    "norm, gated": normed(norm, lambda net, x: net.a(net.norm(x) * torch.sigmoid(x)), a=""),
    "norm, its shape is read": normed(norm, lambda net, x: net.a(y := net.norm(x)) * y.shape[1] * y.size(0), a=""),
    "norm into a residual": normed(norm, lambda net, x: (y := net.norm(x)) + net.b(y), b="x also read by add"),
    "norm, returned": normed(norm, lambda net, x: (y := net.norm(x), net.b(y)), b="x also an output of the graph"),
    "norm, a view is returned": normed(
        norm, lambda net, x: ((y := net.norm(x)).view(-1), net.b(y)), b="x also read by"
    ),
    "norm, a view is returned, several": normed(
        norm,
        lambda net, x: ((y := net.norm(x)).view(-1), net.a(y), net.b(y)),
        a="x also read by",
    ),
    "norm, its shape serves another": normed(
        norm, lambda net, x: net.a(y := net.norm(x)) + x.flatten(0, 1).view_as(y)[..., :1], a="x also read by"
    ),
    "norm, experts": normed(norm, _experts, a="x also read by"),
    "norm, written": normed(norm, _written, a="x also read by", b="between 'norm' and 'b' stands"),
    "norm, chunks of it": normed(
        lambda: nn.LayerNorm(K),
        lambda net, x: net.b(torch.cat([*net.norm(x).chunk(2, -1)], -1)),
        b="cat, which is not known",
    ),
    "linears": between(lambda x: x),
    "relu": between(F.relu),
    "relu and dropout": between(lambda x: F.dropout(torch.relu(x), 0.5, training=False)),
    "relu and casts": between(lambda x: F.relu(x.double()).float()),
    "relu, scaled": between(lambda x: F.relu(x) * 3),
    "gelu": between(F.gelu, "between 'fc1' and 'fc2' stands gelu, which is not homogeneous"),
    "silu": between(F.silu, "between 'fc1' and 'fc2' stands silu, which is not homogeneous"),
    "relu6": between(F.relu6, "relu6"),
    "hardtanh": between(F.hardtanh, "hardtanh"),
    "leaky relu": between(F.leaky_relu),
    "prelu": between(lambda x: F.prelu(x, torch.full((1,), 0.3, dtype=x.dtype))),
    "softmax": between(lambda x: x.softmax(-1), "softmax, which is not homogeneous"),
    "square": between(lambda x: x * x, "'fc1' is read twice by"),
    "gelu by hand": between(lambda x: 0.5 * x * (1.0 + torch.tanh(x)), "'fc1' is also read by"),
    "relu in place": between(lambda x: F.relu(x, inplace=True)),
    "relu in place, shared": between(lambda x: F.relu(x, inplace=True) + x.sum(), "between 'fc1' and 'fc2' stands"),
    "to integers": between(lambda x: (x * 8).int().float(), "not known to be homogeneous"),
    "written": between(lambda x: x.view(-1, N).mul_(2).view(x.shape), "written to in place"),
    "tokens and channels change places": between(
        lambda x: x.transpose(1, 2).reshape(x.shape), "between 'fc1' and 'fc2' channels become tokens"
    ),
    "channels change places": between(lambda x: x.view(*x.shape[:2], 4, 5).transpose(2, 3).flatten(2)),
    "channels in a few": between(lambda x: x[..., :4].repeat_interleave(5, -1)),
    "swiglu": gated(lambda gate, up: F.silu(gate) * up),
    "geglu": gated(lambda gate, up: up * F.gelu(gate)),
    "bilinear": gated(lambda gate, up: gate * up, into="gate"),
    "up is gated twice": gated(lambda gate, up: F.sigmoid(up) * up * gate, into="gate"),
    "both gates are no linear": gated(lambda gate, up: F.gelu(gate) * F.silu(up), "gelu, which is not homogeneous"),
    "a sum": gated(lambda gate, up: gate + up, "add, a sum whose other terms would not be scaled"),
    "up is read by others": gated(lambda gate, up: F.silu(gate) * up + up, "between"),
    "attention": attended(),
    "attention, few heads": attended(few=2),
    "attention, one head": attended(few=1),
    "attention, heads repeated": attended(few=2, spread=repeated),
    "attention, heads interleaved": attended(few=2, spread=lambda v: v.repeat_interleave(2, dim=1)),
    "attention, heads in turn": attended(few=2, spread=lambda v: v.repeat(1, 2, 1, 1)),
    "eager attention": attended(eager),
    "eager attention, heads repeated": attended(eager, few=2, spread=repeated),
    "eager attention, one head": attended(eager, few=1),
    "fused, split": fused(_thirds),
    "fused, chunks of heads": fused(_chunks_of_heads),
    "fused, indexed": fused(_indexed),
    "fused, views": fused(_sliced_twice),
    "fused gate and up": Case(
        build=lambda: Net(
            lambda net, x: net.down(F.silu((y := net.both(x).chunk(2, dim=-1))[0]) * y[1]),
            both=linear(K, 2 * N),
            down=linear(N, K),
        ),
        folds={"down": "both"},
        refused={"both": "comes from input"},
    ),
    "heads last": Case(
        build=lambda: Net(
            lambda net, x: net.o(joined(attention(heads(net.q(x), H), heads(net.q(x), H), _heads_last(net.v(x))))),
            q=linear(K, H * D),
            v=linear(K, H * D),
            o=linear(H * D, K),
        ),
        folds={"o": "v"},
        refused={"q": "run several times"},
    ),
    "heads mixed with tokens": Case(
        build=lambda: Net(
            lambda net, x: net.o(joined((v := net.v(x).view(x.shape[0], H, -1, D)).softmax(-2) * v)),
            v=linear(K, H * D),
            o=linear(H * D, K),
        ),
        folds={},
        refused={"v": "comes from input", "o": "between 'v' and 'o' stands softmax"},
    ),
    "values are kept": Case(
        build=lambda: Net(_kept, v=linear(K, H * D), o=linear(H * D, K)),
        folds={},
        refused={"v": "comes from input", "o": "'v' is also an output of the graph"},
    ),
    "one linear twice": Case(
        build=lambda: Net(lambda net, x: net.fc(net.fc(x)), fc=linear(K, K)),
        folds={},
        refused={"fc": "'fc' is run several times"},
    ),
    "from a linear that runs twice": Case(
        build=lambda: Net(lambda net, x: net.out(net.fc(F.gelu(net.fc(x)))), fc=linear(K, K), out=linear(K, N)),
        folds={},
        refused={"fc": "'fc' is run several times", "out": "run several times under one name"},
    ),
    "one weight in two linears": Case(
        build=_one_weight,
        folds={},
        refused={"a": "'a' is run several times", "b": "'b' is run several times", "out": "run several times under"},
    ),
}


def built(name: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Tensor]:
    """The net of a case in eval mode, and an input for it, the same at every call."""
    torch.manual_seed(0)
    # torch multiplies by another routine, which sums in another order, if a weight may need a gradient
    return CASES[name].build().to(dtype).eval().requires_grad_(False), torch.randn(B, T, K).to(dtype)
