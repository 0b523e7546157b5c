"""GPTQ: columns are rounded one after the other, and those still to come make up for the error of each.

H is the second moment of what the weight multiplies, so that tr(dW H dW^T) is the squared error of its outputs. With
H^-1 = U^T U, U upper, column i rounded with the error w_i - q_i adds ((w_i - q_i) / U_ii)^2 to it, and takes
(w_i - q_i) U_ij / U_ii off each later column j. Columns of large inputs come first. Each keeps the group that it
stands in: scales are found beforehand, so that nothing has to be gathered at run time.
Source: Frantar 2023 (GPTQ), with the order and the static groups of its code.
"""

from dataclasses import replace

import torch
from torch import Tensor

from qcompile.formats import Integer
from qcompile.numerics import QParams, code_dtype, decode, encode
from qcompile.solvers.imatrix import solve_imatrix
from qcompile.solvers.moments import Moments
from qcompile.spec import ALL, Spec, Zero

# of the mean of H's diagonal, added to all of it; source: the paper's percdamp
DAMPING = 0.01
# columns whose errors reach those behind the block at once, as one matmul; source: the paper
BLOCK = 128


def solve_gptq(
    weight: Tensor,
    spec: Spec,
    importance: Tensor | Moments | None = None,
    *,
    damping: float = DAMPING,
    block: int = BLOCK,
    ordered: bool = True,
) -> QParams:
    """Scales (and zero points) of `imatrix`, and codes that were chosen one column after the other.

    weight: [N, K]; on meta, shapes only.  importance: what errors of two columns cost together, H, times any factor; of
        [K] its diagonal alone, None for all alike, and then codes are the nearest.
    damping: share of the mean diagonal that is added to the diagonal; columns without any input are then rounded to
        nearest.  block: changes the time, not the result.  ordered: largest diagonal first, else as they stand.
    The work is done in float32, in float64 for a weight of float64; H is factored in float64.
    Raises SpecError if the spec's tiles do not divide the weight, CalibrationError if H is not positive definite.
    """
    if weight.is_meta:
        return replace(solve_imatrix(weight, spec), codes=torch.empty_like(weight, dtype=code_dtype(spec)))
    moments = Moments.of(importance, weight)
    found = solve_imatrix(weight, spec, moments.diagonal(damping))
    order, upper = (part.to(weight.device) for part in moments.factored(damping, ordered=ordered))
    dtype = torch.float64 if weight.dtype is torch.float64 else torch.float32
    columns = weight.to(dtype).T[order].contiguous()  # [K, N]
    codes = _Rounding(found, len(weight)).in_turn(columns, upper.to(dtype), order, block)
    return replace(found, codes=torch.empty_like(codes).index_copy_(0, order, codes).T.contiguous())


class _Rounding:
    """Columns of one weight, rounded under qparams that are known."""

    def __init__(self, qparams: QParams, rows: int) -> None:
        tile = qparams.spec.granularity
        self._spec, self._levels = qparams.spec, qparams.levels
        self._columns = tile.columns
        self._scale = _by_row(qparams.scale, tile.rows, rows)
        self._zero = None if qparams.zero is None else _by_row(qparams.zero, tile.rows, rows)

    def in_turn(self, columns: Tensor, upper: Tensor, order: Tensor, block: int) -> Tensor:
        """Codes [K, N] of columns [K, N], which are changed.  order: which column of the weight each is."""
        codes = torch.empty_like(columns, dtype=code_dtype(self._spec))
        places = order.tolist()
        for start in range(0, len(columns), block):
            now = columns[start : start + block]
            errors = torch.empty_like(now)
            for i, column in enumerate(now):
                row = upper[start + i]
                codes[start + i], value = self._rounded(column, places[start + i])
                torch.div(column - value, row[start + i], out=errors[i])
                now[i + 1 :].addr_(row[start + i + 1 : start + len(now)], errors[i], alpha=-1)
            behind = start + len(now)
            columns[behind:].addmm_(upper[start:behind, behind:].T, errors, alpha=-1)
        return codes

    def _rounded(self, column: Tensor, place: int) -> tuple[Tensor, Tensor]:
        """Codes and values of column number `place` of the weight, as the oracle has them."""
        group = place // self._columns if self._columns != ALL else 0
        scale = self._scale[group]
        if not isinstance(self._spec.format, Integer):
            codes = encode((column / scale).float(), self._spec.format, self._levels)
            return codes, decode(codes, self._spec.format, self._levels) * scale.to(column.dtype)
        zero = 0.0 if self._zero is None else self._zero[group]
        if self._spec.zero is Zero.MINIMUM:
            codes = ((column - zero) / scale).round().clamp(*self._spec.code_range)
            return codes, codes * scale + zero
        codes = ((column / scale).round() + zero).clamp(*self._spec.code_range)
        return codes, (codes - zero) * scale


def _by_row(parameter: Tensor, rows: int, count: int) -> Tensor:
    """A scale or zero point as [G, N], or [1, 1] of a whole tensor."""
    if rows == ALL:
        return parameter.reshape(1, 1)
    return parameter.repeat_interleave(rows, 0).reshape(count, -1).T.contiguous()
