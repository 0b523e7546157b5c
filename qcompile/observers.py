"""What calibration keeps of an activation, in memory that does not grow with the data, and ranges found from it.

To add an observer, write a function `(stats, spec) -> QParams` and add it to `OBSERVERS`.
Source: the estimators' list in Nagel 2021, "A White Paper on Neural Network Quantization", section 3.1.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from qcompile.numerics import QParams, find_qparams
from qcompile.spec import Spec


@dataclass(frozen=True, kw_only=True)
class Stats:
    """What the rows of an activation [rows, K] left behind.

    count: of rows. low, high: float32 [], over all elements. amax: float32 [K], largest magnitude of each channel.
    squares: float64 [K], sum of squares of each channel.
    """

    count: int
    low: Tensor
    high: Tensor
    amax: Tensor
    squares: Tensor

    @property
    def is_finite(self) -> bool:
        """Whether no NaN and no Inf was among the data."""
        return bool(torch.isfinite(self.low) & torch.isfinite(self.high))


def observe(x: Tensor) -> Stats:
    """Stats of one activation.  x: floating, [..., K] with at least one row; NaN and Inf show in the result."""
    rows = x.detach().reshape(-1, x.shape[-1]).float()
    low, high = rows.amin(0), rows.amax(0)
    return Stats(
        count=rows.shape[0],
        low=low.amin(),
        high=high.amax(),
        amax=torch.maximum(-low, high),
        squares=rows.square().sum(0, dtype=torch.float64),
    )


def merge(a: Stats, b: Stats) -> Stats:
    """Stats of the rows of both.  a and b: of the same K."""
    return Stats(
        count=a.count + b.count,
        low=torch.minimum(a.low, b.low),
        high=torch.maximum(a.high, b.high),
        amax=torch.maximum(a.amax, b.amax),
        squares=a.squares + b.squares,
    )


def observe_absmax(stats: Stats, spec: Spec) -> QParams:
    """The whole range seen: around zero for a symmetric spec, from least to greatest otherwise.

    spec: one scale for the tensor.  The rules of scales are those of `find_qparams`, on the two extremes.
    """
    return find_qparams(torch.stack([stats.low, stats.high]), spec)


Observer = Callable[[Stats, Spec], QParams]

OBSERVERS: dict[str, Observer] = {
    "absmax": observe_absmax,
}
