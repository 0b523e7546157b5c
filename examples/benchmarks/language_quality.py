"""What each recipe does to a causal language model: perplexity, and KL divergence to the float model.

    python examples/benchmarks/language_quality.py --model DIR --tokens FILE [--device cuda] [--windows 259]

Windows of 512 tokens from the second half of the file, every token but the first of a window predicted once; KL in
nats a token, mean over tokens. Recipes that need calibration see windows from the first half.
Writes examples/benchmarks/results/language_quality_<device>.json.
"""

import argparse
import json
import os
import platform
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import qcompile
from qcompile.cli.language import read_tokens
from qcompile.cli.models import load_model
from qcompile.presets import PRESETS
from qcompile.report.quality import LanguageQuality, token_windows

RESULTS = Path(__file__).parent / "results"
WINDOW, BATCH = 512, 8


def quantized(model: nn.Module, recipe: str, calibration: Tensor) -> Any:
    """The compiled model; with a plan where the recipe needs data."""
    options: dict[str, Any] = {"recipe": recipe}
    if PRESETS[recipe].needs_data:
        options = {"plan": qcompile.calibrate(model, calibration.split(BATCH), recipe, progress=False)}
    return torch.compile(model, dynamic=False, backend="qcompile", options=options)


def measure(model: nn.Module, recipes: list[str], windows: Tensor, calibration: Tensor) -> dict[str, dict[str, Any]]:
    """Quality by recipe; "float" is the model itself, compiled."""
    batches = windows.split(BATCH)
    whole = [batch for batch in batches if len(batch) == BATCH]
    reference = torch.compile(model, dynamic=False)
    rows: dict[str, dict[str, Any]] = {}
    base = LanguageQuality()
    for batch in whole:
        logits = reference(batch).logits
        base.add(logits, logits, batch)
    rows["float"] = {"perplexity": base.perplexity, "change": 0.0, "kl": 0.0}
    for recipe in recipes:
        run, quality = quantized(model, recipe, calibration), LanguageQuality()
        for batch in whole:
            quality.add(reference(batch).logits, run(batch).logits, batch)
        report = qcompile.report(run)
        rows[recipe] = {
            "perplexity": quality.perplexity,
            "change": quality.perplexity / base.perplexity - 1,
            "kl": quality.kl,
            "weight_bytes": [report.bytes_before, report.bytes_after],
            "kernels": sorted({site.kernel for site in report.sites if site.weight}),
        }
        print(recipe, rows[recipe], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--tokens", type=Path, required=True)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--windows", type=int, default=256)
    parser.add_argument("--recipes", default=",".join(PRESETS))
    given = parser.parse_args()
    torch._dynamo.config.recompile_limit = 8 * len(PRESETS)
    model = load_model(given.model).to(given.device)
    tokens = read_tokens(given.tokens, given.model, int(model.config.vocab_size))
    windows = token_windows(tokens, WINDOW, given.windows).to(given.device)
    calibration = tokens[: 16 * WINDOW].reshape(16, WINDOW).to(given.device)
    with torch.no_grad():
        rows = measure(model, given.recipes.split(","), windows, calibration)
    name = torch.cuda.get_device_name() if given.device == "cuda" else platform.machine()
    result = {
        "command": "python examples/benchmarks/language_quality.py --model DIR --tokens FILE",
        "model": given.model.name,
        "windows": [len(windows) // BATCH * BATCH, WINDOW],
        "dtype": str(next(model.parameters()).dtype),
        "machine": {"device": name, "torch": torch.__version__, "python": platform.python_version()},
        "rows": rows,
    }
    path = RESULTS / f"language_quality_{given.device}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".tmp")
    beside.write_text(json.dumps(result, indent=1) + "\n")
    os.replace(beside, path)
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
