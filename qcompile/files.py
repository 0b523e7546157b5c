"""ONNX in, quantized ONNX out: the same passes, plans and recipes as for torch.compile, on files."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from itertools import islice
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from qcompile import pipeline
from qcompile.backends.onnx.calibrate import watch_onnx
from qcompile.backends.onnx.door import open_onnx
from qcompile.backends.onnx.emit import TARGETS, emit
from qcompile.backends.onnx.feeds import inputs_of, to_feed
from qcompile.backends.onnx.files import read_model, require_place, write_model
from qcompile.backends.onnx.graph import OnnxGraph
from qcompile.backends.onnx.opsets import raised
from qcompile.backends.onnx.planned import Kernels, as_written
from qcompile.backends.onnx.prove import HeldOut, Proof, numeric_outputs, outputs, prove
from qcompile.backends.onnx.runtime import exact_sums_of, session
from qcompile.calibrate import parts_for
from qcompile.errors import CalibrationError, CoverageError, OptionsError, PlanError, UnsupportedError, nearest
from qcompile.expected import expected_report
from qcompile.graph import Op
from qcompile.methods import check_methods
from qcompile.observers import Part, Stats, merge
from qcompile.outliers import outlier_notes
from qcompile.passes.fold_batch_norm import fold_batch_norm
from qcompile.plan import Plan, make_plan
from qcompile.prepare import prepare_graphs
from qcompile.presets import parse_recipe
from qcompile.progress import shown
from qcompile.recipe import Recipe
from qcompile.report import Report
from qcompile.report.comparison import Agreement
from qcompile.sites import CHANNEL_AXIS, SITE_OPS, find_sites, left_over, result_of
from qcompile.watch import Seen, first_rows

Batch = Mapping[str, Any]
# sites that a note names
NAMED = 3
# batches that a certificate is made on: plain PyTorch is slow, and a wrong file shows on the first
CERTIFIED = 4
# sides of a site
_INPUT, _RESULT = "input", "result"


@dataclass(frozen=True, kw_only=True, eq=False)
class _Opened:
    """A file's graph, to be opened as often as wanted, with inputs that it takes."""

    model: ir.Model
    args: Sequence[Any] = ()

    def open(self) -> OnnxGraph:
        """A plan is about the weights that batch norms were folded into."""
        graph = open_onnx(self.model)
        fold_batch_norm(graph)
        graph.prune()
        return graph


