"""Choices that data makes for sites that read one activation: scale, channels in 16 bit, and the spec of the input.

All are tried on the rows that calibration kept; what gives the outputs the least error is taken.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from math import inf, isnan, log10
from typing import Any, TypeGuard

import torch
from torch import Tensor

from qcompile.cases import Case, Choice
from qcompile.channels import tied
from qcompile.formats import FORMATS, Float, Format, Integer, parse_format
from qcompile.noise import BEYOND, Probe, Treatment
from qcompile.numerics import QParams, dequantize, exact_exp2, qparams_of_range, quantize, widened
from qcompile.observers import Stats, importance_of
from qcompile.ranges import parse_observer
from qcompile.recipe import FLOAT, Rule
from qcompile.shifts import COARSE, FINE, floor_shift, lowers_columns, scales_alone, shift_of
from qcompile.smooth import AWQ, awq_scale, smooth_scale
from qcompile.solvers import IN_TURN
from qcompile.spec import ALL, Spec

# first every third of these, the second being first, then both neighbours of the best
STRENGTHS = tuple(i / 20 for i in range(6, 21))
# of AWQ, likewise, from 0, which moves nothing; source: the paper's code
POWERS = tuple(i / 20 for i in range(21))
# dB of a site's output below which a static input is rescued (noise of 2 % of the signal's amplitude), if that gains
# so much: rows that were not seen fare worse under a scale found beforehand
RESCUE_DB, RESCUE_GAIN = 34.0, 3.0
# noise over signal of which a split must rid the outputs, as it costs a thin matmul and a sum: noise adds up behind
# the sites, and where there is little, even a decibel of it is not worth that
LEAST_RID = 6e-5
# dB that a split and that smoothing must gain: less is within what other rows would show
LEAST_GAIN, LEAST_SMOOTHING = 0.3, 0.5
# that a shift must gain, which under inputs of 8 bits costs a little time
LEAST_SHIFT = 0.05
# bits of exponent that are tried, as in LLM-FP4's code: more reach further than any tensor does
MOST_EXPONENT = 5
# octaves by which a static range may be wider than the observer finds it, if that gains as much as a split must; no
# more, as rows that reach far are rare among those that are sampled
CLIPS = tuple(i / 4 for i in range(-4, 5) if i)


def choose(case: Case) -> Choice:
    """The choice of least error; where a static input stays poor, that under the rule's `rescue` if it gains."""
    if case.rule.format == FLOAT and case.rule.input is not None:
        return max((_best(case, spec) for spec in rivals(case.rule.input)), key=lambda choice: choice.snr_db)
    best = _best(case, case.rule.input)
    rule = case.rule.rescued
    if rule is None or best.snr_db >= RESCUE_DB:
        return best
    # its weight may be of another kind, too, whose errors count
    rescued = replace(_best(replace(case, rule=rule), rule.input), weight=rule.weight)
    return rescued if rescued.snr_db > best.snr_db + RESCUE_GAIN else best


def rivals(spec: Spec) -> Iterator[Spec]:
    """The spec, and those of other floats of as many bits: one of each split into exponent and mantissa."""
    yield spec
    if isinstance(spec.format, Float):
        bits, own = spec.format.bits, spec.format.exponent
        for exponent in range(1, min(bits - 1, MOST_EXPONENT) + 1):
            if exponent != own:
                yield replace(spec, format=_split_format(exponent, bits - 1 - exponent))


def _split_format(exponent: int, mantissa: int) -> Format:
    """The float of so many bits that has a name, which memory or units may be made for, else the free one."""
    named = (f for f in FORMATS.values() if isinstance(f, Float) and not f.negative_zero_is_nan)
    alike = (f for f in named if (f.exponent, f.mantissa) == (exponent, mantissa))
    return next(alike, None) or parse_format(f"e{exponent}m{mantissa}")


def prepared_stats(stats: Stats, choice: Choice) -> Stats:
    """The stats of what is quantized after the choice: divided by the scale, without the channels in 16 bit."""
    stats = stats if choice.scale is None else stats.divided(choice.scale)
    stats = stats if choice.shift is None else stats.divided(exact_exp2(-choice.shift))
    return stats.without(_indices(choice.outliers, stats)) if choice.outliers else stats


