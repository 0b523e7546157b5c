"""After emitting: whether a file is sound, fused as planned, and near the float model, before it gets its name."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx_ir as ir
import onnxruntime as ort
import torch
from torch import Tensor

from qcompile.backends.onnx.feeds import Array, inputs_of, to_feed
from qcompile.backends.onnx.files import read_model
from qcompile.backends.onnx.fusion import check_fusion
from qcompile.backends.onnx.planned import Emitted, Kernels
from qcompile.backends.onnx.runtime import exact_sums_of, results_of, start
from qcompile.errors import CalibrationError, ModelError, UnsupportedError
from qcompile.report.comparison import Comparison, Differences
from qcompile.watch import mask_of

RUNTIME = f"onnxruntime {ort.__version__} on the CPU"
_NO_DATA = (
    "no inputs were at hand; give batches that calibration does not see: held_out, --held-out of `qcompile quantize`, "
    "or --data of `qcompile export`"
)


@dataclass(frozen=True, kw_only=True, eq=False)
class HeldOut:
    """Inputs to compare outputs on.  seen: calibration may have known them."""

    batches: Iterable[Mapping[str, Any]]
    seen: bool = False


@dataclass(frozen=True, kw_only=True, eq=False)
class Proof:
    """kernels: of onnxruntime's session, looked at for a target that it fuses for."""

    comparison: Comparison
    kernels: Kernels = field(default_factory=Kernels)


def prove(path: Path, emitted: Emitted, source: Path, held_out: HeldOut | None) -> Proof:
    """What can be said for a written file, unless something speaks against it.

    source: of the float model.  Raises ModelError if what was written is not sound, has other inputs or outputs, or
    gives NaN or Inf where the float model gives numbers; UnsupportedError if a planned kernel does not appear, or
    onnxruntime cannot run a file that is meant for it; CalibrationError for inputs that do not fit.
    """
    check_written(path, emitted.target, source)
    fuses = emitted.target == "ort-cpu"
    kernels = check_fusion(emitted, path) if fuses else Kernels()
    if fuses and held_out is None:
        return Proof(kernels=kernels, comparison=Comparison(reason=_NO_DATA))
    try:
        sums = exact_sums_of(emitted.model, emitted.target)
        running = start(path, f"the file for {emitted.target}", quiet=not fuses, sums=sums)
        comparison = Comparison(reason=_NO_DATA) if held_out is None else _compared(running, source, held_out)
    except UnsupportedError as e:
        # of the targets, it is onnxruntime's CPU alone that has to run what is here
        if fuses:
            raise
        comparison = Comparison(reason=f"{e}; compare them where the file is meant to run")
    return Proof(kernels=kernels, comparison=comparison)


def check_written(path: Path, target: str, source: Path) -> None:
    """Raise ModelError if a quantized file is broken, or takes or gives other values than the float file."""
    try:
        written = read_model(path, quantized=True)
    except ModelError as e:
        raise ModelError(
            f"what was written for target {target!r} is broken, and was not kept: {e}; report the model and the "
            "recipe that show this"
        ) from e
    model = read_model(source)
    for what in ("inputs", "outputs"):
        wanted, found = (_interface(getattr(one.graph, what)) for one in (model, written))
        if wanted != found:
            raise ModelError(
                f"the {what} of what was written for target {target!r} are {found}, those of {str(source)!r} are "
                f"{wanted}; it was not kept: report the model and the recipe that show this"
            )


def _interface(values: Iterable[ir.Value]) -> list[tuple[str | None, str, int | None]]:
    """Names, types and ranks, save of inputs with a default, which become constants."""
    held = [v for v in values if not v.is_initializer()]
    return [(v.name, str(v.dtype), None if v.shape is None else len(v.shape)) for v in held]


def _compared(running: ort.InferenceSession, source: Path, held_out: HeldOut) -> Comparison:
    inputs = inputs_of(read_model(source))
    names = numeric_outputs(running)
    sums = {name: Differences() for name in names}
    try:
        original = start(source, repr(str(source)))
    except UnsupportedError as e:
        return Comparison(reason=str(e))
    count = 0
    for count, batch in enumerate(held_out.batches, start=1):
        feed = to_feed(batch, inputs, count - 1)
        where = f"batch {count - 1} of those held out"
        wanted = outputs(original, names, feed, where)
        try:
            found = outputs(running, names, feed, where)
        except CalibrationError as e:
            raise UnsupportedError(f"the quantized file fails where the float file runs: {e}") from e
        for name, sum_ in sums.items():
            require_finite(wanted[name], found[name], f"output {name!r} on {where}")
            sum_.add(wanted[name], found[name], mask_of(batch))
    if not count:
        raise CalibrationError(
            "held_out is empty: give at least one batch (an iterator that was used up is empty, too)"
        )
    found_errors = tuple(sum_.error(name) for name, sum_ in sums.items())
    return Comparison(outputs=found_errors, batches=count, seen=held_out.seen, runtime=RUNTIME)


def numeric_outputs(running: ort.InferenceSession) -> list[str]:
    """The names of outputs that are tensors of numbers."""
    return [o.name for o in running.get_outputs() if o.type.startswith("tensor(") and "string" not in o.type]


def outputs(
    running: ort.InferenceSession, names: list[str], feed: Mapping[str, Array], where: str
) -> dict[str, Tensor]:
    """What a session makes of a feed, by name.  Raises what `results_of` raises."""
    results = results_of(running, names, feed, where)
    return {name: torch.as_tensor(result) for name, result in zip(names, results, strict=True)}


def require_finite(wanted: Tensor, found: Tensor, where: str) -> None:
    """Raise ModelError if a quantized output has another shape, or NaN or Inf where the float one has numbers."""
    if wanted.shape != found.shape:
        raise ModelError(
            f"{where} is {list(found.shape)} in the quantized file and {list(wanted.shape)} in the float file; it was "
            "not kept: report the model and the recipe that show this"
        )
    lost = int((wanted.isfinite() & ~found.isfinite()).sum())
    if lost:
        raise ModelError(
            f"{lost} of {found.numel()} values of {where} are NaN or Inf in the quantized file and numbers in the "
            "float file; it was not kept: leave sites out by rules without specs until the one that does it is found"
        )
