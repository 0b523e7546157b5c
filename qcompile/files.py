"""ONNX in, quantized ONNX out: the same passes, plans and recipes as for torch.compile, on files."""

import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor

from qcompile import pipeline
from qcompile.backends.onnx.calibrate import watch_onnx
from qcompile.backends.onnx.door import open_onnx
from qcompile.backends.onnx.emit import TARGETS, emit
from qcompile.backends.onnx.feeds import inputs_of, to_feed
from qcompile.backends.onnx.files import read_model, require_place, write_model
from qcompile.backends.onnx.fusion import check_fusion
from qcompile.backends.onnx.graph import OnnxGraph
from qcompile.backends.onnx.opsets import raised
from qcompile.backends.onnx.planned import Emitted, Kernels, as_written
from qcompile.backends.onnx.runtime import session
from qcompile.calibrate import parts_for
from qcompile.errors import CalibrationError, CoverageError, OptionsError, UnsupportedError, nearest
from qcompile.expected import expected_report
from qcompile.graph import Op
from qcompile.observers import Part, Stats, merge
from qcompile.outliers import outlier_notes
from qcompile.plan import Plan, check_methods, make_plan
from qcompile.prepare import prepare_graphs
from qcompile.presets import parse_recipe
from qcompile.recipe import Recipe
from qcompile.report import Report
from qcompile.sites import find_sites, left_over
from qcompile.watch import Seen, first_rows

Batch = Mapping[str, Any]
# sites that a note names
NAMED = 3


@dataclass(frozen=True, kw_only=True, eq=False)
class _Opened:
    """A file's graph, to be opened as often as wanted, with inputs that it takes."""

    model: ir.Model
    args: Sequence[Any] = ()

    def open(self) -> OnnxGraph:
        return open_onnx(self.model)


def quantize_onnx(
    source: str | Path,
    target_path: str | Path,
    recipe: str | Path | Mapping[str, Any] | Recipe | Plan = "int8",
    *,
    batches: Iterable[Batch] | None = None,
    target: str = "ort-cpu",
    min_coverage: float = 0.0,
    failures: str | Path | None = None,
) -> Report:
    """Quantize an ONNX file into another one, and tell what became of every weight.

    source: a float model; it is never changed. target_path: the file to write, whole or not at all.
    recipe: see `parse_recipe`, or a Plan, for example one made on the PyTorch model that the file was exported from.
    batches: of inputs, tensors or arrays by the names of the model's inputs, for recipes that need data; rows that an
        attention_mask [B, T] calls padding are not counted.  Beside a Plan they are not run, and a note says so.
    target: who runs the file: "ort-cpu", "ort-cuda", "tensorrt", or "portable" (standard operators alone).
    min_coverage: share of the weight bytes that has to be quantized, 0 to 1.  failures: see `qcompile.calibrate`.
    For ort-cpu a session is built, and each kernel that was planned has to be in it.
    Raises ModelError for a broken or quantized source and a path that cannot be written, UnsupportedError for what the
    target cannot run, CalibrationError without data that is needed, CoverageError, and what `make_plan` raises; nothing
    is written then.
    """
    if target not in TARGETS:
        raise UnsupportedError(f"unknown target {target!r}; nearest: {nearest(target, TARGETS)}")
    if not 0 <= min_coverage <= 1:
        raise OptionsError(f"min_coverage is a share from 0 to 1, got {min_coverage}")
    if isinstance(batches, Mapping | Tensor | str):
        raise CalibrationError(f"batches is one {type(batches).__name__}, not a collection of batches: write [batch]")
    model = read_model(source)
    # before data is run for a file that cannot be written
    require_place(Path(target_path), model, Path(source))
    said = list(_with_defaults(model))
    if isinstance(recipe, Plan) and batches is not None:
        said.append("the plan was made before, and is taken as it is: the batches were not run")
    model = raised(model)
    graph = open_onnx(model)
    plan = recipe if isinstance(recipe, Plan) else _planned(model, graph, parse_recipe(recipe), batches, failures)
    sites, left = [found.site for found in find_sites(graph)], list(left_over(graph))
    multiplications = list(pipeline.multiplications(graph, plan))
    noise: dict[str, float] = {}
    applied = pipeline.quantize(graph, plan, noise=noise)
    emitted = emit(graph.model, target)
    kernels = _checked(emitted) if target == "ort-cpu" else Kernels()
    report = as_written(expected_report(applied, sites, left, device=target, noise=noise), emitted, kernels)
    found = () if applied.outliers is None else outlier_notes(applied.outliers)
    ran = sorted({kernel for several in kernels.by_site.values() for kernel in several})
    counted = ", ".join(f"{kernels.counts[kernel]} {kernel}" for kernel in ran if kernels.counts[kernel])
    fused = [f"kernels in onnxruntime's session: {counted}"] if counted else []
    report = replace(report, notes=(*report.notes, *said, *multiplications, *found, *_joined(emitted.notes), *fused))
    if report.coverage < min_coverage:
        raise CoverageError(
            f"{report.coverage:.1%} of the weight bytes of {str(source)!r} are quantized, {min_coverage:.1%} were "
            "demanded: the report says why each of the others is left alone"
        )
    write_model(emitted.model, target_path, source=source)
    return report


