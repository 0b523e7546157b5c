"""Mixed bits: each linear gets the format and the groups that a budget for all of them is best spent on.

What a site's output loses to each spec is measured on rows that calibration kept, and how much that moves the model's
outputs once a site, with its weight alone quantized. Errors of sites add up, as if they were independent.
Source: EXL2 of ExLlamaV2, which measures so and anneals; here by Lagrange's method (`qcompile.budget`).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from glob import escape

import torch
from torch import Tensor

from qcompile.budget import BITS, Budget, Option, least_cost, least_error
from qcompile.cases import probe_part
from qcompile.errors import CalibrationError, RecipeError
from qcompile.formats import parse_format
from qcompile.noise import Treatment
from qcompile.numerics import fake_quantize
from qcompile.observers import Stats
from qcompile.recipe import Recipe, Rule
from qcompile.sites import Site
from qcompile.sizes import stored_bytes
from qcompile.solvers import IN_TURN
from qcompile.spec import Spec, Zero, by_channel, parse_granularity, parse_spec, with_format

WIDTHS = (2, 3, 4, 5, 6, 8)
GROUPS = (32, 64, 128)
# beside integers, for weights on a GPU under float inputs: they err less there than 4 bits of integers, at up to 1.5
# times the time; the CPU and onnxruntime have no kernel for them
BOOKS = ("nf4",)
# and with scales of their own, for as many columns as share one: IQ4_XS of GGML
BLOCKS = {parse_spec("iq4_nl/b32/i6x8"): 256}
# a solver that fits scales, and so none that are integers under one of many groups
FITS_SCALES = "hqq"
# what stands in for a solver that takes the running model
STAND_IN = "mse"


@dataclass(frozen=True, kw_only=True)
class Mix:
    """A recipe without budgets, and a note for each that was spent."""

    recipe: Recipe
    notes: tuple[str, ...] = ()


# how far the model's outputs move when the site of that name reads this weight
Moved = Callable[[str, Tensor], float]


def spend(recipe: Recipe, sites: Sequence[Site], stats: Mapping[str, Stats], moved: Moved) -> Mix:
    """The recipe with, for each rule that has a budget, rules that name the sites of each spec.

    sites, stats: of the model; the stats by site name, of inputs.  Raises RecipeError for a budget that no choice
    meets, and CalibrationError for a site that no data reached.
    """
    rules: list[Rule] = []
    notes = []
    for number, rule in enumerate(recipe.rules, start=1):
        if rule.budget is None:
            rules.append(rule)
            continue
        mine = {s.name: s for s in sites if next((r for r in recipe.rules if r.matches(s)), None) is rule}
        where = f"rule {number} ({rule.match!r}) of recipe {recipe.name!r}"
        if not mine and rule.optional:
            rules.append(replace(rule, budget=None))
            continue
        chosen, note = _chosen(rule, rule.budget, list(mine.values()), stats, moved, where)
        plain = replace(rule, budget=None)
        for spec in dict.fromkeys(chosen.values()):
            names = "|".join(escape(name) for name, its in chosen.items() if its == spec)
            rules.append(replace(plain, match=names, weight=spec))
        # decides nothing, unless the plan is for a model with more sites
        rules.append(replace(plain, optional=True))
        notes.append(f"{where}: {note}")
    return Mix(recipe=replace(recipe, rules=tuple(rules)), notes=tuple(notes))


def _chosen(
    rule: Rule, budget: Budget, sites: Sequence[Site], stats: Mapping[str, Stats], moved: Moved, where: str
) -> tuple[dict[str, Spec], str]:
    """A spec for each site by name, and what that comes to."""
    if not sites:
        raise RecipeError(f"{where} matches no site of this model: correct the glob")
    specs = [list(_specs(rule, site)) for site in sites]
    slots = [_options(rule, site, each, stats, moved, where) for site, each in zip(sites, specs, strict=True)]
    count = sum(site.weight.numel() for site in sites)
    if budget.unit == BITS:
        taken = least_error(slots, budget.amount * count)
    else:
        taken = least_cost(slots, 10 ** (-budget.amount / 10))
    if taken is None:
        raise RecipeError(f"{where} has the budget {budget}, which no choice meets: {_limit(budget, slots, count)}")
    found = {site.name: each[i] for site, each, i in zip(sites, specs, taken, strict=True)}
    bits = sum(slot[i].cost for slot, i in zip(slots, taken, strict=True)) / count
    formats = sorted({spec.format.name for spec in found.values()})
    return found, f"{bits:.3f} bits a weight, of {', '.join(formats)} and their scales"


def _limit(budget: Budget, slots: Sequence[Sequence[Option]], count: int) -> str:
    if budget.unit == BITS:
        least = sum(min(option.cost for option in slot) for slot in slots) / count
        return f"the smallest specs come to {least:.3f} bits a weight"
    return "not even the largest specs err so little; ask for fewer dB"


def _specs(rule: Rule, site: Site) -> Iterator[Spec]:
    """The rule's own kind of scale with every width, in groups that divide K and by channel; blocks stay blocks."""
    assert rule.weight is not None
    K = site.weight.shape[1]
    if rule.weight.zero is Zero.MINIMUM:
        yield from (replace(rule.weight, format=parse_format(f"int{width}")) for width in WIDTHS)
        return
    on_gpu = takes_books(rule, site.weight.device.type)
    books = BOOKS if on_gpu else ()
    groups = [parse_granularity(f"g{size}") for size in GROUPS if K % size == 0]
    for spec in (*(replace(rule.weight, granularity=group) for group in groups), by_channel(rule.weight)):
        yield from (with_format(spec, parse_format(name)) for name in (*(f"int{width}" for width in WIDTHS), *books))
    if on_gpu and rule.solver != FITS_SCALES:
        yield from (spec for spec, columns in BLOCKS.items() if K % columns == 0)


def takes_books(rule: Rule, device: str) -> bool:
    """Whether some kernel multiplies by `BOOKS` and `BLOCKS` on such a device."""
    return rule.input is None and device == "cuda"


def _options(
    rule: Rule, site: Site, specs: Sequence[Spec], stats: Mapping[str, Stats], moved: Moved, where: str
) -> list[Option]:
    """Bits of the whole weight, and noise over signal of the model's outputs, under each spec."""
    assert rule.weight is not None
    seen = stats.get(site.name)
    if seen is None or site.weight.is_meta:
        raise CalibrationError(
            f"{where} spends a budget on {site.name!r}, and no data was seen there: call "
            "qcompile.calibrate(model, batches, recipe) with batches that reach it, or give it a rule of its own"
        )
    probe = probe_part(site.weight, seen, whole=False)
    solver = STAND_IN if rule.solver in IN_TURN else rule.solver
    importance = seen.importance.to(site.weight.device) if rule.weighs_columns else None

    def noise(spec: Spec, solver: str = solver) -> float:
        """Over signal, of the site's output."""
        ratio = probe.after(Treatment(weight=spec, solver=solver, importance=importance))
        return float(10 ** (-ratio / 10))

    with torch.no_grad():
        tried = next((spec for spec in specs if spec.format == rule.weight.format), specs[0])
        lost = moved(site.name, fake_quantize(site.weight.detach().float(), tried))
        matters = lost / noise(tried, "round") if lost > 0 else 0.0
        return [Option(cost=8 * stored_bytes(spec, *site.weight.shape), error=matters * noise(spec)) for spec in specs]
