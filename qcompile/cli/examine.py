"""What `qcompile analyze` needs of a model: its sites, stats of its activations, a plan, and how good a plan is."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from qcompile.calibrate import parts_for, require_data
from qcompile.errors import CalibrationError
from qcompile.methods import check_methods
from qcompile.numerics import snr_db
from qcompile.observers import Part
from qcompile.outliers import Group
from qcompile.plan import Plan, make_plan
from qcompile.prepare import prepare
from qcompile.recipe import Recipe
from qcompile.sites import LeftOver, Site
from qcompile.watch import watch

Batch = Mapping[str, Tensor]
# frames of one model that differ in shapes and plans
FRAMES = 64


@dataclass(frozen=True, kw_only=True)
class Examined:
    """A model seen through its graphs while it ran on data.

    sites: with weights. left: weights that no site reads. groups: of sites by what they read, with stats.
    plan: bound to the model. smoothable: of sites before which a scale can be folded away, channels that share one.
    """

    sites: tuple[Site, ...]
    left: tuple[LeftOver, ...]
    groups: tuple[Group, ...]
    plan: Plan
    smoothable: Mapping[str, Tensor] = field(default_factory=dict)


def examine(model: nn.Module, batches: Iterable[Batch], recipe: Recipe) -> Examined:
    """Run the float model on data and make a plan for it, as `qcompile.calibrate` does, and keep what it saw.

    Raises what `qcompile.calibrate` raises, and CalibrationError for a solver that is run while the model runs.
    """
    check_methods(recipe)
    if recipe.solves_in_turn:
        raise CalibrationError(
            f"recipe {recipe.name!r} chooses codes while the model runs, and each advice would have them chosen anew: "
            "analyze the same specs with solver = 'imatrix'"
        )
    # advice is found from the histograms of channels
    seen = watch(model, batches, parts_for(recipe) | Part.CHANNELS)
    require_data(recipe, seen)
    prepared = prepare(model, seen, recipe, trace=True)
    sites = tuple(seen.sites.values())
    plan = make_plan(sites, recipe, prepared.stats, seen.left, prepared=prepared.decided)
    return Examined(
        sites=sites,
        left=tuple(seen.left),
        groups=tuple(prepared.groups),
        plan=replace(plan, outliers=prepared.outliers).bind(model),
        smoothable=prepared.foldable,
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


def _real(output: Any, batch: Batch) -> Tensor:
    """The first tensor of an output, rows of padding left out, [R, ...]."""
    tensor: Tensor = next(iter(output.values())) if isinstance(output, Mapping) else output[0]
    mask = batch.get("attention_mask")
    if mask is None or tensor.shape[: mask.dim()] != mask.shape:
        return tensor.flatten(0, 1)
    return tensor[mask.bool()]
