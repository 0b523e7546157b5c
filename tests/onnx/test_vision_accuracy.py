"""The network of the benchmark, trained as it trains it: what int8 costs in accuracy."""

from pathlib import Path

import pytest

import qcompile
from qcompile.backends.onnx.runtime import start

BENCHMARKS = Path(__file__).resolve().parents[2] / "examples" / "benchmarks"


@pytest.mark.slow
def test_int8_is_within_half_a_point_of_the_trained_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    import onnx_vision

    model = onnx_vision.trained()
    batches = onnx_vision.calibration()
    images, labels = onnx_vision.test_set()
    source, path = tmp_path / "float.onnx", tmp_path / "int8.onnx"
    onnx_vision.export_model(model, batches[0], source)
    report = qcompile.quantize_onnx(source, path, "int8-static", batches=batches)
    assert [site.kernel for site in report.sites].count("QLinearConv") == 15
    full, small = (onnx_vision.accuracy_of(start(p, p.name), images, labels) for p in (source, path))
    # a task on which nothing could be lost would show nothing
    assert onnx_vision.HARD <= full <= onnx_vision.EASY
    assert full - small <= 0.005
    assert path.stat().st_size < source.stat().st_size / 3
