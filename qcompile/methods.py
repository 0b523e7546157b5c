"""Whether the methods that a recipe names exist, and go together."""

from qcompile.auto import RIVALS
from qcompile.errors import RecipeError, nearest
from qcompile.formats import Float, Integer
from qcompile.graph import Op
from qcompile.ranges import parse_observer
from qcompile.recipe import AUTO, FLOAT, OBJECTIVES, OUTPUT, Recipe, Rule
from qcompile.solvers import IN_TURN, SOLVERS, WEIGHTED
from qcompile.spec import ALL, Spec


def check_methods(recipe: Recipe) -> None:
    """Raise RecipeError for rules that no model could follow."""
    for number, rule in enumerate(recipe.rules, start=1):
        where = f"rule {number} ({rule.match!r}) of recipe {recipe.name!r}"
        if rule.solver not in SOLVERS:
            raise RecipeError(
                f"{where} names the unknown solver {rule.solver!r}; nearest: {nearest(rule.solver, SOLVERS)}"
            )
        if rule.solver in WEIGHTED and Op.CONV in rule.ops:
            raise RecipeError(
                f"{where} gives convolutions the solver {rule.solver!r}, which weighs the columns of linears by what "
                "their inputs look like: write a rule of its own for ops = ['conv'], with solver = 'mse'"
            )
        if problem := _in_turn_problem(rule, recipe):
            raise RecipeError(f"{where} names the solver {rule.solver!r}, but {problem}")
        try:
            observer = parse_observer(rule.observer)
        except RecipeError as e:
            raise RecipeError(f"{where}: {e}") from e
        if observer.ordered and rule.static_input and (rule.smooth is not None or rule.split is not None):
            raise RecipeError(
                f"{where} smooths or splits, after which the extremes of single batches are not known, and observer "
                f"{rule.observer!r} finds ranges from them: take 'mse', 'minmax' or 'percentile'"
            )
        problems = {
            "shifts exponents or tries floats": _shift_problem(rule),
            f"gives inputs the spec {rule.input}": _input_problem(rule.input),
            f"rescues inputs by the spec {rule.rescue}": _rescue_problem(rule),
            "leaves the format open": _choice_problem(rule),
            f"has the objective {rule.objective!r}": _objective_problem(rule),
            f"has the budget {rule.budget}": _budget_problem(rule),
            f"gives results the spec {rule.output}": _output_problem(rule),
        }
        for what, problem in problems.items():
            if problem:
                raise RecipeError(f"{where} {what}, but {problem}")


def _in_turn_problem(rule: Rule, recipe: Recipe) -> str:
    """What speaks against a solver that is run while the model runs; empty if nothing does."""
    if rule.solver not in IN_TURN:
        return ""
    if others := [op.value for op in rule.ops if op is not Op.LINEAR]:
        return (
            "it chooses codes by what weights of linears multiply: write a rule of its own for "
            f"ops = {others}, with solver = 'mse'"
        )
    if any(
        rule.format == FLOAT or (rule.split, rule.shift, rule.threshold) != (None, None, None) for rule in recipe.rules
    ):
        return (
            "split, shift, threshold and format change weights and inputs after it chose codes for them: leave them "
            "out, or take solver = 'imatrix'"
        )
    return ""


def _shift_problem(rule: Rule) -> str:
    """What speaks against the shift or the search of formats of a rule; empty if nothing does."""
    if rule.shift is None and rule.format != FLOAT:
        return ""
    if rule.smooth is not None or rule.split is not None:
        return "smooths or splits, too, which have scales of their own: take one of them"
    specs = [rule.weight] if rule.input is None else [rule.weight, rule.input]
    if not all(spec is not None and isinstance(spec.format, Float) for spec in specs):
        return f"weight {rule.weight} and input {rule.input} are not both floats: take for example fp4_e2m1"
    return ""


