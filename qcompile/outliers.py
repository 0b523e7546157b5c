"""Outliers of activations: channels that stand out of the crowd, and the few tokens that dwarf all others.

Both ruin a shared scale, and want different remedies: a channel is split off or smoothed, a token gets its own scale.
Pure data and maths on `Stats`; the thresholds compare channels with each other, so that units do not matter.
Source: LLM.int8() (Dettmers 2022) for features; Sun 2024, "Massive Activations in Large Language Models", for tokens.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from math import ceil, log10
from typing import Any

import torch
from torch import Tensor

from qcompile.errors import CalibrationError
from qcompile.graph import Op
from qcompile.observers import Stats

# LLM.int8(), section 3: |x| >= 6.0, in a quarter of the layers, at 6 % of the positions
LAYER_SHARE, TOKEN_SHARE = 0.25, 0.06
# times the median channel: reaching so far is enough by itself, whatever the crowd looks like
FAR = 20.0
# times the median channel: 8 dB, below which splitting a channel off gains less than its own rounding error
RATIO = 2.5
# robust standard deviations above the median, in the logarithm: the largest of 10**6 log-normal channels stays below
DEVIATIONS = 5.0
# a channel loud all the time (by its root mean square) may reach less far above a crowd that is loud at times
LASTING_RATIO, LASTING_DEVIATIONS = 4.0, 4.0
# fewer channels are no crowd
SMALLEST_CROWD = 8
# octaves; in a crowd of nearly equal channels the spread says nothing
SMALLEST_SPREAD = 0.1
# the median absolute deviation of a normal distribution is 1 / 1.4826 standard deviations
MAD_TO_SIGMA = 1.4826
# times the median magnitude of an element (Sun 2024)
MASSIVE = 1e3
NORMS = (Op.RMS_NORM, Op.LAYER_NORM)
# bins of a row of the heat map
BINS = 512
# channels that a note names
NAMED = 6


@dataclass(frozen=True, kw_only=True)
class Group:
    """Sites that read one activation, what makes it, and what calibration saw of it.

    feeds_head: the sites make what the model returns (a logits layer), which is no hidden layer.
    """

    sites: tuple[str, ...]
    maker: Op
    stats: Stats
    feeds_head: bool = False


@dataclass(frozen=True, kw_only=True)
class OutlierChannel:
    """A channel that stands out.

    ratio: its amax over the median channel's. rms_ratio: the same of root mean squares. share: its amax over the
    tensor's. exceeding: share of tokens where |x| >= 6.0. peak_factor: amax / rms. kurtosis: E[x^4] / E[x^2]^2.
    gain_db: by how much the range of the tensor shrinks without this channel alone.
    """

    channel: int
    amax: float
    ratio: float
    rms_ratio: float
    share: float
    exceeding: float
    peak_factor: float
    kurtosis: float
    gain_db: float


@dataclass(frozen=True, kw_only=True)
class MassiveTokens:
    """Few tokens with elements over 1000 times the median magnitude; a scale for each token takes them in.

    amax: largest magnitude. ratio: of amax to the median. tokens: how many, share: of all tokens.
    channels: those that reach so far, at most 8, largest first.
    """

    amax: float
    ratio: float
    tokens: int
    share: float
    channels: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Activation:
    """What was found at one activation.

    sites: that read it. maker: kind of op that makes it. channels: K. tokens: rows seen.
    amax, median, rms, kurtosis: of the tensor; median is that of the channels' amax.
    outliers: strongest first. gain_db: by how much the range shrinks without all of them.
    maxima: amax of the channels, each the largest of K / len(maxima) neighbours, for a heat map.
    """

    sites: tuple[str, ...]
    maker: str
    channels: int
    tokens: int
    amax: float
    median: float
    rms: float
    kurtosis: float
    outliers: tuple[OutlierChannel, ...] = ()
    gain_db: float = 0.0
    massive: MassiveTokens | None = None
    maxima: tuple[float, ...] = ()


@dataclass(frozen=True, kw_only=True)
class EmergentFeature:
    """A hidden dimension with |x| >= 6.0 at 6 % of the positions or more, in a quarter of the layers or more.

    layers: in how many, of `of`. positions: mean share of positions there. amax: over all layers.
    """

    channel: int
    layers: int
    of: int
    positions: float
    amax: float


@dataclass(frozen=True, kw_only=True)
class Outliers:
    """All activations in graph order, and the features that emerge across layers."""

    activations: tuple[Activation, ...] = ()
    emergent: tuple[EmergentFeature, ...] = ()

    def channels(self, site: str) -> tuple[int, ...]:
        """The outlier channels of what a site reads, strongest first; () for a site without any."""
        return next((tuple(c.channel for c in a.outliers) for a in self.activations if site in a.sites), ())

    def by_channel(self) -> dict[tuple[int, int], list[tuple[Activation, OutlierChannel]]]:
        """Where a channel of activations of one K stands out, by (K, channel); the most frequent first."""
        found: dict[tuple[int, int], list[tuple[Activation, OutlierChannel]]] = {}
        for activation in self.activations:
            for channel in activation.outliers:
                found.setdefault((activation.channels, channel.channel), []).append((activation, channel))
        return dict(sorted(found.items(), key=lambda item: (-len(item[1]), -max(c.ratio for _, c in item[1]))))

    def to_table(self) -> dict[str, Any]:
        """Numbers, texts, lists and tables only, as JSON holds them; `from_table` reads it back."""
        return asdict(self)

    @classmethod
    def from_table(cls, table: Mapping[str, Any]) -> "Outliers":
        return cls(
            activations=tuple(_activation(a) for a in table["activations"]),
            emergent=tuple(EmergentFeature(**e) for e in table["emergent"]),
        )


def find_outliers(groups: Iterable[Group]) -> Outliers:
    """Outlier channels, massive tokens and emergent features.  groups: in graph order, stats with rows.

    Emergent features are sought among activations that a norm makes and that feed hidden layers: the inputs of
    attention projections and of the first layers of feed-forward nets. Each counts as one layer.
    Raises CalibrationError if an activation held NaN or Inf.
    """
    groups = [group for group in groups if group.stats.count > 0]
    for group in groups:
        if not group.stats.is_finite:
            raise CalibrationError(
                f"the input of {group.sites[0]!r} held NaN or Inf: outliers are sought among numbers; calibrate with "
                "batches for which the float model gives finite values"
            )
    return Outliers(activations=tuple(_examined(group) for group in groups), emergent=tuple(_emergent(groups)))


def outlier_notes(outliers: Outliers) -> Iterator[str]:
    """What was found, a line for each kind of outlier that there is, for a report."""
    channels = outliers.by_channel()
    if channels:
        named = [f"{channel} ({len(places)})" for (_, channel), places in islice(channels.items(), NAMED)]
        more = f", and {len(channels) - NAMED} more" if len(channels) > NAMED else ""
        yield f"outlier channels, with the number of inputs where they stand out: {', '.join(named)}{more}"
    for feature in islice(outliers.emergent, NAMED):
        yield (
            f"emergent feature {feature.channel}: |x| >= 6.0 in {feature.positions:.0%} of the tokens of "
            f"{feature.layers} of {feature.of} inputs, up to {feature.amax:.3g}"
        )
    for activation in outliers.activations:
        if activation.massive is not None:
            yield (
                f"massive tokens before {activation.sites[0]}: {activation.massive.tokens} of {activation.tokens}, "
                f"{activation.massive.ratio:.3g} times the median magnitude"
            )


def standing_out(amax: Tensor, rms: Tensor, exceeding: Tensor) -> Tensor:
    """Which channels are outliers.

    amax, rms: [K], over ordinary tokens. exceeding: [K], share of tokens with |x| >= 6.0.  Returns bool [K].
    A channel reaches RATIO times as far as the median one and is far above the spread of the crowd, by what it
    reaches or by its root mean square; or it reaches 6.0 often and is still clear of the crowd; or it reaches FAR times
    as far. Among fewer than SMALLEST_CROWD channels none is an outlier.
    """
    if amax.numel() < SMALLEST_CROWD:
        return torch.zeros_like(amax, dtype=torch.bool)
    ratio, deviations = _above_crowd(amax)
    lasting_ratio, lasting_deviations = _above_crowd(rms)
    lasting = (lasting_ratio >= LASTING_RATIO) & (lasting_deviations >= LASTING_DEVIATIONS)
    often = (exceeding >= TOKEN_SHARE) & (deviations >= LASTING_DEVIATIONS)
    clear = (deviations >= DEVIATIONS) | lasting | often
    return (ratio > FAR) | ((ratio >= RATIO) & clear)


def massive_tokens(stats: Stats) -> MassiveTokens | None:
    """The massive tokens of an activation, or None: too many tokens are no exception, but the channels' habit."""
    typical = typical_magnitude(stats)
    limit = MASSIVE * typical
    amax = float(stats.amax.max()) if stats.amax.numel() else 0.0
    if typical == 0 or amax < limit:
        return None
    tokens = int(stats.tokens.reaching(limit))
    # of a handful of tokens one may be an exception
    if tokens > max(1, TOKEN_SHARE * stats.count) or tokens == stats.count:
        return None
    order = stats.amax.argsort(descending=True, stable=True)[:8].tolist()
    return MassiveTokens(
        amax=amax,
        ratio=amax / typical,
        tokens=tokens,
        share=tokens / stats.count,
        channels=tuple(k for k in order if float(stats.amax[k]) >= limit),
    )


