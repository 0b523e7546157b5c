"""Plans on disk: what is saved is what is loaded, and nothing else is ever overwritten."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from safetensors.torch import save as serialize
from torch import Tensor, nn

from qcompile import artifact
from qcompile.artifact import load, save
from qcompile.calibrate import calibrate
from qcompile.errors import PlanError
from qcompile.folds import Fold
from qcompile.graph import Op
from qcompile.numerics import QParams, find_qparams
from qcompile.observers import observe
from qcompile.outliers import Group, find_outliers
from qcompile.packing import pack
from qcompile.plan import Decision, Plan
from qcompile.recipe import Recipe, Rule
from qcompile.smooth import Smooth
from qcompile.solved import solved
from qcompile.spec import parse_spec


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(11, 16)
        self.fc = nn.Linear(16, 8)
        self.extra = nn.Parameter(torch.zeros(2, 3, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.emb(x))


@pytest.fixture
def model() -> Net:
    torch.manual_seed(0)
    return Net()


@pytest.fixture
def plan(model: Net) -> Plan:
    return calibrate(model, [torch.arange(11)[None]], "int8-static")


def test_a_plan_comes_back_equal_and_bound(plan: Plan, model: Net, tmp_path: Path) -> None:
    save(plan, tmp_path / "deep" / "plan")
    assert load(tmp_path / "deep" / "plan") == plan
    assert load(tmp_path / "deep" / "plan").binding is None
    bound = load(tmp_path / "deep" / "plan", model)
    assert bound.binding is not None
    assert bound.binding.site_name(model.fc.weight, Op.LINEAR) == "fc"
    assert {p.name for p in (tmp_path / "deep" / "plan").iterdir()} == {"plan.json", "plan.safetensors"}


def test_ranges_of_results_are_kept(tmp_path: Path) -> None:
    spec = parse_spec("int8/tensor/asym")
    ranges = [QParams(spec=spec, scale=torch.tensor(s), zero=torch.tensor(float(z))) for s, z in ((0.5, 3), (0.25, 0))]
    decision = Decision(
        name="conv",
        op=Op.CONV,
        shape=(8, 27),
        weight=parse_spec("int8/channel"),
        input=spec,
        input_qparams=ranges[0],
        output=ranges[1],
    )
    save(Plan(recipe=Recipe(name="r", rules=(Rule(ops=(Op.CONV,)),)), decisions={"conv": decision}), tmp_path / "p")
    assert load(tmp_path / "p").decisions == {"conv": decision}
    model = nn.Module()
    model.conv = nn.Conv2d(3, 8, 3)
    assert load(tmp_path / "p", model).decisions["conv"] == decision


def test_outliers_and_thresholds_are_kept(tmp_path: Path) -> None:
    given = {"op": Op.LINEAR, "shape": (2, 8), "weight": parse_spec("int8/channel"), "input": parse_spec("int8/token")}
    split = Decision(name="a", outliers=(5, 1), **given)
    found = Decision(name="b", threshold=6.0, **given)
    plain = Decision(name="c", **given)
    decisions = {d.name: d for d in (split, found, plain)}
    save(Plan(recipe=Recipe(name="r", rules=(Rule(),)), decisions=decisions), tmp_path / "p")
    assert load(tmp_path / "p").decisions == decisions
    # a plan without them reads as before them
    tables = json.loads((tmp_path / "p" / "plan.json").read_text())["decisions"]
    assert [sorted(table.keys() & {"outliers", "threshold"}) for table in tables] == [["outliers"], ["threshold"], []]


def test_importance_is_kept(model: Net, tmp_path: Path) -> None:
    recipe = {"rules": [{"weight": "int4/g16/asym", "solver": "imatrix"}]}
    plan = calibrate(model, [torch.arange(11)[None]], recipe, progress=False)
    save(plan, tmp_path / "p")
    found, fc = load(tmp_path / "p", model), plan.decisions["fc"]
    assert found == plan
    assert fc.importance is not None
    assert torch.equal(found.decisions["fc"].importance, fc.importance)
    assert found.decisions["fc"].data_digest == fc.data_digest
    (tmp_path / "p" / "plan.safetensors").write_bytes(serialize({}))
    with pytest.raises(PlanError, match=r"is broken .KeyError: 'fc\.importance'.*save it again"):
        load(tmp_path / "p")


def test_a_plan_whose_importance_was_lost_is_refused(model: Net, tmp_path: Path) -> None:
    recipe = {"rules": [{"weight": "int4/g16/asym", "solver": "imatrix"}]}
    save(calibrate(model, [torch.arange(11)[None]], recipe, progress=False), tmp_path / "p")
    path = tmp_path / "p" / "plan.json"
    path.write_text(path.read_text().replace(', "importance": true', ""))
    with pytest.raises(PlanError, match=r"'fc' with solver 'imatrix' takes the importance of 16 channels, got None"):
        load(tmp_path / "p")


@pytest.mark.parametrize(
    "spec", ["int4/g16/asym/bf16", "int4/g16/asym/u4row", "int3/channel", "nf4/g16/dq256", "lloyd4/channel"]
)
def test_codes_of_schema_2_still_load(spec: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(6, 32)
    given = solved(weight, find_qparams(weight, parse_spec(spec)))
    decision = Decision(name="a", op=Op.LINEAR, shape=(6, 32), weight=parse_spec(spec), solver="mse")
    save(Plan(recipe=Recipe(name="r", rules=(Rule(),)), decisions={"a": decision}), tmp_path / "p")
    qparams = given.qparams
    assert qparams.codes is not None
    parts = {"codes": pack(qparams.codes, qparams.spec.format.bits), "scale": qparams.scale}
    parts |= {} if qparams.zero is None else {"zero": qparams.zero}
    parts |= {} if qparams.levels is None else {"levels": qparams.levels}
    parts |= {f"stored.{name}": tensor for name, tensor in qparams.stored.items()}
    path = tmp_path / "p" / "plan.json"
    table = json.loads(path.read_text())
    table["schema"] = 2
    # which no plan of that schema has
    del table["beside"]
    table["decisions"][0] |= {"weight_qparams": sorted(parts), "solved_db": given.snr_db}
    path.write_text(json.dumps(table))
    held = {f"a.weight.{part}": tensor.clone() for part, tensor in parts.items()}
    (tmp_path / "p" / "plan.safetensors").write_bytes(serialize(held))
    # there is nothing to compare a sum with, and it would read all codes
    monkeypatch.setattr(artifact, "_sum_beside", lambda *read: pytest.fail("codes were read for nothing"))
    found = load(tmp_path / "p").decisions["a"].solved
    assert found == given
    assert found is not None
    assert torch.equal(found.qparams.codes, qparams.codes)


def test_what_a_weight_became_is_kept_and_stored_once(tmp_path: Path) -> None:
    weight, spec = torch.randn(6, 32), parse_spec("int4/g16/asym/bf16")
    once = solved(weight, find_qparams(weight, spec), source="a.weight.without_1")
    both = replace(once, columns=torch.randn(6, 2), order=torch.randperm(32))
    decisions = {
        name: Decision(name=name, op=op, shape=(6, 32), weight=spec, solved=found)
        for name, op, found in (("a", Op.LINEAR, both), ("b", Op.EMBEDDING, once))
    }
    save(Plan(recipe=Recipe(name="r", rules=(Rule(),)), decisions=decisions), tmp_path / "p")
    found = load(tmp_path / "p").decisions
    assert found == decisions
    for name, decision in decisions.items():
        before, after = decision.solved, found[name].solved
        assert before is not None
        assert after is not None
        assert (after.source, after.shape, after.digest) == (before.source, before.shape, before.digest)
        for part in ("columns", "order"):
            held = getattr(before, part)
            assert held is None or torch.equal(getattr(after, part), held)
        assert torch.equal(after.qparams.codes, before.qparams.codes)
    stored = load_file(tmp_path / "p" / "plan.safetensors")
    assert sorted(stored) == [f"a.solved.{part}" for part in ("columns", "order", "scale_scale", "weight", "zero")]


def prepared() -> Plan:
    """A plan with all that calibration may find."""
    x = torch.randn(50, 64, generator=torch.Generator().manual_seed(0))
    x[:, 7] *= 40
    group = Group(sites=("a", "b"), maker=Op.RMS_NORM, stats=observe(x))
    given = {"op": Op.LINEAR, "shape": (2, 64), "weight": parse_spec("int8/channel"), "input": parse_spec("int8/token")}
    return Plan(
        recipe=Recipe(name="r", rules=(Rule(smooth=Smooth(), split=0.01),)),
        decisions={name: Decision(name=name, outliers=(7,), **given) for name in ("a", "b")},
        folds=(
            Fold(sites=("a", "b"), scale=torch.linspace(0.1, 3.0, 64), into="norm", method="smooth alpha=0.55"),
            Fold(sites=("c",), scale=torch.tensor([2.0**-10, 1 / 3])),
        ),
        notes=("a note", 'with "quotes" and é'),
        outliers=find_outliers([group]),
    )


def test_folds_notes_and_outliers_are_kept(tmp_path: Path) -> None:
    plan = prepared()
    save(plan, tmp_path / "p")
    found = load(tmp_path / "p")
    assert found == plan
    assert found.notes == plan.notes
    assert found.outliers == plan.outliers
    assert found.outliers is not None
    assert found.outliers.channels("b") == (7,)
    for before, after in zip(plan.folds, found.folds, strict=True):
        assert (after.sites, after.into, after.method) == (before.sites, before.into, before.method)
        assert torch.equal(after.scale, before.scale)


def test_plans_with_other_folds_notes_or_outliers_differ() -> None:
    plan = prepared()
    assert replace(plan, folds=plan.folds[:1]) != plan
    assert replace(plan, notes=()) != plan
    assert replace(plan, outliers=None) != plan


def test_plans_from_before_folds_still_load(plan: Plan, tmp_path: Path) -> None:
    save(plan, tmp_path / "p")
    path = tmp_path / "p" / "plan.json"
    table = json.loads(path.read_text())
    for key in ("folds", "notes", "outliers"):
        del table[key]
    path.write_text(json.dumps(table))
    old = load(tmp_path / "p")
    assert (old.folds, old.notes, old.outliers) == ((), (), None)
    assert old.decisions == plan.decisions


def test_a_fold_without_its_scale_is_broken(tmp_path: Path) -> None:
    save(prepared(), tmp_path / "p")
    (tmp_path / "p" / "plan.safetensors").write_bytes(serialize({}))
    with pytest.raises(PlanError, match=r"is broken .KeyError: 'fold\.0\.scale'.*save it again"):
        load(tmp_path / "p")


@pytest.mark.parametrize(
    ("spec", "zero", "levels", "stored"),
    [
        ("int8/tensor/asym", torch.tensor(3.0), None, {}),
        ("nf4/tensor/bf16", None, None, {"scale": torch.tensor(0.5, dtype=torch.bfloat16)}),
        ("lloyd4/tensor", None, torch.linspace(-1, 1, 16), {"code": torch.tensor([7], dtype=torch.uint8)}),
    ],
)
def test_every_tensor_of_qparams_is_kept(
    spec: str, zero: Tensor | None, levels: Tensor | None, stored: dict[str, Tensor], tmp_path: Path
) -> None:
    parsed = parse_spec(spec)
    held = QParams(spec=parsed, scale=torch.tensor(0.5), zero=zero, levels=levels, stored=stored)
    decision = Decision(name="a.b", op=Op.LINEAR, shape=(2, 4), input=parsed, input_qparams=held, solver="round")
    save(Plan(recipe=Recipe(name="r", rules=(Rule(),)), decisions={"a.b": decision}), tmp_path / "p")
    found = load(tmp_path / "p").decisions["a.b"].input_qparams
    assert found is not None
    assert found.spec == parsed
    for name in ("scale", "zero", "levels"):
        before, after = getattr(held, name), getattr(found, name)
        assert (before is None and after is None) or torch.equal(before, after)
    assert {k: (v.dtype, v.tolist()) for k, v in found.stored.items()} == {
        k: (v.dtype, v.tolist()) for k, v in stored.items()
    }


def test_the_json_is_a_line_for_each_decision(plan: Plan, tmp_path: Path) -> None:
    save(plan, tmp_path / "p")
    text = (tmp_path / "p" / "plan.json").read_text()
    lines = [line for line in text.splitlines() if '"shape"' in line]
    assert [json.loads(line.strip(" ,"))["name"] for line in lines] == ["emb", "fc", "extra"]
    assert json.loads(text)["schema"] == artifact.SCHEMA


def test_saving_again_replaces_a_plan(plan: Plan, model: Net, tmp_path: Path) -> None:
    (tmp_path / "p").mkdir()
    save(plan, tmp_path / "p")
    other = calibrate(model, [torch.arange(3)[None]], "int8")
    save(other, tmp_path / "p")
    assert load(tmp_path / "p") == other
    assert [entry.name for entry in tmp_path.iterdir()] == ["p"]


def test_a_folder_that_holds_something_else_is_left_as_it_is(plan: Plan, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(PlanError, match=r"holds something else \(notes\.txt\).*new or empty folder"):
        save(plan, tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["notes.txt"]
    with pytest.raises(PlanError, match=r"is a file; a plan is saved to a folder"):
        save(plan, tmp_path / "notes.txt")
    with pytest.raises(PlanError, match=r"notes\.txt' is a file; a plan is saved to a folder"):
        save(plan, tmp_path / "notes.txt" / "p")
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_place_that_cannot_be_written_is_named(plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(PlanError, match=r"cannot write the plan to '.*p': Permission denied; choose a folder"):
        save(plan, tmp_path / "p")


@pytest.mark.parametrize("existing", [False, True])
def test_a_failure_while_writing_leaves_what_was_there(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, existing: bool
) -> None:
    if existing:
        save(plan, tmp_path / "p")

    def fail(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(artifact, "save_file", fail)
    with pytest.raises(PlanError, match="No space left on device"):
        save(plan, tmp_path / "p")
    assert [entry.name for entry in tmp_path.iterdir()] == (["p"] if existing else [])
    assert not existing or load(tmp_path / "p") == plan


def test_a_failure_while_renaming_brings_the_old_plan_back(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(plan, tmp_path / "p")
    rename, calls = artifact.os.rename, []

    def second_fails(source: Path, target: Path) -> None:
        calls.append(target)
        if len(calls) == 2:
            raise OSError(5, "Input/output error")
        rename(source, target)

    monkeypatch.setattr(artifact.os, "rename", second_fails)
    with pytest.raises(PlanError, match="Input/output error"):
        save(plan, tmp_path / "p")
    assert [entry.name for entry in tmp_path.iterdir()] == ["p"]
    assert load(tmp_path / "p") == plan


def test_only_plans_are_saved(model: Net, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"save takes a plan, from qcompile\.calibrate.*got Net"):
        save(model, tmp_path / "p")  # type: ignore[arg-type]


def test_a_newer_schema_is_refused_with_both_versions(plan: Plan, tmp_path: Path) -> None:
    save(plan, tmp_path / "p")
    path = tmp_path / "p" / "plan.json"
    path.write_text(path.read_text().replace('"schema": 3', '"schema": 7'))
    with pytest.raises(PlanError, match=r"has schema 7, and this version of qcompile reads up to 3; upgrade qcompile"):
        load(tmp_path / "p")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("plan.json", "{", "is broken .JSONDecodeError.*save it again"),
        ("plan.json", "[]", "is no plan of qcompile; give the folder"),
        ("plan.json", '{"kind": "other"}', "is no plan of qcompile; give the folder"),
        ("plan.json", '{"kind": "qcompile.plan", "schema": 1}', "is broken .KeyError.*decisions.*save it again"),
        ("plan.safetensors", "", "is broken .*save it again"),
    ],
)
def test_a_broken_plan_is_named(plan: Plan, tmp_path: Path, name: str, content: str, message: str) -> None:
    save(plan, tmp_path / "p")
    (tmp_path / "p" / name).write_text(content)
    with pytest.raises(PlanError, match=message):
        load(tmp_path / "p")


def test_a_missing_tensor_or_file_is_named(plan: Plan, tmp_path: Path) -> None:
    save(plan, tmp_path / "p")
    tensors = tmp_path / "p" / "plan.safetensors"
    tensors.write_bytes(serialize({}))
    with pytest.raises(PlanError, match=r"is broken .KeyError: 'fc\.input\.scale'"):
        load(tmp_path / "p")
    tensors.unlink()
    with pytest.raises(PlanError, match=r"no plan in '.*p'.*give the folder that qcompile\.save wrote"):
        load(tmp_path / "p")
    with pytest.raises(PlanError, match=r"no plan in '.*nowhere'"):
        load(tmp_path / "nowhere")


def test_a_plan_for_another_model_is_refused_when_bound(plan: Plan, tmp_path: Path) -> None:
    save(plan, tmp_path / "p")
    with pytest.raises(PlanError, match=r"calibration for another model: the model has no 'emb'"):
        load(tmp_path / "p", nn.Sequential(nn.Linear(2, 2)))