def _best(case: Case, spec: Spec | None) -> Choice:
    """The choice under one input spec."""
    if _goes_by_octaves(spec, case.rule):
        return _clipped_best(case, _shifted(case, spec, case.rule.shift))
    plain = _split(case, Choice(input=spec))
    if case.rule.smooth is None or case.channels is None:
        return plain
    strength = case.rule.smooth.strength if case.strength is None else case.strength
    if strength == AWQ:
        return _weighted(case, spec)
    if not isinstance(strength, str):
        return _split(case, _smoothed(case, spec, strength))
    coarse = _least_noisy(case, [_rough(case, spec, s) for s in STRENGTHS[1::3]])
    assert coarse.strength is not None
    middle = STRENGTHS.index(coarse.strength)
    fine = _least_noisy(case, [_rough(case, spec, STRENGTHS[i]) for i in (middle - 1, middle + 1)])
    found = max(coarse, fine, key=lambda choice: choice.snr_db)
    best = _split(case, replace(found, outliers=()))
    return best if best.snr_db > plain.snr_db + LEAST_SMOOTHING else plain


def _weighted(case: Case, spec: Spec | None) -> Choice:
    """The scale of AWQ with the power of least noise; nothing moves where none is better than that."""

    def powers(numbers: Iterable[int]) -> Choice:
        return _least_noisy(case, [_of_power(case, spec, POWERS[i]) for i in numbers if 0 <= i < len(POWERS)])

    coarse = powers(range(0, len(POWERS), 4))
    middle = POWERS.index(coarse.strength or 0.0)
    fine = powers((middle - 2, middle - 1, middle + 1, middle + 2))
    return _split(case, max(coarse, fine, key=lambda choice: choice.snr_db))


def _of_power(case: Case, spec: Spec | None, power: float) -> Choice:
    if power == 0:
        return Choice(input=spec)
    assert case.rule.smooth is not None
    assert case.channels is not None
    rows, counts = case.stats.sample.rows.abs(), case.stats.sample.counts
    mean = (rows * counts[:, None]).sum(0) / counts.sum()
    scale = awq_scale(tied(mean, case.channels), power, powers_of_two=case.rule.smooth.powers_of_two)
    return Choice(input=spec, scale=scale, strength=power)


def _goes_by_octaves(spec: Spec | None, rule: Rule) -> TypeGuard[Spec]:
    """Whether channels are shifted, not smoothed, and the range that the observer finds is clipped or widened."""
    return spec is not None and (rule.shift is not None or rule.format == FLOAT)


def _shifted(case: Case, spec: Spec, most: int | None) -> Choice:
    """The shift of least noise, or none."""
    plain = _least_noisy(case, [Choice(input=spec)])
    alone = scales_alone(case.rule.weight)
    if most is None or (not alone and case.channels is None):
        return plain

    def raised(shift: Tensor) -> Choice:
        if not bool(shift.any()):
            return plain
        return replace(plain, shift=shift) if alone else replace(plain, scale=exact_exp2(-shift))

    shifts = partial(shift_of, case.stats.amax, case.channels, most)
    coarse = {left_out: raised(shifts(left_out)) for left_out in COARSE}
    best = _least_noisy(case, list(coarse.values()))
    middle = next(o for o, tried in coarse.items() if tried.shift is best.shift and tried.scale is best.scale)
    whole = raised(floor_shift(case.stats.amax, case.channels, most))
    others = _least_noisy(case, [*(raised(shifts(middle + step)) for step in FINE), whole])
    found = max(best, others, key=lambda choice: choice.snr_db)
    return found if found.snr_db > plain.snr_db + LEAST_SHIFT else plain


def _clipped_best(case: Case, choice: Choice) -> Choice:
    """The choice, its static range clipped or widened where the outputs gain by that.

    The observer's range is that of least error of the input's own numbers.
    """
    if not CLIPS or not _is_static(choice.input) or choice.input.scale != "fp32":
        return choice
    best = _least_noisy(case, [replace(choice, clip=clip) for clip in CLIPS])
    return best if best.snr_db > choice.snr_db + LEAST_GAIN else choice


def input_of(case: Case, choice: Choice) -> dict[str, Any]:
    """What a treatment says of the input of a choice; a static range is found once."""
    spec = choice.input
    factor = None if choice.shift is None else exact_exp2(choice.shift).to(case.probe.rows.device)
    if not _is_static(spec):
        return {"input": spec, "factor": factor}
    key = (spec, *(None if part is None else tuple(part.tolist()) for part in (choice.scale, choice.shift)))
    if key not in case.ranges:
        case.ranges[key] = parse_observer(case.rule.observer)(prepared_stats(case.stats, choice), spec)
    return {"input": widened(case.ranges[key], choice.clip), "factor": factor}


def _rough(case: Case, spec: Spec | None, strength: float) -> Choice:
    """Smoothed, with the channels in 16 bit that come first to mind: enough to compare strengths."""
    choice = _smoothed(case, spec, strength)
    return choice if case.rule.split is None else replace(choice, outliers=next(_candidates(case, choice), ()))


def _smoothed(case: Case, spec: Spec | None, strength: float) -> Choice:
    return Choice(input=spec, scale=_scale(case, case.stats.amax, strength), strength=strength)


