"""Files with integers where they serve and floats where those stay poor."""

from pathlib import Path

import pytest
import torch

import qcompile
from qcompile.backends.onnx.export import export_model
from qcompile.backends.onnx.runtime import start
from qcompile.report import Report
from tests.spiky import FLOATS, INTEGERS, spikes, spiky


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("float") / "net.onnx"
    export_model(spiky(), {"x": spikes(0)}, path)
    return path


def specs(report: Report) -> dict[str, tuple[str | None, str | None]]:
    return {site.name: (site.weight, site.input) for site in report.quantized}


@pytest.mark.parametrize("target", ["ort-cpu", "portable"])
def test_a_file_is_what_the_plan_makes_of_the_torch_model(target: str, source: Path, tmp_path: Path) -> None:
    net = spiky()
    plan = qcompile.calibrate(net, [spikes(1), spikes(2)], "int8-fp8-static", progress=False)
    report = qcompile.quantize_onnx(source, tmp_path / "out.onnx", plan, target=target)
    assert specs(report) == {"up": INTEGERS, "down": FLOATS}
    slow = [note for note in report.notes if note.startswith("down: inputs are rounded to fp8_e4m3/tensor in float")]
    assert len(slow) == (target == "ort-cpu")
    found = start(tmp_path / "out.onnx", "out").run(None, {"x": spikes(3).numpy()})[0]
    torch._dynamo.reset()
    with torch.no_grad():
        graph = torch.compile(net, backend="qcompile", options={"plan": plan, "lower": False})(spikes(3))
    assert float((torch.from_numpy(found) - graph).norm() / graph.norm()) < 1e-3


def test_files_are_calibrated_as_models_are_and_tensorrt_mixes_nothing(source: Path, tmp_path: Path) -> None:
    batches = [{"x": spikes(1)}, {"x": spikes(2)}]
    made = {
        target: qcompile.quantize_onnx(source, tmp_path / target, "int8-fp8-static", batches=batches, target=target)
        for target in ("portable", "tensorrt")
    }
    assert specs(made["portable"]) == {"up": INTEGERS, "down": FLOATS}
    assert specs(made["tensorrt"]) == dict.fromkeys(("up", "down"), ("int8/channel", "int8/tensor"))
    assert any("where that is poor none is of another spec" in note for note in made["tensorrt"].notes)