def typical_magnitude(stats: Stats) -> float:
    """Median over tokens of the median magnitude of their elements that are not zero; 0.0 if all are."""
    rows = stats.sample.rows.float().abs()
    medians = torch.where(rows > 0, rows, torch.nan).nanmedian(1).values
    medians = medians.repeat_interleave(stats.sample.counts.to(medians.device))
    medians = medians[medians.isfinite()]
    return float(medians.median()) if medians.numel() else 0.0


def _above_crowd(magnitudes: Tensor) -> tuple[Tensor, Tensor]:
    """Ratio of each channel to the median one, and how many robust deviations it is above, in the logarithm."""
    alive = magnitudes[magnitudes > 0]
    if alive.numel() == 0:
        return torch.zeros_like(magnitudes), torch.zeros_like(magnitudes)
    middle = alive.median()
    octaves = (alive / middle).log2()
    # a spread found from few channels may be too small
    doubt = 1 + 8 / alive.numel()
    spread = doubt * max(MAD_TO_SIGMA * float(octaves.abs().median()), SMALLEST_SPREAD)
    ratio = magnitudes / middle
    return ratio, ratio.log2() / spread


def _examined(group: Group) -> Activation:
    stats = group.stats
    massive = massive_tokens(stats)
    amax, rms = _ordinary(stats, massive)
    exceeding = stats.exceeding.double() / stats.count
    flagged = standing_out(amax, rms, exceeding).nonzero().flatten()
    flagged = flagged[amax[flagged].argsort(descending=True, stable=True)]
    squares, k = float(stats.squares.sum()), stats.amax.numel()
    return Activation(
        sites=group.sites,
        maker=group.maker.value,
        channels=k,
        tokens=stats.count,
        amax=float(stats.amax.max()),
        median=float(stats.amax.median()),
        rms=(squares / (stats.count * k)) ** 0.5,
        kurtosis=_kurtosis(squares, float(stats.fourths.sum()), stats.count * k),
        outliers=tuple(_channels(stats, amax, rms, exceeding, flagged)),
        gain_db=_gain_db(amax, flagged),
        massive=massive,
        maxima=tuple(float(f"{m:.3g}") for m in binned(stats.amax, BINS).tolist()),
    )


