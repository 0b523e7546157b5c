"""A compiled model is saved, loaded into an empty one, and computes the same; without float weights, without data."""

from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import qcompile
from qcompile.errors import PlanError
from qcompile.graph import Op
from qcompile.presets import PRESETS
from qcompile.recipe import Recipe
from tests.families import FAMILIES, build, tokens
from tests.variants import variants

# what every family of presets does to weights: integers, groups, floats, code books, solvers, folds, splits, shifts
RECIPES = (
    "int8",
    "int4-weight",
    "hqq4",
    "int4-imatrix",
    "gptq4",
    "fp8",
    "nf4",
    "w4a8",
    "int4-token",
    "awq4",
    "q4_k",
    "q3_k",
    "iq4_nl",
    "mxfp4",
    "nvfp4",
    "fp4",
    "fp4-weight",
    "llm-int8",
    "int8-smooth-split",
    "int8-static",
    "fp8-smooth-split-static",
)

# the others go the same ways, and int8 with each family below
QUICK = ("gptq4",)


def empty(family: str) -> nn.Module:
    with torch.device("meta"):
        return FAMILIES[family]().eval()


def compiled(model: nn.Module, plan: qcompile.Plan, **options: Any) -> Any:
    return torch.compile(model, backend="qcompile", options={"plan": plan, **options})


@pytest.mark.usefixtures("graphs_only")
@pytest.mark.parametrize(
    ("recipe", "small"),
    [
        *variants(product(RECIPES, (False,)), quick=[(recipe, False) for recipe in QUICK]),
        *variants(product(("int4-weight", "nf4", "fp4"), (True,)), quick=(("nf4", True),)),
    ],
)
def test_what_is_loaded_computes_what_was_saved(recipe: str, small: bool, tmp_path: Path) -> None:
    model, ids = build("llama"), tokens(2, 9)
    if "split" in recipe:
        with torch.no_grad():
            model.model.layers[0].input_layernorm.weight[[3, 70]] *= 60
    plan = qcompile.calibrate(model, [tokens(4, 16, seed=5)], recipe, progress=False)
    fast = compiled(model, plan)
    y = fast(ids).logits
    qcompile.save(fast, tmp_path / "m")
    other = empty("llama")
    plan = qcompile.load(tmp_path / "m", other)
    again = compiled(other, plan, free_weights=small)
    # a kernel for small weights may round in another place
    torch.testing.assert_close(again(ids).logits, y, **({"atol": 2e-2, "rtol": 0} if small else {"atol": 0, "rtol": 0}))
    linears = [m for m in other.modules() if isinstance(m, nn.Linear)]
    assert all(m.weight.isnan().all() and m.weight.untyped_storage().nbytes() <= 4 for m in linears)
    before, after = ({s.name: s for s in qcompile.report(m).sites} for m in (fast, again))
    assert {name: (s.weight, s.input) for name, s in before.items()} == {
        n: (s.weight, s.input) for n, s in after.items()
    }
    # a weight with shifts is looked at as it was before its columns were lowered
    assert {name: site.snr_db for name, site in before.items()} == {name: site.snr_db for name, site in after.items()}


@pytest.mark.usefixtures("graphs_only")
@pytest.mark.parametrize(
    ("family", "recipe"),
    variants(
        product([family for family in FAMILIES if family != "llama"], ("int8+embeddings", "int4-weight")),
        quick=(("gpt2", "int8+embeddings"),),
    ),
)
def test_every_family_comes_back(family: str, recipe: str, tmp_path: Path) -> None:
    model, ids = build(family), tokens(2, 9)
    fast = torch.compile(model, backend="qcompile", options={"recipe": recipe})
    y = fast(ids)[0]
    qcompile.save(fast, tmp_path / "m")
    other = empty(family)
    again = compiled(other, qcompile.load(tmp_path / "m", other))
    assert torch.equal(again(ids)[0], y)


