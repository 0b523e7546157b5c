"""Integer sums on CPUs whose instructions overflow: what sessions are given there, and what a report says."""

from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from torch import nn

import qcompile
from qcompile.backends.onnx import runtime
from qcompile.backends.onnx.export import export_model
from qcompile.backends.onnx.runtime import exact_sums, exact_sums_of, overflows, start

EXACT, AS_WRITTEN = "session.x64quantprecision", "session.disable_quant_qdq"


class Net(nn.Module):
    """Sums of products that all have one sign, which are as large as they get."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(256, 256, bias=False), nn.Linear(256, 64, bias=False)
        for linear in (self.first, self.last):
            linear.weight.data.abs_()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.relu(self.first(x)))


@pytest.fixture
def overflowing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "overflows", lambda: True)


def batches(count: int) -> list[dict[str, torch.Tensor]]:
    return [{"x": torch.rand(2, 3, 256)} for _ in range(count)]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("float") / "net.onnx"
    export_model(Net().eval(), batches(1)[0], path)
    return path


def quantized(source: Path, folder: Path, recipe: str, target: str) -> tuple[Path, str]:
    path = folder / "small.onnx"
    report = qcompile.quantize_onnx(source, path, recipe=recipe, batches=batches(4), target=target)
    return path, "\n".join(report.notes)


@pytest.mark.usefixtures("overflowing")
@pytest.mark.parametrize(
    ("recipe", "target", "entries"),
    [
        ("int8-static", "ort-cpu", {EXACT}),
        ("int8-static", "portable", {EXACT, AS_WRITTEN}),
        ("int8", "ort-cpu", {EXACT}),
        # nothing multiplies integers
        ("int4-weight", "ort-cpu", set()),
        # not for this CPU
        ("int8-static", "tensorrt", set()),
    ],
)
def test_a_report_says_what_sessions_need(
    recipe: str, target: str, entries: set[str], source: Path, tmp_path: Path
) -> None:
    _, notes = quantized(source, tmp_path, recipe, target)
    assert {entry for entry in (EXACT, AS_WRITTEN) if entry in notes} == entries


def test_elsewhere_nothing_is_said(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "overflows", lambda: False)
    path, notes = quantized(source, tmp_path, "int8-static", "ort-cpu")
    assert EXACT not in notes
    assert exact_sums() == exact_sums_of(ir.load(path), "ort-cpu") == {}


@pytest.mark.parametrize("target", ["ort-cpu", "portable"])
def test_what_is_said_suffices(target: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On any CPU; where sums overflow, a session without the entries is far off."""
    here = overflows()
    monkeypatch.setattr(runtime, "overflows", lambda: True)
    path, _ = quantized(source, tmp_path, "int8-static", target)
    feed = {"x": torch.rand(2, 3, 256).numpy()}
    entries = exact_sums_of(ir.load(path), target)
    (exact,) = start(source, "the float file").run(None, feed)
    (found,) = start(path, "the file", sums=entries).run(None, feed)
    (plain,) = ort.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, feed)
    error, without = (float(np.linalg.norm(y - exact) / np.linalg.norm(exact)) for y in (found, plain))
    assert error < 0.01
    assert (without > 0.03) == here
