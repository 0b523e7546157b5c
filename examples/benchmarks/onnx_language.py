"""Quantized ONNX files of a causal language model beside torch.compile under the same plans.

    python examples/benchmarks/onnx_language.py --model DIR --tokens FILE

A plan is made on the PyTorch model, from windows of the first half of the file where its recipe needs data, and serves
both: the exported file, run by onnxruntime, and torch.compile(backend="qcompile"). Perplexity and KL to the float model
are of windows of 512 tokens from the second half. Times are of onnxruntime with one window and with 16 tokens, all
files in turns, in sessions of as many threads as torch uses; they are taken after all results were compared.
Writes examples/benchmarks/results/onnx_language.json.
"""

import argparse
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from result_files import RESULTS, machine, write_result
from torch import Tensor, nn

import qcompile
from qcompile.backends.onnx.export import export_model
from qcompile.backends.onnx.fusion import fused
from qcompile.backends.onnx.runtime import start
from qcompile.cli.language import read_tokens
from qcompile.cli.models import load_model
from qcompile.presets import PRESETS, parse_recipe
from qcompile.recipe import Recipe
from qcompile.report.quality import LanguageQuality, token_windows
from qcompile.report.timing import time_in_turns

FLOAT, WINDOW, CALIBRATION = "float32", 512, 64
FP4 = {"rules": [{"ops": ["linear"], "weight": "fp4_e2m1/g32", "solver": "mse"}]}
RECIPES: dict[str, Recipe] = {
    **{name: PRESETS[name] for name in ("int8-static", "int8-smooth-static", "int8-smooth-split-static")},
    "int4-weight": PRESETS["int4-weight"],
    "fp4-weight": parse_recipe(FP4),
}
LENGTHS = (16, 512)
# of perplexity, between the two ways to run one plan
AGREED = 1e-3
FUSED = ("MatMulIntegerToFloat", "DynamicQuantizeMatMul", "MatMulNBits")


def run(running: onnxruntime.InferenceSession, tokens: Tensor) -> Tensor:
    """float32 [B, T, V]."""
    return torch.from_numpy(running.run(["logits"], {"input_ids": tokens.numpy()})[0])


def quantized(model: nn.Module, source: Path, place: Path, calibration: Tensor) -> Iterator[tuple[str, Path, Any]]:
    """Of each recipe: its name, the file, and the model as torch.compile runs it, under one plan."""
    for name, recipe in RECIPES.items():
        batches = [{"input_ids": batch, "use_cache": False} for batch in calibration.split(8)]
        plan = qcompile.calibrate(model, batches if recipe.needs_data else batches[:1], recipe, progress=False)
        path = place / f"{name}.onnx"
        qcompile.quantize_onnx(source, path, plan)
        yield name, path, torch.compile(model, dynamic=False, backend="qcompile", options={"plan": plan})


def row(name: str, path: Path, compiled: Any, model: Any, windows: Tensor) -> dict[str, Any]:
    """Size, kernels, and quality both ways; raises SystemExit if they differ."""
    running = start(path, path.name)
    by_file, by_torch = LanguageQuality(), LanguageQuality()
    for window in windows.split(1):
        reference = model(input_ids=window, use_cache=False).logits
        by_file.add(reference, run(running, window), window)
        by_torch.add(reference, compiled(input_ids=window, use_cache=False).logits, window)
    apart = by_file.perplexity / by_torch.perplexity - 1
    if not abs(apart) <= AGREED:
        raise SystemExit(f"{name}: perplexity {by_file.perplexity} in onnxruntime, {by_torch.perplexity} in torch")
    kernels = fused(path)
    found = {
        "megabytes": round(path.stat().st_size / 1e6, 2),
        "perplexity": by_file.perplexity,
        "perplexity_in_torch": by_torch.perplexity,
        "apart": apart,
        "kl": by_file.kl,
        "kl_in_torch": by_torch.kl,
        "fused": {kernel: kernels[kernel] for kernel in FUSED if kernels[kernel]},
    }
    print(name, found, flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--tokens", type=Path, required=True)
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=20)
    given = parser.parse_args()
    torch._dynamo.config.recompile_limit = 8 * len(RECIPES)
    model = load_model(given.model)
    tokens = read_tokens(given.tokens, given.model, int(model.config.vocab_size))
    windows = token_windows(tokens, WINDOW, given.windows)
    calibration = tokens[: CALIBRATION * WINDOW].reshape(CALIBRATION, WINDOW).long()
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        place = Path(folder)
        files = {FLOAT: place / "float.onnx"}
        export_model(model, {"input_ids": windows[:2, :8]}, files[FLOAT])
        rows = {FLOAT: row(FLOAT, files[FLOAT], model, model, windows)}
        for name, path, compiled in quantized(model, files[FLOAT], place, calibration):
            files[name] = path
            rows[name] = row(name, path, compiled, model, windows)
        sessions = {name: start(path, path.name) for name, path in files.items()}
        for length in LENGTHS:
            calls = {name: partial(run, s, windows[:1, :length]) for name, s in sessions.items()}
            for name, timing in time_in_turns(calls, rounds=given.rounds).items():
                rows[name][f"ms_1x{length}"] = round(timing.median, 3)
    for name, found in rows.items():
        print(name, found, flush=True)
    result = {
        "command": "python examples/benchmarks/onnx_language.py --model DIR --tokens FILE",
        "model": given.model.name,
        "windows": [len(windows), WINDOW],
        "calibration_windows": CALIBRATION,
        "machine": machine() | {"onnxruntime": onnxruntime.__version__},
        "rows": rows,
    }
    write_result(RESULTS / "onnx_language.json", result)


if __name__ == "__main__":
    main()