def _with_defaults(model: ir.Model) -> Iterator[str]:
    """A note on inputs with a default, which are constants in the file that is written."""
    names = [repr(name) for name, value in inputs_of(model).items() if value.is_initializer()]
    if names:
        more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
        yield f"inputs with a default keep it as a constant, and cannot be fed: {', '.join(names[:NAMED])}{more}"


def _planned(
    model: ir.Model, graph: OnnxGraph, recipe: Recipe, batches: Iterable[Batch] | None, failures: str | Path | None
) -> Plan:
    """A plan for the graph, with what the batches show if there are any."""
    check_methods(recipe)
    sites = [found.site for found in find_sites(graph)]
    left = list(left_over(graph))
    if batches is None:
        if recipe.needs_data:
            raise CalibrationError(
                f"recipe {recipe.name!r} needs data: give batches of the model's inputs "
                f"({', '.join(repr(v.name) for v in graph.model.graph.inputs)}), or take a recipe that needs none"
            )
        return make_plan(sites, recipe, left=left)
    first = _First(batches)
    stats = _stats(graph, first, parts_for(recipe))
    seen = Seen(
        sites={site.name: site for site in sites}, stats=stats, left=left, batches=first.count, example=first.batch
    )
    if not recipe.prepares:
        return make_plan(sites, recipe, stats, left)
    example = {name: torch.as_tensor(x) for name, x in first.batch.items()}
    if not any(isinstance(value.shape[0], int) for value in graph.model.graph.inputs if value.shape):
        example = first_rows(example)
    args = [example[str(value.name)] for value in graph.model.graph.inputs]
    prepared = prepare_graphs([_Opened(model=model, args=args)], seen, recipe, failures=failures)
    plan = make_plan(sites, recipe, prepared.stats, left, prepared=prepared.decided)
    return replace(plan, outliers=prepared.outliers)


def _stats(graph: OnnxGraph, batches: Iterable[Batch], parts: Part) -> dict[str, Stats]:
    """Stats of the inputs of linears, by site; sites that always read the same share one object."""
    read: dict[str, dict[str, ir.Value]] = {}
    for found in find_sites(graph):
        x = graph.inputs(found.value)[0]
        if found.site.op is Op.LINEAR and x is not None:
            # a module that is called several times reads several activations
            read.setdefault(found.site.name, {})[str(x.name)] = x
    watched = {name: x for values in read.values() for name, x in values.items()}
    # what is watched is the graph that will be quantized, in operators that onnxruntime knows
    stats = watch_onnx(emit(graph.model, "portable").model, watched, batches, parts)
    merged: dict[tuple[str, ...], Stats] = {}
    by_site = {}
    for site, values in read.items():
        names = tuple(name for name in values if name in stats)
        if names:
            by_site[site] = merged.setdefault(names, reduce(merge, (stats[name] for name in names)))
    return by_site


def _checked(emitted: Emitted) -> Kernels:
    """The kernels of onnxruntime, those that were planned, found from a file as it will be written."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        write_model(emitted.model, path)
        return check_fusion(emitted, path)


def _joined(notes: Iterable[str]) -> Iterator[str]:
    """Notes that begin with a site's name, those that say the same of several sites as one."""
    sites: dict[str, list[str]] = {}
    for note in notes:
        site, _, text = note.partition(": ")
        sites.setdefault(text, []).append(site)
    for text, named in sites.items():
        more = f" and {len(named) - NAMED} more" if len(named) > NAMED else ""
        yield f"{', '.join(named[:NAMED])}{more}: {text}"


class _First:
    """Batches that are looked at once, of which the first is kept."""

    def __init__(self, batches: Iterable[Batch]) -> None:
        self._batches = batches
        self.count = 0
        self.batch: Batch = {}

    def __iter__(self) -> Any:
        for batch in self._batches:
            if self.count == 0:
                self.batch = batch
            self.count += 1
            yield batch


def run_onnx(path: str | Path, batches: Iterable[Batch]) -> Iterator[dict[str, Tensor]]:
    """What onnxruntime's CPU makes of each batch, by name of output.  path: a float or quantized model.

    Raises ModelError for a broken file, CalibrationError for batches that do not fit it.
    """
    model = read_model(path, quantized=True)
    inputs = inputs_of(model)
    with session(model, repr(str(path))) as running:
        names = [output.name for output in running.get_outputs()]
        for index, batch in enumerate(batches):
            results = running.run(None, to_feed(batch, inputs, index))
            yield {name: torch.from_numpy(result) for name, result in zip(names, results, strict=True)}
