"""The plan: what every site gets, or why it gets nothing. Pure data, the same for every host."""

import operator
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from qcompile.auto import best_rule
from qcompile.binding import Binding
from qcompile.errors import CalibrationError, PlanError, RecipeError, SpecError, nearest
from qcompile.fitting import check_tiles, check_weight
from qcompile.folds import Fold
from qcompile.graph import Op
from qcompile.methods import check_methods
from qcompile.numerics import QParams, on_device, widened
from qcompile.observers import Stats
from qcompile.outliers import Outliers
from qcompile.ranges import parse_observer
from qcompile.recipe import Recipe, Rule
from qcompile.shifts import lowered_importance
from qcompile.sites import CHANNEL_AXIS, LeftOver, Site, digest, same_weight
from qcompile.solved import Solved, equal_qparams, equal_tensors
from qcompile.solvers import IN_TURN, SOLVERS, WEIGHTED
from qcompile.spec import ALL, Spec

# what was found from stats (by identity), by an observer, for a spec: sites that read one activation share it
_Ranges = dict[tuple[int, str, Spec], QParams]
# the bound plans in use, by identity
_BOUND: "weakref.WeakValueDictionary[int, Plan]" = weakref.WeakValueDictionary()


@dataclass(frozen=True, kw_only=True)
class _Seen:
    """Stats by site name, and the ranges that were found from them so far."""

    inputs: Mapping[str, Stats]
    results: Mapping[str, Stats]
    ranges: _Ranges


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What one site gets. A weight or input without spec stays float, and `reason` says why.

    input_qparams: of a static input; None with an input spec means found from each input while running.
    output: of a convolution's result, and of what is added to it; None leaves them float.
    outliers: channels of the input that stay in the model's dtype, with their columns of the weight.
    threshold: instead, the channels are found in each input: those in which any magnitude reaches it (LLM.int8).
    importance: float32 [K], what errors in each column of the weight cost, for solvers that ask for it, until its codes
        are solved.
    solved: the weight as it is stored, from a solver that looks at data or from a file; None to find it from floats.
    shift: octaves by which columns of the weight are raised before its numbers are chosen, and their exponents lowered
        then: as far as folds raise channels of the input, or to fit the weight's grid.
    Raises PlanError if outliers are not distinct channels of the input, or importance is missing or of other channels.
    """

    name: str
    op: Op
    shape: tuple[int, ...]
    weight: Spec | None = None
    input: Spec | None = None
    input_qparams: QParams | None = field(default=None, hash=False)
    solver: str = "round"
    reason: str = ""
    outliers: tuple[int, ...] = ()
    threshold: float | None = None
    output: QParams | None = field(default=None, hash=False)
    importance: Tensor | None = field(default=None, hash=False)
    solved: Solved | None = field(default=None, hash=False)
    shift: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.outliers and not (
            len(set(self.outliers)) == len(self.outliers) and set(self.outliers) <= set(range(self.shape[-1]))
        ):
            raise PlanError(
                f"the outliers of {self.name!r} must be distinct channels from 0 to {self.shape[-1] - 1}, got "
                f"{list(self.outliers[:8])}; calibrate again with qcompile.calibrate"
            )
        # codes that are there were chosen by it
        weighed = self.weighs_columns and self.solved is None
        channels = None if self.importance is None else list(self.importance.shape)
        if channels != [self.shape[-1]] and (weighed or channels is not None):
            raise PlanError(
                f"{self.name!r} with solver {self.solver!r} takes the importance of {self.shape[-1]} channels, got "
                f"{channels}; calibrate again with qcompile.calibrate"
            )
        if self.importance is not None and not bool((torch.isfinite(self.importance) & (self.importance >= 0)).all()):
            raise PlanError(
                f"the importance of channels of {self.name!r} holds NaN, Inf or negative numbers; calibrate again with "
                "qcompile.calibrate"
            )

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Decision):
            return NotImplemented
        # tensors do not compare to one truth
        special: dict[str, Callable[[Any, Any], bool]]
        special = {"input_qparams": equal_qparams, "output": equal_qparams, "importance": equal_tensors}
        return all(
            special.get(f.name, operator.eq)(getattr(self, f.name), getattr(other, f.name)) for f in fields(self)
        )

    @property
    def weighs_columns(self) -> bool:
        """Whether the solver of its weight asks, or asked, what errors in each column cost."""
        return self.op is Op.LINEAR and self.weight is not None and self.solver in WEIGHTED

    def qparams_of(self, weight: Tensor) -> QParams:
        """Those of the weight [N, K], raised by the shift.  Raises PlanError for codes that the plan should hold."""
        if self.solved is not None:
            return self.solved.of_weight(weight, self.name)
        if self.solver in IN_TURN:
            raise PlanError(
                f"the plan holds no codes for the weight of {self.name!r} by solver {self.solver!r}, which chooses "
                "them while the model runs: make the plan with qcompile.calibrate(model, batches, recipe)"
            )
        assert self.weight is not None
        return SOLVERS[self.solver](weight, self.weight, lowered_importance(self.importance, self.shift))

    @cached_property
    def data_digest(self) -> str:
        """Tells apart what a solver makes of one weight by several data; empty for one that looks at none."""
        if self.solved is not None:
            return self.solved.digest
        return "" if self.importance is None else digest(self.importance.tolist())


@dataclass(frozen=True, kw_only=True)
class Preparation:
    """What data decided before specs are given to sites.

    folds: in the order in which they were found. outliers: by site, channels that stay in the model's dtype.
    inputs, weights: by site, a spec where data speaks against the rule's. clips: octaves by which a static range is
    wider than the observer finds it. shifts: octaves of channels. notes: to tell.
    """

    folds: tuple[Fold, ...] = ()
    outliers: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    inputs: Mapping[str, Spec] = field(default_factory=dict)
    clips: Mapping[str, float] = field(default_factory=dict)
    weights: Mapping[str, Spec] = field(default_factory=dict)
    shifts: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Decisions by site name, and the recipe that they follow.

    folds: factors that move between weights before anything is quantized. notes: what calibration has to say.
    outliers: what it found in the float model's activations; None without calibration. Emergent features are sought
        only for recipes that smooth or split (and by `qcompile analyze`): others do not look at the model's graph.
    shared: names of sites that read one weight, of the model that the plan was bound to last; no part of the data, nor
        are the names of its parameters, binding.
    """

    recipe: Recipe
    decisions: Mapping[str, Decision]
    folds: tuple[Fold, ...] = ()
    notes: tuple[str, ...] = ()
    outliers: Outliers | None = None
    shared: tuple[tuple[str, ...], ...] = field(default=(), compare=False, repr=False)
    binding: Binding | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        if self.binding is not None:
            _BOUND[id(self)] = self

    def binding_of(self, parameters: Sequence[Tensor]) -> Binding | None:
        """The binding that knows one of these parameters: the plan's, or an equal plan's, which torch takes for it."""
        bindings = (p.binding for p in (self, *_BOUND.values()) if p.binding is not None and p == self)
        return next((binding for binding in bindings if any(map(binding.name_of, parameters))), None)

    def bind(self, model: nn.Module) -> "Plan":
        """The same plan, with the parameters of `model` known by identity and static qparams on their devices.

        Raises PlanError if the model lacks a weight that the plan names, or has it in another shape.
        """
        binding = Binding(model)
        decisions = {name: _bound(decision, binding) for name, decision in self.decisions.items()}
        if bad := [problem for problem in decisions.values() if isinstance(problem, str)]:
            more = f"; and {len(bad) - 3} more" if len(bad) > 3 else ""
            raise PlanError(
                f"this plan is a calibration for another model: {'; '.join(bad[:3])}{more}. "
                "Bind it to the model it was made for, or calibrate this one with qcompile.calibrate"
            )
        good = {name: decision for name, decision in decisions.items() if isinstance(decision, Decision)}
        shared = binding.sharing({name: decision.shape for name, decision in good.items()})
        return replace(self, decisions=good, shared=shared, binding=binding)


