"""The best format for each site: what `format = "auto"` of a rule does, and "float" where no shift goes with it.

Formats of equally many bits that memory or tensor cores are made for compete. With data, the output of the site
decides, both sides quantized, on rows that calibration kept; without, the error of the weight alone.
For "float", floats of equally many bits do; those of linears are found with folds and shifts (`qcompile.choose`).
"""

from collections.abc import Iterator
from dataclasses import replace

import torch

from qcompile.choose import rivals
from qcompile.errors import WeightError
from qcompile.formats import CodeBook, parse_format
from qcompile.graph import Op
from qcompile.noise import FEATURES, Treatment, own_db, probe, shares_rows
from qcompile.numerics import dequantize, quantize, snr_db
from qcompile.observers import Stats
from qcompile.ranges import parse_observer
from qcompile.recipe import FLOAT, Rule
from qcompile.sites import Site
from qcompile.spec import Spec, with_format

# by bits. Floats that only a study knows (e2m5, e3m4) are left out: nothing multiplies them
RIVALS: dict[int, tuple[str, ...]] = {
    4: ("int4", "fp4_e2m1", "nf4"),
    6: ("int6", "fp6_e2m3", "fp6_e3m2"),
    8: ("int8", "fp8_e4m3"),
}


def best_rule(rule: Rule, site: Site, stats: Stats | None) -> Rule:
    """The rule with the formats of its specs that suit this site best; a rule that leaves no choice, as it is.

    stats: of the site's input, None if there are none. Of equals, what the rule says.
    Raises WeightError if the weight has no values to look at.
    """
    found_with_shift = rule.format == FLOAT and site.op is Op.LINEAR
    if rule.format is None or rule.weight is None or found_with_shift:
        return rule
    if site.weight.is_meta:
        raise WeightError(
            f"the best format for {site.name!r} is found from its values, and its weight is on the meta device: "
            "calibrate the model that has them, or write the format"
        )
    if rule.format == FLOAT:
        return _of_floats(rule, rule.weight, site, stats)
    stats = stats if site.op is Op.LINEAR else None
    if rule.weighs_columns and stats is None:
        # the plan refuses it and names the remedy
        return rule
    return max(_candidates(rule, rule.weight), key=lambda candidate: _snr_db(candidate, site, stats))


def _candidates(rule: Rule, weight: Spec) -> Iterator[Rule]:
    yield rule
    for name in RIVALS[weight.format.bits]:
        fmt = parse_format(name)
        if name == weight.format.name or (isinstance(fmt, CodeBook) and rule.input is not None):
            continue
        yield replace(
            rule, weight=with_format(weight, fmt), input=None if rule.input is None else with_format(rule.input, fmt)
        )


def _of_floats(rule: Rule, weight: Spec, site: Site, stats: Stats | None) -> Rule:
    """The rule with the floats that lose least of the weight and of the input, each by its own error.

    An embedding gives rows of its weight: the weight's error is that of the output.
    """
    best = max(rivals(weight), key=lambda spec: _weight_db(site, spec, rule.solver))
    if rule.input is None or stats is None or site.op is not Op.CONV:
        return replace(rule, weight=best)
    given = max(rivals(rule.input), key=lambda spec: _input_db(rule, spec, stats))
    return replace(rule, weight=best, input=given)


def _snr_db(rule: Rule, site: Site, stats: Stats | None) -> float:
    """Signal to noise of the site's output, or of its weight."""
    assert rule.weight is not None
    if stats is None:
        return _weight_db(site, rule.weight, rule.solver)
    given = rule.input
    treatment = Treatment(
        weight=rule.weight,
        input=parse_observer(rule.observer)(stats, given) if given is not None and rule.static_input else given,
        solver=rule.solver,
        importance=stats.importance.to(site.weight.device) if rule.weighs_columns else None,
    )
    with torch.no_grad():
        return probe(site.weight, stats, whole=shares_rows(rule.weight)).after(treatment)


def _weight_db(site: Site, spec: Spec, solver: str) -> float:
    """Signal to noise of a part of the weight."""
    step = 1 if shares_rows(spec) else -(-len(site.weight) // FEATURES)
    return own_db(site.weight.detach()[::step].float(), Treatment(weight=spec, solver=solver))


def _input_db(rule: Rule, spec: Spec, stats: Stats) -> float:
    """Signal to noise of the sampled rows of a static input."""
    rows = stats.sample.rows.float()
    qparams = parse_observer(rule.observer)(stats, spec)
    return snr_db(rows, dequantize(quantize(rows, qparams), qparams))