def test_every_preset_has_a_relative_here() -> None:
    """A preset with a solver or a preparation that no test saves would be noticed."""
    tested = [PRESETS[name.partition("+")[0]] for name in RECIPES]

    def kinds(recipe: Recipe) -> set[tuple[object, ...]]:
        rules = [replace(r, observer="", threshold=r.threshold and 1.0) for r in recipe.rules if r.weight is not None]
        return {(r.solver, r.prepares, bool(r.threshold), type(r.weight and r.weight.format)) for r in rules}

    known = set().union(*map(kinds, tested))
    assert [name for name, recipe in PRESETS.items() if not kinds(recipe) <= known] == []


@pytest.mark.usefixtures("graphs_only")
def test_tied_tables_are_stored_once(tmp_path: Path) -> None:
    model, ids = build("gpt2"), tokens(2, 9)
    fast = torch.compile(model, backend="qcompile", options={"recipe": "int8+embeddings"})
    y = fast(ids).logits
    qcompile.save(fast, tmp_path / "m")
    table = model.transformer.wte.weight
    assert model.lm_head.weight is table
    codes = sum(m.weight.numel() for n, m in model.named_modules() if hasattr(m, "weight") and m.weight.dim() == 2)
    size = (tmp_path / "m" / "plan.safetensors").stat().st_size
    assert size < 1.15 * (codes - table.numel())
    other = empty("gpt2")
    plan = qcompile.load(tmp_path / "m", other)
    assert other.lm_head.weight is other.transformer.wte.weight
    assert torch.equal(compiled(other, plan)(ids).logits, y)


class Head(nn.Module):
    """Runs with a weight that it is given."""

    def forward(self, x: Tensor, weight: Tensor) -> Tensor:
        return nn.functional.linear(x, weight)