def _ordinary(stats: Stats, massive: MassiveTokens | None) -> tuple[Tensor, Tensor]:
    """amax and rms of each channel, float64 [K]: over all tokens, or over those of the sample that are not massive."""
    amax, rms = stats.amax.double(), (stats.squares / stats.count).sqrt()
    if massive is None:
        return amax, rms
    rows, counts = stats.sample.rows.double(), stats.sample.counts.double()
    kept = rows.abs().amax(1) < MASSIVE * massive.amax / massive.ratio
    if not bool(kept.any()):
        return amax, rms
    rows, counts = rows[kept], counts[kept]
    return rows.abs().amax(0), ((rows.square() * counts[:, None]).sum(0) / counts.sum()).sqrt()


def _channels(stats: Stats, amax: Tensor, rms: Tensor, exceeding: Tensor, flagged: Tensor) -> Iterable[OutlierChannel]:
    ratio, _ = _above_crowd(amax)
    rms_ratio, _ = _above_crowd(rms)
    whole = float(amax.max()) if amax.numel() else 0.0
    for k in flagged.tolist():
        yield OutlierChannel(
            channel=k,
            amax=float(amax[k]),
            ratio=float(ratio[k]),
            rms_ratio=float(rms_ratio[k]),
            share=float(amax[k]) / whole,
            exceeding=float(exceeding[k]),
            peak_factor=float(amax[k] / rms[k]) if float(rms[k]) > 0 else 0.0,
            kurtosis=_kurtosis(float(stats.squares[k]), float(stats.fourths[k]), stats.count),
            gain_db=_gain_db(amax, flagged.new_tensor([k])),
        )


