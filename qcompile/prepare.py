"""What data decides before specs are given: outliers are looked for, and folds and splits chosen, tried and checked."""

import logging
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial, reduce
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn

from qcompile.artifact import save_failure
from qcompile.backends.fx.capture import capture
from qcompile.cases import Case, Choice, fold_method, joined, probe_part
from qcompile.choose import prepared_stats
from qcompile.edges import Edge, find_edges, is_residual
from qcompile.fisher import features_of
from qcompile.folds import Fold
from qcompile.graph import Graph, Op, V
from qcompile.noise import shares_rows
from qcompile.numerics import exact_exp2
from qcompile.observers import Stats
from qcompile.outliers import Group, Outliers, find_outliers
from qcompile.passes.detect_outliers import outlier_groups
from qcompile.passes.fold_smooth import fold_smooth
from qcompile.passes.split_outliers import split_outliers
from qcompile.plan import Decision, Plan, Preparation
from qcompile.recipe import FISHER, Recipe, Rule
from qcompile.rounds import settle
from qcompile.sites import Found, Site, names_of
from qcompile.smooth import MODEL, strength_of
from qcompile.spec import ALL, Spec
from qcompile.verify import check, failing_part, moved, run_graph
from qcompile.watch import Seen, evaluating, first_rows, run_batch

_LOG = logging.getLogger(__name__)
# sites that a note names
NAMED = 6
# octaves by which weights in float16 may be lowered: more would take bits of those that become subnormal
FLOAT16_SHIFTED = 3
Item = TypeVar("Item")


class Captured(Protocol[V]):
    """A graph of a model, to be opened anew as often as wanted, with inputs that it takes."""

    @property
    def args(self) -> Sequence[Any]:
        """In the order of the graph's inputs."""

    def open(self) -> Graph[V]:
        """The graph as it was, to be changed at will."""


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """decided: for the plan. stats: by site, of what is quantized after it. outliers: of the float model.

    groups: the activations with their stats before, in the order of the graphs.
    foldable: of sites before which a scale can be folded away, the channels that must share one (see `find_edges`).
    divided: by site, what the folds divide the rows of its weight by, float64 [N].
    """

    decided: Preparation
    stats: Mapping[str, Stats]
    groups: Sequence[Group]
    foldable: Mapping[str, Tensor] = field(default_factory=dict)
    divided: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def outliers(self) -> Outliers:
        """Of the float model."""
        return find_outliers(self.groups)


def prepare(
    model: nn.Module, seen: Seen, recipe: Recipe, *, failures: str | Path | None = None, trace: bool = False
) -> Prepared:
    """Look for outliers, and for a recipe that asks for it, choose folds and splits and check them on the graph.

    failures: see `qcompile.calibrate`.  trace: look at the model's graph also for a recipe that changes nothing in it;
    otherwise it is not known which activations norms make.  Raises what torch raises if the model cannot be traced.
    """
    if not recipe.prepares and not trace:
        return Prepared(decided=Preparation(), stats=seen.stats, groups=list(_groups(seen)))
    with evaluating(model):
        graphs = capture(model, lambda compiled: run_batch(compiled, first_rows(seen.example), 0))
        return prepare_graphs(graphs, seen, recipe, model=_name(model), failures=failures)


def prepare_graphs(
    graphs: Iterable[Captured[V]],
    seen: Seen,
    recipe: Recipe,
    *,
    model: str = "",
    failures: str | Path | None = None,
) -> Prepared:
    """What `prepare` does, on graphs of any host.  model: its name, for strengths of smoothing that go by it."""
    found = [_Preparing(captured, seen, recipe, model, failures) for captured in graphs]
    runs = Counter(name for one in found for name in one.runs)
    for one in found:
        one.decide({name for name, count in runs.items() if count > 1})
        one.verify()
    held = {name for one in found for name in one.names}
    hidden = [site.name for site in seen.sites.values() if site.op is Op.LINEAR and site.name not in held]
    stats = dict(seen.stats)
    for one in found:
        stats |= one.stats
    decided = Preparation(
        folds=tuple(fold for one in found for fold in one.folds),
        outliers={name: channels for one in found for name, channels in one.split.items()},
        inputs={name: spec for one in found for name, spec in one.inputs.items()},
        clips={name: octaves for one in found for name, octaves in one.clips.items()},
        weights={name: spec for one in found for name, spec in one.weights.items()},
        shifts={name: shift for one in found for name, shift in one.shifts.items()},
        notes=(*_hidden(hidden), *(note for one in found for note in one.notes)),
    )
    return Prepared(
        decided=decided,
        stats=stats,
        groups=[group for one in found for group in one.groups],
        foldable={name: channels for one in found for name, channels in one.foldable.items()},
        divided={name: rows for one in found for name, rows in one.divided()},
    )


