"""What each recipe does to a causal language model: perplexity, and KL divergence to the float model.

    python examples/benchmarks/language_quality.py --model DIR --tokens FILE [--device cuda] [--windows 259]

Windows of 512 tokens from the second half of the file, every token but the first of a window predicted once; KL in
nats a token, mean over tokens. Recipes that need calibration see windows from the first half.
Writes examples/benchmarks/results/language_quality_<device>.json; rows of other recipes in it stay if they are of the
same data and machine.
"""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from result_files import RESULTS, device, write_result
from torch import Tensor, nn

import qcompile
from qcompile.cli.language import read_tokens
from qcompile.cli.models import load_model
from qcompile.presets import PRESETS
from qcompile.report.quality import LanguageQuality, token_windows

WINDOW, BATCH = 512, 8
# windows that recipes which need data see
CALIBRATION = 64


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


def rows_before(path: Path, about: Mapping[str, Any]) -> dict[str, Any]:
    """The rows of a result of the same model, data and machine, so that recipes may be measured a few at a time."""
    if not path.exists():
        return {}
    old: dict[str, Any] = json.loads(path.read_text())
    rows: dict[str, Any] = old.pop("rows")
    return rows if old == about else {}


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
    calibration = tokens[: CALIBRATION * WINDOW].reshape(CALIBRATION, WINDOW).to(given.device)
    with torch.no_grad():
        rows = measure(model, given.recipes.split(","), windows, calibration)
    path = RESULTS / f"language_quality_{given.device}.json"
    about = {
        "command": "python examples/benchmarks/language_quality.py --model DIR --tokens FILE",
        "model": given.model.name,
        "windows": [len(windows) // BATCH * BATCH, WINDOW],
        "calibration_windows": CALIBRATION,
        "dtype": str(next(model.parameters()).dtype),
        "machine": device(given.device),
    }
    write_result(path, about | {"rows": rows_before(path, about) | rows})


if __name__ == "__main__":
    main()
