"""Which channel of what made it each element of an activation carries.

The numbers are int64, on the CPU, one for each element, and of size 1 along every dimension in which they stay the
same: those of an activation [B, T, K] are [1, 1, K]. So views, transposes and repeats can be followed exactly, and
need not be guessed from shapes.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

# of an op that makes several tensors, one for each
Channels = Tensor | tuple[Tensor, ...]


def numbered(rank: int, count: int) -> Tensor:
    """The numbers of an activation of that rank whose last dimension holds `count` channels."""
    return torch.arange(count, device="cpu").reshape([1] * (rank - 1) + [count])


def shrunk(channels: Tensor) -> Tensor:
    """The same numbers, of size 1 along every dimension in which they stay the same."""
    # what only repeats first, so that nothing large is ever compared
    for same in (_repeats, _stays):
        for d in range(channels.dim()):
            if channels.shape[d] > 1 and same(channels, d):
                channels = channels.narrow(d, 0, 1)
    return channels


def reshaped(channels: Tensor, before: Sequence[int], after: Sequence[int]) -> Tensor:
    """The numbers of a tensor of shape `before` once its elements, in their order, have the shape `after`.

    No size may be 0.
    """
    grown, target = list(channels.shape), list[int]()
    for old, new in blocks(before, after):
        varies = any(channels.shape[d] > 1 for d in old)
        target += [after[d] if varies else 1 for d in new]
        if varies:
            grown[old.start : old.stop] = before[old.start : old.stop]
    return shrunk(channels.expand(grown).reshape(target))


def tied(scale: Tensor, channels: Tensor) -> Tensor:
    """The smallest vectors that are nowhere below `scale` [..., K], and equal wherever `channels` [K] are equal."""
    if scale.numel() == 0:
        return scale
    where = channels.to(scale.device)
    none = scale.new_zeros(*scale.shape[:-1], int(channels.max()) + 1)
    peak = none.scatter_reduce(-1, where.expand_as(scale), scale, "amax", include_self=False)
    return peak[..., where]


def _repeats(channels: Tensor, d: int) -> bool:
    return channels.stride(d) == 0


def _stays(channels: Tensor, d: int) -> bool:
    return bool((channels == channels.narrow(d, 0, 1)).all())


def blocks(before: Sequence[int], after: Sequence[int]) -> Iterator[tuple[range, range]]:
    """The smallest runs of dimensions, old and new, that hold the same number of elements."""
    i = j = 0
    while i < len(before) or j < len(after):
        start, first = i, j
        old = new = 1
        if i < len(before):
            old, i = before[i], i + 1
        if j < len(after):
            new, j = after[j], j + 1
        while old != new:
            if old < new:
                old, i = old * before[i], i + 1
            else:
                new, j = new * after[j], j + 1
        yield range(start, i), range(first, j)
