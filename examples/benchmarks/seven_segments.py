"""Images of hexadecimal digits as seven segments show them, tilted, skewed, scaled, moved, and half hidden by noise.

Drawn from a seed, so that nothing has to be downloaded. Neighbours such as 6 and b, or 8 and 0, differ by one segment,
which noise and strokes that belong to no digit may hide.
"""

import torch
from torch import Tensor

SIZE, CLASSES = 32, 16

# corners of the digit, y downwards: top, middle and bottom, left and right
_CORNERS = {
    "tl": (-0.5, -1.0),
    "tr": (0.5, -1.0),
    "ml": (-0.5, 0.0),
    "mr": (0.5, 0.0),
    "bl": (-0.5, 1.0),
    "br": (0.5, 1.0),
}
# segments a to g: the two corners that each joins
_SEGMENTS = (("tl", "tr"), ("tr", "mr"), ("mr", "br"), ("bl", "br"), ("ml", "bl"), ("tl", "ml"), ("ml", "mr"))
# which of them 0 to F light; source: the usual table of seven-segment displays
_LIT = (0x3F, 0x06, 0x5B, 0x4F, 0x66, 0x6D, 0x7D, 0x07, 0x7F, 0x6F, 0x77, 0x7C, 0x39, 0x5E, 0x79, 0x71)
# strokes that belong to no digit
_STRAY = 1


def images(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """float32 [count, 1, 32, 32], about zero, and their classes int64 [count]; the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return torch.rand(count, *shape, generator=generator) * (high - low) + low

    labels = torch.randint(CLASSES, (count,), generator=generator)
    ends = torch.tensor([[_CORNERS[a], _CORNERS[b]] for a, b in _SEGMENTS])  # [7, 2, 2]
    angle, size = uniform(-0.4, 0.4), uniform(0.4, 0.7)
    turn = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], 1).reshape(count, 2, 2)
    skew = torch.eye(2).repeat(count, 1, 1)
    skew[:, 0, 1] = uniform(-0.25, 0.25)
    place = uniform(-0.25, 0.25, 2)[:, None, None]
    strokes = (ends @ (turn @ skew * size[:, None, None]).transpose(1, 2)[:, None]) + place  # [count, 7, 2, 2]
    lit = torch.tensor([[bool(mask >> i & 1) for i in range(len(_SEGMENTS))] for mask in _LIT])[labels]
    start = uniform(-1.0, 1.0, _STRAY, 1, 2)
    stray = torch.cat([start, start + uniform(-0.5, 0.5, _STRAY, 1, 2)], 2)
    strokes = torch.cat([strokes, stray], 1)
    lit = torch.cat([lit, torch.ones(count, _STRAY, dtype=torch.bool)], 1)
    ink = _drawn(strokes, lit, uniform(0.05, 0.11))
    # light on dark or dark on light
    paper, contrast = uniform(-0.5, 0.5, 1, 1, 1), uniform(0.6, 1.5, 1, 1, 1)
    noise = torch.randn(count, 1, SIZE, SIZE, generator=generator) * uniform(0.05, 0.4, 1, 1, 1)
    return paper - paper.sign() * contrast * ink[:, None] + noise, labels


def _drawn(strokes: Tensor, lit: Tensor, width: Tensor) -> Tensor:
    """How much ink is on each pixel, 0 to 1, [B, H, W].  strokes: [B, S, 2, 2]; lit: [B, S]; width: [B]."""
    axis = torch.linspace(-1, 1, SIZE)
    pixels = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), -1).reshape(-1, 2)  # x, y
    ink = torch.zeros(len(strokes), SIZE * SIZE)
    for start, end, on in zip(strokes[:, :, 0].unbind(1), strokes[:, :, 1].unbind(1), lit.unbind(1), strict=True):
        along = end - start
        from_start = pixels - start[:, None]  # [B, H * W, 2]
        part = (from_start * along[:, None]).sum(-1) / along.square().sum(-1, keepdim=True).clamp(min=1e-6)
        distance = (from_start - part.clamp(0, 1)[..., None] * along[:, None]).norm(dim=-1)
        edge = (width[:, None] - distance) * (SIZE / 2) + 0.5
        ink = torch.maximum(ink, edge.clamp(0, 1) * on[:, None])
    return ink.reshape(-1, SIZE, SIZE)