def make_plan(
    sites: Sequence[Site],
    recipe: Recipe,
    stats: Mapping[str, Stats] | None = None,
    left: Iterable[LeftOver] = (),
    *,
    prepared: Preparation | None = None,
    whole: bool = True,
    results: Mapping[str, Stats] | None = None,
) -> Plan:
    """What each site gets by the first rule that matches it. Pure: nothing is changed, weights are only looked at.

    stats: by site name, for static inputs, after what `prepared` says. prepared: what data decided. results: by site
        name, of what convolutions give, for rules with an output spec; a result that is not among them stays float.
    left: weights that no site reads; they get a reason.
    whole: the sites are all there are. A part of a model need not have a site for every rule.
    Sites of one name and weight (a module called twice) share the decision; of one name and several weights, they
    stay float. Weights on meta are checked by shape only.
    Raises RecipeError, SpecError, WeightError or CalibrationError, each with the site and the remedy.
    """
    check_methods(recipe)
    if (recipe.prepares and prepared is None) or recipe.budgets:
        raise CalibrationError(
            f"recipe {recipe.name!r} smooths, splits, rescues or has a budget, which takes data: make a plan with "
            "qcompile.calibrate(model, batches, recipe), and compile with options={'plan': plan}"
        )
    prepared = prepared or Preparation()
    decisions: dict[str, Decision] = {}
    first: dict[str, Site] = {}
    ranges: _Ranges = {}
    used: set[int] = set()
    for site in sites:
        number = next((i for i, rule in enumerate(recipe.rules, start=1) if rule.matches(site)), None)
        if number is not None:
            used.add(number)
        if site.name not in decisions:
            first[site.name] = site
            seen = _Seen(inputs=stats or {}, results=results or {}, ranges=ranges)
            decisions[site.name] = _decide(site, number, recipe, seen, prepared)
        elif not same_weight(first[site.name], site):
            reason = "ops with different weights have this name, and a plan goes by names"
            decisions[site.name] = replace(_left_alone(first[site.name]), reason=reason)
    if whole:
        _require_use(recipe, sites, used)
    # sites first, as they stand in the graph
    decisions |= {name: d for name, d in unreached(left).items() if name not in decisions}
    return Plan(recipe=recipe, decisions=decisions, folds=prepared.folds, notes=prepared.notes)


