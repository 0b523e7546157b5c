"""Code books learned from a tensor: quantiles, and Lloyd-Max.

Sources: Lloyd 1982, Max 1960; Dettmers 2022 (8-bit optimizers) for the quantile map.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import pad

from qcompile.errors import SpecError
from qcompile.formats import CodeBook

# sorting more samples than this changes no level by more than its own sampling error
MAX_SAMPLES = 2**21


def learned_levels(fmt: CodeBook, x: Tensor) -> Tensor:
    """Levels of a learned code book for x, ascending.  x: any shape, already divided by its scale.

    Returns float32 [2**bits].  Raises SpecError for a code book with fixed levels, or if x is empty.
    """
    learn = next((f for prefix, f in _LEARN.items() if fmt.name.startswith(prefix)), None)
    if fmt.levels is not None or learn is None:
        raise SpecError(f"{fmt.name} has fixed levels; learned code books start with {', '.join(_LEARN)}")
    if x.numel() == 0:
        raise SpecError(f"cannot learn the levels of {fmt.name} from an empty tensor of shape {list(x.shape)}")
    if x.is_meta:
        return x.new_empty(2**fmt.bits, dtype=torch.float32)
    flat = x.detach().flatten().float()
    stride = -(-flat.numel() // MAX_SAMPLES)
    return learn(flat[::stride].sort().values, 2**fmt.bits)


def quantile_levels(ordered: Tensor, count: int) -> Tensor:
    """The medians of `count` cells that hold equally many values.  ordered: [n] ascending.  Source: bitsandbytes."""
    middles = (torch.arange(count, device=ordered.device) + 0.5) / count
    return ordered[(middles * ordered.numel()).long()]


def lloyd_max_levels(ordered: Tensor, count: int, *, rounds: int = 200, tolerance: float = 1e-5) -> Tensor:
    """The levels of least mean squared error: thresholds at midpoints, levels at conditional means.

    ordered: [n] ascending.  Starts from the companding density p**(1/3) (Panter and Dite 1951): from equal
    spacing, hundreds of rounds do not converge for 255 levels.
    """
    ordered = ordered.double()
    levels = _companded(ordered, count)
    total = pad(ordered.cumsum(0), (1, 0))
    for _ in range(rounds):
        edges = torch.searchsorted(ordered, (levels[1:] + levels[:-1]) / 2)
        edges = pad(pad(edges, (1, 0)), (0, 1), value=ordered.numel())
        size = edges[1:] - edges[:-1]
        means = (total[edges[1:]] - total[edges[:-1]]) / size.clamp(min=1)
        moved = torch.where(size > 0, means, levels)
        done = (moved - levels).abs().max() <= tolerance * levels.abs().max()
        levels = moved
        if done:
            break
    return levels.float()


def _companded(ordered: Tensor, count: int) -> Tensor:
    bins = max(4 * count, 64)
    edges = torch.linspace(float(ordered[0]), float(ordered[-1]), bins + 1, dtype=ordered.dtype, device=ordered.device)
    inside = torch.searchsorted(ordered, edges[1:-1]).diff(
        prepend=edges.new_zeros(1).long(), append=edges.new_full((1,), ordered.numel()).long()
    )
    mass = pad(inside.double().pow(1 / 3).cumsum(0), (1, 0))
    wanted = (torch.arange(count, dtype=ordered.dtype, device=ordered.device) + 0.5) / count * mass[-1]
    upper = torch.searchsorted(mass, wanted).clamp(1, bins)
    part = (wanted - mass[upper - 1]) / (mass[upper] - mass[upper - 1]).clamp(min=1e-30)
    return edges[upper - 1] + part * (edges[upper] - edges[upper - 1])


_LEARN: dict[str, Callable[[Tensor, int], Tensor]] = {
    "quantile": quantile_levels,
    "lloyd": lloyd_max_levels,
}
