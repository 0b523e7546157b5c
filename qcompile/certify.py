"""The agreement certificate: one plan, run by PyTorch and by onnxruntime, makes the same of the same inputs."""

import inspect
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import onnx_ir as ir
import onnxruntime as ort
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from qcompile.artifact import load
from qcompile.backends.onnx.exact import exact_session, finds_scales, rounds_inputs
from qcompile.backends.onnx.export import named_results
from qcompile.backends.onnx.feeds import inputs_of, to_feed
from qcompile.backends.onnx.files import read_model
from qcompile.backends.onnx.prove import RUNTIME, numeric_outputs, outputs
from qcompile.backends.onnx.runtime import start
from qcompile.compile import reference, report
from qcompile.errors import CalibrationError, PlanError, UnsupportedError
from qcompile.plan import Plan
from qcompile.report import Report
from qcompile.report.comparison import Agreement, Differences, OutputAgreement, OutputError
from qcompile.watch import evaluating, mask_of

Batch = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class _Bound:
    """How far the two may be apart, in units of the plan's own error against float, and why."""

    factor: float
    why: str


# what a wrong file does is as large as the plan's own error; without rounded inputs 1e-3 of it was the most seen
_SUMS = _Bound(factor=0.1, why="only sums are taken in another order")
# A sum in another order moves an input across a tie, and what follows is rounded anew, the more the deeper the model:
# in the end two independent errors, sqrt(2) apart. All-MiniLM's 24 rounded inputs in a row reach 0.5
_TIES = _Bound(factor=1.5, why="sums in another order move inputs across ties, and what follows is rounded anew")
# 8 bits around zero are up to twice as coarse as planned: errors e and 2e, independent, are sqrt(5) e apart
_OWN_SCALES = _Bound(factor=4.0, why="onnxruntime finds the scales of inputs itself")


def agreement(
    model: nn.Module | ExportedProgram, plan: Plan | str | Path, path: str | Path, batches: Iterable[Batch]
) -> Agreement:
    """Whether a quantized ONNX file computes in onnxruntime what the plan it was made by computes in PyTorch.

    model: the float model that the file's source was exported from.  plan: or the folder where `qcompile.save` put it.
    batches: of inputs by the names of the file's inputs, which are those of the model's arguments, or in their order.
    For each output both results stand beside each other and beside the float model's. They agree if they differ by
    less than the plan's own error allows: a tenth of it where inputs stay float, 1.5 times where they are rounded, and
    4 times where onnxruntime finds their scales itself; `Agreement.why` says which, and why. Kernels that would round
    the inputs of narrow weights do not in this run: the plan does not either.
    Raises ModelError for a broken file, PlanError if the plan is not of this model, CalibrationError for batches that
    do not fit or none, UnsupportedError for a model whose outputs are not those of the file.
    """
    module: nn.Module = model.module() if isinstance(model, ExportedProgram) else getattr(model, "_orig_mod", model)
    file = read_model(path, quantized=True)
    plan = plan if isinstance(plan, Plan) else load(plan, module)
    quantized = {name: decision for name, decision in plan.decisions.items() if decision.weight is not None}
    rounded = any(decision.input is not None for decision in quantized.values())
    bound = _OWN_SCALES if finds_scales(file) else _TIES if rounded else _SUMS
    fast = start(Path(path), repr(str(path)))
    count = 0
    # what was exported knows no modes
    mode = nullcontext() if isinstance(model, ExportedProgram) else evaluating(module)
    bound_plan = replace(plan, decisions=quantized).bind(module)
    with exact_session(file, repr(str(path))) as exact, mode, reference(module, bound_plan) as planned:
        sides = _Sides(
            module=module, keywords=_keywords(model), bound=bound, planned=planned, file=file, fast=fast, exact=exact
        )
        for count, batch in enumerate(batches, start=1):
            sides.run(batch, count - 1)
    if not count:
        raise CalibrationError("there are no batches to compare PyTorch and onnxruntime on: give at least one")
    _require_all(quantized, report(planned))
    return Agreement(
        outputs=tuple(sides.agreements()),
        batches=count,
        runtimes=f"PyTorch {torch.__version__} and {RUNTIME}",
        why=sides.why,
    )