def unreached(left: Iterable[LeftOver]) -> dict[str, Decision]:
    """Decisions for weights that no site reads: each has a reason."""
    found = {}
    for weight in left:
        reason = f"read by {weight.reader}, which is not a linear" if weight.reader else "no op read it"
        shape = tuple(weight.weight.shape)
        found[weight.name] = Decision(name=weight.name, op=Op.OTHER, shape=shape, reason=reason)
    return found


def _left_alone(site: Site) -> Decision:
    return Decision(name=site.name, op=site.op, shape=tuple(site.weight.shape))


def _decide(site: Site, number: int | None, recipe: Recipe, seen: _Seen, prepared: Preparation) -> Decision:
    left_alone = _left_alone(site)
    if number is None:
        return replace(left_alone, reason=f"no rule of recipe {recipe.name!r} matches this {site.op.value}")
    rule = recipe.rules[number - 1]
    rule = replace(
        rule,
        input=prepared.inputs.get(site.name, rule.input),
        weight=prepared.weights.get(site.name, rule.weight),
    )
    # the input of an embedding is indices
    input_spec = rule.input if site.op in CHANNEL_AXIS else None
    if rule.weight is None and input_spec is None:
        return replace(left_alone, reason=f"rule {number} leaves it alone")
    if site.op is Op.CONV and input_spec is not None and input_spec.granularity.rows != ALL:
        reason = f"rule {number} gives inputs {input_spec}, and those of a convolution have one scale each"
        return replace(left_alone, reason=reason)
    if rule.weight is not None:
        check_weight(site)
        check_tiles(site, rule.weight, "weight")
    if input_spec is not None:
        check_tiles(site, input_spec, "input")
    if rule.solves_in_turn:
        _stats_for(site, rule, seen)
    rule = best_rule(rule, site, seen.inputs.get(site.name))
    return replace(
        left_alone,
        weight=rule.weight,
        input=input_spec and rule.input,
        input_qparams=widened(_static_qparams(site, rule, seen), prepared.clips.get(site.name, 0.0))
        if input_spec is not None and rule.static_input
        else None,
        output=_output_qparams(site, rule, seen),
        solver=rule.solver,
        importance=_stats_for(site, rule, seen).importance if site.op is Op.LINEAR and rule.weighs_columns else None,
        outliers=prepared.outliers.get(site.name, ()),
        shift=prepared.shifts.get(site.name, ()),
        threshold=rule.threshold if input_spec is not None and site.op is Op.LINEAR else None,
        reason="" if rule.weight is not None else f"rule {number} quantizes its input only",
    )