def _emergent(groups: Sequence[Group]) -> Iterable[EmergentFeature]:
    families: dict[int, list[Stats]] = {}
    for group in groups:
        if group.maker in NORMS and not group.feeds_head:
            families.setdefault(group.stats.amax.numel(), []).append(group.stats)
    for layers in families.values():
        shares = torch.stack([s.exceeding.double().cpu() / s.count for s in layers])  # [layers, K]
        peaks = torch.stack([s.amax.cpu() for s in layers]).amax(0)
        often = shares >= TOKEN_SHARE
        found = (often.sum(0) >= ceil(LAYER_SHARE * len(layers))).nonzero().flatten().tolist()
        features = [
            EmergentFeature(
                channel=k,
                layers=int(often[:, k].sum()),
                of=len(layers),
                positions=float(shares[often[:, k], k].mean()),
                amax=float(peaks[k]),
            )
            for k in found
        ]
        yield from sorted(features, key=lambda f: (-f.layers, -f.amax))


def binned(magnitudes: Tensor, bins: int) -> Tensor:
    """The largest of each of at most `bins` runs of neighbours, all of one length but the last.  [K] -> [<= bins]."""
    width = max(1, ceil(magnitudes.numel() / bins))
    padded = torch.nn.functional.pad(magnitudes, (0, -magnitudes.numel() % width))
    return padded.view(-1, width).amax(1)


def _gain_db(amax: Tensor, channels: Tensor) -> float:
    """20 log10(amax / amax without these channels); 0 if nothing would be left."""
    rest = amax.clone()
    rest[channels.to(rest.device)] = 0
    whole, left = (float(t.max()) if t.numel() else 0.0 for t in (amax, rest))
    return 20 * log10(whole / left) if left > 0 else 0.0


def _kurtosis(squares: float, fourths: float, count: int) -> float:
    return count * fourths / squares**2 if squares > 0 else 0.0


def _activation(table: Mapping[str, Any]) -> Activation:
    massive = table["massive"]
    return Activation(
        **{
            **table,
            "sites": tuple(table["sites"]),
            "outliers": tuple(OutlierChannel(**c) for c in table["outliers"]),
            "massive": None
            if massive is None
            else MassiveTokens(**{**massive, "channels": tuple(massive["channels"])}),
            "maxima": tuple(table["maxima"]),
        }
    )
