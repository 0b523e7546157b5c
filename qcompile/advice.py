"""Why a site loses accuracy, in plain words, and what would mend it: predicted from rows, measured on the model."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from itertools import takewhile
from math import isfinite

import torch
from torch import Tensor

from qcompile.channels import tied
from qcompile.noise import Probe, Treatment, probe, shares_rows
from qcompile.numerics import QParams
from qcompile.observers import Stats
from qcompile.outliers import Activation
from qcompile.sizes import stored_bytes
from qcompile.smooth import smooth_scale
from qcompile.spec import ALL, Spec, parse_spec

# dB; less is not worth a user's time
LEAST_GAIN = 1.0
# dB; where something cheaper gains so much, leaving a site in 16 bit is not proposed
ENOUGH = 3.0
# a split of few channels is preferred while it gains this part of what more channels would
GOOD_PART = 0.8
SPLITS = (1, 2, 4, 8)
# 0.5 is SmoothQuant's own; activations with strong outliers want more
ALPHAS = (0.4, 0.55, 0.7, 0.85)
# cases that remedies are sought for, the noisiest
CASES = 16
DYNAMIC = "int8/token/asym"
# what an input could have instead, and a weight, the smallest first
INPUTS = (DYNAMIC, "fp8_e4m3/token")
WEIGHTS = ("int4/g32/asym/bf16", "int8/channel")
# a 16-bit weight
FLOAT_BYTES = 2


class Kind(Enum):
    """What a remedy does."""

    SPLIT = "split"
    DYNAMIC = "dynamic"
    SMOOTH = "smooth"
    INPUT = "input"
    WEIGHT = "weight"
    FLOAT = "float"


@dataclass(frozen=True, kw_only=True)
class Remedy:
    """channels: of SPLIT. alpha: of SMOOTH. spec: of DYNAMIC, INPUT and WEIGHT, as text."""

    kind: Kind
    channels: tuple[int, ...] = ()
    alpha: float | None = None
    spec: str = ""


@dataclass(frozen=True, kw_only=True)
class Advice:
    """What to do for sites that read one activation.

    cause, action: why they lose accuracy and what to do, for a reader. before_db: signal-to-noise ratio of their
    outputs as they are. predicted_db: what it would gain. bytes: that the weights would grow by.
    measured_db: what the model's outputs gained when it was tried, None if it was not.
    """

    sites: tuple[str, ...]
    cause: str
    action: str
    remedy: Remedy
    before_db: float
    predicted_db: float
    bytes: int
    measured_db: float | None = None

    @property
    def text(self) -> str:
        """Sites, cause and remedy in one sentence."""
        return f"{title(self.sites)}: {self.cause}; {self.action}"

    @property
    def removed(self) -> float:
        """Noise over signal that would go: what sites are compared by."""
        return _noise(self.before_db) - _noise(self.before_db + self.predicted_db)


@dataclass(frozen=True, kw_only=True, eq=False)
class Case:
    """Sites that read one activation and are quantized alike.

    weights: float [N, K], of each of them. scale: float32 [K] that a fold multiplies their columns by, None for 1.
    stats: of what they read.
    static: finds the qparams of a static input again, None where the input is float or dynamic.
    channels: int64 [K], what must share a scale if 1 / scale can go into what makes the activation; None if it cannot.
    """

    sites: tuple[str, ...]
    weights: tuple[Tensor, ...]
    stats: Stats
    treatment: Treatment
    activation: Activation
    static: Callable[[Stats], QParams] | None = None
    channels: Tensor | None = None
    scale: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """[N, K] of all weights, one above the other."""
        return sum(len(weight) for weight in self.weights), self.weights[0].shape[1]

    def weight(self) -> Tensor:
        """All weights as they are folded, one above the other, made anew: cases are many."""
        weight = torch.cat(self.weights) if len(self.weights) > 1 else self.weights[0]
        return weight if self.scale is None else weight * self.scale.to(weight.device)


def advise(cases: Iterable[Case], *, most: int = CASES) -> list[Advice]:
    """Remedies that gain something, those first that take most noise out of the model; several for one case.

    most: cases that are looked at, the noisiest.
    """
    noisy = sorted(((_before(case), case) for case in cases), key=lambda pair: pair[0])[:most]
    found = [list(_advice(case, before)) for before, case in noisy if isfinite(before)]
    found.sort(key=lambda options: -max((o.removed for o in options if o.remedy.kind is not Kind.FLOAT), default=0.0))
    return [advice for options in found for advice in options]


def _before(case: Case) -> float:
    """Signal-to-noise ratio of the case's outputs as they are."""
    return _probe(case).after(case.treatment)


def _probe(case: Case) -> Probe:
    return probe(case.weight(), case.stats, whole=shares_rows(case.treatment.weight))


