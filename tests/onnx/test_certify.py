"""The certificate: the same plan in PyTorch and in a file gives the same, and a wrong file does not pass."""

import json
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn

import qcompile
from qcompile.backends.onnx.export import export_model
from qcompile.errors import CalibrationError, PlanError, UnsupportedError
from qcompile.plan import Plan
from qcompile.report.comparison import Agreement
from tests.blocks import GptBlock, LlamaBlock, PostBlock

GROUPS: dict[str, Any] = {"name": "groups", "rules": [{"match": "*", "weight": "int4/g8/asym"}]}
BLOCKS = (LlamaBlock, GptBlock, PostBlock)


def block(kind: type[nn.Module] = PostBlock) -> nn.Module:
    torch.manual_seed(0)
    return kind().eval()


def batches(*seeds: int) -> list[dict[str, Tensor]]:
    return [{"x": torch.randn(4, 12, 16, generator=torch.Generator().manual_seed(seed))} for seed in seeds]


@cache
def exported(kind: type[nn.Module]) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "float.onnx"
        export_model(block(kind), batches(0)[0], path)
        return path.read_bytes()


def source(folder: Path, kind: type[nn.Module] = PostBlock) -> Path:
    path = folder / "float.onnx"
    path.write_bytes(exported(kind))
    return path


def made(model: nn.Module, recipe: Any, folder: Path, target: str = "ort-cpu") -> tuple[Plan, Path]:
    """A plan and the file of it."""
    plan = qcompile.calibrate(model, batches(1, 2), recipe, progress=False)
    qcompile.quantize_onnx(source(folder, type(model)), folder / "out.onnx", plan, target=target)
    return plan, folder / "out.onnx"


def certified(found: Agreement) -> float:
    """How far the two are apart, in units of the plan's own error."""
    assert found.agrees
    assert str(found).count("agree on") == 1
    (output,) = found.outputs
    assert output.torch_db > 15
    assert abs(output.torch_db - output.file_db) < 6
    return output.distance / 10 ** (-output.torch_db / 20)


@pytest.mark.parametrize("kind", BLOCKS)
@pytest.mark.parametrize(("recipe", "target"), [("int8-static", "ort-cpu"), (GROUPS, "ort-cpu"), (GROUPS, "portable")])
def test_both_make_the_same_of_a_plan(kind: type[nn.Module], recipe: Any, target: str, tmp_path: Path) -> None:
    model = block(kind)
    plan, path = made(model, recipe, tmp_path, target)
    found = qcompile.agreement(model, plan, path, batches(8, 9))
    # sums alone differ: nothing here lies so near a tie that it moves
    assert certified(found) < 1e-3
    assert found.batches == 2
    assert f"PyTorch {torch.__version__}" in found.runtimes
    assert "onnxruntime" in found.runtimes


def test_kernels_that_round_inputs_themselves_are_told_from_the_plan(tmp_path: Path) -> None:
    """onnxruntime's kernel for 8-bit weights rounds inputs: the file is further from float, and yet says the same."""
    model = block()
    plan, path = made(model, "int8-weight", tmp_path)
    found = qcompile.agreement(model, plan, path, batches(9))
    assert certified(found) < 1e-3
    assert found.outputs[0].file_db < found.outputs[0].torch_db - 3
    assert "do not here" in found.why


def test_scales_that_onnxruntime_finds_are_allowed_for(tmp_path: Path) -> None:
    model = block()
    plan, path = made(model, "int8", tmp_path)
    found = qcompile.agreement(model, plan, path, batches(9))
    assert 0.5 < certified(found) < 4
    assert "finds the scales" in found.why


def test_a_plan_may_lie_in_a_folder(tmp_path: Path) -> None:
    model = block()
    plan, path = made(model, "int8-static", tmp_path)
    qcompile.save(plan, tmp_path / "plan")
    assert qcompile.agreement(model, tmp_path / "plan", path, batches(9)).agrees


def scaled(path: Path, factor: float, ending: str) -> None:
    """One constant of the file, of which the name ends so, is multiplied."""
    proto = onnx.load(path)
    tensor = next(t for t in proto.graph.initializer if t.name.endswith(ending))
    array = numpy_helper.to_array(tensor)
    tensor.CopyFrom(numpy_helper.from_array((array * factor).astype(array.dtype), tensor.name))
    path.write_bytes(proto.SerializeToString())


@pytest.mark.parametrize(
    ("recipe", "factor", "ending"),
    [
        ("int8-static", 1.25, "fc1.weight_codes_scale"),
        ("int8-static", 0.0, "fc2.bias"),
        ("int8", 1.25, "fc1.weight_codes_scale"),
        ("int8-weight", 1.02, "fc1.weight_codes_scale"),
        (GROUPS, 1.02, "o.weight_codes_scale"),
    ],
)
def test_a_wrong_file_does_not_pass(recipe: Any, factor: float, ending: str, tmp_path: Path) -> None:
    model = block()
    plan, path = made(model, recipe, tmp_path)
    assert qcompile.agreement(model, plan, path, batches(9)).agrees
    scaled(path, factor, ending)
    found = qcompile.agreement(model, plan, path, batches(9))
    assert not found.agrees
    assert "DISAGREE" in str(found)


