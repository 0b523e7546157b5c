"""What can go wrong, as types; every message says what happened, where, and what to do."""

from collections.abc import Iterable
from difflib import get_close_matches


class QcompileError(Exception):
    """Base of every error that qcompile raises on purpose."""


class SpecError(QcompileError, ValueError):
    """A format or spec that cannot be: unknown name, contradiction, or a shape it does not fit."""


class RecipeError(QcompileError, ValueError):
    """A recipe that does not exist, does not parse, or whose rule matches nothing."""


class OptionsError(QcompileError, ValueError):
    """An option of the torch.compile backend that is unknown or of the wrong type."""


class GraphError(QcompileError):
    """A graph edit that the host cannot make."""


class PlanError(QcompileError):
    """A plan that does not belong to this model, or is of another schema."""


class CalibrationError(QcompileError):
    """Calibration saw no data, or data that cannot be used."""


class WeightError(QcompileError, ValueError):
    """A weight that cannot be quantized: NaN, Inf, integer, or not loaded."""


class ModelError(QcompileError, ValueError):
    """A model file that is broken, unsafe, quantized already, or cannot be written."""


class UnsupportedError(QcompileError):
    """Asked for something that this machine, library or use cannot do."""


class CoverageError(QcompileError):
    """Less of the model was quantized than the caller demanded."""


def nearest(name: str, known: Iterable[str], count: int = 4) -> str:
    """The names in `known` most like `name`, quoted and joined, for the end of an error message."""
    names = sorted(set(known))
    close = get_close_matches(name, names, n=count, cutoff=0.3) or names[:count]
    return ", ".join(repr(n) for n in close) or "none"
