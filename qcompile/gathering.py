"""Observing an activation that comes in pieces: small ones wait until there is enough to be looked at together."""

from dataclasses import dataclass

import torch
from torch import Tensor

from qcompile.errors import CalibrationError
from qcompile.observers import Part, Stats, extended

# numbers that are worth a look: below, its many small steps take longer than the numbers themselves
ENOUGH = 2**20
# that may wait in all activations of a model together; where there are many, pieces are looked at one by one
ROOM = 2**27


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
        self._waiting: list[tuple[int, Tensor]] = []
        self._numbers = 0

    def add(self, rows: Tensor, *, batch: int) -> None:
        """Rows [R, K] of batch number `batch`, at least one; they may change afterwards.

        Raises CalibrationError for NaN or Inf among them.
        """
        if rows.numel() >= min(ENOUGH, self._room.left):
            self._look_at_waiting()
            self._look([(batch, rows)])
            return
        # at once, for what reads this activation may show the same NaN, and is not to blame
        if not bool(torch.isfinite(torch.stack([rows.amin(), rows.amax()]).float()).all()):
            raise not_finite(batch, self._where, rows)
        self._waiting.append((batch, rows.clone()))
        self._numbers += rows.numel()
        self._room.left -= rows.numel()
        if self._numbers >= ENOUGH:
            self._look_at_waiting()

    def stats(self) -> Stats | None:
        """Of all rows so far; None without any."""
        self._look_at_waiting()
        return self._stats

    def _look_at_waiting(self) -> None:
        if self._waiting:
            self._look(self._waiting)
        self._room.left += self._numbers
        self._waiting, self._numbers = [], 0

    def _look(self, pieces: list[tuple[int, Tensor]]) -> None:
        self._stats = extended(self._stats, pieces, parts=self._parts)
        if not self._stats.is_finite:
            raise not_finite(pieces[0][0], self._where, pieces[0][1])


def not_finite(batch: int, where: str, rows: Tensor) -> CalibrationError:
    """The error for NaN or Inf in these rows of a batch."""
    return CalibrationError(
        f"batch {batch} gives NaN or Inf {where} {list(rows.shape)}: check the batch and the float model's weights, or "
        "leave the batch out"
    )
