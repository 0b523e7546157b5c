"""Folds: factors that move from an activation into the weights that read it, and out of what makes it."""

from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Fold:
    """The sites read activation / scale, and their weights' columns are multiplied by scale, so the model stays.

    sites: by name, all that read the activation.  scale: float32 [K], positive and finite.
    into: name of what takes 1 / scale: a norm, or the site of a linear; "" where a multiplication remains.
    method: how scale was found, for people ("smooth alpha=0.55").
    Source: SmoothQuant (Xiao 2023); the same algebra serves AWQ and exponent shifts.
    """

    sites: tuple[str, ...]
    scale: Tensor = field(hash=False, compare=False)
    into: str = ""
    method: str = ""
