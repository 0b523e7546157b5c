"""Recipes from TOML and tables: what is read, and what every mistake in one is answered with."""

from pathlib import Path

import pytest
import torch

from qcompile.errors import RecipeError
from qcompile.graph import Op
from qcompile.recipe import FLOAT, Recipe, Rule, read_recipe, recipe_from_table, recipe_to_table
from qcompile.sites import Site
from qcompile.smooth import Smooth
from qcompile.spec import parse_spec

TOML = """
name = "mine"
summary = "int4, but int8 at the end"

[[rules]]
match = "*.lm_head"
weight = "int8/channel"

[[rules]]
match = "*"
ops = ["linear", "embedding", "conv"]
weight = "int4/g32/asym"
input = "int8/tensor"
solver = "mse"
observer = "absmax"
output = "int8/tensor/asym"
"""


def test_toml_gives_the_rules_in_order(tmp_path: Path) -> None:
    path = tmp_path / "r.toml"
    path.write_text(TOML)
    assert read_recipe(path) == Recipe(
        name="mine",
        summary="int4, but int8 at the end",
        rules=(
            Rule(match="*.lm_head", weight=parse_spec("int8/channel")),
            Rule(
                ops=(Op.LINEAR, Op.EMBEDDING, Op.CONV),
                weight=parse_spec("int4/g32/asym"),
                input=parse_spec("int8/tensor"),
                solver="mse",
                observer="absmax",
                output=parse_spec("int8/tensor/asym"),
            ),
        ),
    )


def test_a_file_without_a_name_is_called_like_the_file(tmp_path: Path) -> None:
    path = tmp_path / "half.toml"
    path.write_text('[[rules]]\nweight = "int8/channel"')
    assert read_recipe(path).name == "half"


def test_a_table_reads_back_what_was_written(tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_text(TOML)
    recipe = read_recipe(tmp_path / "r.toml")
    assert recipe_from_table(recipe_to_table(recipe)) == recipe
    bare = Recipe(name="bare", rules=(Rule(), Rule(match="a|b", optional=True)))
    assert recipe_from_table(recipe_to_table(bare)) == bare


def test_what_prepares_inputs_is_read_and_written_back(tmp_path: Path) -> None:
    path = tmp_path / "r.toml"
    path.write_text(
        '[[rules]]\nsmooth = 0.5\nsplit = 0.01\nthreshold = 6\nrescue = "int8/token/asym"\n'
        '[[rules]]\nsmooth = "search/pow2"\n[[rules]]\nsmooth = "model"\n[[rules]]\n'
        '[[rules]]\ninput = "int8/tensor/asym"\nrescue = "fp8_e4m3/tensor"\n'
    )
    recipe = read_recipe(path)
    first, second, third, bare, floats = recipe.rules
    assert first == Rule(smooth=Smooth(strength=0.5), split=0.01, threshold=6.0, rescue=parse_spec("int8/token/asym"))
    assert second.smooth == Smooth(powers_of_two=True)
    assert third.smooth == Smooth(strength="model")
    assert bare == Rule()
    assert floats == Rule(input=parse_spec("int8/tensor/asym"), rescue=parse_spec("fp8_e4m3/tensor"))
    assert recipe_from_table(recipe_to_table(recipe)) == recipe
    # what a rule does not ask for is not written
    assert not recipe_to_table(recipe)["rules"][3].keys() & {"smooth", "split", "threshold", "rescue"}


@pytest.mark.parametrize(
    ("rule", "prepares"),
    [
        (Rule(smooth=Smooth()), True),
        (Rule(split=0.01), True),
        (Rule(threshold=6.0), False),
        (Rule(rescue=parse_spec("int8/token")), False),
        (Rule(input=parse_spec("int8/tensor"), rescue=parse_spec("fp8_e4m3/tensor")), True),
        (Rule(weight=parse_spec("fp4_e2m1/channel"), format=FLOAT), True),
        (Rule(ops=(Op.EMBEDDING,), weight=parse_spec("fp4_e2m1/channel"), format=FLOAT), False),
    ],
)
def test_what_changes_the_graph_needs_data(rule: Rule, prepares: bool) -> None:
    recipe = Recipe(name="r", rules=(Rule(), rule))
    assert recipe.prepares is prepares
    assert recipe.needs_data is prepares


@pytest.mark.parametrize(
    ("rule", "needs"),
    [
        (Rule(weight=parse_spec("int4/g32"), solver="imatrix"), True),
        (Rule(weight=parse_spec("int4/g32"), solver="mse"), False),
        (Rule(solver="imatrix"), False),
        (Rule(ops=(Op.EMBEDDING,), weight=parse_spec("int4/g32"), solver="imatrix"), False),
    ],
)
def test_a_solver_that_weighs_columns_of_linears_needs_data(rule: Rule, needs: bool) -> None:
    recipe = Recipe(name="r", rules=(Rule(), rule))
    assert rule.weighs_columns is needs
    assert recipe.needs_data is needs
    assert recipe.prepares is False


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ({"rules": [{}], "sumary": "x"}, ["unknown key 'sumary'", "'summary'"]),
        ({"rules": [{"weigth": "int8/channel"}]}, ["rule 1 of", "'weigth'", "'weight'", "known: match, "]),
        ({"rules": [{}, {"weight": "int9/channel"}]}, ["rule 2 of", "key 'weight'", "unknown format 'int9'", "'int8'"]),
        ({"rules": [{"weight": 8}]}, ["rule 1 of", "key 'weight'", "takes text, got 8"]),
        ({"rules": [{"match": ["a"]}]}, ["rule 1 of", "key 'match'", "takes text, got ['a']"]),
        ({"rules": [{"optional": "yes"}]}, ["rule 1 of", "key 'optional'", "takes true or false, got 'yes'"]),
        ({"rules": [{"ops": "linear"}]}, ["rule 1 of", "key 'ops'", "list of ops", "linear, embedding"]),
        ({"rules": [{"ops": ["softmax"]}]}, ["rule 1 of", "linear, embedding", "['softmax']"]),
        ({"rules": [{"ops": []}]}, ["rule 1 of", "linear, embedding"]),
        ({"rules": [{"smooth": "strong"}]}, ["rule 1 of", "key 'smooth'", "from 0 to 1, 'search'"]),
        ({"rules": [{"smooth": 1.5}]}, ["rule 1 of", "key 'smooth'", "'1.5'", "from 0 to 1"]),
        ({"rules": [{"smooth": True}]}, ["rule 1 of", "key 'smooth'", "takes text, got True"]),
        ({"rules": [{"split": 1}]}, ["rule 1 of", "key 'split'", "between 0 and 1, got 1"]),
        ({"rules": [{"split": 0}]}, ["rule 1 of", "key 'split'", "above 0, got 0"]),
        ({"rules": [{"split": "0.1"}]}, ["rule 1 of", "key 'split'", "above 0, got '0.1'"]),
        ({"rules": [{"threshold": -6.0}]}, ["rule 1 of", "key 'threshold'", "above 0, got -6.0"]),
        ({"rules": [{"threshold": True}]}, ["rule 1 of", "key 'threshold'", "above 0, got True"]),
        ({"rules": [{"threshold": float("nan")}]}, ["rule 1 of", "key 'threshold'", "above 0, got nan"]),
        ({"rules": [{"threshold": float("inf")}]}, ["rule 1 of", "key 'threshold'", "above 0, got inf"]),
        ({"rules": [{"rescue": "int9/token"}]}, ["rule 1 of", "key 'rescue'", "unknown format 'int9'"]),
        ({"rules": {}}, ["key 'rules'", "[[rules]]"]),
        ({"rules": []}, ["has no rules", "[[rules]]"]),
        ({}, ["has no rules"]),
    ],
)
def test_a_mistake_is_named_with_its_place_and_remedy(table: dict[str, object], words: list[str]) -> None:
    with pytest.raises(RecipeError) as caught:
        recipe_from_table(table, place="'my.toml'")
    assert [w for w in ["'my.toml'", *words] if w not in str(caught.value)] == []


