"""Static ranges from stats, by name: observers.

To add one, write a function `(lines, spec, parameter) -> (low, high)` and add a line to `OBSERVERS`.
Sources: Nagel 2021 (A White Paper on Neural Network Quantization), section 3.1; NVIDIA Transformer Engine for delayed
scaling.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from qcompile.clipping import KL_BINS, divergence_cells, least_divergence, least_error
from qcompile.distribution import Distribution, lloyd_max_levels, quantile_levels
from qcompile.errors import CalibrationError, RecipeError, SpecError, nearest
from qcompile.formats import CodeBook
from qcompile.numerics import QParams, on_device, qparams_of_range, rounded
from qcompile.observers import BATCHES, History, Part, Stats
from qcompile.spec import Spec, parse_granularity

Range = tuple[Tensor, Tensor]


@dataclass(frozen=True, kw_only=True, eq=False)
class Lines:
    """What a range is found from: the whole tensor as one line, or each channel as its own. All on the CPU.

    low, high: float32 [C]. rows: float32 [C, r], sampled values of each line; counts: int64 [r], how often they came.
    whole: whether those are all values.
    """

    low: Tensor
    high: Tensor
    rows: Tensor
    counts: Tensor
    whole: bool
    history: History | None
    binned: Callable[[], Distribution | None]

    @property
    def amax(self) -> Tensor:
        """Largest magnitude of each line, [C]."""
        return torch.maximum(-self.low, self.high)

    @cached_property
    def values(self) -> Distribution:
        """The distribution of each line.  Raises CalibrationError if no histogram was kept."""
        found = self.binned()
        if found is None:
            raise CalibrationError(
                "the range is found from a histogram, and these stats were kept without: observe with the parts that "
                "`needed_parts` names, or take 'minmax'"
            )
        return found


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """The number that may follow an observer's name: above `low`, at most `high`."""

    default: float
    low: float
    high: float
    whole: bool = False


@dataclass(frozen=True, kw_only=True)
class Observer:
    """A way to find a static range, to be called with stats and a spec of one scale for the tensor."""

    find: Callable[[Lines, Spec, float], Range]
    parts: Part = Part.NONE
    # batches count one by one: their extremes are not known after a fold or split
    ordered: bool = False
    parameter: Parameter | None = None
    value: float = 0.0

    def __call__(self, stats: Stats, spec: Spec) -> QParams:
        """Scale (and zero point, and learned levels) for an activation; a scale is positive, whatever was seen.

        Raises CalibrationError if the stats lack what the observer needs, SpecError if the spec does not go with it.
        """
        lines = _whole(stats)
        low, high = self.find(lines, spec, self.value)
        qparams = qparams_of_range(low[0], high[0], spec)
        if isinstance(spec.format, CodeBook) and spec.format.levels is None:
            qparams = replace(qparams, levels=_learned(lines.values, spec.format, qparams.scale))
        return on_device(qparams, stats.low.device)


def find_absmax(lines: Lines, spec: Spec, parameter: float) -> Range:
    """The largest magnitude, to both sides of zero."""
    return -lines.amax, lines.amax


def find_minmax(lines: Lines, spec: Spec, parameter: float) -> Range:
    """From least to greatest."""
    return lines.low, lines.high


def find_last(lines: Lines, spec: Spec, parameter: float) -> Range:
    """From least to greatest of the last batch."""
    history = _history(lines)
    return history.low[-1:], history.high[-1:]


def find_moving_average(lines: Lines, spec: Spec, momentum: float) -> Range:
    """Average over batches in their order, in which the old value weighs `momentum`."""
    history = _history(lines)
    low, high = history.low[:1], history.high[:1]
    for i in range(1, len(history.batches)):
        low = momentum * low + (1 - momentum) * history.low[i]
        high = momentum * high + (1 - momentum) * history.high[i]
    return low, high


def find_delayed(lines: Lines, spec: Spec, length: float) -> Range:
    """What the last `length` batches reach, or without any value there, what the scale in use before reaches."""
    low, high = delayed_ranges(_history(lines), int(length))
    return low[-1:], high[-1:]


def find_percentile(lines: Lines, spec: Spec, percent: float) -> Range:
    """The magnitude below which so many percent lie; of an asymmetric spec, what leaves that out at each end."""
    part = percent / 100
    if not spec.symmetric:
        return lines.values.quantile(1 - part).float(), lines.values.quantile(part).float()
    clip = lines.values.magnitude_quantile(part).float()
    return -clip, clip


