"""Second moments of what weights multiply: what errors of their columns cost, and the factor that GPTQ works by.

Weights that read the same share one object, so that it is factored once.
"""

from dataclasses import dataclass, field
from math import inf, log10

import torch
from torch import Tensor

from qcompile.errors import CalibrationError

# order of the columns, and the factor of the inverse in that order
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

    def blocks(self, columns: int) -> Tensor:
        """What errors cost together in each tile of so many columns, with a mean diagonal of 1.

        Returns float32 [K / columns, columns, columns]; where no input was anything but zero, all columns are alike.
        """
        mean = self.matrix.diagonal().double().mean()
        tiles = self.matrix.unflatten(0, (-1, columns)).unflatten(2, (-1, columns))
        blocks = tiles.diagonal(dim1=0, dim2=2).permute(2, 0, 1).double()
        unit = torch.eye(columns, dtype=blocks.dtype, device=blocks.device)
        return torch.where(mean == 0, unit, blocks / mean).float()

    def snr_db(self, weight: Tensor, values: Tensor) -> float:
        """Signal-to-noise ratio in dB of outputs when `values` stand for the weight; both [N, K]."""
        matrix = self.matrix.to(weight.device, torch.float32)
        signal, noise = (
            float(((part @ matrix) * part).double().sum()) for part in (weight.float(), values.float() - weight.float())
        )
        return 10 * log10(signal / noise) if signal > 0 and noise > 0 else inf

    def diagonal(self, damping: float) -> Tensor:
        """What each column costs, 1 in the mean, and `damping` more; float64 [K].

        Where no input was anything but zero, all columns are alike.
        """
        found = self.matrix.diagonal().double()
        mean = found.mean()
        return torch.where(mean == 0, 1.0, found / mean) + damping

    def factored(self, damping: float, *, ordered: bool) -> _Factored:
        """Order of the columns, int64 [K], and `inverse_factor` of the moments in that order, float64 [K, K].

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
            hessian = self.matrix[order][:, order].double()
            mean = hessian.diagonal().mean()
            hessian /= torch.where(mean == 0, 1.0, mean)
            hessian.diagonal().copy_(diagonal[order])
            self._factored[key] = order, inverse_factor(hessian)
        return self._factored[key]


def inverse_factor(hessian: Tensor) -> Tensor:
    """The upper triangular U with H^-1 = U^T U.  hessian: H, float64 [K, K].

    From the Cholesky factor of H turned around, whose inverse is as good as the factor; that of H^-1 squares errors.
    Raises CalibrationError if H is not positive definite.
    """
    turned, failed = torch.linalg.cholesky_ex(hessian.flip(0, 1))
    if int(failed):
        raise CalibrationError(
            f"the second moments {list(hessian.shape)} of an input are not positive definite, as NaN or Inf among them "
            "or too few rows make them: calibrate with more batches that the float model gives finite values for"
        )
    upper = turned.flip(0, 1)
    del turned
    unit = torch.eye(len(upper), dtype=upper.dtype, device=upper.device)
    # a matrix of many channels is large: the inverse takes the place of the unit
    return torch.linalg.solve_triangular(upper, unit, upper=True, out=unit)
