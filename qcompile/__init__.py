"""A quantizing graph compiler for PyTorch.

`torch.compile(model, backend="qcompile")` needs no import of this package; `qcompile.report` tells what it did.
"""

from pathlib import Path
from typing import Any

from torch.nn import Module

from qcompile import artifact, readers
from qcompile.calibrate import calibrate
from qcompile.errors import PlanError, QcompileError
from qcompile.plan import Plan
from qcompile.recipe import Recipe, Rule
from qcompile.report import Report
from qcompile.report.comparison import Agreement
from qcompile.spec import Spec, parse_spec

__all__ = [
    "Plan",
    "QcompileError",
    "Recipe",
    "Report",
    "Rule",
    "Spec",
    "agreement",
    "calibrate",
    "load",
    "parse_spec",
    "quantize_onnx",
    "report",
    "save",
]


def report(compiled: Any) -> Report:
    """What became of a compiled model: every site, what runs it, what it cost and what it saved.

    See `qcompile.compile.report`.
    """
    # the compiler takes a second to import, and a program that only calibrates does without it
    from qcompile import compile

    return compile.report(compiled)


def save(model: Any, folder: str | Path, layout: str = "qcompile") -> None:
    """Write a plan, or a model that was compiled and called, to a folder, whole or not at all.

    Of a model, the folder holds the codes of its quantized weights and in float the rest, for `load`.
    layout: of a model, "compressed-tensors" writes what transformers and vLLM load.
    See `qcompile.artifact.save` and `qcompile.checkpoint.save_model`.
    """
    if isinstance(model, Plan):
        return artifact.save(model, folder)
    from qcompile import checkpoint

    return checkpoint.save_model(model, folder, layout)


def load(folder: str | Path, model: Any = None, device: Any = None) -> Plan:
    """The plan in a folder, bound to `model` if one is given; of a folder that holds a model, its tensors go into it.

    model: may be on meta, as `with torch.device("meta"): model = Model(config)` makes it.
    device: of its tensors; None: the CPU, or for a GGUF file, where they are.
    folder: of `save`, or a checkpoint of GPTQ, AWQ or compressed-tensors in a folder of Hugging Face, or a GGUF file; a
        model is needed for these, for the last one with memory of its own.
    What is not as `save` wrote it is refused: codes when the model is compiled, which reads them, everything else here.
    See `qcompile.artifact.load`, `qcompile.checkpoint.load_model`, `qcompile.checkpoint.load_checkpoint` and
    `qcompile.gguf.load_gguf`.
    """
    if Path(folder).is_file() and Path(folder).suffix == ".gguf":
        from qcompile import gguf

        return gguf.load_gguf(folder, model, device)
    if not isinstance(model, Module | None):
        raise PlanError(f"load takes the model that a plan is for, a torch.nn.Module, got {type(model).__name__}")
    if model is None or not (artifact.holds_model(folder) or readers.is_checkpoint(Path(folder))):
        return artifact.load(folder, model)
    from qcompile import checkpoint

    read = checkpoint.load_model if artifact.holds_model(folder) else checkpoint.load_checkpoint
    return read(folder, model, "cpu" if device is None else device)


def quantize_onnx(*args: Any, **kwargs: Any) -> Report:
    """Quantize an ONNX file into another one; see `qcompile.files.quantize_onnx`, which takes the same arguments."""
    # none of the ONNX libraries is needed for all else
    from qcompile import files

    return files.quantize_onnx(*args, **kwargs)


def agreement(*args: Any, **kwargs: Any) -> Agreement:
    """Whether an ONNX file computes what its plan does in PyTorch; see `qcompile.certify.agreement`."""
    from qcompile import certify

    return certify.agreement(*args, **kwargs)