class _Preparing(Generic[V]):
    """One graph of the model, and what has been decided for it so far."""

    def __init__(
        self, captured: Captured[V], seen: Seen, recipe: Recipe, model: str, failures: str | Path | None
    ) -> None:
        self.folds: list[Fold] = []
        self.split: dict[str, tuple[int, ...]] = {}
        self.inputs: dict[str, Spec] = {}
        self.clips: dict[str, float] = {}
        self.weights: dict[str, Spec] = {}
        self.shifts: dict[str, tuple[int, ...]] = {}
        self.stats: dict[str, Stats] = {}
        self.notes: list[str] = []
        self.foldable: dict[str, Tensor] = {}
        self.names: set[str] = set()
        # to look at; what changes a graph opens its own
        self._graph = captured.open()
        self.groups = list(outlier_groups(self._graph, seen.stats))
        # names of each linear, as often as it runs
        self._edges = find_edges(self._graph)
        self.runs = [name for edge in self._edges for f in edge.consumers for name in names_of(self._graph, f)]
        self._captured, self._seen, self._recipe = captured, seen, recipe
        self._model, self._failures = model, failures
        # the folds that divide rows of linears, with the channels of their scales
        self._taken: dict[V, list[tuple[Fold, Tensor]]] = {}

    def decide(self, repeated: set[str]) -> None:
        """Choose for each activation, last ones first: a fold behind changes rows of the weights before it.

        repeated: sites or weights that run several times; they follow one shift only, and each run would bring one.
        """
        for edge in reversed(self._edges):
            self.names |= {found.site.name for found in edge.consumers}
            by_rule = self._by_rule(edge)
            # a scale serves all that read the activation: it is sought where they agree on how
            foldable = not edge.reason or (edge.multiply and is_residual(self._graph, edge.value))
            may_scale = foldable and len(by_rule) == 1 and not self._others(edge, *by_rule.values())
            self.foldable |= {found.site.name: edge.channels for found in edge.consumers if foldable}
            for rule, members in by_rule.items():
                several = any(names_of(self._graph, found) & repeated for found in members)
                chosen = replace(rule, shift=None) if several else _exact(rule, members)
                # for weights alone no multiplication is worth it
                free = not edge.reason or rule.input is not None
                self._decide(edge, chosen, members, may_scale=may_scale and free)

    def _by_rule(self, edge: Edge[V]) -> dict[Rule, list[Found[V]]]:
        """The edge's sites that are quantized and of which data was seen, by the rule that decides them."""
        found: dict[Rule, list[Found[V]]] = {}
        for member in edge.consumers:
            rule = next((rule for rule in self._recipe.rules if rule.matches(member.site)), None)
            wanted = rule is not None and rule.prepares and (rule.input, rule.shift, rule.smooth) != (None, None, None)
            if rule is not None and wanted and member.site.name in self._seen.stats:
                found.setdefault(rule, []).append(member)
        return found

    def _others(self, edge: Edge[V], members: Sequence[Found[V]]) -> bool:
        """Whether readers that are not members quantize the activation too: their ranges know nothing of a scale."""
        others = [found.site for found in edge.consumers if found not in members]
        rules = [next((rule for rule in self._recipe.rules if rule.matches(site)), None) for site in others]
        return any(rule is not None and rule.input is not None for rule in rules)

    def _decide(self, edge: Edge[V], rule: Rule, members: Sequence[Found[V]], *, may_scale: bool) -> None:
        stats = self._seen.stats[members[0].site.name]
        weights = [self._weight(member) for member in members]
        probes = [
            probe_part(weight, stats, whole=shares_rows(rule.weight), features=self._features(member, rule))
            for member, weight in zip(members, weights, strict=True)
        ]
        case = Case(
            probe=joined(probes),
            stats=stats,
            columns=torch.stack([weight.abs().amax(0) for weight in weights]).amax(0),
            rule=rule,
            channels=edge.channels if may_scale else None,
            strength=self._strength(rule),
        )
        choice, weighed = settle(case, probes)
        names = tuple(member.site.name for member in members)
        if choice.shift is not None:
            self._raise(edge, names, choice.shift, may_scale=may_scale)
        self.weights |= {name: w.spec for name, w in zip(names, weighed, strict=False) if w.spec != rule.weight}
        self.shifts |= {
            name: tuple(w.lowered.tolist()) for name, w in zip(names, weighed, strict=False) if w.lowered is not None
        }
        if choice.scale is not None:
            readers = tuple(found.site.name for found in edge.consumers)
            self._fold(edge, Fold(sites=readers, scale=choice.scale, into=edge.into, method=fold_method(choice, rule)))
            # who reads the activation beside the members gets it divided, too
            others = (name for name in readers if name not in names and name in self._seen.stats)
            self.stats |= {name: self._seen.stats[name].divided(choice.scale) for name in others}
        self._take(names, stats, choice, rule)

    def _raise(self, edge: Edge[V], names: tuple[str, ...], shift: Tensor, *, may_scale: bool) -> None:
        """Raise channels of the activation by octaves, in what makes it if all that read it follow."""
        whole = may_scale and len(names) == len(edge.consumers)
        into = edge.into if whole else ""
        self._fold(edge, Fold(sites=names, scale=exact_exp2(-shift), into=into, method="exponent shift"))

    def _fold(self, edge: Edge[V], fold: Fold) -> None:
        self.folds.append(fold)
        if fold.into and edge.producer is not None:
            self._taken.setdefault(edge.producer, []).append((fold, edge.channels))

    def divided(self) -> Iterator[tuple[str, Tensor]]:
        """The sites of linears whose rows folds divide, and by what, float64 [N]."""
        for edge in self._edges:
            for member in edge.consumers:
                if member.value in self._taken:
                    yield member.site.name, self._rows(member)

    def _rows(self, member: Found[V]) -> Tensor:
        """What the folds chosen so far divide the rows of a site's weight by, float64 [N]."""
        rows = torch.ones(member.site.weight.shape[0], dtype=torch.float64)
        for fold, channels in self._taken.get(member.value, ()):
            if fold in self.folds:
                rows *= torch.ones_like(rows).scatter(0, channels.cpu(), fold.scale.double().cpu())
        return rows

    def _weight(self, member: Found[V]) -> Tensor:
        """A site's weight as the folds chosen so far leave it, float32 [N, K]."""
        weight = member.site.weight.detach().float()
        return weight / self._rows(member).to(weight)[:, None] if member.value in self._taken else weight

    def _features(self, member: Found[V], rule: Rule) -> Tensor | None:
        """What errors of a site's output features cost as the folds chosen so far leave them, float32 [N]."""
        if rule.objective != FISHER:
            return None
        found = features_of(self._seen.features, member.site.name)
        return found * self._rows(member).to(found).square() if member.value in self._taken else found

    def _take(self, names: Sequence[str], stats: Stats, choice: Choice, rule: Rule) -> None:
        self.stats |= dict.fromkeys(names, prepared_stats(stats, choice))
        if choice.outliers:
            self.split |= dict.fromkeys(names, choice.outliers)
        if choice.input is not None and choice.input != rule.input:
            self.inputs |= dict.fromkeys(names, choice.input)
        if choice.weight not in (None, rule.weight):
            self.weights |= dict.fromkeys(names, choice.weight)
        if choice.clip:
            self.clips |= dict.fromkeys(names, choice.clip)

    def _strength(self, rule: Rule) -> float | None:
        known = rule.smooth is not None and rule.smooth.strength == MODEL
        return strength_of(self._model) if known else None

    @cached_property
    def _reference(self) -> Any:
        """What the graph gives before anything is changed."""
        return run_graph(self._graph, self._captured.args)

    def verify(self) -> None:
        """Undo what does not leave the graph's outputs as they were."""
        if self._keeps_outputs():
            return
        broken = self._checked("fold_smooth", fold_smooth, self.folds, lambda fold: fold.sites)
        self.folds = [fold for fold in self.folds if fold not in broken]
        for fold in broken:
            # without its scale, what was chosen with it does not hold either
            self._forget(fold.sites)
        self._checked_split()

    def _keeps_outputs(self) -> bool:
        """Whether all passes together leave the outputs as they were; then none need be run alone."""

        def run(graph: Graph[V]) -> int:
            return fold_smooth(graph, self.folds) + self._run_split(graph, self._splits())

        nothing = not self.folds and not self.split
        return nothing or moved(self._captured.open, run, self._captured.args, self._reference) <= 1

    def _checked_split(self) -> None:
        def run(graph: Graph[V], chosen: Sequence[Decision]) -> int:
            fold_smooth(graph, self.folds)
            return self._run_split(graph, chosen)

        for decision in self._checked("split_outliers", run, self._splits(), lambda decision: (decision.name,)):
            self._forget((decision.name,))

    def _run_split(self, graph: Graph[V], chosen: Sequence[Decision]) -> int:
        return split_outliers(graph, Plan(recipe=self._recipe, decisions={d.name: d for d in chosen}))

    def _splits(self) -> list[Decision]:
        return [self._split_alone(site) for name, site in self._seen.sites.items() if name in self.split]

    def _split_alone(self, site: Site) -> Decision:
        """What the plan will say of a site that is split, without the ranges, which change nothing in a float graph."""
        rule = next(rule for rule in self._recipe.rules if rule.matches(site))
        given = self.inputs.get(site.name, rule.input)
        return Decision(
            name=site.name,
            op=site.op,
            shape=tuple(site.weight.shape),
            weight=self.weights.get(site.name, rule.weight),
            input=None if given is None or given.granularity.rows == ALL else given,
            outliers=self.split[site.name],
        )

    def _forget(self, sites: Sequence[str]) -> None:
        chosen: tuple[dict[str, Any], ...] = (self.split, self.shifts, self.inputs, self.weights, self.clips)
        for name in sites:
            for by_name in chosen:
                by_name.pop(name, None)
            if name in self._seen.stats:
                scales = (fold.scale for fold in self.folds if name in fold.sites)
                self.stats[name] = reduce(Stats.divided, scales, self._seen.stats[name])

    def _checked(
        self,
        name: str,
        run: Callable[[Graph[V], Sequence[Any]], int],
        items: Sequence[Item],
        sites_of: Callable[[Item], Sequence[str]],
    ) -> list[Item]:
        """The items with which the pass changes the outputs; they are saved, and noted."""
        if not items:
            return []
        broken = check(self._captured.open, run, items, self._captured.args, self._reference)
        for together, distance in broken:
            sites = [site for item in together for site in sites_of(item)]
            failure = failing_part(self._captured.open, partial(_run_some, run, together), sites, self._captured.args)
            folder = save_failure(failure, self._folder(), f"{name}-{sites[0]}")
            named = ", ".join(sites[:NAMED]) + (f" and {len(sites) - NAMED} more" if len(sites) > NAMED else "")
            how = failure.error.partition("\n")[0] or f"{distance:.3g} times what rounding may do"
            note = (
                f"pass {name} changed the model's outputs at {named} ({how}) and "
                f"was undone there; the part of the graph and its inputs are in {str(folder)!r}"
            )
            _LOG.warning(note)
            self.notes.append(note)
        return [item for together, _ in broken for item in together]

    def _folder(self) -> Path:
        if self._failures is None:
            self._failures = tempfile.mkdtemp(prefix="qcompile-failures-")
        return Path(self._failures)