class Lent(nn.Module):
    """A weight of two linears, a table of two embeddings, and modules that run with weights of others."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.again = nn.Embedding(96, 64), nn.Embedding(96, 64)
        self.a, self.b, self.kept = nn.Linear(64, 64), nn.Linear(64, 64, bias=False), nn.Linear(64, 64)
        self.inner, self.head = Head(), Head()
        self.b.weight, self.again.weight = self.a.weight, self.words.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.b(torch.relu(self.a(self.words(ids)))) + self.again(ids + 1)
        return self.head(torch.relu(self.inner(x, self.kept.weight)), self.words.weight)


@pytest.mark.usefixtures("graphs_only")
@pytest.mark.parametrize("solver", ["round", "gptq"])
def test_weights_of_several_modules_are_quantized_and_stored_once(solver: str, tmp_path: Path) -> None:
    spec = qcompile.parse_spec("int4/g32/asym")
    table = qcompile.Rule(ops=(Op.EMBEDDING,), weight=qcompile.parse_spec("int8/channel"))
    recipe = Recipe(name="lent", rules=(table, qcompile.Rule(weight=spec, solver=solver)))
    model, ids = Lent().eval(), tokens(8, 32) % 95
    plan = qcompile.calibrate(model, [ids], recipe, progress=False)
    assert replace(plan.decisions["a"], name="b") == plan.decisions["b"]
    fast = compiled(model, plan)
    y = fast(ids)
    sites = {site.name: site for site in qcompile.report(fast).sites}
    assert set(sites) == {"words", "again", "a", "b", "inner", "head"}
    assert all(site.weight is not None for site in sites.values())
    qcompile.save(fast, tmp_path / "m")
    codes = [f for f in load_file(tmp_path / "m" / "plan.safetensors") if f.endswith(".solved.weight")]
    # the table as embedding and as linear, and two linears
    assert len(codes) == 4
    with torch.device("meta"):
        other = Lent().eval()
    assert torch.equal(compiled(other, qcompile.load(tmp_path / "m", other))(ids), y)


class Words(nn.Module):
    """A table that is read twice, and tensors of every kind."""

    def __init__(self, width: int = 128, tie: bool = True) -> None:
        super().__init__()
        self.table, self.inner, self.head = nn.Embedding(50, width), nn.Linear(width, width), nn.Linear(width, 50)
        self.norm = nn.LayerNorm(width)
        self.register_buffer("kept", torch.rand(width))
        self.register_buffer("passing", torch.rand(width), persistent=False)
        self.plain = torch.rand(width)
        if tie:
            self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.norm(self.table(ids)) * self.kept + self.passing - self.plain
        return self.head(self.inner(x))


@pytest.fixture
def ids() -> Tensor:
    return torch.tensor([[1, 49, 4], [0, 7, 7]])


def words(recipe: str, ids: Tensor, folder: Path) -> tuple[Words, Tensor]:
    model = Words().eval()
    fast = torch.compile(model, backend="qcompile", options={"recipe": recipe})
    y = fast(ids)
    qcompile.save(fast, folder)
    return model, y


def empty_words(**options: Any) -> Words:
    with torch.device("meta"):
        return Words(**options).eval()


@pytest.mark.usefixtures("graphs_only")
@pytest.mark.parametrize("recipe", ["int8", "int8+embeddings"])
def test_buffers_and_plain_tensors_are_kept(recipe: str, ids: Tensor, tmp_path: Path) -> None:
    model, y = words(recipe, ids, tmp_path / "m")
    other = empty_words()
    plan = qcompile.load(tmp_path / "m", other)
    assert torch.equal(compiled(other, plan)(ids), y)
    for name in ("kept", "passing", "plain"):
        assert torch.equal(getattr(other, name), getattr(model, name))
    # an embedding that stays float needs its table
    assert bool(other.table.weight.isnan().any()) is (recipe == "int8+embeddings")


@pytest.mark.usefixtures("graphs_only")
def test_a_loaded_model_is_saved_again(ids: Tensor, tmp_path: Path) -> None:
    _, y = words("int4-weight+embeddings", ids, tmp_path / "m")
    other = empty_words()
    fast = compiled(other, qcompile.load(tmp_path / "m", other))
    fast(ids)
    # over the files that it reads
    qcompile.save(fast, tmp_path / "m")
    third = empty_words()
    assert torch.equal(compiled(third, qcompile.load(tmp_path / "m", third))(ids), y)
    assert torch.equal(fast(ids), y)


@pytest.mark.usefixtures("graphs_only")
def test_a_model_with_weights_takes_those_of_the_folder(ids: Tensor, tmp_path: Path) -> None:
    _, y = words("int8", ids, tmp_path / "m")
    other = Words().eval()
    assert torch.equal(compiled(other, qcompile.load(tmp_path / "m", other))(ids), y)


@pytest.mark.usefixtures("graphs_only")
def test_another_recipe_or_the_reference_says_that_values_are_gone(ids: Tensor, tmp_path: Path) -> None:
    words("int8", ids, tmp_path / "m")
    other = empty_words()
    plan = qcompile.load(tmp_path / "m", other)
    for options in ({"recipe": "nf4"}, {"plan": plan, "lower": False}):
        torch._dynamo.reset()
        with pytest.raises(
            Exception, match=r"(?s)WeightError.*has no float values.*qcompile\.load gave its codes alone"
        ):
            torch.compile(other, backend="qcompile", options=options)(ids)


@pytest.mark.usefixtures("graphs_only")
def test_a_model_that_was_moved_after_loading_says_where_to_load_it(ids: Tensor, tmp_path: Path) -> None:
    words("int8-weight", ids, tmp_path / "m")
    other = empty_words()
    plan = qcompile.load(tmp_path / "m", other)
    with pytest.raises(
        Exception, match=r"(?s)PlanError.*nothing but NaN.*load\(folder, model, device=\.\.\.\)\. .* keeps its dtypes"
    ):
        compiled(other.bfloat16(), plan)(ids)
    # as it says
    other = empty_words().bfloat16()
    qcompile.load(tmp_path / "m", other)
    assert {tensor.dtype for tensor in other.state_dict().values()} == {torch.float32}


@pytest.mark.usefixtures("graphs_only")
@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: empty_words(width=64), r"'table\.weight' is \[50, 64\] in it and \[50, 128\] in the folder"),
        (
            lambda: nn.ModuleDict({"tables": nn.Embedding(50, 128)}),
            r"it has no 'table\.weight' \[50, 128\] \(nearest: 'tables",
        ),
        (lambda: nn.Sequential(empty_words()), r"is not the Words that"),
        (lambda: _with_more(empty_words()), r"it has 'more\.weight' \[3, 3\], which is not stored"),
    ],
    ids=["shape", "renamed", "nested", "more"],
)
def test_another_model_is_refused_and_stays(model: Any, message: str, ids: Tensor, tmp_path: Path) -> None:
    words("int8", ids, tmp_path / "m")
    other = model()
    before = {name: id(p) for name, p in other.named_parameters()}
    with pytest.raises(PlanError, match=message):
        qcompile.load(tmp_path / "m", other)
    assert {name: id(p) for name, p in other.named_parameters()} == before


def _with_more(model: nn.Module) -> nn.Module:
    model.more = nn.Linear(3, 3)
    return model


@pytest.mark.usefixtures("graphs_only")
def test_broken_folders_are_named(ids: Tensor, tmp_path: Path) -> None:
    words("int8", ids, tmp_path / "m")
    manifest, floats = tmp_path / "m" / "manifest.json", tmp_path / "m" / "floats.safetensors"
    text, content = manifest.read_text(), floats.read_bytes()

    def refused(message: str) -> None:
        with pytest.raises(PlanError, match=message):
            qcompile.load(tmp_path / "m", empty_words())

    floats.write_bytes(content[:-5])
    refused(rf"has {len(content) - 5} bytes, and {len(content)} when it was saved: it was not copied whole")
    floats.write_bytes(b"\0" * len(content))
    refused(r"floats\.safetensors' is broken .*copy it again")
    floats.unlink()
    refused(r"no whole model in .*give the folder that qcompile\.save wrote")
    floats.write_bytes(content)
    # what is left must not pass for a plan alone, which leaves the model without numbers
    manifest.unlink()
    refused(r"no whole model in .*give the folder that qcompile\.save wrote")
    manifest.write_text(text.replace('"schema": 1', '"schema": 9'))
    refused(r"has schema 9, and this version of qcompile reads up to 1; upgrade qcompile")
    manifest.write_text(text[:-40])
    refused(r"the manifest in .* is broken .JSONDecodeError.*save the model again")
    manifest.write_text(text.replace('"float32"', '"float33"'))
    refused(r"is broken .AttributeError")
    manifest.write_text(text)
    qcompile.load(tmp_path / "m", empty_words())


@pytest.mark.usefixtures("graphs_only")
def test_a_save_that_fails_leaves_what_was_there(ids: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, y = words("int8", ids, tmp_path / "m")

    def fail(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("qcompile.manifest.write_tensors", fail)
    with pytest.raises(PlanError, match="No space left on device"):
        words("int4-weight", ids, tmp_path / "m")
    assert [entry.name for entry in tmp_path.iterdir()] == ["m"]
    other = empty_words()
    torch._dynamo.reset()
    assert torch.equal(compiled(other, qcompile.load(tmp_path / "m", other))(ids), y)


@pytest.mark.usefixtures("graphs_only")
def test_freed_weights_and_what_was_never_compiled_are_refused(ids: Tensor, tmp_path: Path) -> None:
    with pytest.raises(qcompile.QcompileError, match="nothing of this model was compiled by backend 'qcompile' yet"):
        qcompile.save(Words(), tmp_path / "m")
    fast = torch.compile(Words().eval(), backend="qcompile", options={"free_weights": True})
    fast(ids)
    with pytest.raises(qcompile.QcompileError, match=r"was freed by free_weights=True.*without free_weights"):
        qcompile.save(fast, tmp_path / "m")
    for wrong in (Words().forward, 3):
        with pytest.raises(PlanError, match=r"save takes a plan, or a model that .* was called, got (method|int)"):
            qcompile.save(wrong, tmp_path / "m")
        with pytest.raises(PlanError, match=r"load takes the model .*, a torch\.nn\.Module, got (method|int)"):
            qcompile.load(tmp_path / "m", wrong)
    assert list(tmp_path.iterdir()) == []
