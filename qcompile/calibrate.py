"""Calibration: what a recipe needs to know of a model from data, prepared and decided, as a plan."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import reduce
from operator import or_
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from qcompile.binding import Binding
from qcompile.errors import CalibrationError
from qcompile.fisher import output_fisher
from qcompile.fitting import check_tiles
from qcompile.methods import check_methods
from qcompile.mixed import spend
from qcompile.observers import Part
from qcompile.outliers import Outliers
from qcompile.plan import Decision, Plan, make_plan
from qcompile.prepare import prepare
from qcompile.presets import parse_recipe
from qcompile.progress import shown
from qcompile.ranges import needed_parts
from qcompile.recipe import Recipe
from qcompile.resume import Unfinished
from qcompile.sensitivity import Sensitivity
from qcompile.sequential import Weights, solve_in_turn
from qcompile.watch import Seen, require_several, watch


def calibrate(
    model: nn.Module,
    batches: Iterable[Any],
    recipe: str | Path | Mapping[str, Any] | Recipe = "int8-static",
    *,
    progress: bool = True,
    failures: str | Path | None = None,
    resume: str | Path | None = None,
) -> Plan:
    """The plan of a recipe for a model, with ranges, folds and outliers found from data; it is bound to the model.

    batches: what the model takes: dicts of keyword arguments, tuples of positional ones, or single tensors. Where a
        dict has an attention_mask [B, T], rows of activations that are padding (0) are not counted. A batch that lies
        in host memory as a whole goes to the device that the whole model is on, when it runs.
    progress: show a bar, if standard error is a terminal.
    failures: a folder for the parts of the graph where a pass changed the model's outputs and was undone; by default
        one in the system's folder for temporary files. `Plan.notes` says what was undone.
    resume: a folder where weights that are solved in turn are kept as they come, so that a call with the same model,
        data and recipe goes on where one before it was interrupted; it may be removed when that is done.
    The model runs in eval mode without gradients; its training flags are as before afterwards. For GPTQ it runs twice,
    the second time on all batches side by side, one weight after the other quantized: what lies between two of its
    layers is then held for all of them, in host memory if the model is on a GPU. For `objective = "fisher"` it runs
    twice, too, once with gradients: a batch then takes as much memory as a step of training. Both hold all batches.
    Raises CalibrationError without batches, without sites, or if an activation is NaN or Inf; WeightError if a
    parameter has no values; and what `make_plan` and `parse_recipe` raise.
    """
    parsed = parse_recipe(recipe)
    check_methods(parsed)
    model = getattr(model, "_orig_mod", model)
    if parsed.solves_in_turn or parsed.weighs_features:
        # the model runs twice
        require_several(batches)
        batches = list(batches)
    decided = _decided(model, batches, parsed, progress=progress, failures=failures)
    plan = decided.plan
    if parsed.solves_in_turn:
        assert isinstance(batches, list)
        kept = None if resume is None else Unfinished(resume, model, plan, batches)
        plan = solve_in_turn(
            model, batches, plan, decided.weights, divided=decided.divided, kept=kept, progress=progress
        )
    shared = _shared(plan, decided.weights, Binding(model))
    return replace(
        plan,
        decisions={**plan.decisions, **shared},
        outliers=decided.outliers,
        notes=(*decided.notes, *plan.notes),
    ).bind(model)


def _shared(plan: Plan, weights: Weights, binding: Binding) -> dict[str, Decision]:
    """Decisions for further modules that have a site's weight: graphs call an op by the module that runs it."""
    return {
        name: replace(plan.decisions[site.name], name=name)
        for site in weights.sites.values()
        for name in binding.site_names(site.weight, site.op)
        if name not in plan.decisions
    }


@dataclass(frozen=True, kw_only=True, eq=False)
class _Decided:
    """What data decided in one run: a plan without the codes that are solved in turn, and what these need.

    notes: to stand before those of the plan.  divided: see `Prepared`.
    """

    plan: Plan
    weights: Weights
    outliers: Outliers
    notes: tuple[str, ...]
    divided: Mapping[str, Tensor]


def _decided(
    model: nn.Module, batches: Iterable[Any], recipe: Recipe, *, progress: bool, failures: str | Path | None
) -> _Decided:
    seen = watch(model, batches, parts_for(recipe), progress=progress)
    require_data(recipe, seen)
    if recipe.weighs_features:
        assert isinstance(batches, list)
        seen = replace(seen, features=output_fisher(model, shown(batches, progress=progress)))
    notes: tuple[str, ...] = ()
    if recipe.budgets:
        mix = spend(recipe, list(seen.sites.values()), seen.stats, Sensitivity(model, seen.example).moved)
        recipe, notes = mix.recipe, mix.notes
    _require_tiles(seen, recipe)
    prepared = prepare(model, seen, recipe, failures=failures)
    plan = make_plan(list(seen.sites.values()), recipe, prepared.stats, seen.left, prepared=prepared.decided)
    return _Decided(
        plan=plan, weights=Weights.of(seen), outliers=prepared.outliers, notes=notes, divided=prepared.divided
    )


def _require_tiles(seen: Seen, recipe: Recipe) -> None:
    """Raise SpecError, with the site, before weights are tried under specs that do not fit them."""
    for site in seen.sites.values():
        rule = next((rule for rule in recipe.rules if rule.matches(site)), None)
        if rule is not None and rule.weight is not None:
            check_tiles(site, rule.weight, "weight")


def parts_for(recipe: Recipe) -> Part:
    """The histograms that a recipe's ranges are found from; after folds and splits only those of channels serve."""
    parts = [needed_parts(r.observer, r.input) for r in recipe.rules if r.static_input and r.input is not None]
    needed = reduce(or_, parts, Part.NONE)
    return Part.CHANNELS if needed and recipe.prepares else needed


def require_data(recipe: Recipe, seen: Seen) -> None:
    """Raise CalibrationError if nothing ran, or if what ran showed no site."""
    if seen.batches == 0:
        purpose = (
            "static ranges, folds and splits come from data"
            if recipe.needs_data
            else "the model's sites are seen while it runs"
        )
        raise CalibrationError(
            f"batches is empty, and recipe {recipe.name!r} needs at least one: {purpose}. "
            "Give batches that the model takes (an iterator that was used up is empty, too)"
        )
    if not seen.sites:
        raise CalibrationError(
            f"{seen.batches} batches ran, and no linear or embedding read a parameter of the model: calibrate the "
            "eager float model itself, not a wrapper that calls another one, with weights that are parameters as they "
            "are (no buffers, nothing that weight_norm or another parametrization computes)"
        )
