"""What `qcompile analyze` needs of a model: its graphs, stats of its activations, a plan, and how good a plan is."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from qcompile.backends.fx.door import open_dynamo
from qcompile.backends.fx.dynamo import parameters
from qcompile.backends.fx.graph import FxGraph
from qcompile.binding import Binding
from qcompile.errors import CalibrationError
from qcompile.folds import Fold
from qcompile.graph import Op
from qcompile.numerics import snr_db
from qcompile.observers import Part, Stats, merge, observe
from qcompile.outliers import Group
from qcompile.passes.detect_outliers import outlier_groups
from qcompile.plan import Plan, make_plan
from qcompile.recipe import Recipe
from qcompile.sites import Found, LeftOver, Site, find_sites, left_over

Batch = Mapping[str, Tensor]
# frames of one model that differ in shapes and plans
FRAMES = 64


@dataclass(frozen=True, kw_only=True)
class Examined:
    """A model seen through its graphs while it ran on data.

    sites: with weights. left: weights that no site reads. groups: of sites by what they read, with stats.
    plan: bound to the model. folds: that it assumes. smoothable: sites before which a scale can be folded away, None if
    not known.
    """

    sites: tuple[Site, ...]
    left: tuple[LeftOver, ...]
    groups: tuple[Group, ...]
    plan: Plan
    folds: tuple[Fold, ...] = ()
    smoothable: frozenset[str] | None = None


def examine(model: nn.Module, batches: Iterable[Batch], recipe: Recipe) -> Examined:
    """Run the float model on data and make a plan for it.

    Raises CalibrationError without batches, or if an activation is NaN or Inf, and what `make_plan` raises.
    """
    watch = _Watch(binding=Binding(model))
    torch._dynamo.reset()
    with torch.no_grad(), torch._dynamo.config.patch(recompile_limit=FRAMES):
        run = torch.compile(model, backend=watch.receive)
        for batch in batches:
            watch.mask = batch.get("attention_mask")
            run(**batch)
    torch._dynamo.reset()
    if not watch.stats:
        raise CalibrationError("no linear of the model was reached: give at least one batch of data")
    groups = {group.sites: group for graph in watch.graphs for group in outlier_groups(graph, watch.stats)}
    plan = make_plan(list(watch.sites.values()), recipe, watch.stats, watch.left.values())
    return Examined(
        sites=tuple(watch.sites.values()),
        left=tuple(watch.left.values()),
        groups=tuple(groups.values()),
        plan=plan.bind(model),
    )


def output_snr(model: nn.Module, batches: Sequence[Batch]) -> Callable[[Plan], float]:
    """A measure of plans: signal to noise in dB of the model's first output on these batches, padding left out."""
    with torch.no_grad():
        expected = [_real(model(**batch), batch) for batch in batches]

    def measure(plan: Plan) -> float:
        torch._dynamo.reset()
        options = {"plan": plan, "lower": False}
        with torch.no_grad(), torch._dynamo.config.patch(recompile_limit=FRAMES):
            run = torch.compile(model, backend="qcompile", options=options)  # type: ignore[arg-type]
            found = [_real(run(**batch), batch) for batch in batches]
        torch._dynamo.reset()
        return snr_db(torch.cat(expected), torch.cat(found))

    return measure


@dataclass(kw_only=True)
class _Watch:
    """A torch.compile backend that runs the float graph and keeps stats of what sites read."""

    binding: Binding
    graphs: list[FxGraph] = field(default_factory=list)
    sites: dict[str, Site] = field(default_factory=dict)
    left: dict[str, LeftOver] = field(default_factory=dict)
    stats: dict[str, Stats] = field(default_factory=dict)
    mask: Tensor | None = None

    def receive(self, gm: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        slots = parameters(gm, inputs)
        names = {s.placeholder: next(iter(self.binding.name_of(inputs[s.position])), s.name) for s in slots}
        graph = open_dynamo(gm, {s.placeholder: (names[s.placeholder], inputs[s.position]) for s in slots})
        weights = {s.position for s in slots}
        found = [f for f in find_sites(graph) if f.site.op is Op.LINEAR]
        self.graphs.append(graph)
        for f in find_sites(graph):
            self.sites.setdefault(f.site.name, f.site)
        for weight in left_over(graph):
            self.left.setdefault(weight.name, weight)
        watched = {_read(graph, f) for f in found}

        def run(*args: Any) -> Any:
            given = [arg for i, arg in enumerate(args) if i not in weights]
            result, seen = graph.run(given, list(watched))
            self._observe(graph, found, seen)
            return result

        return run

    def _observe(self, graph: FxGraph, found: Sequence[Found[Node]], seen: Mapping[Node, Tensor]) -> None:
        known: dict[Node, Stats] = {}
        for f in found:
            x, name = _read(graph, f), f.site.name
            if x not in known:
                known[x] = observe(self._rows(seen[x]), parts=Part.TENSOR | Part.CHANNELS)
            if not known[x].is_finite:
                raise CalibrationError(f"the input of {name!r} held NaN or Inf: check the data and the model's weights")
            self.stats[name] = merge(self.stats[name], known[x]) if name in self.stats else known[x]

    def _rows(self, x: Tensor) -> Tensor:
        """Rows [R, K] that are no padding."""
        if self.mask is None or x.shape[:-1] != self.mask.shape:
            return x.reshape(-1, x.shape[-1])
        return x[self.mask.bool()]


def _read(graph: FxGraph, found: Found[Node]) -> Node:
    x = graph.inputs(found.value)[0]
    assert x is not None, "a linear reads an activation"
    return x


def _real(output: Any, batch: Batch) -> Tensor:
    """The first tensor of an output, rows of padding left out, [R, ...]."""
    tensor: Tensor = next(iter(output.values())) if isinstance(output, Mapping) else output[0]
    mask = batch.get("attention_mask")
    if mask is None or tensor.shape[: mask.dim()] != mask.shape:
        return tensor.flatten(0, 1)
    return tensor[mask.bool()]