def _scale(case: Case, amax: Tensor, strength: float) -> Tensor:
    """What an activation of these largest magnitudes, float32 [..., K], is divided by."""
    assert case.rule.smooth is not None
    assert case.channels is not None
    # the least scale that all channels from one row can share: by the largest of each side
    columns = case.tied_columns.to(amax.device)
    return smooth_scale(tied(amax, case.channels), columns, strength, powers_of_two=case.rule.smooth.powers_of_two)


def _split(case: Case, choice: Choice) -> Choice:
    """The choice with the channels that are worth 16 bit, and its signal-to-noise ratio."""
    whole = _least_noisy(case, [choice])
    split = [] if case.rule.split is None else [replace(choice, outliers=o) for o in _candidates(case, choice)]
    if not split:
        return whole
    best = _least_noisy(case, split)
    gains = best.snr_db > whole.snr_db + LEAST_GAIN and _noise(whole) > _noise(best) + LEAST_RID
    return best if gains else whole


def _noise(choice: Choice) -> float:
    """Over signal, of the outputs."""
    return 10 ** (-choice.snr_db / 10)


def _candidates(case: Case, choice: Choice) -> Iterator[tuple[int, ...]]:
    """As many channels as the rule allows: the largest, or for floats those that carry the most of the output.

    An integer's step grows with the largest channel; a float's error follows each number's own magnitude.
    """
    assert case.rule.split is not None
    amax = case.stats.amax if choice.scale is None else case.stats.amax / choice.scale
    count = max(1, int(case.rule.split * len(amax)))
    if count >= len(amax):
        return
    spec = choice.input or case.rule.weight
    is_integer = spec is not None and isinstance(spec.format, Integer)
    metrics = [amax.double(), case.energy] if is_integer else [case.energy]
    for metric in metrics:
        yield tuple(sorted(metric.topk(count).indices.tolist()))


def _least_noisy(case: Case, choices: Sequence[Choice]) -> Choice:
    """The choice of least noise, of equals the first, with its signal-to-noise ratio."""
    # one that stands there several times is measured once
    measured = {choice: _inside(case, choice) for choice in dict.fromkeys(choices)}
    inside = [measured[choice] for choice in choices]
    best, least = -1, inf
    for i in sorted(range(len(choices)), key=inside.__getitem__):
        # clipping only adds noise: those behind it are no better
        if best >= 0 and inside[i] > least:
            break
        noise = inside[i] + _beyond(case, choices[i])
        if best < 0 or (noise, i) < (least, best):
            best, least = i, noise
    return replace(choices[best], snr_db=-10 * log10(least) if least > 0 else inf)


def _inside(case: Case, choice: Choice) -> float:
    """Noise over signal of the outputs for the rows that calibration saw."""
    probe = case.probe if choice.scale is None else case.probe.scaled(choice.scale)
    treatment = _by_octaves(case, choice) if _goes_by_octaves(choice.input, case.rule) else _by_range(case, choice)
    snr_db = probe.after(treatment)
    # what is no number is no good
    return inf if isnan(snr_db) else 10 ** (-snr_db / 10)


def _by_octaves(case: Case, choice: Choice) -> Treatment:
    """How the sites are quantized by octaves; a static range is found as it will be in the end."""
    rule, device = case.rule, case.probe.weight.device
    # what is lowered after its numbers were chosen has the same noise under every shift
    after = lowers_columns(rule.weight)
    stats = case.stats if choice.scale is None else case.stats.divided(choice.scale)
    return Treatment(
        weight=None if after else rule.weight,
        solver=rule.solver,
        importance=stats.importance.to(device) if rule.weighs_columns and not after else None,
        raised=None if after or choice.shift is None else exact_exp2(-choice.shift).to(device),
        **input_of(case, choice),
    )


def _by_range(case: Case, choice: Choice) -> Treatment:
    """How the sites are quantized; a static input has its whole range, which is found at once and serves."""
    in_turn = case.rule.solver in IN_TURN
    return Treatment(
        weight=case.rule.weight,
        input=_whole_range(case, choice, choice.input) if _is_static(choice.input) else choice.input,
        # those that are run in turn begin with its scales
        solver="imatrix" if in_turn else case.rule.solver,
        channels=tuple(choice.outliers),
        importance=_importance(case, choice) if in_turn or case.rule.weighs_columns else None,
    )


def _is_static(spec: Spec | None) -> TypeGuard[Spec]:
    return spec is not None and spec.granularity.rows == ALL


def _importance(case: Case, choice: Choice) -> Tensor:
    """Of the channels that are left after scale and split, as `prepared_stats` would give it, and sooner."""
    stats = case.stats
    squares = stats.squares if choice.scale is None else stats.squares / choice.scale.double().square()
    return importance_of(squares.index_fill(0, _indices(choice.outliers, stats), 0.0), stats.count)


