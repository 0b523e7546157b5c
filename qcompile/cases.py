"""Cases to choose for: sites that read one activation, the rows to try choices on, and what can be chosen."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from qcompile.channels import tied
from qcompile.noise import Probe
from qcompile.numerics import QParams
from qcompile.observers import Stats
from qcompile.recipe import Rule
from qcompile.smooth import AWQ
from qcompile.spec import Spec

# what is tried is tried often: the error of a mean over so many is a few percent
ROWS, FEATURES = 128, 128


@dataclass(frozen=True, kw_only=True, eq=False)
class Case:
    """Sites that read one activation and follow one rule.

    probe: the rows, and the weights of all sites one below the other (see `joined`).  stats: of the activation.
    columns: float32 [K], largest magnitude of each column of the weights.
    channels: int64 [K], what must share a scale (see `qcompile.edges`); None if no scale may move.
    strength: of smoothing, where the rule names none by number.
    ranges: of static inputs, found so far: they do not depend on the weights.
    """

    probe: Probe
    stats: Stats
    columns: Tensor
    rule: Rule
    channels: Tensor | None = None
    strength: float | None = None
    ranges: dict[tuple[Hashable, ...], QParams] = field(default_factory=dict)

    @cached_property
    def energy(self) -> Tensor:
        """What each channel carries of the outputs, float64 [K]; a scale cancels out, as the weight gets it back."""
        return self.stats.squares * self.probe.weight.double().square().sum(0).to(self.stats.squares.device)

    @cached_property
    def tied_columns(self) -> Tensor:
        """The largest magnitude of the columns that must share a scale, float32 [K]."""
        assert self.channels is not None
        return tied(self.columns, self.channels)

    @cached_property
    def halves(self) -> tuple[Probe, Probe] | None:
        """The sampled rows in two parts, to find something on one and try it on the other; None for a single row."""
        sample, weight = self.stats.sample, self.probe.weight
        half = min(ROWS, len(sample.rows) // 2)
        if half == 0:
            return None
        first, second = (
            replace(self.probe, rows=rows.to(weight.device), counts=counts.double().to(weight.device))
            for rows, counts in zip(sample.rows.split(half)[:2], sample.counts.split(half)[:2], strict=True)
        )
        return first, second

    @cached_property
    def extremes(self) -> tuple[Tensor, Tensor]:
        """Least and greatest of each channel in either half, float32 [2, K]."""
        assert self.halves is not None
        return torch.stack([half.low for half in self.halves]), torch.stack([half.high for half in self.halves])


@dataclass(frozen=True, kw_only=True, eq=False)
class Choice:
    """What the sites of a case get.

    input: spec.  weight: spec that a rescue brings, None for the rule's.
    scale: float32 [K] that the activation is divided by, or None; strength: that it came from, None for powers of two
    from a shift.  outliers: channels that stay in 16 bit, ascending.  shift: int64 [K], octaves by which
    channels are raised, and exponents of the weight lowered after its numbers were chosen, or None.
    clip: octaves by which a static range is wider than the observer finds it.
    snr_db: of the outputs, over all sites.
    """

    input: Spec | None
    weight: Spec | None = None
    scale: Tensor | None = None
    strength: float | None = None
    outliers: tuple[int, ...] = ()
    shift: Tensor | None = None
    clip: float = 0.0
    snr_db: float = 0.0


def probe_part(weight: Tensor, stats: Stats, *, whole: bool, features: Tensor | None = None) -> Probe:
    """A part of a site that is large enough to try choices on; whole: all rows of the weight, which share scales.

    features: float32 [N], see `Probe`.
    """
    step = 1 if whole else -(-len(weight) // FEATURES)
    # sampled rows stand in the order of their hashes, so that any first ones are a fair sample
    return Probe(
        weight=weight.detach()[::step].float(),
        rows=stats.sample.rows[:ROWS].to(weight.device),
        counts=stats.sample.counts[:ROWS].double().to(weight.device),
        features=None if features is None else features[::step].to(weight.device),
    )


def joined(probes: Sequence[Probe]) -> Probe:
    """One probe for sites with the same rows, in which each site's output counts the same.

    A weight is divided by its output's root mean square, which no scale of a channel or token sees. Where it is known
    what features cost, they tell by themselves what each site counts.
    """
    known = [probe.features for probe in probes if probe.features is not None]
    if len(known) == len(probes):
        return replace(_stacked(probes, [1.0] * len(probes)), features=torch.cat(known))
    loud = [probe for probe in probes if probe.signal > 0]
    if not loud:
        return replace(probes[0], features=None)
    return _stacked(loud, [(probe.signal / probe.counts.sum().item()) ** 0.5 for probe in loud])


def _stacked(probes: Sequence[Probe], divisors: Sequence[float]) -> Probe:
    """One probe with the weights one below the other, each divided."""
    numbers = [p.numbers / divisor for p, divisor in zip(probes, divisors, strict=True) if p.numbers is not None]
    return Probe(
        weight=torch.cat([p.weight / divisor for p, divisor in zip(probes, divisors, strict=True)]),
        rows=probes[0].rows,
        counts=probes[0].counts,
        numbers=torch.cat(numbers) if len(numbers) == len(probes) else None,
    )


def fold_method(choice: Choice, rule: Rule) -> str:
    """How the scale of a choice was found, for people."""
    if choice.strength is None:
        return "exponent shift"
    is_awq = rule.smooth is not None and rule.smooth.strength == AWQ
    return f"awq power={choice.strength:.2f}" if is_awq else f"smooth alpha={choice.strength:.2f}"
