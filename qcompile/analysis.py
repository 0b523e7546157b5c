"""The analysis of a quantized model: its outliers, the noise of each site, and what would help. Data, and JSON."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from qcompile.advice import Advice, Case, Kind, Remedy, advise, importance_left, smoothing, without
from qcompile.errors import PlanError
from qcompile.folds import Fold, scale_before
from qcompile.noise import Noise, Treatment, measure_noise, probe, shares_rows
from qcompile.numerics import QParams, exact_exp2
from qcompile.observers import Stats
from qcompile.outliers import NORMS, Activation, Group, Outliers, find_outliers
from qcompile.plan import Decision, Plan
from qcompile.ranges import parse_observer
from qcompile.sites import Site
from qcompile.spec import Spec, parse_spec

SCHEMA = 1
_KIND = "qcompile.analysis"


@dataclass(frozen=True, kw_only=True)
class SiteNoise:
    """The noise of a quantized site, and its signal-to-noise ratio in dB if nothing were folded, None without folds.

    weight, input: specs as text, "" for float.  split: channels that bypass quantization.
    """

    name: str
    noise: Noise
    unfolded_db: float | None = None
    weight: str = ""
    input: str = ""
    split: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class FoldNote:
    """A fold as the reader sees it: which sites, where 1 / scale went ("" is a multiplication), how it was found.

    smallest, largest: of the factors.
    """

    sites: tuple[str, ...]
    into: str
    method: str
    smallest: float
    largest: float


@dataclass(frozen=True, kw_only=True)
class Analysis:
    """What was found in a model under one plan."""

    outliers: Outliers
    sites: tuple[SiteNoise, ...] = ()
    folds: tuple[FoldNote, ...] = ()
    advice: tuple[Advice, ...] = ()

    def to_json(self) -> str:
        """JSON text, which `from_json` reads back.  Ratios that are infinite are written as JSON's Infinity."""
        table = asdict(self)
        for advice in table["advice"]:
            advice["remedy"]["kind"] = advice["remedy"]["kind"].value
        return json.dumps({"schema": SCHEMA, "kind": _KIND, **table}) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "Analysis":
        """Raises PlanError if the text is no analysis, or one of a newer schema."""
        try:
            data = json.loads(text)
        except json.JSONDecodeError:
            data = None
        if not isinstance(data, dict) or data.get("kind") != _KIND:
            raise PlanError("this JSON is no analysis of qcompile; write one with `qcompile analyze MODEL --json FILE`")
        if data["schema"] > SCHEMA:
            raise PlanError(f"analysis of schema {data['schema']}, this version reads up to {SCHEMA}; upgrade qcompile")
        return cls(
            outliers=Outliers.from_table(data["outliers"]),
            sites=tuple(_site_noise(s) for s in data["sites"]),
            folds=tuple(FoldNote(**{**f, "sites": tuple(f["sites"])}) for f in data["folds"]),
            advice=tuple(_advice(a) for a in data["advice"]),
        )


def analyze(
    sites: Iterable[Site],
    groups: Sequence[Group],
    plan: Plan,
    *,
    smoothable: Mapping[str, Tensor] | None = None,
) -> Analysis:
    """The analysis of a plan, from the stats of the float model's activations; nothing of the model runs.

    sites: with weights as the float model has them. groups: sites by what they read, in graph order, with stats as
    the float model gives them. smoothable: of sites before which a scale can be folded away, which channels must share
    one, int64 [K]; by default those that read what a norm makes.
    Sites that are not quantized, or of which no stats are known, have no noise and no advice.
    """
    outliers = plan.outliers or find_outliers(groups)
    weights = {site.name: site.weight for site in sites}
    cases: list[Case] = []
    found: list[SiteNoise] = []
    for group in groups:
        names = [name for name in group.sites if _is_quantized(plan.decisions.get(name)) and name in weights]
        if not names or group.stats.count == 0:
            continue
        seen = _Seen(group=group, names=names, weights=weights, plan=plan)
        found += seen.measured()
        activation = next((a for a in outliers.activations if a.sites == group.sites), None)
        if activation is None:
            raise PlanError(
                f"the plan's outliers were not found in the activation that {group.sites[0]!r} reads with "
                f"{len(group.sites) - 1} others: analyze the plan with the groups that it was made with"
            )
        cases += seen.cases(activation, _sharing(group, smoothable))
    return Analysis(
        outliers=outliers,
        sites=tuple(found),
        folds=tuple(_note(fold) for fold in plan.folds),
        advice=tuple(advise(cases)),
    )


