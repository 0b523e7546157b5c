"""`qcompile inspect` says what a folder holds, and what loads it."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

import qcompile
from qcompile.cli import app
from qcompile.errors import OptionsError
from qcompile.graph import Op


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.fc = nn.Embedding(50, 64), nn.Linear(64, 50, bias=False)
        self.fc.weight = self.table.weight
        self.up = nn.Linear(64, 64)

    def forward(self, ids: Tensor) -> Tensor:
        return self.fc(self.up(self.table(ids)))


@pytest.fixture
def ids() -> Tensor:
    return torch.tensor([[1, 49, 4], [0, 7, 7]])


@pytest.fixture
def saved(ids: Tensor, tmp_path: Path) -> Path:
    int4 = qcompile.parse_spec("int4/g64/asym/bf16")
    int8 = {"weight": qcompile.parse_spec("int8/channel"), "input": qcompile.parse_spec("int8/token")}
    table = qcompile.Rule(match="table", ops=(Op.EMBEDDING,), weight=int4)
    recipe = qcompile.Recipe(name="mine", rules=(table, qcompile.Rule(match="fc", weight=int4), qcompile.Rule(**int8)))
    with torch.no_grad():
        fast = torch.compile(Net().eval(), backend="qcompile", options={"recipe": recipe})
        fast(ids)
    qcompile.save(fast, tmp_path / "m")
    return tmp_path / "m"


def inspect(*arguments: object) -> str:
    result = CliRunner().invoke(app, ["inspect", *map(str, arguments)])
    assert result.exit_code == 0, result.output
    return result.output


def test_a_model_is_shown_site_by_site(saved: Path) -> None:
    text = inspect(saved, "--markdown", "--verify")
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")][2:]
    # 4 bits, and of 64 columns a scale of 16 and a zero point of 8
    assert [row[:5] for row in rows] == [
        ["table", "50 x 64", "int4/g64/asym/bf16", "float", "4.375"],
        ["up", "64 x 64", "int8/channel", "int8/token", "8.500"],
        ["fc", "50 x 64", "int4/g64/asym/bf16", "float", "4.375"],
    ]
    assert rows[1][5] == str(64 * 64 + 64 * 4)
    assert "a Net with its weights, recipe 'mine', schema 1, qcompile " in text
    assert "one tensor: table.weight = fc.weight" in text
    assert f'plan = qcompile.load("{saved}", model)' in text
    assert "all files are as they were saved" in text
    # the bias of `up` alone is float; the shared table is stored once
    assert "in float: 256 bytes" in text
    assert "2 weights, 7296 numbers" in text


@pytest.mark.parametrize(("head", "noted"), [("int8/channel", True), ("int4/g64/asym/bf16", False)])
def test_a_tied_weight_that_is_stored_twice_is_noted(head: str, noted: bool, ids: Tensor, tmp_path: Path) -> None:
    int4 = qcompile.parse_spec("int4/g64/asym/bf16")
    fc = qcompile.Rule(match="fc", weight=qcompile.parse_spec(head))
    rules = (fc, qcompile.Rule(ops=(Op.LINEAR, Op.EMBEDDING), weight=int4))
    with torch.no_grad():
        recipe = qcompile.Recipe(name="mine", rules=rules)
        fast = torch.compile(Net().eval(), backend="qcompile", options={"recipe": recipe})
        fast(ids)
    qcompile.save(fast, tmp_path / "m")
    said = "one weight is kept 2 times, as int4/g64/asym/bf16 for 'table', as int8/channel for 'fc'"
    assert (said in inspect(tmp_path / "m")) is noted


def test_a_plan_is_shown(ids: Tensor, tmp_path: Path) -> None:
    plan = qcompile.calibrate(Net(), [ids], "int8-static", progress=False)
    qcompile.save(plan, tmp_path / "p")
    text = inspect(tmp_path / "p", "--markdown")
    assert "| up | 64 x 64 | int8/channel | int8/tensor/asym | 8.500 | 4352 | round |" in text
    assert "a plan, recipe 'int8-static', schema 3; weights come from the model" in text


def test_a_weight_of_several_modules_counts_once_under_each_spec(ids: Tensor, tmp_path: Path) -> None:
    model = Net()
    model.up = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    model.up[1].weight = model.up[0].weight
    int8, int4 = (qcompile.Rule(weight=qcompile.parse_spec(spec)) for spec in ("int8/channel", "int4/g64/asym/bf16"))
    both = (Op.EMBEDDING, Op.LINEAR)
    rules = (replace(int4, match="up*"), replace(int8, ops=both))
    plan = qcompile.calibrate(model, [ids], qcompile.Recipe(name="mine", rules=rules), progress=False)
    assert {name for name, d in plan.decisions.items() if d.weight is not None} == {"table", "fc", "up.0", "up.1"}
    qcompile.save(plan, tmp_path / "p")
    assert "2 weights, 7296 numbers, 5640 bytes" in inspect(tmp_path / "p")
    assert "one weight: up.0 = up.1" in inspect(tmp_path / "p")
    # what is loaded without a model still knows
    qcompile.save(qcompile.load(tmp_path / "p"), tmp_path / "again")
    assert "2 weights, 7296 numbers, 5640 bytes" in inspect(tmp_path / "again")
    apart = qcompile.Recipe(name="apart", rules=(replace(int4, match="fc"), *rules))
    qcompile.save(qcompile.calibrate(model, [ids], apart, progress=False), tmp_path / "a")
    text = inspect(tmp_path / "a")
    assert "3 weights, 10496 numbers, 7390 bytes" in text
    assert "one weight is kept 2 times, as int8/channel for 'table', as int4/g64/asym/bf16 for 'fc'" in text


def test_what_is_broken_ends_in_one_line(saved: Path, tmp_path: Path) -> None:
    def error(*arguments: object) -> str:
        result = CliRunner().invoke(app, ["inspect", *map(str, arguments)])
        assert result.exit_code == 2
        return result.output

    assert "no plan in" in error(tmp_path / "nowhere")
    path = saved / "floats.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert "it changed since" in error(saved, "--verify")
    path.write_bytes(content[:-8])
    assert "it was not copied whole" in error(saved)


@pytest.mark.parametrize(("weight", "stored"), [
    ("fp4_e2m1/channel", "round + shift"), ("fp4_e2m1/b32/e8m0", "round"),
])  # fmt: skip
def test_octaves_that_are_kept_beside_a_weight_are_named(weight: str, stored: str, ids: Tensor, tmp_path: Path) -> None:
    rule = qcompile.Rule(weight=qcompile.parse_spec(weight))
    plan = qcompile.calibrate(Net(), [ids], qcompile.Recipe(name="mine", rules=(rule,)), progress=False)
    decisions = {name: replace(d, shift=(0, 3) * 32 if name == "up" else ()) for name, d in plan.decisions.items()}
    qcompile.save(replace(plan, decisions=decisions), tmp_path / "p")
    rows = [line.strip("| ").split(" | ") for line in inspect(tmp_path / "p", "--markdown").splitlines()]
    found = {row[0]: row[-1] for row in rows if len(row) > 1}
    # octaves of a block of numbers are in their scale
    assert (found["up"], found["fc"]) == (stored, "round")


def test_what_is_no_plan_is_named(tmp_path: Path) -> None:
    (tmp_path / "float").mkdir()
    (tmp_path / "float" / "config.json").write_text("{}")
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    (tmp_path / "empty").mkdir()
    for name, said in (
        ("float", "that is a model in float; compile it"),
        ("model.gguf", "a .gguf file and its model to qcompile.load"),
        ("empty", "No such file"),
        ("nowhere", "give the folder that qcompile.save wrote"),
    ):
        result = CliRunner().invoke(app, ["inspect", str(tmp_path / name)])
        assert result.exit_code != 0
        assert said in " ".join(result.output.split())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there_is_named(saved: Path) -> None:
    with torch.device("meta"):
        empty = Net()
    with pytest.raises(OptionsError, match="sees no CUDA device"):
        qcompile.load(saved, empty, device="cuda")
