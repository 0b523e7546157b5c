"""The options of `torch.compile(model, backend="qcompile", options={...})`."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from qcompile.errors import OptionsError, nearest
from qcompile.plan import Plan
from qcompile.recipe import Recipe
from qcompile.report import Report


@dataclass(frozen=True, kw_only=True)
class Options:
    """What a user may ask of the backend.

    recipe: a preset's name, the path of a TOML file, or a Recipe; None takes the device's default.
    plan: from `qcompile.calibrate` or `qcompile.load`; it brings its own recipe.
    report: a path that gets the report as JSON, or a function that gets the Report, after each compilation.
    min_coverage: share of weight bytes that must be quantized, or compiling fails.
    free_weights: give up the float values of weights once packed; the model itself then computes NaN.
    lower: False runs the Q/DQ graph in eager torch: the reference for results, and slow.
    dump: a folder that gets the graph's text after every pass.
    mode: as torch.compile's own, which torch takes only where there are no options; handed to Inductor.
    """

    recipe: str | Path | Recipe | None = None
    plan: Plan | None = None
    report: str | Path | Callable[[Report], object] | None = None
    min_coverage: float = 0.0
    free_weights: bool = False
    lower: bool = True
    dump: str | Path | None = None
    mode: str | None = None

    @classmethod
    def parse(cls, options: Mapping[str, Any] | None) -> "Options":
        """Options from the mapping that a user gave torch.compile.

        Raises OptionsError for an unknown name, a wrong type, or a recipe beside a plan.
        """
        given = dict(options or {})
        known = [f.name for f in fields(cls)]
        for name in given:
            if name not in known:
                raise OptionsError(
                    f"unknown option {name!r} of backend 'qcompile'; nearest: {nearest(name, known)}; "
                    f"known: {', '.join(known)}"
                )
        for name, value in given.items():
            if not isinstance(value, _TYPES[name]):
                expected = " or ".join(getattr(t, "__name__", str(t)) for t in _TYPES[name])
                raise OptionsError(f"option {name!r} takes {expected}, got {value!r}")
        if given.get("plan") is not None and given.get("recipe") is not None:
            raise OptionsError("give 'recipe' or 'plan', not both: a plan was made by a recipe")
        if not 0 <= given.get("min_coverage", 0.0) <= 1:
            raise OptionsError(f"option 'min_coverage' is a share from 0 to 1, got {given['min_coverage']!r}")
        return cls(**given)


_NONE = type(None)
_TYPES: dict[str, tuple[type, ...]] = {
    "recipe": (str, Path, Recipe, _NONE),
    "plan": (Plan, _NONE),
    "report": (str, Path, Callable, _NONE),  # type: ignore[dict-item]
    "min_coverage": (float, int),
    "free_weights": (bool,),
    "lower": (bool,),
    "dump": (str, Path, _NONE),
    "mode": (str, _NONE),
}
