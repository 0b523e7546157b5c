"""Recipes from TOML and tables: what is read, and what every mistake in one is answered with."""

from pathlib import Path

import pytest
import torch

from qcompile.errors import RecipeError
from qcompile.graph import Op
from qcompile.recipe import Recipe, Rule, read_recipe, recipe_from_table, recipe_to_table
from qcompile.sites import Site
from qcompile.spec import parse_spec

TOML = """
name = "mine"
summary = "int4, but int8 at the end"

[[rules]]
match = "*.lm_head"
weight = "int8/channel"

[[rules]]
match = "*"
ops = ["linear", "embedding"]
weight = "int4/g32/asym"
input = "int8/tensor"
solver = "mse"
observer = "absmax"
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
                ops=(Op.LINEAR, Op.EMBEDDING),
                weight=parse_spec("int4/g32/asym"),
                input=parse_spec("int8/tensor"),
                solver="mse",
                observer="absmax",
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