def find_mse(lines: Lines, spec: Spec, parameter: float) -> Range:
    """The range of least squared error on the spec's grid; the whole range where clipping is no gain.

    A histogram spreads values that are few and lie on a grid of their own, so the sampled rows have a say: a range
    that rounds what it holds of them no better than the whole range is not taken.
    """
    if isinstance(spec.format, CodeBook) and spec.format.levels is None:
        # learned levels of least error are no grid to clip by
        return lines.low, lines.high
    low, high = least_error(lines.values, lines.low, lines.high, spec)
    worse = _rounding(lines, spec, (low, high), (low, high)) >= _rounding(
        lines, spec, (lines.low, lines.high), (low, high)
    )
    return torch.where(worse, lines.low, low), torch.where(worse, lines.high, high)


def find_kl(lines: Lines, spec: Spec, parameter: float) -> Range:
    """The magnitude that loses least information when the values between the grid's thresholds become one.

    It limits both ends. An asymmetric range gives the longer side as many levels as its part of the range.
    """
    amax = lines.amax.double()
    counts = lines.values.magnitudes(KL_BINS, amax)
    clip = amax.clone()
    for i in amax.nonzero().flatten().tolist():
        bits = spec.format.bits
        span = amax[i] if spec.symmetric else lines.high[i].clamp(min=0) - lines.low[i].clamp(max=0)
        levels = 2 ** (bits - 1) if spec.symmetric else round(float(2**bits * amax[i] / span))
        clip[i] *= least_divergence(counts[i], divergence_cells(spec.format, levels)) / KL_BINS
    clip = clip.float()
    return torch.maximum(lines.low, -clip), torch.minimum(lines.high, clip)


def find_lloyd(lines: Lines, spec: Spec, parameter: float) -> Range:
    """The whole range, for the levels of a learned code book."""
    if not isinstance(spec.format, CodeBook) or spec.format.levels is not None:
        raise SpecError(f"observer 'lloyd' learns levels, and those of {spec} are fixed: take 'mse', or lloyd4/tensor")
    return lines.low, lines.high


OBSERVERS: dict[str, Observer] = {
    "absmax": Observer(find=find_absmax),
    "minmax": Observer(find=find_minmax),
    "last": Observer(find=find_last, ordered=True),
    "moving_average": Observer(find=find_moving_average, ordered=True, parameter=Parameter(default=0.9, low=0, high=1)),
    "delayed": Observer(
        find=find_delayed, ordered=True, parameter=Parameter(default=BATCHES, low=0, high=BATCHES, whole=True)
    ),
    "percentile": Observer(
        find=find_percentile, parts=Part.TENSOR, parameter=Parameter(default=99.99, low=50, high=100)
    ),
    "mse": Observer(find=find_mse, parts=Part.TENSOR),
    "kl": Observer(find=find_kl, parts=Part.TENSOR),
    "lloyd": Observer(find=find_lloyd, parts=Part.TENSOR),
}

_LEARN: dict[str, Callable[[Distribution, int], Tensor]] = {
    "quantile": quantile_levels,
    "lloyd": lloyd_max_levels,
}


def parse_observer(text: str) -> Observer:
    """The observer written as `text`: a name of `OBSERVERS`, or name/parameter, as "percentile/99.9", "delayed/16".

    Raises RecipeError that names the known ones.
    """
    name, slash, number = text.partition("/")
    observer = OBSERVERS.get(name)
    if observer is None:
        raise RecipeError(
            f"unknown observer {text!r}; nearest: {nearest(name, OBSERVERS)}; known: {', '.join(OBSERVERS)}"
        )
    parameter = observer.parameter
    if not slash:
        return observer if parameter is None else replace(observer, value=parameter.default)
    if parameter is None:
        takers = ", ".join(f"{n}/{o.parameter.default:g}" for n, o in OBSERVERS.items() if o.parameter is not None)
        raise RecipeError(f"observer {name!r} takes no parameter, got {text!r}; those that do: {takers}")
    kind = "a whole number" if parameter.whole else "a number"
    try:
        value = float(number)
    except ValueError:
        value = torch.nan
    if not parameter.low < value <= parameter.high or (parameter.whole and value % 1):
        raise RecipeError(
            f"observer {text!r} needs {kind} above {parameter.low:g}, at most {parameter.high:g}, after the slash, "
            f"such as {name}/{parameter.default:g}"
        )
    return replace(observer, value=value)