def test_a_file_that_is_missing_or_no_toml_is_named(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"cannot read recipe file '.*gone\.toml'.*TOML file"):
        read_recipe(tmp_path / "gone.toml")
    (tmp_path / "bad.toml").write_text("rules = ?")
    with pytest.raises(RecipeError, match=r"'.*bad\.toml' is not TOML: .*line 1.*key = value"):
        read_recipe(tmp_path / "bad.toml")
    (tmp_path / "raw.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(RecipeError, match="is not TOML"):
        read_recipe(tmp_path / "raw.toml")


def test_a_rule_matches_by_glob_and_op() -> None:
    rule = Rule(match="*.fc")
    weight = torch.zeros(2, 2)
    assert rule.matches(Site(name="layers.0.fc", op=Op.LINEAR, weight=weight))
    assert not rule.matches(Site(name="layers.0.fc", op=Op.EMBEDDING, weight=weight))
    assert not rule.matches(Site(name="fc", op=Op.LINEAR, weight=weight))
    assert not rule.matches(Site(name="layers.0.FC", op=Op.LINEAR, weight=weight))


def test_a_bar_stands_between_alternatives() -> None:
    rule = Rule(match="*.q|*.k")
    weight = torch.ones(1, 1)
    matched = [n for n in ("a.q", "a.k", "a.v") if rule.matches(Site(name=n, op=Op.LINEAR, weight=weight))]
    assert matched == ["a.q", "a.k"]


@pytest.mark.parametrize(
    ("spec", "static"), [("int8/tensor", True), ("int8/token", False), ("fp4_e2m1/b32/e8m0", False), (None, False)]
)
def test_one_scale_for_the_tensor_needs_data(spec: str | None, static: bool) -> None:
    rule = Rule(input=None if spec is None else parse_spec(spec))
    assert rule.static_input is static
    assert Recipe(name="r", rules=(Rule(), rule)).needs_data is static
