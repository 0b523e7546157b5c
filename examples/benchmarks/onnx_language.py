"""Quantized ONNX files of a causal language model beside torch.compile under the same plans.

    python examples/benchmarks/onnx_language.py --model DIR --tokens FILE

A plan is made on the PyTorch model, from windows of the first half of the file where its recipe needs data, and serves
both: the exported file, run by onnxruntime, and torch.compile(backend="qcompile"). Perplexity and KL to the float model
are of windows of 512 tokens from the second half.

The two have to agree on perplexity. They round alike, but floats that differ by an ulp fall on two sides of a tie, and
static plans carry that through all layers: each window is a little off, to either side, and a standard error over
windows says how far chance alone goes. Files with narrow weights alone are compared as copies whose kernels take float
inputs, as the plan says; the files themselves round inputs to int8 in blocks, which is what makes them fast, and their
rows hold both. What else a file does otherwise than planned stands in the row's notes.

Times are of onnxruntime with one window and with 16 tokens, all files in turns, in sessions of as many threads as torch
uses; they are taken after all results were compared.  Writes examples/benchmarks/results/onnx_language.json.
"""

import argparse
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import stdev
from typing import Any

import onnx
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
from qcompile.report.quality import LanguageQuality, token_divergences, token_windows
from qcompile.report.timing import time_in_turns

FLOAT, WINDOW = "float32", 512
FP4 = {"rules": [{"ops": ["linear"], "weight": "fp4_e2m1/g32", "solver": "mse"}]}
RECIPES: dict[str, Recipe] = {
    **{name: PRESETS[name] for name in ("int8-static", "int8-smooth-static", "int8-smooth-split-static")},
    "int4-weight": PRESETS["int4-weight"],
    "fp4-weight": parse_recipe(FP4),
}
LENGTHS = (16, 512)
# of perplexity, between the two ways to run one plan
AGREED = 1e-3
FUSED = ("MatMulIntegerToFloat", "DynamicQuantizeMatMul", "MatMulNBits", "SkipSimplifiedLayerNormalization")
NARROW, FLOAT_ACCURACY = "MatMulNBits", 1


@dataclass(frozen=True, kw_only=True, eq=False)
class Candidate:
    """One plan: its file, the session that runs it, and the model as torch.compile runs it.

    as_planned: a session of the same weights that takes inputs as the plan has them; `running` itself if that does.
    notes: what the report says of the file, where it deviates from the plan above all.
    """

    path: Path
    running: onnxruntime.InferenceSession
    as_planned: onnxruntime.InferenceSession
    compiled: Any
    notes: tuple[str, ...] = ()


@dataclass(kw_only=True)
class Measured:
    """Sums over the windows added.  between: KL(torch || file).  apart: of each window, nats a token."""

    by_file: LanguageQuality = field(default_factory=LanguageQuality)
    by_torch: LanguageQuality = field(default_factory=LanguageQuality)
    between: float = 0.0
    apart: list[float] = field(default_factory=list)

    def add(self, reference: Tensor, from_file: Tensor, from_torch: Tensor, window: Tensor) -> None:
        before = self.by_file.losses - self.by_torch.losses
        self.by_file.add(reference, from_file, window)
        self.by_torch.add(reference, from_torch, window)
        self.apart.append((self.by_file.losses - self.by_torch.losses - before) / (window.numel() - 1))
        self.between += float(token_divergences(from_torch[:, :-1], from_file[:, :-1]).sum())

    def row(self) -> dict[str, Any]:
        return {
            "perplexity": self.by_file.perplexity,
            "perplexity_in_torch": self.by_torch.perplexity,
            "apart": self.by_file.perplexity / self.by_torch.perplexity - 1,
            "standard_error_of_apart": stdev(self.apart) / len(self.apart) ** 0.5,
            "kl": self.by_file.kl,
            "kl_in_torch": self.by_torch.kl,
            "kl_between": self.between / self.by_file.predictions,
        }


def run(running: onnxruntime.InferenceSession, tokens: Tensor) -> Tensor:
    """float32 [B, T, V]."""
    return torch.from_numpy(running.run(["logits"], {"input_ids": tokens.numpy()})[0])


def with_float_inputs(path: Path) -> Path:
    """A copy whose kernels of narrow weights leave inputs as they are; the path itself if it has none of them."""
    model = onnx.load(path)
    nodes = [node for node in model.graph.node if node.op_type == NARROW]
    for node in nodes:
        next(a for a in node.attribute if a.name == "accuracy_level").i = FLOAT_ACCURACY
    if not nodes:
        return path
    copy = path.with_suffix(".float_inputs.onnx")
    onnx.save(model, copy)
    return copy