def needed_parts(text: str, spec: Spec) -> Part:
    """The histograms to keep for an observer and a spec.  Raises as `parse_observer`.

    Where the tensor's is lacking, that of channels serves in its place: for 'mse' without loss, for others coarsely.
    """
    learns = isinstance(spec.format, CodeBook) and spec.format.levels is None
    return parse_observer(text).parts | (Part.TENSOR if learns else Part.NONE)


def channel_ranges(stats: Stats, observer: str, spec: Spec) -> Range:
    """Least and greatest value to cover in each channel, as the observer finds it from the channel alone.

    spec: gives the grid; its granularity is ignored.  Returns float32 [K] twice.  Raises CalibrationError if the
    observer needs the order of batches, or histograms of channels that were not kept.
    """
    low, high = stats.low.cpu(), stats.high.cpu()
    lines = Lines(
        low=low,
        high=high,
        rows=stats.sample.rows.cpu().T.contiguous(),
        counts=stats.sample.counts.cpu(),
        whole=int(stats.sample.counts.sum()) == stats.count,
        history=None,
        binned=lambda: None if stats.channels is None else stats.channels.lines(low, high),
    )
    found = parse_observer(observer)
    low, high = found.find(lines, spec, found.value)
    return low.to(stats.low.device), high.to(stats.low.device)


def token_quantile(stats: Stats, part: float) -> float:
    """The magnitude that the largest of a row's values stays below in `part` of all rows, 0 to 1."""
    largest = stats.amax.amax()
    return float(stats.tokens.together(torch.zeros_like(largest), largest).quantile(part))


def delayed_ranges(history: History, length: int) -> Range:
    """After each batch, the range that serves next: least and greatest of the last `length` batches.

    A window of zeros, or one with NaN or Inf, keeps the range before it, at first none.  Returns float32 [batches]
    twice.  Source: NVIDIA Transformer Engine, delayed scaling with margin 0 and amax "max".
    """
    lows, highs = [], []
    low = high = history.low.new_zeros(())
    for end in range(1, len(history.batches) + 1):
        window = slice(max(0, end - length), end)
        least, greatest = history.low[window].amin(), history.high[window].amax()
        reach = torch.maximum(-least, greatest)
        if bool(torch.isfinite(reach)) and float(reach) > 0:
            low, high = least, greatest
        lows.append(low)
        highs.append(high)
    return torch.stack(lows), torch.stack(highs)


def _whole(stats: Stats) -> Lines:
    low, high = stats.low.amin().cpu(), stats.high.amax().cpu()
    histogram = stats.channels if stats.tensor is None else stats.tensor
    rows, history = stats.sample.rows.cpu(), stats.history
    return Lines(
        low=low[None],
        high=high[None],
        rows=rows.reshape(1, -1),
        counts=stats.sample.counts.cpu().repeat_interleave(rows.shape[1]),
        whole=int(stats.sample.counts.sum()) == stats.count,
        history=replace(history, low=history.low.cpu(), high=history.high.cpu()),
        binned=lambda: None if histogram is None else histogram.together(low, high),
    )


def _history(lines: Lines) -> History:
    if lines.history is None or not lines.history.batches:
        raise CalibrationError(
            "the range is found from that of each batch, and it is not known here: it is kept for whole tensors as the "
            "model computes them, not for channels, nor after smoothing or holding out; take 'mse' or 'minmax'"
        )
    return lines.history


def _rounding(lines: Lines, spec: Spec, ends: Range, inside: Range) -> Tensor:
    """Squared error of sampled values under a range, [C]; if they are not all there are, of those inside only."""
    alone = replace(spec, granularity=parse_granularity("channel"))
    qparams = qparams_of_range(ends[0][:, None], ends[1][:, None], alone)
    error = (rounded(lines.rows, qparams) - lines.rows).double().square() * lines.counts
    if lines.whole:
        return error.sum(1)
    reach = torch.maximum(-inside[0], inside[1])[:, None]
    low, high = (-reach, reach) if spec.symmetric else (inside[0][:, None], inside[1][:, None])
    return torch.where((lines.rows >= low) & (lines.rows <= high), error, 0.0).sum(1)


def _learned(values: Distribution, fmt: CodeBook, scale: Tensor) -> Tensor:
    learn = next(f for prefix, f in _LEARN.items() if fmt.name.startswith(prefix))
    return (learn(values, 2**fmt.bits) / scale.double()).float()
