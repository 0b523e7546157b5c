"""Observing an activation that comes in pieces: small ones wait until there is enough to be looked at together."""

import torch
from torch import Tensor

from qcompile.errors import CalibrationError
from qcompile.observers import Part, Stats, extended

# numbers that are worth a look: below, its many small steps take longer than the numbers themselves
ENOUGH = 2**20


class Gathering:
    """The stats of one activation over many batches, in memory that does not grow with them.

    where: it is, for messages.  parts: the histograms to keep.
    """

    def __init__(self, where: str, parts: Part) -> None:
        self._where, self._parts = where, parts
        self._stats: Stats | None = None
        self._waiting: list[tuple[int, Tensor]] = []

    def add(self, rows: Tensor, *, batch: int) -> None:
        """Rows [R, K] of batch number `batch`, at least one; they may change afterwards.

        Raises CalibrationError if these rows, or such as waited, hold NaN or Inf; it names their batch.
        """
        waiting = sum(piece.numel() for _, piece in self._waiting) + rows.numel()
        if waiting < ENOUGH:
            self._waiting.append((batch, rows.clone()))
            return
        self._waiting.append((batch, rows))
        self._look()

    def stats(self) -> Stats | None:
        """Of all rows so far; None without any.  Raises CalibrationError as `add` does."""
        if self._waiting:
            self._look()
        return self._stats

    def _look(self) -> None:
        pieces, self._waiting = self._waiting, []
        self._stats = extended(self._stats, pieces, parts=self._parts)
        if not self._stats.is_finite:
            batch, rows = next(piece for piece in pieces if not bool(torch.isfinite(piece[1]).all()))
            raise not_finite(batch, self._where, rows)


def not_finite(batch: int, where: str, rows: Tensor) -> CalibrationError:
    """The error for NaN or Inf in these rows of a batch."""
    return CalibrationError(
        f"batch {batch} gives NaN or Inf {where} {list(rows.shape)}: check the batch and the float model's weights, or "
        "leave the batch out"
    )
