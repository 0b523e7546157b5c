"""A model with a site whose input integers under one scale serve badly, wherever it is split and however smoothed."""

import torch
from torch import Tensor, nn

WIDTH, HIDDEN = 64, 96
SPIKE, RARE = 100.0, 3e-4
INTEGERS, FLOATS = ("int8/channel", "int8/tensor/asym"), ("fp8_e4m3/channel", "fp8_e4m3/tensor")


class Spiky(nn.Module):
    """`down` reads the input with its spikes, in whichever channel they are, and `up` what a norm leaves of them."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, HIDDEN), nn.Linear(WIDTH, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.norm(x)) + self.down(x)


def spiky() -> Spiky:
    torch.manual_seed(0)
    return Spiky().eval()


def spikes(seed: int) -> Tensor:
    """Normal numbers, and a few of a hundred."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(16, 16, WIDTH, generator=generator)
    x[torch.rand(x.shape, generator=generator) < RARE] = SPIKE
    return x