def measured(advice: Sequence[Advice], gain: Callable[[Advice], float], *, tries: int = 4) -> list[Advice]:
    """The same advice, the first few measured.

    gain: applies one to a plan, runs the model and returns what its outputs gained in dB.
    """
    return [*(replace(one, measured_db=gain(one)) for one in advice[:tries]), *advice[tries:]]


def _advice(case: Case, before: float) -> Iterator[Advice]:
    """The best remedy of each kind for one case, the best first."""
    seen = _probe(case)
    gains = {remedy: _after(case, seen, remedy) - before for remedy in _candidates(case)}
    cause = _cause(case, seen, gains)
    best = [_best(kind, gains) for kind in Kind]
    options = sorted(((r, gains[r]) for r in best if r is not None and gains[r] >= LEAST_GAIN), key=lambda o: -o[1])
    cheap = any(gain >= ENOUGH for remedy, gain in options if remedy.kind is not Kind.FLOAT)
    for remedy, gain in options:
        if remedy.kind is Kind.FLOAT and cheap:
            continue
        grown = extra_bytes(case, remedy)
        size = _held_bytes(case)
        yield Advice(
            sites=case.sites,
            cause=cause,
            action=_words(remedy) + (f" ({grown / size:+.1%} bytes)" if grown else ""),
            remedy=remedy,
            before_db=before,
            predicted_db=gain,
            bytes=grown,
        )


def _best(kind: Kind, gains: dict[Remedy, float]) -> Remedy | None:
    """The remedy of that kind that gains most; of splits the smallest that gains nearly as much."""
    of_kind = {remedy: gain for remedy, gain in gains.items() if remedy.kind is kind}
    if not of_kind:
        return None
    most = max(of_kind.values())
    if kind is not Kind.SPLIT:
        return max(of_kind, key=lambda r: of_kind[r])
    return next(remedy for remedy, gain in of_kind.items() if gain >= GOOD_PART * most or gain == most)


def _candidates(case: Case) -> Iterator[Remedy]:
    """Everything that could be tried, splits from the smallest on."""
    treatment, (n, k) = case.treatment, case.shape
    spec = treatment.input.spec if isinstance(treatment.input, QParams) else treatment.input
    if spec is not None:
        loud = loudest(case.stats, treatment.channels)
        yield from (Remedy(kind=Kind.SPLIT, channels=tuple(loud[:n])) for n in SPLITS if 16 * n <= k)
        if spec.granularity.rows == ALL:
            yield Remedy(kind=Kind.DYNAMIC, spec=DYNAMIC)
        yield from (Remedy(kind=Kind.INPUT, spec=s) for s in INPUTS if spec.granularity.rows != ALL and s != str(spec))
        if case.channels is not None:
            yield from (Remedy(kind=Kind.SMOOTH, alpha=alpha) for alpha in ALPHAS)
    if treatment.weight is not None:
        held = _held_bytes(case)
        for other in WEIGHTS:
            tile = parse_spec(other).granularity.columns
            if (tile == ALL or k % tile == 0) and stored_bytes(parse_spec(other), n, k) > held:
                yield Remedy(kind=Kind.WEIGHT, spec=other)
    if spec is not None or treatment.weight is not None:
        yield Remedy(kind=Kind.FLOAT)


def loudest(stats: Stats, apart_from: Sequence[int] = ()) -> list[int]:
    """Channels by how much they widen ranges: by their fourth powers, between what lasts and what peaks.

    Those are summed over all tokens; rare ones may be missing from the sampled rows.
    """
    power = stats.fourths.clone()
    power[list(apart_from)] = -1.0
    return [int(k) for k in power.argsort(descending=True, stable=True)[: max(SPLITS)]]


def smoothing(amax: Tensor, weight: Tensor, channels: Tensor, alpha: float) -> Tensor:
    """SmoothQuant's scale for an activation's amax [K] and the weights [N, K] that read it, as channels may share it.

    channels: see `Case`.  Returns float32 [K] on the activation's device.
    """
    columns = weight.detach().float().abs().amax(0).to(amax.device)
    return smooth_scale(tied(amax, channels), tied(columns, channels), alpha)


