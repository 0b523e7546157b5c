"""What Inductor shall compute once and keep in memory, rather than anew in every loop that reads it."""

from torch import Tensor


def kept(x: Tensor) -> Tensor:
    """x, contiguous; Inductor keeps in memory what it reads by strides."""
    x = x.contiguous()
    return x.as_strided(x.shape, x.stride())