def remedied(
    plan: Plan,
    advice: Advice,
    sites: Iterable[Site],
    groups: Iterable[Group],
    *,
    smoothable: Mapping[str, Tensor] | None = None,
) -> Plan:
    """The plan with an advice followed.  sites, groups, smoothable: what `analyze` was given when it gave it."""
    group = next(group for group in groups if advice.sites[0] in group.sites)
    scale = scale_before(group.sites[0], plan.folds)
    stats = folded_stats(group, plan.folds)
    if advice.remedy.kind is Kind.SMOOTH:
        weights = [site.weight.detach() for site in sites if site.name in advice.sites]
        columns = torch.cat(weights) if scale is None else torch.cat(weights) * scale.to(weights[0].device)
        fold = _smooth(group, stats, columns, advice.remedy, _sharing(group, smoothable))
        stats = stats.divided(fold.scale)
        plan = replace(plan, folds=(*plan.folds, fold))
    changed = {name: _changed(plan, plan.decisions[name], advice.remedy, stats) for name in advice.sites}
    return replace(plan, decisions={**plan.decisions, **changed})


def _smooth(group: Group, stats: Stats, weight: Tensor, remedy: Remedy, channels: Tensor | None) -> Fold:
    assert channels is not None
    assert remedy.alpha is not None
    scale = smoothing(stats.amax, weight, channels, remedy.alpha)
    return Fold(sites=group.sites, scale=scale, method=f"smooth alpha={remedy.alpha:.2f}")


def _sharing(group: Group, smoothable: Mapping[str, Tensor] | None) -> Tensor | None:
    """Which channels of what a group reads must share a scale; None if none can be folded away."""
    if smoothable is not None:
        return smoothable.get(group.sites[0])
    return torch.arange(group.stats.amax.numel()) if group.maker in NORMS else None


def folded_stats(group: Group, folds: Sequence[Fold]) -> Stats:
    """The stats of what a group reads once folded."""
    scale = scale_before(group.sites[0], folds)
    return group.stats if scale is None else group.stats.divided(scale.to(group.stats.low.device))


def _changed(plan: Plan, decision: Decision, remedy: Remedy, stats: Stats) -> Decision:
    match remedy.kind:
        case Kind.SPLIT:
            channels = tuple(sorted({*_treatment(decision, stats).channels, *remedy.channels}))
            static = _static(plan, decision.name)
            qparams = None if static is None else static(without(stats, channels))
            importance = importance_left(decision.importance, stats, channels)
            return replace(decision, outliers=channels, threshold=None, input_qparams=qparams, importance=importance)
        case Kind.SMOOTH:
            static = _static(plan, decision.name)
            qparams = None if static is None else static(without(stats, decision.outliers))
            importance = importance_left(decision.importance, stats, decision.outliers)
            return replace(decision, input_qparams=qparams, importance=importance)
        case Kind.WEIGHT:
            return replace(decision, weight=parse_spec(remedy.spec))
        case Kind.FLOAT:
            reason = "left in 16 bit by an advice"
            return replace(decision, weight=None, input=None, input_qparams=None, outliers=(), reason=reason)
        case _:
            return replace(decision, input=parse_spec(remedy.spec), input_qparams=None)


def _is_quantized(decision: Decision | None) -> bool:
    return decision is not None and (decision.weight is not None or decision.input is not None)


def _importance(decision: Decision, stats: Stats, channels: Sequence[int]) -> Tensor | None:
    """As in the plan; one that stores codes is without, and then it is what the data here show."""
    if decision.importance is None and decision.weighs_columns:
        return without(stats, channels).importance
    return decision.importance


def _treatment(decision: Decision, stats: Stats) -> Treatment:
    channels = decision.outliers
    if not channels and decision.threshold is not None:
        # found in each input while running: here in all that were seen
        channels = tuple((stats.amax >= decision.threshold).nonzero().flatten().tolist())
    return Treatment(
        weight=decision.weight,
        input=decision.input if decision.input_qparams is None else decision.input_qparams,
        solver=decision.solver,
        # only a weight that is quantized is split
        channels=channels if decision.weight is not None else (),
        importance=_importance(decision, stats, channels),
        raised=exact_exp2(torch.tensor(decision.shift, device=stats.low.device)) if decision.shift else None,
    )


