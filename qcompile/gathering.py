"""Observing an activation that comes in pieces: small ones wait until there is enough to be looked at together."""

from dataclasses import dataclass

import torch
from torch import Tensor

from qcompile.errors import CalibrationError
from qcompile.observers import History, Part, Stats, extended, range_of

# numbers that are worth a look: below, its many small steps take longer than the numbers themselves
ENOUGH = 2**21
# that may wait in all activations of a model together
ROOM = 2**27
# of what is left of it, an activation takes so much at most, so that something is left for all
SHARE = 32


@dataclass
class Room:
    """How many numbers more may wait in the gatherings that share it."""

    left: int = ROOM


class Gathering:
    """The stats of one activation over many batches, in memory that does not grow with them.

    where: it is, for messages.  parts: the histograms to keep.  room: shared with the model's other activations.
    """

    def __init__(self, where: str, parts: Part, room: Room) -> None:
        self._where, self._parts, self._room = where, parts, room
        self._stats: Stats | None = None
        # where pieces wait, and how many rows do; memory of its own for each piece would cost more than to look at it
        self._buffer: Tensor | None = None
        self._filled = 0
        self._ranges: list[History] = []

    def add(self, rows: Tensor, *, batch: int) -> None:
        """Rows [R, K] of batch number `batch`, at least one; they may change afterwards.

        Raises CalibrationError for NaN or Inf among them.
        """
        place = self._place(rows)
        if place is None:
            self._look_at_waiting()
            self._stats = extended(self._stats, rows, batch=batch, parts=self._parts)
            if not self._stats.is_finite:
                raise not_finite(batch, self._where, rows)
            return
        found = range_of(rows, batch)
        # at once, for what reads this activation may show the same NaN, and is not to blame
        if not bool(torch.isfinite(torch.cat([found.low, found.high])).all()):
            raise not_finite(batch, self._where, rows)
        place.copy_(rows)
        self._filled += len(rows)
        self._ranges.append(found)

    def stats(self) -> Stats | None:
        """Of all rows so far; None without any."""
        self._let_go()
        return self._stats

    def _place(self, rows: Tensor) -> Tensor | None:
        """Where these rows may wait; None if they are enough by themselves, or if there is no room."""
        if self._buffer is not None and not _alike(self._buffer, rows):
            self._let_go()
        if self._buffer is None:
            size = min(ENOUGH, self._room.left // SHARE)
            if rows.numel() >= size:
                return None
            self._buffer = rows.new_empty(size // rows.shape[1], rows.shape[1])
            self._room.left -= self._buffer.numel()
        if len(rows) > len(self._buffer):
            return None
        if self._filled + len(rows) > len(self._buffer):
            self._look_at_waiting()
        return self._buffer[self._filled : self._filled + len(rows)]

    def _look_at_waiting(self) -> None:
        if self._buffer is not None and self._filled:
            rows = self._buffer[: self._filled]
            self._stats = extended(self._stats, rows, ranges=self._ranges, parts=self._parts)
        self._filled, self._ranges = 0, []

    def _let_go(self) -> None:
        """Look at what waits, and leave its room to others."""
        self._look_at_waiting()
        if self._buffer is not None:
            self._room.left += self._buffer.numel()
            self._buffer = None


def _alike(a: Tensor, b: Tensor) -> bool:
    return a.shape[1] == b.shape[1] and a.dtype == b.dtype and a.device == b.device


def not_finite(batch: int, where: str, rows: Tensor) -> CalibrationError:
    """The error for NaN or Inf in these rows of a batch."""
    return CalibrationError(
        f"batch {batch} gives NaN or Inf {where} {list(rows.shape)}: check the batch and the float model's weights, or "
        "leave the batch out"
    )