def _rescue_problem(rule: Rule) -> str:
    """What speaks against the rescue of a rule, and what to take; empty if nothing does."""
    if rule.rescue is None:
        return ""
    if problem := _input_problem(rule.rescue):
        return problem
    if rule.input is None or not rule.static_input:
        return f"input {rule.input} has no calibrated scale that could be poor: leave rescue out"
    if rule.format == FLOAT:
        return "format = 'float' chooses the inputs itself: remove one of them"
    return _kind_problem(rule, rule.rescue) if rule.changes_kind and rule.weight is not None else ""


def _kind_problem(rule: Rule, rescue: Spec) -> str:
    """What speaks against weights of the rescue's format, which take its place where it is one of another kind."""
    assert rule.input is not None
    assert rule.weight is not None
    takes = f"{rule.input.format.name}/token"
    if rule.shift is not None:
        return f"shift is for floats, which a rescue of integers would end: take {takes}"
    if rescue.format.bits != rule.weight.format.bits:
        return (
            f"weights {rule.weight} would follow it into {rescue.format.name}, of other than their "
            f"{rule.weight.format.bits} bits: take {takes}"
        )
    if rule.solver == "kquant" and isinstance(rescue.format, Float):
        return f"weights would follow it, and solver 'kquant' makes no floats: take {takes}, or solver = 'mse'"
    return ""


def _input_problem(spec: Spec | None) -> str:
    """What speaks against an input spec, and what to take; empty if nothing does."""
    if spec is None:
        return ""
    fmt, tile = spec.format, spec.granularity
    if tile.rows > 1:
        return f"blocks of several rows are for weights; take groups along K: {fmt.name}/g{tile.columns}"
    return ""


def _choice_problem(rule: Rule) -> str:
    """What speaks against format = "auto" in a rule, and what to do; empty if nothing does."""
    if rule.format != AUTO:
        return ""
    if rule.weight is None:
        return "has no spec of weights to say how many bits: write one, such as weight = 'int8/channel'"
    bits = rule.weight.format.bits
    if bits not in RIVALS:
        return f"there is no choice among formats of {bits} bits: take {', '.join(map(str, RIVALS))}"
    if rule.input is not None and rule.input.format.bits != bits:
        return f"weights have {bits} bits and inputs {rule.input.format.bits}: what multiplies them wants both alike"
    fixed = (rule.smooth, rule.split, rule.threshold, rule.rescue, rule.output)
    if any(value is not None for value in fixed):
        return "smooth, split, threshold, rescue and output are chosen for one format: remove them, or name the format"
    return ""


def _objective_problem(rule: Rule) -> str:
    """What speaks against the objective of a rule; empty if nothing does."""
    if rule.objective not in OBJECTIVES:
        return f"there is none such; nearest: {nearest(rule.objective, OBJECTIVES)}"
    if rule.objective != OUTPUT and rule.format != FLOAT:
        return "it is formats that are chosen by it: add format = 'float'"
    return ""


def _budget_problem(rule: Rule) -> str:
    """What speaks against the budget of a rule, and what to do; empty if nothing does."""
    if rule.budget is None:
        return ""
    if rule.weight is None or rule.weight.granularity.rows != 1 or not isinstance(rule.weight.format, Integer):
        return "no spec of integers by channel or group says how scales are kept: write weight = 'int4/g128/asym/bf16'"
    if rule.ops != (Op.LINEAR,):
        return "what weights cost the outputs is measured of linears only: write a rule of its own for other ops"
    if rule.prepares or rule.format is not None or rule.threshold is not None:
        return "smooth, split, shift, rescue, format and threshold are chosen for one spec: remove them"
    return ""


def _output_problem(rule: Rule) -> str:
    """What speaks against the output spec of a rule, and what to take; empty if nothing does."""
    if rule.output is None:
        return ""
    if rule.output.granularity.rows != ALL:
        return f"they have one calibrated scale: take {rule.output.format.name}/tensor"
    if Op.CONV not in rule.ops or not rule.static_input:
        return "only convolutions with a static input give codes: add ops = ['conv'] and an input spec"
    return ""
