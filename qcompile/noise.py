"""Noise: what quantization does to the output of one site, measured on rows that calibration kept.

The output is X @ W.T for rows X [R, K] of an activation, each standing for as many tokens as its count, and a weight W
[N, K]. Nothing of the model runs.
"""

from dataclasses import dataclass, field, replace
from functools import cached_property
from math import inf, log10

import torch
from torch import Tensor

from qcompile.numerics import QParams, dequantize, find_qparams, quantize, rounded, snr_db
from qcompile.observers import Stats
from qcompile.solvers import SOLVERS
from qcompile.spec import Spec

# beyond every float format, so that its code is the last one of a grid
BEYOND = 3e38
# output features that a measurement looks at: the error of a mean over so many is a few percent
FEATURES = 2048
# channels named one by one
LISTED = 8


@dataclass(frozen=True, kw_only=True)
class Treatment:
    """How a site is quantized: specs, None for float; a QParams as input is static.

    channels: those that bypass quantization, on both sides.  importance: float32 [K], of columns, for the solver.
    factor: float32 [K], powers of two that the input is multiplied by while it is quantized.
    raised: float32 [K], powers of two that columns of the weight are multiplied by while it is quantized.
    """

    weight: Spec | None = None
    input: Spec | QParams | None = None
    solver: str = "round"
    channels: tuple[int, ...] = ()
    importance: Tensor | None = field(default=None, compare=False)
    factor: Tensor | None = field(default=None, compare=False)
    raised: Tensor | None = field(default=None, compare=False)


@dataclass(frozen=True, kw_only=True)
class Noise:
    """Signal-to-noise ratios in dB of one site's output, and where the noise comes from.

    snr_db: of the site as it is quantized. weight_db, input_db: with only that side quantized, None if it is float.
    clipping: share of the input's noise that comes from values beyond the grid, the rest is rounding; their cross
        term is split evenly, so that a share may leave [0, 1] by a little.
    channels: of the input, those with the largest share of noise: (channel, share). The share is the energy of
        (quantized - x)[:, k] * W[:, k] over the sum of these energies; cross terms between channels are left out.
    crossed: the input's noise over that sum: 1 where the errors of channels are independent.
    """

    snr_db: float
    weight_db: float | None = None
    input_db: float | None = None
    clipping: float = 0.0
    channels: tuple[tuple[int, float], ...] = ()
    crossed: float = 1.0


@dataclass(frozen=True, kw_only=True, eq=False)
class Probe:
    """Rows and a weight to measure on.  weight: float32 [N, K].  rows: float32 [R, K].  counts: float64 [R].

    features: float32 [N], what squared errors of each output feature cost; None for all alike.
    numbers: float32 [N, K], the weight as it was quantized already, for treatments that leave it; None if it was not.
    """

    weight: Tensor
    rows: Tensor
    counts: Tensor
    features: Tensor | None = None
    numbers: Tensor | None = None
    # of the scale that was tried last: channels are held out and inputs found under one scale after the other
    _divided: list[tuple[Tensor, "Probe"]] = field(default_factory=list, init=False, repr=False)

    @cached_property
    def output(self) -> Tensor:
        return self.rows @ self.weight.T  # [R, N]

    @cached_property
    def signal(self) -> float:
        return self.energy(self.output)

    @cached_property
    def low(self) -> Tensor:
        return self.rows.amin(0)  # [K]

    @cached_property
    def high(self) -> Tensor:
        return self.rows.amax(0)  # [K]

    def energy(self, x: Tensor) -> float:
        """Sum of squares over tokens and features.  x: [R, N]."""
        return float((self.squares(x) * self.counts).sum())

    def squares(self, x: Tensor) -> Tensor:
        """Their sum over features, of each row; float64 [R].  x: [R, N]."""
        each = x.double().square()
        return each.sum(1) if self.features is None else each @ self.features.double()

    def snr_db(self, noise: float) -> float:
        """inf without noise, -inf without signal."""
        if noise == 0:
            return inf
        return 10 * log10(self.signal / noise) if self.signal > 0 else -inf

    def scaled(self, scale: Tensor) -> "Probe":
        """The same outputs from rows / scale and columns of the weight * scale.  scale: float32 [K], on any device."""
        if self._divided and self._divided[0][0] is scale:
            return self._divided[0][1]
        made = self._scaled(scale.to(self.weight.device))
        self._divided[:] = [(scale, made)]
        return made

    def _scaled(self, scale: Tensor) -> "Probe":
        numbers = None if self.numbers is None else self.numbers * scale
        made = replace(self, weight=self.weight * scale, rows=self.rows / scale, numbers=numbers)
        # not computed again for each scale that is tried
        made.__dict__.update(output=self.output, signal=self.signal)
        return made

    def after(self, treatment: Treatment) -> float:
        """Signal-to-noise ratio in dB of the output, both sides quantized as the treatment says."""
        kept = list(treatment.channels)
        known = self.numbers if treatment.weight is None and self.numbers is not None else self.weight
        rows, weight = _without(self.rows, kept), _without(known, kept)
        output = _input(rows, treatment) @ treated(weight, treatment).T
        if kept:
            output += self.rows[:, kept] @ self.weight[:, kept].T
        return self.snr_db(self.energy(output.sub_(self.output)))


