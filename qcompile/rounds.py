"""What sites that read one activation get, by turns: the input given the weights as quantized, and these given it.

Source: LLM-FP4 (Liu 2023), algorithm 1, which alternates for three rounds.
"""

import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qcompile.cases import Case, Choice, joined
from qcompile.choose import LEAST_GAIN, choose, input_of, rivals
from qcompile.noise import Probe, Treatment, treated
from qcompile.numerics import exact_exp2, snr_db
from qcompile.recipe import FLOAT, WEIGHT
from qcompile.shifts import lowers_columns, most_lowered, raised_columns, within
from qcompile.spec import Spec

# in a single one, the input is chosen for the weights in float, and these for the input in float; row "fp4, three
# rounds" of `examples/benchmarks/fp4.py` says what more would gain
ROUNDS = 1


@dataclass(frozen=True, kw_only=True, eq=False)
class Weighed:
    """What the weight of a site gets.

    lowered: int64 [K], octaves by which exponents of columns are lowered after the weight's numbers were chosen: by the
    shift of the input, or for a rule with one, to where the weight fits its grid better; None if by none.
    numbers: float32 [N, K], what becomes of the weight of the site's probe.
    """

    spec: Spec
    lowered: Tensor | None
    numbers: Tensor


# what a weight may get, with the dB that it must gain
_Options = list[tuple[Weighed, float]]


def settle(case: Case, probes: Sequence[Probe]) -> tuple[Choice, tuple[Weighed, ...]]:
    """The choice for the activation, and what each site's weight gets; none for a rule that leaves weights no choice.

    probes: of each site; that of the case joins them.  The rounds end early when one changes nothing.
    """
    choice = choose(case)
    if case.rule.format != FLOAT and case.rule.shift is None:
        return choice, ()
    # a scale is chosen with the weights that it multiplies
    alternates = ROUNDS > 1 and lowers_columns(case.rule.weight) and case.rule.input is not None
    # by shift: what a weight may get does not depend on the rest of the choice
    known: dict[tuple[int, ...], list[_Options]] = {}

    def weighed_for(choice: Choice) -> tuple[Weighed, ...]:
        shift = () if choice.shift is None else tuple(choice.shift.tolist())
        if shift not in known:
            known[shift] = [_options(case, probe, choice) for probe in probes]
        given = Treatment(**input_of(case, choice)) if alternates else Treatment()
        return tuple(_best(case, *pair, choice, given) for pair in zip(probes, known[shift], strict=True))

    weighed = weighed_for(choice)
    for _ in range(ROUNDS - 1 if alternates else 0):
        quantized = [replace(probe, numbers=one.numbers) for probe, one in zip(probes, weighed, strict=True)]
        choice_again = choose(replace(case, probe=joined(quantized)))
        weighed_again = weighed_for(choice_again)
        stays = _same(choice, choice_again) and all(map(operator.is_, weighed, weighed_again))
        choice, weighed = choice_again, weighed_again
        if stays:
            break
    return choice, weighed


def choose_weight(case: Case, probe: Probe, choice: Choice) -> Weighed:
    """What is best by the rule's objective: the rule's spec or that of another float, and how columns are lowered.

    probe: of the site.  choice: of its input, which stays in float here.  The other floats are tried for
    `format = "float"`.
    """
    return _best(case, probe, _options(case, probe, choice), choice, Treatment())


def _best(case: Case, probe: Probe, options: _Options, choice: Choice, given: Treatment) -> Weighed:
    probe = _divided(probe, choice)

    def gain(option: tuple[Weighed, float]) -> float:
        weighed, handicap = option
        if case.rule.objective == WEIGHT:
            return snr_db(probe.weight, weighed.numbers) - handicap
        return replace(probe, numbers=weighed.numbers).after(given) - handicap

    return max(options, key=gain)[0]


def _options(case: Case, probe: Probe, choice: Choice) -> _Options:
    rule, stats = case.rule, case.stats if choice.scale is None else case.stats.divided(choice.scale)
    probe = _divided(probe, choice)
    assert rule.weight is not None
    weighs = rule.weighs_columns and rule.objective != WEIGHT
    importance = stats.importance.to(probe.weight.device) if weighs else None
    shift = torch.zeros(probe.weight.shape[1], dtype=torch.int64) if choice.shift is None else choice.shift.cpu()
    found: _Options = []
    for spec in rivals(rule.weight) if rule.format == FLOAT else [rule.weight]:
        # what the weight cannot follow of the shift, it is multiplied by before its numbers are chosen
        most = most_lowered(spec, rule.shift or 0)
        tried = [(shift.clamp(max=most), 0.0)]
        if most > 0:
            octaves = raised_columns(probe.weight, spec, importance).cpu()
            tried.append((within(shift + octaves, most), LEAST_GAIN))
        for lowered, handicap in tried:
            factor = exact_exp2(lowered - shift).to(probe.weight.device)
            treatment = Treatment(weight=spec, solver=rule.solver, importance=importance, raised=factor)
            numbers = treated(probe.weight, treatment)
            columns = lowered if bool(lowered.any()) else None
            found.append((Weighed(spec=spec, lowered=columns, numbers=numbers), handicap))
    return found


def _divided(probe: Probe, choice: Choice) -> Probe:
    return probe if choice.scale is None else probe.scaled(choice.scale)


def _same(one: Choice, other: Choice) -> bool:
    shifts = [torch.zeros(1) if choice.shift is None else choice.shift for choice in (one, other)]
    return (one.input, one.clip) == (other.input, other.clip) and bool((shifts[0] == shifts[1]).all())
