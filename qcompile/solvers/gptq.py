"""GPTQ: columns are rounded one after the other, and those still to come make up for the error of each.

H is the second moment of what the weight multiplies, so that tr(dW H dW^T) is the squared error of its outputs. With
H^-1 = U^T U, U upper, column i rounded with the error w_i - q_i adds ((w_i - q_i) / U_ii)^2 to it, and takes
(w_i - q_i) U_ij / U_ii off each later column j. Columns of large inputs come first. Each keeps the group that it
stands in: scales are found beforehand, so that nothing has to be gathered at run time.
Source: Frantar 2023 (GPTQ), with the order and the static groups of its code.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from qcompile.formats import Integer
from qcompile.numerics import QParams, code_dtype, decode, encode
from qcompile.solvers.imatrix import solve_imatrix
from qcompile.solvers.moments import PANEL, Moments, upper_rows
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
    order, turned = (part.to(weight.device) for part in moments.factored(damping, ordered=ordered))
    dtype = torch.float64 if weight.dtype is torch.float64 else torch.float32
    codes = _Rounding(found, order, len(weight), block).in_turn(_columns(weight, order, dtype), turned)
    return replace(found, codes=torch.empty_like(codes).index_copy_(0, order, codes).T.contiguous())


def _columns(weight: Tensor, order: Tensor, dtype: torch.dtype) -> Tensor:
    """The columns of the weight in that order, [K, N]."""
    columns = torch.empty(weight.shape[::-1], dtype=dtype, device=weight.device)
    for to, some in zip(columns.split(PANEL), order.split(PANEL), strict=True):
        to.copy_(weight[:, some].T)
    return columns


@dataclass(frozen=True, kw_only=True, eq=False)
class _Block:
    """Columns [B, N] that are rounded in turn: what each is left with, and what that reads and makes.

    upper: [B, B], of the factor.  scale, zero: [B, N], or [B, 1] of a whole tensor.  codes, errors: [B, N].
    """

    columns: Tensor
    upper: Tensor
    scale: Tensor
    zero: Tensor | None
    codes: Tensor
    errors: Tensor

    def take(self, columns: Tensor, upper: Tensor, scale: Tensor, zero: Tensor | None) -> None:
        """Replace what stands here."""
        self.columns.copy_(columns)
        self.upper.copy_(upper)
        self.scale.copy_(scale)
        if self.zero is not None and zero is not None:
            self.zero.copy_(zero)


class _Rounding:
    """Columns of one weight, rounded under qparams that are known.

    order: which column of the weight each is.  rows: N.
    """

    def __init__(self, qparams: QParams, order: Tensor, rows: int, block: int) -> None:
        tile = qparams.spec.granularity
        self._spec, self._levels, self._size = qparams.spec, qparams.levels, block
        self._groups = order // tile.columns if tile.columns != ALL else torch.zeros_like(order)
        self._scale = _by_row(qparams.scale, tile.rows, rows)
        self._zero = None if qparams.zero is None else _by_row(qparams.zero, tile.rows, rows)

    def in_turn(self, columns: Tensor, turned: Tensor) -> Tensor:
        """Codes [K, N] of columns [K, N], which are changed.  turned: as by `turned_factor`."""
        codes = torch.empty_like(columns, dtype=code_dtype(self._spec))
        K, again = len(columns), None
        for start in range(0, K, self._size):
            end = min(start + self._size, K)
            upper = upper_rows(turned, start, end).to(columns.dtype)
            given = (columns[start:end], upper[:, : end - start], *self._parameters(start, end))
            if again is not None and end - start == self._size:
                done = again(*given)
            else:
                done = self._block(*given)
                self._round(done)
                again = self._recorded(done) if again is None and end + self._size <= K else again
            codes[start:end] = done.codes
            columns[end:].addmm_(upper[:, end - start :].T, done.errors, alpha=-1)
        return codes

    def _recorded(self, block: _Block) -> Callable[..., _Block] | None:
        """What rounds a block of that size, in one launch: each of its steps takes a GPU less time than to be launched.

        None where steps are not recorded: on other devices, and of formats whose tables come from the host.
        """
        device = block.columns.device
        if device.type != "cuda" or not isinstance(self._spec.format, Integer):
            return None
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream(device)
        torch.cuda.synchronize(device)
        # not torch.cuda.graph, which gives up all free memory first, that of the host too, where batches are parked
        with torch.cuda.stream(stream):
            graph.capture_begin(capture_error_mode="thread_local")
            try:
                self._round(block)
            finally:
                graph.capture_end()

        def again(*given: Any) -> _Block:
            block.take(*given)
            graph.replay()
            return block

        return again

    def _parameters(self, start: int, end: int) -> tuple[Tensor, Tensor | None]:
        groups = self._groups[start:end]
        return self._scale[groups], None if self._zero is None else self._zero[groups]

    def _block(self, columns: Tensor, upper: Tensor, scale: Tensor, zero: Tensor | None) -> _Block:
        codes = torch.empty_like(columns, dtype=code_dtype(self._spec))
        errors = torch.empty_like(columns)
        return _Block(columns=columns.clone(), upper=upper.clone(), scale=scale, zero=zero, codes=codes, errors=errors)

    def _round(self, block: _Block) -> None:
        """Codes and errors of the columns, each after what those before it leave of it."""
        for i, column in enumerate(block.columns):
            zero = None if block.zero is None else block.zero[i]
            block.codes[i], value = self._rounded(column, block.scale[i], zero)
            torch.div(column - value, block.upper[i, i], out=block.errors[i])
            block.columns[i + 1 :].addr_(block.upper[i, i + 1 :], block.errors[i], alpha=-1)

    def _rounded(self, column: Tensor, scale: Tensor, zero: Tensor | None) -> tuple[Tensor, Tensor]:
        """Codes and values of a column of the weight, as the oracle has them."""
        if not isinstance(self._spec.format, Integer):
            codes = encode((column / scale).float(), self._spec.format, self._levels)
            return codes, decode(codes, self._spec.format, self._levels) * scale.to(column.dtype)
        point: Tensor | float = 0.0 if zero is None else zero
        if self._spec.zero is Zero.MINIMUM:
            codes = ((column - point) / scale).round().clamp(*self._spec.code_range)
            return codes, codes * scale + point
        codes = ((column / scale).round() + point).clamp(*self._spec.code_range)
        return codes, (codes - point) * scale


def _by_row(parameter: Tensor, rows: int, count: int) -> Tensor:
    """A scale or zero point as [G, N], or [1, 1] of a whole tensor."""
    if rows == ALL:
        return parameter.reshape(1, 1)
    return parameter.repeat_interleave(rows, 0).reshape(count, -1).T.contiguous()
