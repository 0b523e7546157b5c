"""Recipes: ordered rules that say which sites get which specs. The first rule that matches a site decides."""

import math
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from qcompile.budget import Budget, parse_budget
from qcompile.errors import RecipeError, SpecError, nearest
from qcompile.formats import Float, Integer
from qcompile.graph import Op
from qcompile.sites import SITE_OPS, Site
from qcompile.smooth import Smooth, parse_smooth
from qcompile.solvers import IN_TURN, WEIGHTED
from qcompile.spec import ALL, Spec, parse_spec, with_format

AUTO, FLOAT = "auto", "float"
# what formats are chosen by: errors of the site's output, of the weight itself, or of the site's output by how much
# each of its features matters to what the model says
OUTPUT, WEIGHT, FISHER = OBJECTIVES = ("output", "weight", "fisher")
# the numbers of 4-bit floats, each divided by a power of two up to this one, are numbers of E4M3
MOST_SHIFTED = 14


@dataclass(frozen=True, kw_only=True)
class Rule:
    """Sites whose module path matches the glob `match` and whose op is in `ops` get these specs.

    A rule without specs leaves its sites alone. `match`: "*" crosses dots, so "*.down_proj" is every layer's;
    "|" stands between alternatives.
    """

    match: str = "*"
    # an optional rule may decide nothing; of any other that is an error
    optional: bool = False
    ops: tuple[Op, ...] = (Op.LINEAR,)
    weight: Spec | None = None
    input: Spec | None = None
    # how the weight's codes are chosen: a name in qcompile.solvers.SOLVERS
    solver: str = "round"
    # how a static input range is found: a name in qcompile.ranges.OBSERVERS, or with a parameter as "percentile/99.9"
    observer: str = "mse"
    # how factors of the input's channels move into weights
    smooth: Smooth | None = None
    # the largest share of the input's channels that stays in 16 bit
    split: float | None = None
    # by how many octaves, at most, a channel of the input may be raised, and the exponents of a weight's column lowered
    shift: int | None = None
    # from which magnitude on a column of the input stays in float, found while running (LLM.int8)
    threshold: float | None = None
    # the input spec of sites where the static one loses too much; floats in place of integers, or integers of floats,
    # are what their weights become, too
    rescue: Spec | None = None
    # "auto": each site gets the best format with as many bits as those of the specs; "float": its weight and its input
    # get, each for itself, the best float, found with the shift; of embeddings and convolutions by their own errors
    format: str | None = None
    # by which error `format = "float"` and its shift are chosen for linears: one of OBJECTIVES; inputs go by the
    # output's where weights go by their own
    objective: str = OUTPUT
    # what the weights of the sites may cost or err together: each gets integers of a width of its own for it, or NF4
    budget: Budget | None = None
    # of a convolution's result, and of what is added to it: where one kernel reads the codes that another made
    output: Spec | None = None

    def matches(self, site: Site) -> bool:
        """Whether the rule is about this site; an earlier rule may still decide it."""
        return site.op in self.ops and any(fnmatchcase(site.name, glob) for glob in self.match.split("|"))

    @property
    def static_input(self) -> bool:
        """Whether one scale serves all inputs: then it must be known beforehand, from calibration."""
        return self.input is not None and self.input.granularity.rows == ALL

    @property
    def rescued(self) -> "Rule | None":
        """The rule of sites where the static input loses too much; None if nothing is to be tried there."""
        if not self.static_input or self.rescue is None:
            return None
        weight = self.weight
        if weight is not None and self.changes_kind:
            weight = with_format(weight, self.rescue.format)
        return replace(self, weight=weight, input=self.rescue, rescue=None)

    @property
    def changes_kind(self) -> bool:
        """Whether the rescue makes floats of integers, or integers of floats: on both sides, or nothing multiplies."""
        kinds = [type(spec.format) for spec in (self.input, self.rescue) if spec is not None]
        return kinds in ([Integer, Float], [Float, Integer])

    @property
    def prepares(self) -> bool:
        """Whether data decides about the graph, or of which specs sites are, before they are quantized."""
        floats = self.format == FLOAT and Op.LINEAR in self.ops
        changed = self.smooth is not None or self.split is not None or self.shift is not None
        return changed or floats or self.rescued is not None

    @property
    def weighs_columns(self) -> bool:
        """Whether the weight's codes are chosen by what its input looks like, which calibration must show."""
        return self.weight is not None and self.solver in WEIGHTED and Op.LINEAR in self.ops

    @property
    def solves_in_turn(self) -> bool:
        """Whether the weight's codes are chosen while calibration runs the model with those before quantized."""
        return self.weight is not None and self.solver in IN_TURN


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Rules in order, and a name for messages and reports."""

    name: str
    rules: tuple[Rule, ...]
    summary: str = ""

    @property
    def needs_data(self) -> bool:
        """Whether the recipe can be followed only after calibration."""
        return (
            self.prepares
            or self.solves_in_turn
            or self.budgets
            or any(rule.static_input or rule.weighs_columns for rule in self.rules)
        )

    @property
    def weighs_features(self) -> bool:
        """Whether some choice goes by how much output features matter, which takes gradients."""
        return any(rule.objective == FISHER for rule in self.rules)

    @property
    def budgets(self) -> bool:
        """Whether sites share a budget, which is spent as data shows is best."""
        return any(rule.budget is not None for rule in self.rules)

    @property
    def solves_in_turn(self) -> bool:
        """Whether some rule's solver is run while the model runs."""
        return any(rule.solves_in_turn for rule in self.rules)

    @property
    def chooses(self) -> bool:
        """Whether formats are chosen by the values of weights."""
        return any(rule.format == AUTO or (rule.format == FLOAT and rule.ops != (Op.LINEAR,)) for rule in self.rules)

    @property
    def prepares(self) -> bool:
        """Whether the graph is changed before it is quantized, as data shows is best."""
        return any(rule.prepares for rule in self.rules)