def quantize_onnx(
    source: str | Path,
    target_path: str | Path,
    recipe: str | Path | Mapping[str, Any] | Recipe | Plan = "int8",
    *,
    batches: Iterable[Batch] | None = None,
    held_out: Iterable[Batch] | None = None,
    model: nn.Module | ExportedProgram | None = None,
    example: Batch | None = None,
    target: str = "ort-cpu",
    min_coverage: float = 0.0,
    failures: str | Path | None = None,
    progress: bool = True,
) -> Report:
    """Quantize an ONNX file into another one, and tell what became of every weight.

    source: a float model; it is never changed. target_path: the file to write, whole or not at all.
    recipe: see `parse_recipe`, or a Plan, for example one made on the PyTorch model that the file was exported from.
    batches: of inputs, tensors or arrays by the names of the model's inputs, for recipes that need data; rows that an
        attention_mask [B, T] calls padding are not counted. Beside a Plan calibration does not run them, and a note
        says so.
    held_out: batches that calibration does not see, on which the file's outputs are compared with the float model's;
        without them that is done on the last of `batches`, and the report says so.
    model: the PyTorch model that the source was exported from. The report then holds a certificate, made on the first
        of the same batches, or on `example` where there are none (see `qcompile.certify.agreement`).
    target: who runs the file: "ort-cpu", "ort-cuda", "tensorrt", or "portable" (standard operators alone).
    min_coverage: share of the weight bytes that has to be quantized, 0 to 1.
    failures, progress: see `qcompile.calibrate`.
    Before the file gets its name it is read back and checked. For ort-cpu a session is built, and each kernel that was
    planned has to be in it; outputs may not be NaN or Inf where the float model's are numbers, nor differ from the
    model's under the same plan by more than the certificate allows.
    Raises ModelError for a broken or quantized source and a path that cannot be written, UnsupportedError for what the
    target cannot run and for outputs that are not as said, CalibrationError without data that is needed, CoverageError,
    and what `make_plan` raises; nothing is written then.
    """
    if target not in TARGETS:
        raise UnsupportedError(f"unknown target {target!r}; nearest: {nearest(target, TARGETS)}")
    if not 0 <= min_coverage <= 1:
        raise OptionsError(f"min_coverage is a share from 0 to 1, got {min_coverage}")
    for name, given in (("batches", batches), ("held_out", held_out)):
        if isinstance(given, Mapping | Tensor | str):
            raise CalibrationError(f"{name} is one {type(given).__name__}, not a collection of batches: write [batch]")
    float_model = read_model(source)
    # before data is run for a file that cannot be written
    require_place(Path(target_path), float_model, Path(source))
    said = list(_with_defaults(float_model))
    if isinstance(recipe, Plan) and batches is not None:
        said.append("the plan was made before, and is taken as it is: the batches did not change it")
    float_model = raised(float_model)
    graph = _Opened(model=float_model).open()
    ends = None if batches is None else _Ends(shown(batches, progress=progress))
    if not isinstance(recipe, Plan):
        recipe, asked = _adapted(parse_recipe(recipe), target)
        said += asked
    plan = recipe if isinstance(recipe, Plan) else _planned(float_model, graph, recipe, ends, failures)
    sites, left = [found.site for found in find_sites(graph, SITE_OPS)], list(left_over(graph, SITE_OPS))
    multiplications = list(pipeline.multiplications(graph, plan))
    noise: dict[str, float] = {}
    applied = pipeline.quantize(graph, plan, noise=noise, ops=SITE_OPS)
    emitted = emit(graph.model, target)
    expected = expected_report(applied, sites, left, device=target, noise=noise)
    report = as_written(expected, emitted, Kernels())
    if report.coverage < min_coverage:
        raise CoverageError(
            f"{report.coverage:.1%} of the weight bytes of {str(source)!r} are quantized, {min_coverage:.1%} were "
            "demanded: the report says why each of the others is left alone"
        )
    held = _held_out(held_out, ends)
    certify = None if model is None else _certifier(model, applied, held, example)
    found: list[tuple[Proof, Agreement | str | None]] = []

    def look(new: Path) -> None:
        seen = None if held is None else replace(held, batches=shown(held.batches, progress=progress, what="compare"))
        proof = prove(new, emitted, Path(source), seen)
        found.append((proof, None if certify is None else certify(new)))

    write_model(emitted.model, target_path, source=source, prove=look)
    proof, certificate = found[0]
    outliers = () if applied.outliers is None else outlier_notes(applied.outliers)
    report = as_written(expected, emitted, proof.kernels)
    notes = (*report.notes, *said, *multiplications, *outliers, *_joined(emitted.notes), *_counted(proof.kernels))
    notes = (*notes, *_served(emitted.model, target))
    if isinstance(certificate, str):
        return replace(report, notes=(*notes, certificate), comparison=proof.comparison)
    return replace(report, notes=notes, comparison=proof.comparison, agreement=certificate)


def _served(model: ir.Model, target: str) -> Iterator[str]:
    """What whoever serves the file must know."""
    settings = exact_sums_of(model, target) if target in ("ort-cpu", "portable") else {}
    if settings:
        entries = ", ".join(f"{key} = {value}" for key, value in settings.items())
        yield (
            "this CPU has no VNNI, and onnxruntime's sums of products of bytes overflow here: give sessions the config "
            f"entries {entries}, as was done for the comparison"
        )