def _beyond(case: Case, choice: Choice) -> float:
    """Noise over signal that a static range will add when it clips rows that calibration did not see.

    The sampled rows are new to each other: scale and range are found on half of them, and what they clip of the other
    half, beyond what they clip of their own, is that noise. The more rows were seen, the more rarely one reaches
    further: as often as 1 / count.
    """
    spec = choice.input
    if case.halves is None or not _is_static(spec):
        return 0.0
    one, other = case.halves
    least, most = _range_of_halves(case, choice, spec)
    noise = _clipped(other, least[0], most[0]) + _clipped(one, least[1], most[1])
    if noise > 0:
        noise -= _clipped(one, least[0], most[0]) + _clipped(other, least[1], most[1])
    return max(noise, 0.0) / 2 * float(one.counts.sum()) / case.stats.count


def _range_of_halves(case: Case, choice: Choice, spec: Spec) -> tuple[Tensor, Tensor]:
    """The ends, float32 [2, K], between which numbers are not clipped by scale and range of each half of the rows."""
    low, high = case.extremes
    scale = _scale_of_halves(case, choice, torch.maximum(-low, high))
    outliers = _indices(choice.outliers, case.stats).to(low.device)
    low = (low / scale).index_fill(1, outliers, 0.0).amin(1, keepdim=True).clamp(max=0.0)
    high = (high / scale).index_fill(1, outliers, 0.0).amax(1, keepdim=True).clamp(min=0.0)
    if spec.symmetric:
        low, high = torch.minimum(low, -high), torch.maximum(high, -low)
    if _goes_by_octaves(spec, case.rule):
        # a range of least error hardly depends on what reaches furthest: half of the rows have it, too, or reach less
        first, last = _ends(input_of(case, replace(choice, clip=0.0))["input"])
        low, high = low.clamp(min=first) * 2.0**choice.clip, high.clamp(max=last) * 2.0**choice.clip
    # what the scale takes from a row it gives to the weight: both are left as they are
    return (low * scale).index_fill(1, outliers, -inf), (high * scale).index_fill(1, outliers, inf)


def _scale_of_halves(case: Case, choice: Choice, amax: Tensor) -> Tensor:
    """What each half of the rows would have the activation divided by, float32 [2, K].  amax: [2, K], of the halves."""
    scale = choice.scale if choice.shift is None else exact_exp2(-choice.shift)
    if scale is None:
        return torch.ones_like(amax)
    if choice.strength is not None:
        return _scale(case, amax, choice.strength)
    scale, reach = scale.to(amax.device), case.stats.amax.to(amax.device)
    if case.channels is not None:
        amax, reach = tied(amax, case.channels), tied(reach, case.channels)
    # a channel that is raised until it reaches the end would be raised further where it reaches less; but not one that
    # reaches it anyway, or is raised by as much as the rule allows
    follows = (scale < 1) & (scale > 2.0 ** -(case.rule.shift or 0)) & (amax > 0)
    return torch.where(follows, scale * (amax / reach), scale)


def _ends(qparams: QParams) -> tuple[float, float]:
    """The least and the greatest number of a grid with one scale."""
    codes = quantize(torch.tensor([-BEYOND, BEYOND], device=qparams.scale.device), qparams)
    first, last = dequantize(codes, qparams).tolist()
    return first, last


def _clipped(new: Probe, least: Tensor, most: Tensor) -> float:
    """Noise over signal in the outputs of these rows if they are clipped.  least, most: float32 [K]."""
    reaching = ((new.low < least) | (new.high > most)).nonzero().flatten()
    if new.signal == 0 or len(reaching) == 0:
        return 0.0
    # mostly few channels reach further, in few rows
    rows = new.rows.index_select(1, reaching)
    error = rows.clamp(least[reaching], most[reaching]) - rows
    hit = error.any(1).nonzero().flatten()
    noise = new.squares(error[hit] @ new.weight.index_select(1, reaching).T)
    return float((noise * new.counts[hit]).sum()) / new.signal


def _whole_range(case: Case, choice: Choice, spec: Spec) -> QParams:
    low, high = case.stats.low, case.stats.high
    if choice.scale is not None:
        low, high = low / choice.scale, high / choice.scale
    outliers = _indices(choice.outliers, case.stats)
    return qparams_of_range(low.index_fill(0, outliers, 0.0).amin(), high.index_fill(0, outliers, 0.0).amax(), spec)


def _indices(channels: tuple[int, ...], stats: Stats) -> Tensor:
    return torch.tensor(channels, dtype=torch.int64, device=stats.low.device)