def test_a_file_that_gives_nan_does_not_pass(tmp_path: Path) -> None:
    model = block()
    plan, path = made(model, "int8-static", tmp_path)
    scaled(path, float("nan"), "fc2.bias")
    assert not qcompile.agreement(model, plan, path, batches(9)).agrees


def test_it_may_be_asked_for_often(tmp_path: Path) -> None:
    """torch gives up compiling a function after a few times, and runs the float model then."""
    model = block()
    limit = torch._dynamo.config.recompile_limit
    plan, path = made(model, GROUPS, tmp_path)
    apart = [certified(qcompile.agreement(model, plan, path, batches(9))) for _ in range(limit + 2)]
    assert max(apart) < 1e-3


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    model = block()
    plan, path = made(model, "int8-static", tmp_path)
    with pytest.raises(PlanError, match="another model"):
        qcompile.agreement(block(GptBlock), plan, path, batches(9))
    with pytest.raises(CalibrationError, match="no batches"):
        qcompile.agreement(model, plan, path, [])
    with pytest.raises(CalibrationError, match="lacks the input 'x'"):
        qcompile.agreement(model, plan, path, [{}])

    class Two(PostBlock):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
            return super().forward(x), x

    with pytest.raises(UnsupportedError, match="gives 2 tensors, and the file 1"):
        qcompile.agreement(Two().eval(), plan, path, batches(9))


def test_the_report_holds_both_proofs(tmp_path: Path) -> None:
    model = block()
    given = {"batches": batches(1, 2), "held_out": batches(8, 9), "model": model}
    report = qcompile.quantize_onnx(source(tmp_path), tmp_path / "out.onnx", "int8-static", **given)
    assert report.agreement is not None
    assert report.agreement.agrees
    assert report.comparison is not None
    # the same outputs beside the same reference, in onnxruntime and in PyTorch
    assert report.agreement.outputs[0].file_db == pytest.approx(report.comparison.outputs[0].snr_db, abs=0.01)
    read = qcompile.Report.from_json(report.to_json())
    assert (read.agreement, read.comparison) == (report.agreement, report.comparison)
    assert json.loads(report.to_json())["agreement"]["batches"] == 2
    for text in (report.to_text(), report.to_html()):
        assert "agree on 2 batches" in text
        assert "which calibration did not see" in text
        assert f"{report.agreement.outputs[0].between_db:.1f}" in text
        assert f"{report.comparison.outputs[0].lowest_cosine:.5f}" in text


def test_without_inputs_the_report_says_why_there_is_no_certificate(tmp_path: Path) -> None:
    model = block()
    path, out = source(tmp_path), tmp_path / "out.onnx"
    report = qcompile.quantize_onnx(path, out, "int8", model=model)
    assert report.agreement is None
    assert any("no agreement certificate" in note for note in report.notes)
    other = qcompile.quantize_onnx(path, out, "int8", model=block(GptBlock), example=batches(3)[0])
    assert any("no agreement certificate: this plan is a calibration for another model" in n for n in other.notes)
    certain = qcompile.quantize_onnx(path, out, "int8", model=model, example=batches(3)[0])
    assert certain.agreement is not None


def test_inputs_in_their_order_serve_a_model_with_other_names(tmp_path: Path) -> None:
    class Positional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(16, 16)

        def forward(self, *xs: Tensor) -> Tensor:
            return self.fc(xs[0]) * xs[1]

    torch.manual_seed(0)
    model, xs = Positional().eval(), (torch.randn(3, 16), torch.randn(3, 16))
    export_model(model, xs, tmp_path / "float.onnx")
    batch = {f"input_{i}": x for i, x in enumerate(xs)}
    report = qcompile.quantize_onnx(
        tmp_path / "float.onnx", tmp_path / "out.onnx", "int8-static", batches=[batch], model=model
    )
    assert report.agreement is not None
    assert report.agreement.agrees


@pytest.mark.parametrize(("terminal", "progress"), [(True, True), (True, False), (False, True)])
def test_a_bar_moves_only_where_someone_watches(
    terminal: bool, progress: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = source(tmp_path)
    capsys.readouterr()
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    # what rich asks beside it
    monkeypatch.setenv("TERM", "xterm")
    given = {"batches": iter(batches(1, 2)), "held_out": batches(3), "progress": progress}
    qcompile.quantize_onnx(path, tmp_path / "out.onnx", "int8-static", **given)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert ("calibrate" in captured.err) == (terminal and progress)
    assert ("compare" in captured.err) == (terminal and progress)
    assert bool(captured.err) == (terminal and progress)


def test_arrays_serve_as_batches(tmp_path: Path) -> None:
    model = block()
    plan, path = made(model, "int8-static", tmp_path)
    assert qcompile.agreement(model, plan, path, [{"x": np.asarray(batches(9)[0]["x"])}]).agrees