def _adapted(recipe: Recipe, target: str) -> tuple[Recipe, list[str]]:
    """The recipe as the target takes it, and a note if that is another."""
    adapt = TARGETS[target].adapt
    taken = recipe if adapt is None else adapt(recipe)
    if taken == recipe:
        return recipe, []
    rescued = any(rule.rescued is not None for rule in recipe.rules)
    return taken, [
        f"target {target!r} takes no zero points, nor scales found while running: inputs are symmetric"
        + (", and where that is poor none is of another spec" if rescued else "")
    ]


def _held_out(given: Iterable[Batch] | None, ends: "_Ends | None") -> HeldOut | None:
    """The batches to compare outputs on: those that calibration did not see, or the last that it was given."""
    if given is not None:
        return HeldOut(batches=list(given))
    if ends is None:
        return None
    ends.drain()
    return HeldOut(batches=[ends.last], seen=True) if ends.count else None


def _certifier(
    model: nn.Module | ExportedProgram, plan: Plan, held: HeldOut | None, example: Batch | None
) -> Callable[[Path], Agreement | str]:
    """What makes the certificate of a written file, or says why there is none.

    Raises UnsupportedError if the two disagree.
    """
    # the compiler takes a second to import, and a file without a model beside it does without
    from qcompile.certify import agreement

    batches = list(islice(held.batches, CERTIFIED)) if held is not None else [] if example is None else [example]

    def certify(path: Path) -> Agreement | str:
        if not batches:
            return "no agreement certificate: no inputs were at hand; give held_out batches, or an example"
        try:
            certificate = agreement(model, plan, path, batches)
        except (PlanError, UnsupportedError) as e:
            return f"no agreement certificate: {e}"
        if not certificate.agrees:
            raise UnsupportedError(f"{certificate}; the file was not kept: report the model and the recipe")
        return certificate

    return certify


def _counted(kernels: Kernels) -> Iterator[str]:
    """A note on the kernels that run the sites."""
    ran = sorted({kernel for several in kernels.by_site.values() for kernel in several})
    counted = ", ".join(f"{kernels.counts[kernel]} {kernel}" for kernel in ran if kernels.counts[kernel])
    if counted:
        yield f"kernels in onnxruntime's session: {counted}"


def _with_defaults(model: ir.Model) -> Iterator[str]:
    """A note on inputs with a default, which are constants in the file that is written."""
    names = [repr(name) for name, value in inputs_of(model).items() if value.is_initializer()]
    if names:
        more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
        yield f"inputs with a default keep it as a constant, and cannot be fed: {', '.join(names[:NAMED])}{more}"


def _planned(
    model: ir.Model, graph: OnnxGraph, recipe: Recipe, batches: "_Ends | None", failures: str | Path | None
) -> Plan:
    """A plan for the graph, with what the batches show if there are any."""
    check_methods(recipe)
    if recipe.solves_in_turn or recipe.budgets or recipe.weighs_features:
        raise CalibrationError(
            f"recipe {recipe.name!r} chooses codes, widths or formats while the PyTorch model runs: make a plan with "
            "qcompile.calibrate(model, batches, recipe) on the model that the file was exported from, and give it in "
            "place of the recipe"
        )
    sites = [found.site for found in find_sites(graph, SITE_OPS)]
    left = list(left_over(graph, SITE_OPS))
    if batches is None:
        if recipe.needs_data:
            raise CalibrationError(
                f"recipe {recipe.name!r} needs data: give batches of the model's inputs "
                f"({', '.join(repr(v.name) for v in graph.model.graph.inputs)}), or take a recipe that needs none"
            )
        return make_plan(sites, recipe, left=left)
    stats, results = _stats(graph, batches, parts_for(recipe))
    seen = Seen(
        sites={site.name: site for site in sites}, stats=stats, left=left, batches=batches.count, example=batches.first
    )
    if not recipe.prepares:
        return make_plan(sites, recipe, stats, left, results=results)
    example = {name: torch.as_tensor(x) for name, x in batches.first.items()}
    if not any(isinstance(value.shape[0], int) for value in graph.model.graph.inputs if value.shape):
        example = first_rows(example)
    args = [example[str(value.name)] for value in graph.model.graph.inputs]
    prepared = prepare_graphs([_Opened(model=model, args=args)], seen, recipe, failures=failures)
    plan = make_plan(sites, recipe, prepared.stats, left, prepared=prepared.decided, results=results)
    return replace(plan, outliers=prepared.outliers)