def _exact(rule: Rule, members: Sequence[Found[V]]) -> Rule:
    """The rule with no larger shift than is exact in the dtype of these sites' weights."""
    if rule.shift is None or all(found.site.weight.dtype != torch.float16 for found in members):
        return rule
    return replace(rule, shift=min(rule.shift, FLOAT16_SHIFTED))


def _groups(seen: Seen) -> Iterator[Group]:
    """Sites that share an activation, as seen while the model ran."""
    members: dict[int, list[str]] = {}
    for name, stats in seen.stats.items():
        members.setdefault(id(stats), []).append(name)
    for names in members.values():
        yield Group(sites=tuple(names), maker=Op.OTHER, stats=seen.stats[names[0]])


def _hidden(sites: Sequence[str]) -> Iterator[str]:
    """A note on sites that ran but are in no graph."""
    if sites:
        yield (
            f"{len(sites)} sites are in no graph that torch.compile makes of the model, and could not be folded or "
            f"split: {', '.join(sites[:NAMED])}"
        )


def _run_some(run: Callable[[Graph[V], Sequence[Item]], int], items: Sequence[Item], graph: Graph[V]) -> int:
    return run(graph, items)


def _name(model: nn.Module) -> str:
    """What people call a model: where it was loaded from, or its class."""
    return str(getattr(getattr(model, "config", None), "_name_or_path", "") or type(model).__name__)