def _static(plan: Plan, name: str) -> Callable[[Stats], QParams] | None:
    """What finds the qparams of a static input from stats; None for any other input."""
    decision = plan.decisions[name]
    if decision.input is None or decision.input_qparams is None:
        return None
    site = Site(name=name, op=decision.op, weight=torch.empty(decision.shape, device="meta"))
    rule = next((rule for rule in plan.recipe.rules if rule.matches(site)), None)
    observer = parse_observer("minmax" if rule is None else rule.observer)
    # what a fold or split would leave of single batches is not known
    return partial(parse_observer("minmax") if observer.ordered else observer, spec=decision.input)


class _Seen:
    """The quantized sites of one group, with what is found once for all of them."""

    def __init__(self, *, group: Group, names: Sequence[str], weights: Mapping[str, Tensor], plan: Plan) -> None:
        self._names, self._weights, self._plan = names, weights, plan
        self._scale = scale_before(names[0], plan.folds)
        self._stats, self._folded = group.stats, folded_stats(group, plan.folds)
        self._ranges: dict[tuple[Spec | None, tuple[int, ...]], QParams] = {}

    def measured(self) -> Iterator[SiteNoise]:
        """The noise of each site."""
        for name in self._names:
            decision, weight = self._plan.decisions[name], self._weights[name]
            treatment = _treatment(decision, self._folded)
            plain = probe(weight, self._stats, whole=shares_rows(treatment.weight))
            scale = None if self._scale is None else self._scale.to(plain.weight.device)
            yield SiteNoise(
                name=name,
                noise=measure_noise(plain if scale is None else plain.scaled(scale), treatment),
                unfolded_db=None if scale is None else plain.after(self._unfolded(name, treatment)),
                weight="" if decision.weight is None else str(decision.weight),
                input="" if decision.input is None else str(decision.input),
                split=treatment.channels,
            )

    def _unfolded(self, name: str, treatment: Treatment) -> Treatment:
        """What the site would get without folds: ranges and importance are those of the activation as it was."""
        importance = importance_left(treatment.importance, self._stats, treatment.channels)
        treatment = replace(treatment, importance=importance)
        static = _static(self._plan, name)
        if static is None:
            return treatment
        key = (self._plan.decisions[name].input, treatment.channels)
        if key not in self._ranges:
            self._ranges[key] = static(without(self._stats, treatment.channels))
        return replace(treatment, input=self._ranges[key])

    def cases(self, activation: Activation, channels: Tensor | None) -> Iterator[Case]:
        """The sites, together where they are quantized alike."""
        alike: dict[tuple[Any, ...], list[str]] = {}
        for name in self._names:
            decision = self._plan.decisions[name]
            static = decision.input_qparams is not None
            key = (decision.weight, decision.input, static, decision.solver, decision.outliers, decision.threshold)
            alike.setdefault(key, []).append(name)
        for same in alike.values():
            yield Case(
                sites=tuple(same),
                weights=tuple(self._weights[name].detach() for name in same),
                scale=self._scale,
                stats=self._folded,
                treatment=_treatment(self._plan.decisions[same[0]], self._folded),
                activation=activation,
                static=_static(self._plan, same[0]),
                # a vector serves all readers of the activation
                channels=channels if len(alike) == 1 else None,
            )


def _note(fold: Fold) -> FoldNote:
    return FoldNote(
        sites=fold.sites,
        into=fold.into,
        method=fold.method,
        smallest=float(fold.scale.min()),
        largest=float(fold.scale.max()),
    )


def _site_noise(table: Mapping[str, Any]) -> SiteNoise:
    noise = table["noise"]
    channels = tuple((int(k), float(share)) for k, share in noise["channels"])
    return SiteNoise(**{**table, "split": tuple(table["split"]), "noise": Noise(**{**noise, "channels": channels})})


def _advice(table: Mapping[str, Any]) -> Advice:
    remedy = table["remedy"]
    found = Remedy(**{**remedy, "kind": Kind(remedy["kind"]), "channels": tuple(remedy["channels"])})
    return Advice(**{**table, "sites": tuple(table["sites"]), "remedy": found})
