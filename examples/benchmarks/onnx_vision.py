"""A residual network in int8 beside its float32 file: accuracy, size, kernels and milliseconds of onnxruntime's CPU.

    python examples/benchmarks/onnx_vision.py

The network (15 convolutions, batch norms, residual sums) is trained here for some minutes on drawn digits, and exported
with its norms folded by the exporter. Static recipes see 512 images of the training set; accuracy is that on 2000
images of another seed. Times are of 1 and of 16 images, all files in turns, in sessions of as many threads as torch
uses. Every file's accuracy is looked at before anything is timed.
Writes examples/benchmarks/results/onnx_vision.json.
"""

import argparse
import tempfile
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from residual_network import ResidualNetwork, accuracy, train
from result_files import RESULTS, machine, write_result
from seven_segments import CLASSES, SIZE, images
from torch import Tensor

import qcompile
from qcompile.backends.onnx.export import export_model
from qcompile.backends.onnx.fusion import fused
from qcompile.backends.onnx.runtime import start
from qcompile.report.timing import time_in_turns

FLOAT, BASELINE = "float32", "onnxruntime quantize_static, per channel"
RECIPES = ("int8-static", "int8-weight")
TRAIN, TEST, CALIBRATE, BATCH = 8000, 2000, 512, 64
EPOCHS = 5
SHAPES = (1, 16)
# float accuracies between which a loss can be seen, and the loss with which a file is broken, and nothing is timed
EASY, HARD, BROKEN = 0.998, 0.9, 0.05
FUSED = ("QLinearConv", "QLinearAdd", "MatMulIntegerToFloat", "QGemm", "Conv", "FusedConv")


def trained(epochs: int = EPOCHS, count: int = TRAIN) -> torch.nn.Module:
    """The network after training; the same for the same arguments and versions."""
    torch.manual_seed(0)
    return train(ResidualNetwork(CLASSES), *images(count, seed=1), epochs=epochs)


def calibration() -> list[dict[str, Tensor]]:
    """Batches of images that the network was trained on."""
    return [{"images": part} for part in images(TRAIN, seed=1)[0][:CALIBRATE].split(BATCH)]


def test_set() -> tuple[Tensor, Tensor]:
    """Images that nothing was trained or calibrated on, and their classes."""
    return images(TEST, seed=2)


def run(running: onnxruntime.InferenceSession, x: Tensor) -> Tensor:
    return torch.from_numpy(running.run(None, {"images": x.numpy()})[0])


def accuracy_of(running: onnxruntime.InferenceSession, x: Tensor, labels: Tensor) -> float:
    return accuracy(torch.cat([run(running, part) for part in x.split(250)]), labels)


def quantize_by_onnxruntime(source: Path, path: Path, batches: list[dict[str, Tensor]]) -> None:
    """What onnxruntime's own quantizer makes, as it is meant to be used: prepared first, per channel, u8 and s8."""
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self._left = iter(batches)

        def get_next(self) -> dict[str, np.ndarray[Any, Any]] | None:
            return {name: x.numpy() for name, x in batch.items()} if (batch := next(self._left, None)) else None

    prepared = path.with_suffix(".prepared.onnx")
    quant_pre_process(source, prepared, skip_symbolic_shape=True)
    quantize_static(
        prepared, path, Reader(), per_channel=True, activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    given = parser.parse_args()
    began = time.perf_counter()
    model = trained(given.epochs)
    seconds = time.perf_counter() - began
    batches = calibration()
    x, labels = test_set()
    with tempfile.TemporaryDirectory() as place:
        files = {FLOAT: Path(place) / "float.onnx", BASELINE: Path(place) / "baseline.onnx"}
        export_model(model, batches[0], files[FLOAT])
        quantize_by_onnxruntime(files[FLOAT], files[BASELINE], batches)
        for name in RECIPES:
            files[name] = Path(place) / f"{name}.onnx"
            qcompile.quantize_onnx(files[FLOAT], files[name], name, batches=batches)
        sessions = {name: start(path, path.name) for name, path in files.items()}
        rows = {name: row(files[name], accuracy_of(s, x, labels)) for name, s in sessions.items()}
        for name, found in rows.items():
            print(name, found, flush=True)
        check(rows)
        for batch in SHAPES:
            calls = {name: partial(run, s, x[:batch]) for name, s in sessions.items()}
            for name, timing in time_in_turns(calls, rounds=given.rounds).items():
                rows[name][f"ms_{batch}"] = round(timing.median, 3)
                rows[name][f"lowest_ms_{batch}"] = round(timing.lowest, 3)
    for name, found in rows.items():
        print(name, found, flush=True)
    result = {
        "command": "python examples/benchmarks/onnx_vision.py",
        "model": f"residual network, 15 convolutions, {sum(p.numel() for p in model.parameters())} parameters",
        "data": f"drawn digits, {SIZE} x {SIZE}, {CLASSES} classes; {TRAIN} to train, {TEST} to test",
        "training_seconds": round(seconds),
        "machine": machine() | {"onnxruntime": onnxruntime.__version__},
        "rows": rows,
    }
    write_result(RESULTS / "onnx_vision.json", result)


def row(path: Path, correct: float) -> dict[str, Any]:
    """Megabytes, accuracy and fused kernels of one file."""
    kernels = fused(path)
    return {
        "megabytes": round(path.stat().st_size / 1e6, 3),
        "accuracy": round(correct, 4),
        "fused": {kernel: kernels[kernel] for kernel in FUSED if kernels[kernel]},
    }


def check(rows: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise SystemExit if the task is too easy or too hard to tell files apart, or if one of our files is broken."""
    reached = rows[FLOAT]["accuracy"]
    if not HARD <= reached <= EASY:
        raise SystemExit(f"float32 reaches {reached:.2%}: nothing was timed")
    for name in RECIPES:
        if reached - rows[name]["accuracy"] > BROKEN:
            raise SystemExit(f"{name} reaches {rows[name]['accuracy']:.2%}, float32 {reached:.2%}: nothing was timed")


if __name__ == "__main__":
    main()
