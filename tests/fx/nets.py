"""Small nets, each a spelling that the door has to know."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

K, H, N = 6, 10, 4


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(K)
        self.up = nn.Linear(K, H)
        self.down = nn.Linear(H, K, bias=False)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.dropout(self.down(F.gelu(self.up(self.norm(x)))))


class Conv1D(nn.Module):
    """GPT-2's linear: weight [K, N], addmm on a view."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(K, N))
        self.bias = nn.Parameter(torch.randn(N))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.view(-1, K), self.weight).view(*x.shape[:-1], N)


class Tied(nn.Module):
    """A language model's head that reads the embedding's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(N, K)
        self.lm_head = nn.Linear(K, N, bias=False)
        self.lm_head.weight = self.embed_tokens.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.lm_head(self.embed_tokens(ids))


class Matmuls(nn.Module):
    """matmul with constants: [K, N] as it is, [N, K] behind transposes, with a bias or without."""

    def __init__(self) -> None:
        super().__init__()
        self.stored = nn.Parameter(torch.randn(K, K))
        self.turned = nn.Parameter(torch.randn(N, K))
        self.bias = nn.Parameter(torch.randn(N))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.matmul(x, self.stored)
        return x @ self.turned.t() + self.bias + x.matmul(self.turned.T) + x @ self.turned.transpose(0, 1)


class Keywords(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(K, N)
        self.norm = nn.LayerNorm(N)

    def forward(self, x: Tensor) -> Tensor:
        x = F.linear(bias=self.linear.bias, weight=self.linear.weight, input=x)
        return F.layer_norm(x, weight=self.norm.weight, bias=self.norm.bias, normalized_shape=(N,))


class Residual(nn.Module):
    """The bias that is added later belongs to the linear only if nothing else reads it."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(K, K, bias=False)
        self.bias = nn.Parameter(torch.randn(K))

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        return (y + self.bias) * y + x


NETS: dict[str, tuple[type[nn.Module], Tensor]] = {
    "mlp": (Mlp, torch.randn(2, 3, K)),
    "conv1d": (Conv1D, torch.randn(2, 3, K)),
    "tied": (Tied, torch.tensor([[0, 3, 1]])),
    "matmuls": (Matmuls, torch.randn(2, 3, K)),
    "keywords": (Keywords, torch.randn(2, 3, K)),
    "residual": (Residual, torch.randn(2, 3, K)),
}


def net(name: str) -> tuple[nn.Module, Tensor]:
    """A net with random weights, in eval mode, and an input for it."""
    torch.manual_seed(0)
    build, x = NETS[name]
    return build().eval(), x
