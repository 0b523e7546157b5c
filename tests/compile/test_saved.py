"""What a folder holds of a model: weights of two specs are told, and damage is found."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

import qcompile
from qcompile.errors import PlanError
from qcompile.graph import Op
from qcompile.recipe import Recipe


class Words(nn.Module):
    """A table that is the head, too."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.inner, self.head = nn.Embedding(50, 128), nn.Linear(128, 128), nn.Linear(128, 50)
        self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.inner(self.table(ids)))


@pytest.fixture
def ids() -> Tensor:
    return torch.tensor([[1, 49, 4], [0, 7, 7]])


def empty_words() -> Words:
    with torch.device("meta"):
        return Words().eval()


def compiled(model: nn.Module, plan: qcompile.Plan) -> Any:
    return torch.compile(model, backend="qcompile", options={"plan": plan})


@pytest.mark.usefixtures("graphs_only")
@pytest.mark.parametrize(("head", "times"), [("int4/g32/asym", 2), ("int8/channel", 0)])
def test_a_tied_weight_of_two_specs_is_counted_and_noted(head: str, times: int, ids: Tensor, tmp_path: Path) -> None:
    table = qcompile.Rule(ops=(Op.EMBEDDING,), weight=qcompile.parse_spec("int8/channel"))
    recipe = Recipe(name="two", rules=(table, qcompile.Rule(weight=qcompile.parse_spec(head))))
    fast = torch.compile(Words().eval(), backend="qcompile", options={"recipe": recipe})
    fast(ids)
    report = qcompile.report(fast)
    notes = [note for note in report.notes if "one weight is kept" in note]
    assert notes == [
        f"one weight is kept {times} times, as int8/channel for 'table', as {head} for 'head': give these sites one "
        "spec to keep it once"
    ] * bool(times)
    # the kernels of both keep their own packs
    sizes = {site.name: site.bytes_after for site in report.sites}
    assert sizes["table"] > 0
    assert sizes["head"] >= 50 * 128 // 2
    qcompile.save(fast, tmp_path / "m")
    codes = [name for name in load_file(tmp_path / "m" / "plan.safetensors") if name.endswith(".solved.weight")]
    assert len(codes) == max(times, 1) + 1


@pytest.mark.usefixtures("graphs_only")
@pytest.mark.parametrize("recipe", ["int8-static", "int4-weight"])
def test_a_flipped_bit_of_any_tensor_is_found(recipe: str, ids: Tensor, tmp_path: Path) -> None:
    plan = qcompile.calibrate(model := Words().eval(), [ids], recipe, progress=False)
    fast = compiled(model, plan)
    fast(ids)
    qcompile.save(fast, tmp_path / "m")
    seen = set()
    for path in sorted((tmp_path / "m").glob("*.safetensors")):
        for name, start in _starts(path).items():
            _flip(path, start)
            torch._dynamo.reset()
            other = empty_words()
            with pytest.raises(Exception, match=r"save") as caught:
                compiled(other, qcompile.load(tmp_path / "m", other))(ids)
            found = [what for what in ("changed since", "beside codes", "digest is") if what in str(caught.value)]
            assert found, f"{name}: {caught.value}"
            seen.update(found)
            _flip(path, start)
    # the ranges of inputs are beside codes
    assert seen == {"changed since", "digest is", *(["beside codes"] if recipe == "int8-static" else [])}
    other = empty_words()
    qcompile.load(tmp_path / "m", other)


@pytest.mark.usefixtures("graphs_only")
def test_codes_are_not_read_before_they_are_used(ids: Tensor, tmp_path: Path) -> None:
    fast = torch.compile(Words().eval(), backend="qcompile", options={"recipe": "int4-weight"})
    fast(ids)
    qcompile.save(fast, tmp_path / "m")
    path = tmp_path / "m" / "plan.safetensors"
    _flip(path, _starts(path)["inner.solved.weight"])
    # whoever only looks at a plan does not wait until gigabytes are read
    plan = qcompile.load(tmp_path / "m", empty_words())
    with pytest.raises(PlanError, match=r"codes \[128, 128\] of 'inner\.weight' are not those.*copy the files again"):
        _ = plan.decisions["inner"].solved.qparams


def _starts(path: Path) -> dict[str, int]:
    """Where the numbers of each tensor of a safetensors file begin."""
    content = path.read_bytes()
    size = 8 + int.from_bytes(content[:8], "little")
    held = json.loads(content[8:size])
    return {name: size + held[name]["data_offsets"][0] for name in held.keys() - {"__metadata__"}}


def _flip(path: Path, place: int) -> None:
    # another file in its place: that one may be mapped
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.unlink()
    path.write_bytes(content)


# a graph reads it, and no module keeps it
_ELSEWHERE = torch.rand(3, 64)


class Matrices(nn.Module):
    """Matrices that are no parameters: one that is added, one that a linear reads, and one that no module keeps."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.places = nn.Linear(64, 64), torch.rand(3, 64)
        self.register_buffer("mix", torch.rand(64, 64) - 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.inner(x) + self.places, self.mix) * _ELSEWHERE


@pytest.mark.usefixtures("graphs_only")
@pytest.mark.parametrize("calibrated", [False, True])
def test_a_model_with_matrices_that_are_no_parameters_comes_back(calibrated: bool, tmp_path: Path) -> None:
    model, x = Matrices().eval(), torch.rand(3, 64)
    plan = qcompile.calibrate(model, [x], "int8", progress=False)
    options = {"plan": plan} if calibrated else {"recipe": "int8"}
    fast = torch.compile(model, backend="qcompile", options=options)
    y = fast(x)
    qcompile.save(fast, tmp_path / "m")
    with torch.device("meta"):
        other = Matrices().eval()
    plan = qcompile.load(tmp_path / "m", other)
    assert torch.equal(compiled(other, plan)(x), y)
    # calibration sees parameters only
    assert (plan.decisions["mix"].weight is None) is calibrated
    with pytest.raises(PlanError, match=r"the model has no 'inner'"):
        plan.bind(nn.Linear(64, 64))