def read_recipe(path: str | Path) -> Recipe:
    """The recipe in a TOML file; without `name` it is called like the file.

    Raises RecipeError if there is no such file, or it is no TOML, or no recipe.
    """
    path = Path(path)
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise RecipeError(f"cannot read recipe file {str(path)!r}: {e.strerror}; give the path of a TOML file") from e
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as e:
        raise RecipeError(f"recipe file {str(path)!r} is not TOML: {e}; write key = value lines") from e
    return recipe_from_table({"name": path.stem, **table}, place=repr(str(path)))


def recipe_from_table(table: Mapping[str, Any], place: str = "recipe") -> Recipe:
    """The recipe that a table (from TOML or JSON) describes: name, summary, rules with the fields of `Rule`.

    place: what messages call it.  Raises RecipeError for unknown keys, wrong types, and specs that do not parse.
    """
    read = _read(table, {"name": _text, "summary": _text, "rules": _tables}, place)
    rules = read.pop("rules", [])
    if not rules:
        raise RecipeError(f"{place} has no rules; write at least one [[rules]] table, such as weight = 'int8/channel'")
    return Recipe(
        name=read.pop("name", "custom"),
        rules=tuple(Rule(**_read(rule, _RULE, f"rule {i} of {place}")) for i, rule in enumerate(rules, start=1)),
        **read,
    )


def recipe_to_table(recipe: Recipe) -> dict[str, Any]:
    """The table that `recipe_from_table` reads back."""
    rules = [
        {
            "match": rule.match,
            **({"optional": True} if rule.optional else {}),
            "ops": [op.value for op in rule.ops],
            **({} if rule.weight is None else {"weight": str(rule.weight)}),
            **({} if rule.input is None else {"input": str(rule.input)}),
            "solver": rule.solver,
            "observer": rule.observer,
            **({} if rule.smooth is None else {"smooth": str(rule.smooth)}),
            **({} if rule.split is None else {"split": rule.split}),
            **({} if rule.shift is None else {"shift": rule.shift}),
            **({} if rule.threshold is None else {"threshold": rule.threshold}),
            **({} if rule.rescue is None else {"rescue": str(rule.rescue)}),
            **({} if rule.format is None else {"format": rule.format}),
            **({} if rule.objective == OUTPUT else {"objective": rule.objective}),
            **({} if rule.budget is None else {"budget": str(rule.budget)}),
            **({} if rule.output is None else {"output": str(rule.output)}),
        }
        for rule in recipe.rules
    ]
    return {"name": recipe.name, "summary": recipe.summary, "rules": rules}


def _read(table: Mapping[str, Any], readers: Mapping[str, Callable[[Any], Any]], place: str) -> dict[str, Any]:
    read = {}
    for key, value in table.items():
        if key not in readers:
            raise RecipeError(
                f"{place} has the unknown key {key!r}; nearest: {nearest(key, readers)}; known: {', '.join(readers)}"
            )
        try:
            read[key] = readers[key](value)
        except (RecipeError, SpecError) as e:
            raise RecipeError(f"{place}, key {key!r}: {e}") from e
    return read


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise RecipeError(f"takes text, got {value!r}")
    return value


def _open_format(value: Any) -> str:
    if value not in (AUTO, FLOAT):
        raise RecipeError(
            f"takes '{AUTO}', '{FLOAT}' or nothing, got {value!r}: one format is a part of the specs, as 'int4/g128'"
        )
    return str(value)


def _truth(value: Any) -> bool:
    if not isinstance(value, bool):
        raise RecipeError(f"takes true or false, got {value!r}")
    return value


def _positive(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise RecipeError(f"takes a number above 0, got {value!r}")
    return float(value)


def _octaves(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MOST_SHIFTED:
        raise RecipeError(f"takes a number of octaves from 1 to {MOST_SHIFTED}, got {value!r}")
    return value


def _share(value: Any) -> float:
    if _positive(value) >= 1:
        raise RecipeError(f"takes a share of the channels, between 0 and 1, got {value!r}")
    return float(value)


def _tables(value: Any) -> list[Mapping[str, Any]]:
    if not isinstance(value, list) or not all(isinstance(v, Mapping) for v in value):
        raise RecipeError(f"takes tables, written [[rules]], got {value!r}")
    return value


def _ops(value: Any) -> tuple[Op, ...]:
    known = [op.value for op in SITE_OPS]
    if not isinstance(value, list) or not value or any(v not in known for v in value):
        raise RecipeError(f"takes a list of ops out of {', '.join(known)}, got {value!r}")
    return tuple(Op(v) for v in value)


_RULE: dict[str, Callable[[Any], Any]] = {
    "match": _text,
    "optional": _truth,
    "ops": _ops,
    "weight": lambda value: parse_spec(_text(value)),
    "input": lambda value: parse_spec(_text(value)),
    "solver": _text,
    "observer": _text,
    # a number needs no quotes
    "smooth": lambda value: parse_smooth(str(value) if isinstance(value, float) else _text(value)),
    "split": _share,
    "shift": _octaves,
    "threshold": _positive,
    "rescue": lambda value: parse_spec(_text(value)),
    "format": _open_format,
    "objective": _text,
    "budget": lambda value: parse_budget(_text(value)),
    "output": lambda value: parse_spec(_text(value)),
}
