"""What calibration keeps of an activation, in memory that does not grow with the data.

Stats merge: rows in any order, cut in any way, on several processes give the stats of all rows; integers exactly,
float sums to rounding. Ranges are found from them in `qcompile.ranges`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Flag, auto
from functools import cached_property, reduce

import torch
from torch import Tensor

from qcompile.errors import CalibrationError
from qcompile.histogram import (
    FINE,
    TOKENS,
    Histogram,
    channel_resolution,
    count,
    count_channels,
    merge_histograms,
)
from qcompile.sample import Sample, merge_samples, row_hashes, sample_rows
from qcompile.steps import step_size

# the magnitude of an emergent feature; source: Dettmers 2022 (LLM.int8)
THRESHOLD = 6.0
# batches of which the ranges are kept; source: the default history of NVIDIA Transformer Engine
BATCHES = 1024
# magnitudes of which the largest of a channel may be, so that sums of its fourth powers are exact enough in float32
_LEAST, _MOST = 2.0**-20, 2.0**20
# elements of one step on the CPU, so that its passes find them in a cache
CHUNK = 2**18


class Part(Flag):
    """Histograms that observing may keep: each costs about as much time as all else together."""

    NONE = 0
    TENSOR = auto()
    CHANNELS = auto()


@dataclass(frozen=True, kw_only=True, eq=False)
class History:
    """Least and greatest of the most recent batches.

    batches: their numbers, ascending. low, high: float32 [batches], over all channels.
    """

    batches: tuple[int, ...]
    low: Tensor
    high: Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class Stats:
    """What the rows of an activation [rows, K] left behind.

    count: of rows. low, high: float32 [K]. squares, fourths: float64 [K], sums of powers of each channel.
    exceeding: int64 [K], rows in which a channel's magnitude is `THRESHOLD` or more.
    tokens: of the largest magnitude of each row. tensor: of all elements; channels: of each; None if not kept.
    """

    count: int
    low: Tensor
    high: Tensor
    squares: Tensor
    fourths: Tensor
    exceeding: Tensor
    tokens: Histogram
    history: History
    sample: Sample
    tensor: Histogram | None = None
    channels: Histogram | None = None

    @cached_property
    def amax(self) -> Tensor:
        """Largest magnitude of each channel, float32 [K]."""
        return torch.maximum(-self.low, self.high)

    @cached_property
    def importance(self) -> Tensor:
        """What errors in the weights of each channel cost, float32 [K]: see `importance_of`."""
        return importance_of(self.squares, self.count)

    @property
    def is_finite(self) -> bool:
        """Whether no NaN and no Inf was among the data; histograms hold only what is finite."""
        return bool(torch.isfinite(self.low).all() & torch.isfinite(self.high).all())

    def divided(self, scale: Tensor) -> "Stats":
        """The stats of activation / scale.  scale: [K], positive.

        What cannot be known is dropped: the tensor's histogram (ranges then use those of channels) and the history.
        `tokens` is that of the sampled rows. `exceeding` never counts too few: a bin, or without histograms a
        channel, counts whole if one value of it may reach the threshold.
        """
        scale = scale.float()
        channels = None if self.channels is None else self.channels.divided(scale)
        sample = replace(self.sample, rows=self.sample.rows / scale)
        derived = replace(
            self,
            low=self.low / scale,
            high=self.high / scale,
            squares=self.squares / scale.double().square(),
            fourths=self.fourths / scale.double().square().square(),
            tokens=_tokens_of(sample),
            history=_no_history(scale),
            sample=sample,
            tensor=None,
            channels=channels,
        )
        return replace(derived, exceeding=_exceeding_after(derived, scale, self.exceeding))

    def without(self, channels: Tensor) -> "Stats":
        """The stats when these channels are held out: they count as zeros.  channels: int64 [n].

        The tensor's histogram and the history are dropped, and `tokens` is that of the sampled rows.
        """
        sample = replace(self.sample, rows=self.sample.rows.index_fill(1, channels, 0.0))
        return replace(
            self,
            low=self.low.index_fill(0, channels, 0.0),
            high=self.high.index_fill(0, channels, 0.0),
            squares=self.squares.index_fill(0, channels, 0.0),
            fourths=self.fourths.index_fill(0, channels, 0.0),
            exceeding=self.exceeding.index_fill(0, channels, 0),
            tokens=_tokens_of(sample),
            history=_no_history(self.low),
            sample=sample,
            tensor=None,
            channels=None if self.channels is None else self.channels.without(channels),
        )


def importance_of(squares: Tensor, count: int) -> Tensor:
    """What errors in the weights of each channel cost: its mean square, over that of all channels.

    squares: float64 [K], sums over that many rows.  Returns float32 [K], positive.
    One row in which all channels are alike counts beside those that were seen: that a channel was silent in few rows
    does not make its weights worthless.
    """
    mean = squares.mean()
    relative = torch.where(mean > 0, squares / mean, 1.0)
    return ((relative * count + 1) / (count + 1)).float()


def observe(x: Tensor, *, batch: int = 0, parts: Part = Part.TENSOR, beside: Stats | None = None) -> Stats:
    """Stats of one activation.

    x: floating, [..., K] with at least one row; NaN and Inf show in the result. batch: the number of the batch that
    x is of, or is a part of. parts: the histograms to keep. beside: what the result will be merged with, and then it
    holds nothing that merging would drop: the sum is the same and found sooner.  Raises CalibrationError if x is empty.
    """
    if x.numel() == 0:
        raise CalibrationError(f"an activation of shape {list(x.shape)} has no rows to observe: leave the batch out")
    rows = x.detach().reshape(-1, x.shape[-1])
    low, high, peaks, hashes, squares, fourths = _swept(rows)
    amax = torch.maximum(-low, high)
    finite = bool(torch.isfinite(amax).all())
    if not finite:
        amax = torch.where(torch.isfinite(rows), rows, 0.0).float().abs().amax(0)
    if not bool((((amax > _LEAST) & (amax < _MOST)) | (amax == 0)).all()):
        squares, fourths = _careful_sums(rows, amax)
    largest = amax.amax()
    channels = None
    if Part.CHANNELS in parts:
        known = None if beside is None else beside.channels
        resolution = channel_resolution(rows.shape[1])
        channels = count_channels(rows, resolution, amax=amax, finite=finite, beside=known)
    return Stats(
        count=len(rows),
        low=low,
        high=high,
        squares=squares,
        fourths=fourths,
        exceeding=_exceeding(rows, amax, channels),
        tokens=count(
            peaks[:, None], TOKENS, amax=largest, finite=finite, beside=None if beside is None else beside.tokens
        ),
        history=History(batches=(batch,), low=low.amin()[None], high=high.amax()[None]),
        sample=sample_rows(rows, hashes, beside=None if beside is None else beside.sample),
        tensor=count(rows, FINE, amax=largest, finite=finite, beside=None if beside is None else beside.tensor)
        if Part.TENSOR in parts
        else None,
        channels=channels,
    )


def extended(
    known: Stats | None, rows: Tensor, *, batch: int = 0, ranges: Sequence[History] = (), parts: Part
) -> Stats:
    """Stats of all rows so far and of these, [R, K] with at least one: of one batch, or of those that have ranges.

    Other arguments and errors as of `observe` and `merge`.
    """
    seen = observe(rows, batch=batch, parts=parts, beside=known)
    if ranges:
        seen = replace(seen, history=reduce(_merge_histories, ranges))
    return seen if known is None else merge(known, seen)


def merge(a: Stats, b: Stats) -> Stats:
    """Stats of the rows of both.  a, b: of the same K and parts.  Raises CalibrationError if they do not fit."""
    if len(a.low) != len(b.low):
        raise CalibrationError(f"stats of {len(a.low)} and of {len(b.low)} channels are not of one activation")
    if a.count + b.count > torch.iinfo(torch.int32).max:
        raise CalibrationError(f"{a.count + b.count} rows are more than a histogram can count: use fewer batches")
    return Stats(
        count=a.count + b.count,
        low=torch.minimum(a.low, b.low),
        high=torch.maximum(a.high, b.high),
        squares=a.squares + b.squares,
        fourths=a.fourths + b.fourths,
        exceeding=a.exceeding + b.exceeding,
        tokens=merge_histograms(a.tokens, b.tokens),
        history=_merge_histories(a.history, b.history),
        sample=merge_samples(a.sample, b.sample),
        tensor=_merge_parts(a.tensor, b.tensor),
        channels=_merge_parts(a.channels, b.channels),
    )


def _merge_parts(a: Histogram | None, b: Histogram | None) -> Histogram | None:
    if (a is None) != (b is None):
        raise CalibrationError("stats with a histogram and without it do not merge: observe all batches with one parts")
    return None if a is None or b is None else merge_histograms(a, b)


def range_of(rows: Tensor, batch: int) -> History:
    """The range of rows of one batch.  rows: floating [R, K], at least one."""
    return History(batches=(batch,), low=rows.amin().float()[None], high=rows.amax().float()[None])


def _merge_histories(a: History, b: History) -> History:
    first, second = (a, b) if a.batches[:1] <= b.batches[:1] else (b, a)
    batches = first.batches + second.batches
    low, high = torch.cat([first.low, second.low]), torch.cat([first.high, second.high])
    if first.batches and second.batches and first.batches[-1] >= second.batches[0]:
        kept = sorted(set(batches))
        number = {batch: i for i, batch in enumerate(kept)}
        place = torch.tensor([number[batch] for batch in batches], device=low.device)
        low = low.new_full((len(kept),), torch.inf).scatter_reduce_(0, place, low, "amin")
        high = high.new_full((len(kept),), -torch.inf).scatter_reduce_(0, place, high, "amax")
        batches = tuple(kept)
    return History(batches=batches[-BATCHES:], low=low[-BATCHES:], high=high[-BATCHES:])


def _swept(rows: Tensor) -> tuple[Tensor, ...]:
    """Least and greatest of each channel, float32 [K]; largest magnitude and hash of each row, [R]; sums, float64 [K].

    The sums of squares and of fourth powers are right where magnitudes are between _LEAST and _MOST.
    """
    extremes, per_row = [], []
    squares, fourths = (rows.new_zeros(rows.shape[1], dtype=torch.float64) for _ in range(2))
    for part in rows.split(max(1, step_size(rows, CHUNK) // rows.shape[1])):
        chunk = part.float()
        extremes.append((chunk.amin(0), chunk.amax(0)))
        per_row.append((torch.maximum(chunk.amax(1), -chunk.amin(1)), row_hashes(chunk)))
        powers = chunk * chunk
        squares += powers.sum(0)
        powers *= powers
        fourths += powers.sum(0)
    low, high = (torch.stack(found) for found in zip(*extremes, strict=True))
    peaks, hashes = (torch.cat(found) for found in zip(*per_row, strict=True))
    return low.amin(0), high.amax(0), peaks, hashes, squares, fourths


def _careful_sums(rows: Tensor, amax: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of squares and of fourth powers, float64 [K], of any float32."""
    # under powers of two, which are exact, neither overflows float32
    unit = torch.ldexp(torch.ones_like(amax), -torch.frexp(amax).exponent.clamp(-120, 120))
    squares, fourths = (torch.zeros_like(amax, dtype=torch.float64) for _ in range(2))
    for part in rows.split(max(1, step_size(rows, CHUNK) // rows.shape[1])):
        powers = (part * unit).square_()
        squares += powers.sum(0)
        fourths += powers.square_().sum(0)
    back = unit.double().square()
    return squares / back, fourths / back.square()


def _exceeding(rows: Tensor, amax: Tensor, channels: Histogram | None) -> Tensor:
    """Rows in which each channel reaches the threshold, int64 [K]; few channels have any.

    channels: of the same rows; it knows, unless a window of its does not reach down to the threshold.
    """
    large = (amax >= THRESHOLD).nonzero().flatten()
    exceeding = torch.zeros_like(amax, dtype=torch.int64)
    if len(large) == 0:
        return exceeding
    # to gather many columns takes longer than to look at all
    gathered = 8 * len(large) < len(amax)
    if not gathered and channels is not None and channels.begins_at(THRESHOLD):
        return torch.where(amax >= THRESHOLD, channels.reaching(THRESHOLD), 0)
    for part in rows.split(max(1, step_size(rows, CHUNK) // (len(large) if gathered else len(amax)))):
        chosen = part.index_select(1, large) if gathered else part
        # ones and zeros in place: a tensor of bool would be slow to make numbers of
        found = chosen.float().abs().ge_(THRESHOLD).sum(0).long()
        exceeding[large] += found if gathered else found[large]
    return exceeding


def _tokens_of(sample: Sample) -> Histogram:
    peaks = sample.rows.abs().amax(1).repeat_interleave(sample.counts)
    return count(peaks[:, None], TOKENS, amax=peaks.amax())


def _no_history(like: Tensor) -> History:
    return History(batches=(), low=like.new_empty(0), high=like.new_empty(0))


def _exceeding_after(stats: Stats, scale: Tensor, before: Tensor) -> Tensor:
    """Rows that may reach the threshold after the division; dividing by 1 or more brings no new ones."""
    most = torch.full_like(before, stats.count) if stats.channels is None else stats.channels.reaching(THRESHOLD)
    most = torch.where(scale >= 1, torch.minimum(most, before), most)
    return torch.where(stats.amax < THRESHOLD, 0, most)
