"""A quantizing graph compiler for PyTorch.

`torch.compile(model, backend="qcompile")` needs no import of this package; `qcompile.report` tells what it did.
"""

from typing import Any

from qcompile.artifact import load, save
from qcompile.calibrate import calibrate
from qcompile.errors import QcompileError
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


def quantize_onnx(*args: Any, **kwargs: Any) -> Report:
    """Quantize an ONNX file into another one; see `qcompile.files.quantize_onnx`, which takes the same arguments."""
    # none of the ONNX libraries is needed for all else
    from qcompile import files

    return files.quantize_onnx(*args, **kwargs)


def agreement(*args: Any, **kwargs: Any) -> Agreement:
    """Whether an ONNX file computes what its plan does in PyTorch; see `qcompile.certify.agreement`."""
    from qcompile import certify

    return certify.agreement(*args, **kwargs)
