"""Folds: factors that move from an activation into the weights that read it, and out of what makes it."""

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from math import prod

import torch
from torch import Tensor

from qcompile.errors import GraphError

# what passes call the constants that a fold made of "a.weight": "a.weight.folded_" and a digest
FOLDED = ".folded_"


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


def fold_notes(folds: Sequence[Fold], sites: Collection[str]) -> Iterator[str]:
    """How many folds there are and where they go, for a report; nothing without folds.  sites: all of a plan."""
    if not folds:
        return
    remain = sum(not fold.into for fold in folds)
    linears = sum(fold.into in sites for fold in folds)
    norms = len(folds) - remain - linears
    kinds = ((norms, "into norms"), (linears, "into linears"), (remain, "by a multiplication that stays"))
    yield f"{len(folds)} folds: {', '.join(f'{count} {kind}' for count, kind in kinds if count)}"


def scale_before(site: str, folds: Iterable[Fold]) -> Tensor | None:
    """What the activation that a site reads is divided by, [K]; None if no fold names the site."""
    scales = [fold.scale for fold in folds if site in fold.sites]
    return prod(scales[1:], start=scales[0]) if scales else None


def fitting_scale(fold: Fold, width: int) -> Tensor:
    """The fold's scale [width] in float64 on the CPU.  Raises GraphError if it cannot be applied."""
    scale = fold.scale.detach().to("cpu", torch.float64)
    if tuple(scale.shape) == (width,) and bool((scale > 0).all()) and bool(scale.isfinite().all()):
        return scale
    raise GraphError(
        f"the fold {fold.method!r} of {', '.join(map(repr, fold.sites))} has a scale {list(scale.shape)} that does not "
        f"fit: it needs {width} numbers, all positive and finite; make it again from this model's statistics"
    )


def rescaled(name: str, tensor: Tensor, columns: Tensor | None, rows: Tensor | None) -> Tensor:
    """[N, K] times columns [K], [N, K] or [N] divided by rows [N], rounded once to its own dtype.

    name: for the error.  Raises GraphError if finite numbers overflow.
    """
    # float32 holds the products of shorter floats well enough, in half the memory
    short = tensor.dtype.itemsize < torch.float32.itemsize
    wide = tensor.to(torch.float32 if short else torch.float64)
    if columns is not None and tensor.dim() == 2:
        wide = wide * columns.to(wide)
    if rows is not None:
        wide = wide / rows.to(wide).reshape(-1, *[1] * (tensor.dim() - 1))
    return require_finite(name, wide.to(tensor.dtype), wide)


def require_finite(name: str, made: Tensor, wide: Tensor) -> Tensor:
    """`made`, which is `wide` rounded to a shorter dtype.  Raises GraphError if finite numbers became infinite."""
    if is_finite(made) or not is_finite(wide):
        return made
    raise GraphError(
        f"a fold makes {name!r} overflow {str(made.dtype).removeprefix('torch.')}: its largest value would be "
        f"{float(wide.abs().max()):.3g}; clip the scale of this fold, or leave its sites out"
    )


def is_finite(tensor: Tensor) -> bool:
    """Whether no NaN and no Inf is in a tensor of any shape and floating dtype; taken for granted on meta."""
    if tensor.is_meta or not tensor.numel():
        return True
    low, high = tensor.aminmax()
    return bool(low.isfinite() and high.isfinite())