def probe(weight: Tensor, stats: Stats, *, whole: bool = False) -> Probe:
    """What to measure a site on: the rows of its stats, and at most FEATURES rows of its weight, evenly spread.

    weight: floating [N, K].  whole: all rows of the weight, where they share scales.
    """
    step = 1 if whole else -(-weight.shape[0] // FEATURES)
    sample = stats.sample
    return Probe(
        weight=weight.detach()[::step].float(),
        rows=sample.rows.float().to(weight.device),
        counts=sample.counts.double().to(weight.device),
    )


def own_db(weight: Tensor, treatment: Treatment) -> float:
    """Signal-to-noise ratio in dB of a weight [N, K] itself, quantized as the treatment says."""
    return snr_db(weight, treated(weight, treatment))


def shares_rows(spec: Spec | None) -> bool:
    """Whether one scale of a weight serves several output features."""
    return spec is not None and spec.granularity.rows != 1


def measure_noise(probe: Probe, treatment: Treatment) -> Noise:
    """The noise of a site's output.  Raises SpecError if the specs do not fit the shapes."""
    kept = list(treatment.channels)
    rows, weight = _without(probe.rows, kept), _without(probe.weight, kept)
    snr_db = probe.after(treatment)
    weight_db = None
    if treatment.weight is not None:
        weight_db = probe.snr_db(probe.energy(rows @ (treated(weight, treatment) - weight).T))
    if treatment.input is None:
        return Noise(snr_db=snr_db, weight_db=weight_db)
    qparams = _qparams(rows, treatment.input)
    quantized = rounded(rows, qparams)
    error = quantized - rows
    noise = error @ weight.T
    energy = probe.energy(noise)
    clipped = (rows.clamp(_extreme(rows, qparams, -BEYOND), _extreme(rows, qparams, BEYOND)) - rows) @ weight.T
    along = float(((clipped.double() * noise.double()).sum(1) * probe.counts).sum())
    own = (error.double().square() * probe.counts[:, None]).sum(0) * weight.double().square().sum(0)  # [K]
    total = float(own.sum())
    top = own.topk(min(LISTED, own.numel()))
    return Noise(
        snr_db=snr_db,
        weight_db=weight_db,
        input_db=probe.snr_db(energy),
        clipping=along / energy if energy > 0 else 0.0,
        channels=tuple((int(k), float(e) / total) for e, k in zip(*top, strict=True)) if total > 0 else (),
        crossed=energy / total if total > 0 else 1.0,
    )


def _without(x: Tensor, channels: list[int]) -> Tensor:
    """x with these columns zero."""
    return x.index_fill(1, torch.tensor(channels, device=x.device), 0.0) if channels else x


def treated(weight: Tensor, treatment: Treatment) -> Tensor:
    """A weight [N, K] as the treatment leaves it, float32."""
    if treatment.weight is None:
        return weight
    factor, importance = treatment.raised, treatment.importance
    taken = weight if factor is None else weight * factor
    # an error in a column that is lowered afterwards costs as much less
    importance = importance if factor is None or importance is None else importance / factor.square()
    qparams = SOLVERS[treatment.solver](taken, treatment.weight, importance)
    quantized = rounded(taken, qparams)
    return quantized if factor is None else quantized / factor


def _input(rows: Tensor, treatment: Treatment) -> Tensor:
    if treatment.input is None:
        return rows
    taken = rows if treatment.factor is None else rows * treatment.factor
    qparams = _qparams(taken, treatment.input)
    quantized = rounded(taken, qparams)
    return quantized if treatment.factor is None else quantized / treatment.factor


def _qparams(rows: Tensor, how: Spec | QParams) -> QParams:
    return how if isinstance(how, QParams) else find_qparams(rows, how)


def _extreme(rows: Tensor, qparams: QParams, value: float) -> Tensor:
    """The number farthest from zero that each element could become, [R, K]."""
    return dequantize(quantize(torch.full_like(rows, value), qparams), qparams)