def _after(case: Case, seen: Probe, remedy: Remedy) -> float:
    """Signal-to-noise ratio of the case's outputs with a remedy."""
    treatment, stats = case.treatment, case.stats
    match remedy.kind:
        case Kind.SPLIT:
            channels = (*treatment.channels, *remedy.channels)
            weighed = importance_left(treatment.importance, stats, channels)
            given = _input(case, stats, channels)
            return seen.after(replace(treatment, channels=channels, input=given, importance=weighed))
        case Kind.SMOOTH:
            assert remedy.alpha is not None
            assert case.channels is not None
            weight = case.weight()
            scale = smoothing(stats.amax, weight, case.channels, remedy.alpha).to(weight.device)
            stats = stats.divided(scale.to(stats.low.device))
            weighed = importance_left(treatment.importance, stats, treatment.channels)
            given = _input(case, stats, treatment.channels)
            return seen.scaled(scale).after(replace(treatment, input=given, importance=weighed))
        case Kind.DYNAMIC | Kind.INPUT:
            return seen.after(replace(treatment, input=parse_spec(remedy.spec)))
        case Kind.WEIGHT:
            return seen.after(replace(treatment, weight=parse_spec(remedy.spec)))
        case Kind.FLOAT:
            return FLOAT_DB


# what 16 bit leave of a signal: bfloat16 rounds to 8 bits, 6.02 * 8 + 4.8 dB below uniform values
FLOAT_DB = 53.0


def _input(case: Case, stats: Stats, channels: Sequence[int]) -> Spec | QParams | None:
    return case.treatment.input if case.static is None else case.static(without(stats, channels))


def without(stats: Stats, channels: Sequence[int]) -> Stats:
    """The stats when these channels bypass quantization."""
    return stats.without(torch.tensor(channels, device=stats.low.device)) if channels else stats


def importance_left(known: Tensor | None, stats: Stats, channels: Sequence[int]) -> Tensor | None:
    """The importance of the channels that do not bypass quantization; None for a solver that does not ask for it."""
    return None if known is None else without(stats, channels).importance


def _cause(case: Case, seen: Probe, gains: dict[Remedy, float]) -> str:
    """One clause on what makes the noise."""
    treatment, massive = case.treatment, case.activation.massive
    total = _noise(seen.after(treatment))
    from_weight = _noise(seen.after(replace(treatment, input=None))) / total
    if treatment.input is None or from_weight > 0.5:
        return f"its weight causes {min(from_weight, 1.0):.0%} of the noise"
    if massive is not None and case.static is not None:
        return f"{massive.tokens} of {case.activation.tokens} tokens reach {massive.ratio:.0f} times the median"
    splits = [(remedy, 1 - _noise(gain)) for remedy, gain in gains.items() if remedy.kind is Kind.SPLIT]
    blamed = next(((r, part) for r, part in splits if part >= 0.3), None)
    if blamed is None:
        return f"its input causes {1 - from_weight:.0%} of the noise, and no few channels stand out"
    channels, part = blamed[0].channels, blamed[1]
    middle = float(case.stats.amax.median())
    ratio = f", {float(case.stats.amax[channels[0]]) / middle:.1f}x the median channel," if middle > 0 else ""
    if len(channels) == 1:
        return f"channel {channels[0]}{ratio} causes {part:.0%} of the noise"
    return f"{len(channels)} channels ({', '.join(map(str, channels))}) cause {part:.0%} of the noise"


def _words(remedy: Remedy) -> str:
    match remedy.kind:
        case Kind.SPLIT:
            listed = ", ".join(map(str, remedy.channels))
            return f"split off channel{'s' if len(remedy.channels) > 1 else ''} {listed}"
        case Kind.DYNAMIC:
            return f"give every token its own scale ({remedy.spec})"
        case Kind.SMOOTH:
            return f"smooth it (alpha={remedy.alpha:g})"
        case Kind.INPUT:
            return f"give its input {remedy.spec}"
        case Kind.WEIGHT:
            return f"give its weight {remedy.spec}"
        case Kind.FLOAT:
            return "leave it in 16 bit"


def extra_bytes(case: Case, remedy: Remedy) -> int:
    """Bytes that the weights of a case grow by."""
    n, k = case.shape
    match remedy.kind:
        case Kind.SPLIT:
            return FLOAT_BYTES * n * len(remedy.channels)
        case Kind.WEIGHT:
            return stored_bytes(parse_spec(remedy.spec), n, k) - _held_bytes(case)
        case Kind.FLOAT:
            return FLOAT_BYTES * n * k - _held_bytes(case)
    return 0


def _held_bytes(case: Case) -> int:
    n, k = case.shape
    spec = case.treatment.weight
    return FLOAT_BYTES * n * k if spec is None else stored_bytes(spec, n, k)


def _noise(db: float) -> float:
    return 10 ** (-db / 10)


def title(sites: Sequence[str]) -> str:
    """Names with what they share said once: "layers.3.mlp.gate_proj, up_proj"."""
    parts = [name.split(".") for name in sites]
    shared = sum(1 for _ in takewhile(lambda level: len(set(level)) == 1, zip(*parts, strict=False)))
    return ", ".join([sites[0], *(".".join(own[min(shared, len(own) - 1) :]) for own in parts[1:])])