def _stats(graph: OnnxGraph, batches: Iterable[Batch], parts: Part) -> tuple[dict[str, Stats], dict[str, Stats]]:
    """Stats of the inputs of sites, and of the results of convolutions, by site.

    Sites that always read the same share one object; a result that the model returns has none.
    """
    read: dict[tuple[str, str], dict[str, ir.Value]] = {}
    axes: dict[str, int] = {}
    returned = graph.outputs()
    for found in find_sites(graph, SITE_OPS):
        x, result = graph.inputs(found.value)[0], result_of(graph, found.value)
        axis = CHANNEL_AXIS.get(found.site.op)
        watched = [] if axis is None or x is None else [(_INPUT, x)]
        if found.site.op is Op.CONV and result not in returned:
            watched.append((_RESULT, result))
        for side, value in watched:
            key = f"{value.name} {axis}"
            # a module that is called several times reads several activations
            read.setdefault((side, found.site.name), {})[key] = value
            axes[key] = axis or -1
    values = {key: value for one in read.values() for key, value in one.items()}
    # what is watched is the graph that will be quantized, in operators that onnxruntime knows
    stats = watch_onnx(emit(graph.model, "portable").model, values, batches, parts, axes)
    merged: dict[tuple[str, ...], Stats] = {}
    by_site: dict[str, dict[str, Stats]] = {_INPUT: {}, _RESULT: {}}
    for (side, site), named in read.items():
        names = tuple(name for name in named if name in stats)
        if names:
            by_site[side][site] = merged.setdefault(names, reduce(merge, (stats[name] for name in names)))
    return by_site[_INPUT], by_site[_RESULT]


def _joined(notes: Iterable[str]) -> Iterator[str]:
    """Notes that begin with a site's name, those that say the same of several sites as one."""
    sites: dict[str, list[str]] = {}
    for note in notes:
        site, _, text = note.partition(": ")
        sites.setdefault(text, []).append(site)
    for text, named in sites.items():
        more = f" and {len(named) - NAMED} more" if len(named) > NAMED else ""
        yield f"{', '.join(named[:NAMED])}{more}: {text}"


class _Ends:
    """Batches that are looked at once, of which the first that is not empty and the last are kept."""

    def __init__(self, batches: Iterable[Batch]) -> None:
        self._batches = iter(batches)
        self.count = 0
        self.first: Batch = {}
        self.last: Batch = {}

    def __iter__(self) -> Iterator[Batch]:
        for batch in self._batches:
            if self.count == 0 or not any(torch.as_tensor(x).numel() for x in self.first.values()):
                self.first = batch
            self.last = batch
            self.count += 1
            yield batch

    def drain(self) -> None:
        """Look at what nobody asked for yet."""
        deque(self, maxlen=0)


def run_onnx(path: str | Path, batches: Iterable[Batch]) -> Iterator[dict[str, Tensor]]:
    """What onnxruntime's CPU makes of each batch, by name of numeric output.  path: a float or quantized model.

    Raises ModelError for a broken file, CalibrationError for batches that do not fit it.
    """
    model = read_model(path, quantized=True)
    inputs = inputs_of(model)
    with session(model, repr(str(path))) as running:
        names = numeric_outputs(running)
        if not names:
            raise CalibrationError(f"{str(path)!r} has no output of numbers: there is nothing to compare")
        for index, batch in enumerate(batches):
            yield outputs(running, names, to_feed(batch, inputs, index), f"batch {index}")