@dataclass(kw_only=True, eq=False)
class _Sums:
    """Of one output: the two sides from each other, and each from float.  floor: rounding of its dtype may do that."""

    floor: float
    between: Differences = field(default_factory=Differences)
    torch: Differences = field(default_factory=Differences)
    file: Differences = field(default_factory=Differences)


@dataclass(kw_only=True, eq=False)
class _Sides:
    """One plan twice.

    keywords: arguments of the model that have names.  fast: a session of the file as it is, exact: one that rounds no
    more than the file says.
    """

    module: nn.Module
    keywords: Collection[str]
    bound: _Bound
    planned: Callable[..., Any]
    file: ir.Model
    fast: ort.InferenceSession
    exact: ort.InferenceSession
    sums: dict[str, _Sums] = field(default_factory=dict)

    @property
    def why(self) -> str:
        """What the bound is, for a reader."""
        kernels = "; kernels that round the inputs of narrow weights do not here" if rounds_inputs(self.file) else ""
        return f"{self.bound.factor:g} times the plan's own error: {self.bound.why}{kernels}"

    def run(self, batch: Batch, index: int) -> None:
        """Both sides and the float model on a batch."""
        names = numeric_outputs(self.fast)
        feed = to_feed(batch, inputs_of(self.file), index)
        given = {name: torch.as_tensor(batch[name]) for name in inputs_of(self.file)}
        with torch.no_grad():
            wanted, planned = (self._called(run, given, names) for run in (self.module, self.planned))
        fast = outputs(self.fast, names, feed, f"batch {index}")
        exact = outputs(self.exact, names, feed, f"batch {index}")
        mask = mask_of(batch)
        for name, x, y in zip(names, wanted, planned, strict=True):
            if exact[name].shape != x.shape:
                raise UnsupportedError(
                    f"output {name!r} of the file is {list(exact[name].shape)} on batch {index}, the model's is "
                    f"{list(x.shape)}: the file was exported from another model"
                )
            dtype = x.dtype if x.is_floating_point() else torch.float32
            sums = self.sums.setdefault(name, _Sums(floor=torch.finfo(dtype).eps ** 0.5))
            sums.torch.add(x, y, mask)
            sums.file.add(x, fast[name], mask)
            sums.between.add(y, exact[name], mask)

    def _called(self, run: Callable[..., Any], given: Mapping[str, Tensor], names: Sequence[str]) -> list[Tensor]:
        """Results in the order of the file's outputs."""
        if all(name in self.keywords for name in given):
            found = run(**given, **({"use_cache": False} if "use_cache" in self.keywords else {}))
        else:
            found = run(*given.values())
        results = list(named_results(found, type(self.module).__name__).values())
        if len(results) != len(names):
            raise UnsupportedError(
                f"{type(self.module).__name__} gives {len(results)} tensors, and the file {len(names)}: "
                f"{', '.join(names)}; give the model that the file was exported from"
            )
        return results

    def agreements(self) -> Iterable[OutputAgreement]:
        """Of all batches, output by output."""
        for name, sums in self.sums.items():
            between, planned, file = (one.error(name) for one in (sums.between, sums.torch, sums.file))
            yield OutputAgreement(
                name=name,
                largest=_share(between),
                between_db=between.snr_db,
                torch_db=planned.snr_db,
                file_db=file.snr_db,
                distance=between.relative,
                # where the reference itself has lost its numbers, nothing is close to it
                bound=max(self.bound.factor * planned.relative, sums.floor) if math.isfinite(planned.relative) else 0.0,
            )


def _require_all(planned: Collection[str], found: Report) -> None:
    """Raise PlanError if PyTorch did not quantize all that was planned."""
    absent = sorted(set(planned) - {site.name for site in found.quantized})
    if absent:
        raise PlanError(
            f"PyTorch quantized {len(planned) - len(absent)} of the {len(planned)} sites of the plan, and not "
            f"{absent[0]!r}: the plan was made on another graph, or torch.compile does not see all of the model"
        )


def _keywords(model: nn.Module | ExportedProgram) -> Collection[str]:
    if isinstance(model, ExportedProgram):
        # it takes by name what it was exported with by name, and nothing else
        return model.example_inputs[1] if model.example_inputs else ()
    return inspect.signature(model.forward).parameters


def _share(error: OutputError) -> float:
    return error.largest / error.peak if error.peak else error.largest
