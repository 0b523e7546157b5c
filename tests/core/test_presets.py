"""Presets by name, and what a user may write for a recipe."""

from pathlib import Path

import pytest
import torch

from qcompile.errors import RecipeError
from qcompile.graph import Op
from qcompile.observers import observe
from qcompile.plan import Preparation, make_plan
from qcompile.presets import PRESETS, default_recipe, parse_recipe
from qcompile.recipe import Recipe, Rule, recipe_from_table, recipe_to_table
from qcompile.sites import Site
from qcompile.solvers import SOLVERS

# weight, input; what each name promises to a user
SPECS = {
    "int8": ("int8/channel", "int8/token/asym"),
    "int8-weight": ("int8/channel", "None"),
    "int4-weight": ("int4/g128/asym/bf16", "None"),
    "int4-imatrix": ("int4/g32/asym/bf16", "None"),
    "hqq4": ("int4/g64/asym/bf16", "None"),
    "gptq4": ("int4/g128/asym/bf16", "None"),
    "awq4": ("int4/g128/asym/bf16", "None"),
    "fp8": ("fp8_e4m3/channel", "fp8_e4m3/token"),
    "nf4": ("nf4/g64", "None"),
    "int4-token": ("int4/channel", "int4/token/asym"),
    "w4a8": ("int4/g128/asym/u4row", "int8/token/asym"),
    "mxfp4": ("fp4_e2m1/b32/e8m0", "fp4_e2m1/b32/e8m0"),
    "nvfp4": ("fp4_e2m1/b16/fp8_e4m3", "fp4_e2m1/b16/fp8_e4m3"),
    "fp4-a8": ("fp4_e2m1/channel", "fp8_e4m3/token"),
    "fp4-weight": ("fp4_e2m1/channel", "None"),
    "int8-static": ("int8/channel", "int8/tensor/asym"),
    "fp8-static": ("fp8_e4m3/channel", "fp8_e4m3/tensor"),
}


@pytest.mark.parametrize("name", SPECS)
def test_a_preset_is_what_its_name_says(name: str) -> None:
    recipe = parse_recipe(name)
    rule = recipe.rules[-1]
    assert rule.match == "*"
    assert (str(rule.weight), str(rule.input)) == SPECS[name]
    assert recipe.name == name
    assert recipe.summary
    assert rule.solver in SOLVERS


@pytest.mark.parametrize("name", SPECS)
def test_logits_keep_eight_bits_where_a_model_has_such_a_layer(name: str) -> None:
    recipe = PRESETS[name]
    head = Site(name="lm_head", op=Op.LINEAR, weight=torch.randn(8, 256))
    fc = Site(name="model.fc", op=Op.LINEAR, weight=torch.randn(8, 256))
    rule = next(rule for rule in recipe.rules if rule.matches(head))
    assert rule.weight is not None
    assert rule.weight.format.bits == 8
    stats = {"model.fc": observe(torch.ones(1, 256))}
    decided = make_plan([fc], recipe, stats, prepared=Preparation()).decisions["model.fc"]
    assert (str(decided.weight), str(decided.input)) == SPECS[name]


def test_only_static_presets_and_those_of_solvers_that_look_at_data_need_data() -> None:
    assert {name for name in SPECS if PRESETS[name].needs_data} == {
        "int8-static",
        "fp8-static",
        "int4-imatrix",
        "gptq4",
        "awq4",
    }


def test_a_recipe_is_taken_as_object_table_file_or_path_text(tmp_path: Path) -> None:
    recipe = Recipe(name="r", rules=(Rule(),))
    assert parse_recipe(recipe) is recipe
    assert parse_recipe({"name": "r", "rules": [{}]}) == recipe
    path = tmp_path / "r.toml"
    path.write_text("[[rules]]")
    assert parse_recipe(path) == parse_recipe(str(path)) == recipe
    (tmp_path / "no_suffix").write_text('name = "r"\n[[rules]]')
    assert parse_recipe(str(tmp_path / "no_suffix")) == recipe


def test_an_unknown_name_gets_the_nearest_and_the_other_ways() -> None:
    with pytest.raises(RecipeError, match=r"unknown recipe 'int4-wieght'; nearest presets: 'int4-weight'.*TOML file"):
        parse_recipe("int4-wieght")
    with pytest.raises(RecipeError, match=r"cannot read recipe file 'gone\.toml'"):
        parse_recipe("gone.toml")
    with pytest.raises(RecipeError, match="a preset's name, the path of a TOML file or a Recipe, got 8"):
        parse_recipe(8)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("device", "capability", "name"),
    [
        ("cpu", None, "int8"),
        ("cuda", (8, 0), "int8"),
        ("cuda", (8, 6), "int8"),
        ("cuda", (8, 9), "fp8"),
        ("cuda", (9, 0), "fp8"),
        ("cuda", (10, 0), "fp8"),
        ("cuda", None, "int8"),
        ("mps", None, "int8"),
    ],
)
def test_the_default_is_fp8_where_tensor_cores_multiply_it(
    device: str, capability: tuple[int, int] | None, name: str
) -> None:
    assert default_recipe(device, capability) is PRESETS[name]


def test_an_addition_stands_before_the_rules_of_a_preset() -> None:
    table = Site(name="model.embed_tokens", op=Op.EMBEDDING, weight=torch.randn(8, 256))
    fc = Site(name="model.fc", op=Op.LINEAR, weight=torch.randn(8, 256))
    recipe = parse_recipe("int4-weight+embeddings")
    assert recipe.name == "int4-weight+embeddings"
    decided = make_plan([table, fc], recipe).decisions
    assert {name: str(d.weight) for name, d in decided.items()} == {
        "model.embed_tokens": "int8/channel",
        "model.fc": "int4/g128/asym/bf16",
    }
    # of a model without embeddings nothing is asked
    assert list(make_plan([fc], recipe).decisions) == ["model.fc"]
    # as a plan on disk brings it back
    assert recipe_from_table(recipe_to_table(recipe)) == recipe


@pytest.mark.parametrize(("source", "named"), [("int8+embedings", "embeddings"), ("int8+", "embeddings")])
def test_an_unknown_addition_is_named_with_the_nearest(source: str, named: str) -> None:
    with pytest.raises(RecipeError, match=f"unknown addition .*nearest: .*{named}"):
        parse_recipe(source)