def candidates(model: nn.Module, source: Path, place: Path, calibration: Tensor) -> Iterator[tuple[str, Candidate]]:
    """The recipes by name, first the float model."""
    running = start(source, source.name)
    yield FLOAT, Candidate(path=source, running=running, as_planned=running, compiled=model)
    for name, recipe in RECIPES.items():
        batches = [{"input_ids": batch, "use_cache": False} for batch in calibration.split(8)]
        plan = qcompile.calibrate(model, batches if recipe.needs_data else batches[:1], recipe, progress=False)
        path = place / f"{name}.onnx"
        report = qcompile.quantize_onnx(source, path, plan)
        running, copy = start(path, path.name), with_float_inputs(path)
        yield (
            name,
            Candidate(
                path=path,
                running=running,
                as_planned=running if copy == path else start(copy, copy.name),
                compiled=torch.compile(model, dynamic=False, backend="qcompile", options={"plan": plan}),
                notes=report.notes,
            ),
        )
        print("made", name, flush=True)


def measure(model: Any, found: dict[str, Candidate], windows: Tensor) -> dict[str, dict[str, Any]]:
    """Size, kernels and quality both ways, by recipe; raises SystemExit if the ways differ."""
    planned = {name: Measured() for name in found}
    written = {name: Measured() for name, one in found.items() if one.as_planned is not one.running}
    for window in windows.split(1):
        reference = model(input_ids=window, use_cache=False).logits
        for name, one in found.items():
            by_torch = one.compiled(input_ids=window, use_cache=False).logits if name != FLOAT else reference
            planned[name].add(reference, run(one.as_planned, window), by_torch, window)
            if name in written:
                written[name].add(reference, run(one.running, window), by_torch, window)
    rows = {name: row(one, written.get(name, planned[name]), planned[name]) for name, one in found.items()}
    for name, values in rows.items():
        print(name, values, flush=True)
    wrong = {
        name: values["as_planned"] for name, values in rows.items() if not abs(values["as_planned"]["apart"]) <= AGREED
    }
    if wrong:
        raise SystemExit(f"onnxruntime and torch differ by more than {AGREED:.1%}, nothing was timed: {wrong}")
    return rows


def row(one: Candidate, written: Measured, planned: Measured) -> dict[str, Any]:
    """What is known of one file before it is timed.  as_planned: of the copy that is compared with torch."""
    kernels = fused(one.path)
    return {
        "megabytes": round(one.path.stat().st_size / 1e6, 2),
        **written.row(),
        "as_planned": planned.row(),
        "fused": {kernel: kernels[kernel] for kernel in FUSED if kernels[kernel]},
        "notes": list(one.notes),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--tokens", type=Path, required=True)
    parser.add_argument("--windows", type=int, default=64, help="two or more")
    parser.add_argument("--calibration", type=int, default=32, help="windows that recipes which need data see")
    parser.add_argument("--rounds", type=int, default=20)
    given = parser.parse_args()
    torch._dynamo.config.recompile_limit = 8 * len(RECIPES)
    model = load_model(given.model)
    tokens = read_tokens(given.tokens, given.model, int(model.config.vocab_size))
    windows = token_windows(tokens, WINDOW, given.windows)
    calibration = tokens[: given.calibration * WINDOW].reshape(given.calibration, WINDOW).long()
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        place = Path(folder)
        export_model(model, {"input_ids": windows[:2, :8]}, place / "float.onnx")
        found = dict(candidates(model, place / "float.onnx", place, calibration))
        rows = measure(model, found, windows)
        for length in LENGTHS:
            calls = {name: partial(run, one.running, windows[:1, :length]) for name, one in found.items()}
            for name, timing in time_in_turns(calls, rounds=given.rounds).items():
                rows[name][f"ms_1x{length}"] = round(timing.median, 3)
                rows[name][f"lowest_ms_1x{length}"] = round(timing.lowest, 3)
                print(name, length, timing.median, flush=True)
    result = {
        "command": "python examples/benchmarks/onnx_language.py --model DIR --tokens FILE",
        "model": given.model.name,
        "windows": [len(windows), WINDOW],
        "calibration_windows": given.calibration,
        "machine": machine() | {"onnxruntime": onnxruntime.__version__},
        "rows": rows,
    }
    write_result(RESULTS / "onnx_language.json", result)


if __name__ == "__main__":
    main()