def _static_qparams(site: Site, rule: Rule, seen: _Seen) -> QParams:
    assert rule.input is not None
    stats = seen.inputs.get(site.name)
    if stats is None:
        raise CalibrationError(
            f"{site.name!r} gets the static input {rule.input}, and no data was seen there: call "
            "qcompile.calibrate(model, batches, recipe) with batches that reach it, or take a spec that finds its "
            f"scale while running, {rule.input.format.name}/token"
        )
    return _range(stats, rule.observer, rule.input, f"the input of {site.name!r}", seen.ranges)


def _stats_for(site: Site, rule: Rule, seen: _Seen) -> Stats:
    """The stats that the rule's solver asks for."""
    stats = seen.inputs.get(site.name)
    if stats is None:
        raise CalibrationError(
            f"{site.name!r} gets solver {rule.solver!r}, which looks at data, and none was seen there: call "
            "qcompile.calibrate(model, batches, recipe) with batches that reach it, or give the site a rule with "
            "solver 'mse'"
        )
    _require_finite(stats, f"the input of {site.name!r}")
    return stats


def _output_qparams(site: Site, rule: Rule, seen: _Seen) -> QParams | None:
    stats = seen.results.get(site.name)
    if site.op is not Op.CONV or rule.output is None or stats is None:
        return None
    return _range(stats, rule.observer, rule.output, f"the result of {site.name!r}", seen.ranges)


def _require_finite(stats: Stats, what: str) -> None:
    if not stats.is_finite:
        raise CalibrationError(
            f"{what} held NaN or Inf (range {float(stats.low.amin())} to {float(stats.high.amax())}): calibrate with "
            "batches for which the float model gives finite values"
        )


def _range(stats: Stats, observer: str, spec: Spec, what: str, ranges: _Ranges) -> QParams:
    _require_finite(stats, what)
    key = (id(stats), observer, spec)
    try:
        if key not in ranges:
            ranges[key] = parse_observer(observer)(stats, spec)
        return ranges[key]
    except (CalibrationError, SpecError) as e:
        e.add_note(f"while finding the range of {what}")
        raise


def _require_use(recipe: Recipe, sites: Sequence[Site], used: set[int]) -> None:
    """Raise RecipeError for a rule that decides nothing, unless it is optional or about all that earlier rules left."""
    for number, rule in enumerate(recipe.rules, start=1):
        about = [site.name for site in sites if site.op in rule.ops]
        if number in used or not sites or rule.optional or rule.match == "*":
            continue
        where = f"rule {number} ({rule.match!r}) of recipe {recipe.name!r}"
        if taken := [site.name for site in sites if rule.matches(site)]:
            raise RecipeError(
                f"{where} decides nothing: earlier rules took all {len(taken)} sites that it matches, such as "
                f"{taken[0]!r}; move it up or remove it"
            )
        ops = " or ".join(op.value for op in rule.ops)
        known = nearest(rule.match, about or [site.name for site in sites])
        raise RecipeError(
            f"{where} matches no {ops}; nearest sites: {known}. Correct the glob, remove the rule, or, if the model is "
            "compiled in parts, plan for all of it first: qcompile.calibrate(model, batches, recipe)"
        )


def _bound(decision: Decision, binding: Binding) -> Decision | str:
    """The decision with its qparams on the device of the weight, or what speaks against it."""
    weight = binding.weight_at(decision.name, decision.shape)
    if weight is None and decision.op is Op.OTHER:
        # quantizes nothing, and a graph reads tensors that no module keeps, too
        return decision
    if weight is None:
        names = (name.removesuffix(".weight") for name, p in binding.parameters.items() if p.dim() > 1)
        return f"the model has no {decision.name!r} (nearest: {nearest(decision.name, names)})"
    shape = weight.flatten(1).shape if decision.op is Op.CONV else weight.shape
    if sorted(shape) != sorted(decision.shape):
        return f"{decision.name!r} is {list(weight.shape)} in the model and {list(decision.shape)} in the plan"
    # values are not given up for a weight that has none
    if weight.is_meta:
        return decision
    found, result, importance = decision.input_qparams, decision.output, decision.importance
    return replace(
        decision,
        input_qparams=None if found is None else on_device(found, weight.device),
        output=None if result is None else on_device(result, weight.device),
        importance=None if importance is None else importance.to(weight.device),
    )
