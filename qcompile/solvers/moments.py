"""Second moments of what weights multiply: what errors of their columns cost, and the factor that GPTQ works by.

Weights that read the same share one object, so that it is factored once.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from math import inf, log10

import torch
from torch import Tensor

from qcompile.errors import CalibrationError

# rows or columns that are worked on at once where a whole copy of a matrix would take too much memory
PANEL = 512
# order of the columns, and the factor of the inverse in that order, turned around
_Factored = tuple[Tensor, Tensor]


@dataclass(frozen=True, kw_only=True, eq=False)
class Moments:
    """The mean of x x^T over rows x [K] of an activation, up to any factor.

    matrix: floating [K, K], symmetric.  rows: how many it was found from; 0 if that is not known.
    """

    matrix: Tensor
    rows: int = 0
    _factored: dict[tuple[float, bool], _Factored] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, importance: "Tensor | Moments | None", weight: Tensor) -> "Moments":
        """What is known of the columns of a weight [N, K] as moments: nothing, [K] of each alone, or all, [K, K]."""
        if isinstance(importance, Moments):
            return importance
        if importance is None:
            importance = weight.new_ones(weight.shape[1], dtype=torch.float64)
        return cls(matrix=torch.diag(importance) if importance.dim() == 1 else importance)

    @classmethod
    def over(cls, parts: Iterable[Tensor], k: int) -> "Moments":
        """Of all rows of these [rows, K], float32 [K, K].  k: K."""
        total, count = torch.zeros(k, k), 0
        for part in parts:
            rows = part.float()
            total = total.to(rows.device).addmm_(rows.t(), rows)
            count += len(rows)
        return cls(matrix=total.div_(max(count, 1)), rows=count)

    def blocks(self, columns: int) -> Tensor:
        """What errors cost together in each tile of so many columns, with a mean diagonal of 1.

        Returns float32 [K / columns, columns, columns]; where no input was anything but zero, all columns are alike.
        """
        tiles = self.matrix.unflatten(0, (-1, columns)).unflatten(2, (-1, columns))
        blocks = tiles.diagonal(dim1=0, dim2=2).permute(2, 0, 1).double()
        unit = torch.eye(columns, dtype=blocks.dtype, device=blocks.device)
        return torch.where(self._is_silent, unit, blocks / self._mean).float()

    def snr_db(self, weight: Tensor, values: Tensor) -> float:
        """Signal-to-noise ratio in dB of outputs when `values` stand for the weight; both [N, K]."""
        matrix = self.matrix.to(weight.device, torch.float32)
        signal = noise = torch.zeros((), dtype=torch.float64, device=weight.device)
        for true, rounded in zip(weight.split(PANEL), values.split(PANEL), strict=True):
            part = true.float()
            apart = rounded.float() - part
            signal = signal + ((part @ matrix) * part).double().sum()
            noise = noise + ((apart @ matrix) * apart).double().sum()
        return 10 * log10(float(signal / noise)) if signal > 0 and noise > 0 else inf

    def diagonal(self, damping: float) -> Tensor:
        """What each column costs, 1 in the mean, and `damping` more; float64 [K].

        Where no input was anything but zero, all columns are alike.
        """
        return torch.where(self._is_silent, 1.0, self.matrix.diagonal().double() / self._mean) + damping

    def factored(self, damping: float, *, ordered: bool) -> _Factored:
        """Order of the columns, int64 [K], and `turned_factor` of the moments in that order, float64 [K, K].

        damping: added to the diagonal, as to `diagonal`.  ordered: largest diagonal first, else as they stand.
        Kept: it is made at the first call.  Raises CalibrationError if the moments are not positive definite.
        """
        key = (damping, ordered)
        if key not in self._factored:
            diagonal = self.diagonal(damping)
            order = torch.arange(len(diagonal), device=diagonal.device)
            if ordered:
                # stable, so that columns that are alike stay as they stand
                order = diagonal.argsort(descending=True, stable=True)
            self._factored[key] = order, turned_factor(self._hessian(order.flip(0), diagonal))
        return self._factored[key]

    def damped(self, damping: float, device: torch.device) -> "Damped":
        """The moments with `diagonal`, there."""
        # where nothing was seen, all columns cost 1
        more = damping + self._is_silent
        matrix, mean, more = (part.to(device, torch.float32) for part in (self.matrix, self._mean, more))
        return Damped(matrix=matrix, mean=mean, more=more)

    def forget(self) -> None:
        """Give up what `factored` keeps, which takes twice the memory of the moments."""
        self._factored.clear()

    @property
    def _is_silent(self) -> Tensor:
        """Whether no input was anything but zero; bool []."""
        return self.matrix.diagonal().double().mean() == 0

    @property
    def _mean(self) -> Tensor:
        """Of the diagonal; 1 where no input was anything but zero."""
        return torch.where(self._is_silent, 1.0, self.matrix.diagonal().double().mean())

    def _hessian(self, order: Tensor, diagonal: Tensor) -> Tensor:
        """The moments in another order of channels, with a mean diagonal of 1 and then this one, float64 [K, K]."""
        hessian = torch.empty(self.matrix.shape, dtype=torch.float64, device=self.matrix.device)
        for to, rows in zip(hessian.split(PANEL), order.split(PANEL), strict=True):
            to.copy_(self.matrix[rows][:, order])
        hessian /= self._mean
        hessian.diagonal().copy_(diagonal[order])
        return hessian


@dataclass(frozen=True, kw_only=True, eq=False)
class Damped:
    """matrix / mean, with `more` added to its diagonal, without a copy of it: one of many channels is large."""

    matrix: Tensor
    mean: Tensor
    more: Tensor

    def after(self, x: Tensor, start: int = 0) -> Tensor:
        """x times its rows from `start` on, [R, K].  x: float32 [R, k], as many columns as those are rows."""
        end = start + x.shape[1]
        found = (x @ self.matrix[start:end]).div_(self.mean)
        found[:, start:end].addcmul_(x, self.more)
        return found


def turned_factor(hessian: Tensor) -> Tensor:
    """The lower triangular L^-1 of H = L L^T, float64 [K, K], in the place of H, which is given up.

    Of H turned around, it is the upper triangular U with H^-1 = U^T U turned around (`upper_rows`). It is as good as L;
    a factor of H^-1 would have squared its errors.  Raises CalibrationError if H is not positive definite.
    """
    # as LAPACK has it, so that nothing is copied
    lower, failed = hessian.mT, hessian.new_empty((), dtype=torch.int32)
    torch.linalg.cholesky_ex(lower, out=(lower, failed))
    if int(failed):
        raise CalibrationError(
            f"the second moments {list(hessian.shape)} of an input are not positive definite, as NaN or Inf among them "
            "or too few rows make them: calibrate with more batches that the float model gives finite values for"
        )
    _invert(lower)
    return lower


def upper_rows(turned: Tensor, start: int, end: int) -> Tensor:
    """Rows of U from the diagonal on, [end - start, K - start], of what `turned_factor` gave."""
    K = len(turned)
    return turned[K - end : K - start, : K - start].flip(0, 1)


def _invert(lower: Tensor) -> None:
    """Put the inverse of a lower triangular matrix in its place, without a copy: one of many channels is large."""
    if len(lower) <= PANEL:
        unit = torch.eye(len(lower), dtype=lower.dtype, device=lower.device)
        lower.copy_(torch.linalg.solve_triangular(lower, unit, upper=False))
        return
    half = len(lower) // 2
    first, last, between = lower[:half, :half], lower[half:, half:], lower[half:, :half]
    _invert(first)
    _invert(last)
    for columns in between.split(PANEL, 1):
        columns.copy_(last @ columns)
    for rows in between.split(PANEL):
        rows.copy_(rows @ first).neg_()
