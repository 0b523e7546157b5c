"""Pieces of an activation, small and large, give the stats of all of them."""

import pytest
import torch
from torch import Tensor

from qcompile import gathering
from qcompile.errors import CalibrationError
from qcompile.gathering import ENOUGH, SHARE, Gathering, Room
from qcompile.observers import Part, Stats, observe

PARTS = Part.TENSOR | Part.CHANNELS
K = 6


def pieces(*counts: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(count, K, generator=generator) for count in counts]


def gathered(rows: list[Tensor], monkeypatch: pytest.MonkeyPatch, enough: int) -> tuple[Stats, int]:
    """The stats, and how often was looked."""
    monkeypatch.setattr(gathering, "ENOUGH", enough)
    looks = 0
    plain = gathering.extended

    def counted(*args: object, **more: object) -> Stats:
        nonlocal looks
        looks += 1
        return plain(*args, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(gathering, "extended", counted)
    seen = Gathering("at x", PARTS, Room())
    for batch, piece in enumerate(rows):
        seen.add(piece, batch=batch)
    stats = seen.stats()
    assert stats is not None
    return stats, looks


@pytest.mark.parametrize(("enough", "looks"), [(1, 5), (8 * K, 3), (ENOUGH, 1)])
def test_all_pieces_count_once_whenever_they_are_looked_at(
    enough: int, looks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = pieces(3, 5, 8, 1, 2)
    found, looked = gathered(rows, monkeypatch, enough)
    assert looked == looks
    whole = observe(torch.cat(rows), parts=PARTS)
    assert found.count == whole.count == 19
    for name in ("low", "high", "exceeding"):
        assert torch.equal(getattr(found, name), getattr(whole, name))
    assert found.channels is not None
    assert whole.channels is not None
    assert torch.equal(found.channels.counts, whole.channels.counts)
    assert torch.equal(found.sample.rows, whole.sample.rows)
    torch.testing.assert_close(found.squares, whole.squares, rtol=1e-6, atol=0)
    # the range of each batch is kept, however many were looked at together
    assert found.history.batches == (0, 1, 2, 3, 4)
    assert found.history.low.tolist() == [float(piece.min()) for piece in rows]
    assert found.history.high.tolist() == [float(piece.max()) for piece in rows]


def test_what_waits_is_not_changed_with_its_source() -> None:
    (rows,) = pieces(4)
    kept, seen = rows.clone(), Gathering("at x", Part.NONE, Room())
    seen.add(rows, batch=0)
    rows.zero_()
    stats = seen.stats()
    assert stats is not None
    assert torch.equal(stats.high, kept.amax(0))


def test_more_may_follow_after_a_look() -> None:
    first, second = pieces(4, 3)
    seen = Gathering("at x", Part.NONE, Room())
    assert seen.stats() is None
    seen.add(first, batch=0)
    assert seen.stats() is seen.stats()
    seen.add(second, batch=1)
    stats = seen.stats()
    assert stats is not None
    assert stats.count == 7


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 1e39])
@pytest.mark.parametrize("enough", [1, ENOUGH])
def test_the_batch_that_is_not_finite_is_named_at_once(
    value: float, enough: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gathering, "ENOUGH", enough)
    rows = [piece.double() for piece in pieces(4, 3)]
    rows[1][2, 5] = value
    seen = Gathering("at the input of 'fc'", Part.NONE, Room())
    seen.add(rows[0], batch=10)
    with pytest.raises(CalibrationError, match=r"batch 11 gives NaN or Inf at the input of 'fc' \[3, 6\]"):
        seen.add(rows[1], batch=11)


def test_what_waits_in_many_activations_has_one_room() -> None:
    # the first takes room for 8 rows, the others less and less, the last none
    room, rows = Room(left=SHARE * 8 * K), pieces(7, 7, 7, 9)
    seen = [Gathering(f"at {i}", PARTS, room) for i in range(4)]
    for one, piece in zip(seen, rows, strict=True):
        one.add(piece, batch=0)
    assert SHARE * 5 * K < room.left < SHARE * 8 * K
    for one, piece in zip(seen, rows, strict=True):
        stats = one.stats()
        assert stats is not None
        assert torch.equal(stats.high, piece.amax(0))
    assert room.left == SHARE * 8 * K


def test_pieces_of_another_dtype_do_not_wait_together() -> None:
    rows = pieces(4, 3)
    room = Room()
    seen = Gathering("at x", Part.NONE, room)
    seen.add(rows[0], batch=0)
    seen.add(rows[1].double() * 3, batch=1)
    stats = seen.stats()
    assert stats is not None
    assert stats.count == 7
    assert torch.equal(stats.high, torch.maximum(rows[0].amax(0), (rows[1].double() * 3).float().amax(0)))
    assert room == Room()
