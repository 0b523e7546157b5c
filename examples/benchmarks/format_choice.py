"""What choosing formats site by site gains over one format for all: perplexity and KL divergence to the float model.

    python examples/benchmarks/format_choice.py --model DIR --tokens FILE [--device cpu] [--windows 32]

Windows of 512 tokens from the second half of the file; calibration sees windows of the first half. Sites run as plain
torch has them, so that the numbers are those of the formats and not of kernels.
Writes examples/benchmarks/results/format_choice.json.
"""

import argparse
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from language_quality import BATCH, WINDOW
from result_files import RESULTS, device, write_result
from torch import Tensor, nn

import qcompile
from qcompile.cli.language import read_tokens
from qcompile.cli.models import load_model
from qcompile.recipe import recipe_from_table
from qcompile.report.quality import LanguageQuality, token_windows

CALIBRATION = 16

RULES: dict[str, dict[str, Any]] = {
    "int8, one scale an input": {"weight": "int8/channel", "input": "int8/tensor/asym"},
    "fp8, one scale an input": {"weight": "fp8_e4m3/channel", "input": "fp8_e4m3/tensor"},
    "auto, one scale an input": {"weight": "int8/channel", "input": "int8/tensor/asym", "format": "auto"},
    "int4/g32/asym": {"weight": "int4/g32/asym", "solver": "mse"},
    "fp4_e2m1/g32": {"weight": "fp4_e2m1/g32", "solver": "mse"},
    "nf4/g32": {"weight": "nf4/g32", "solver": "mse"},
    "auto, 4 bits in groups of 32": {"weight": "int4/g32/asym", "solver": "mse", "format": "auto"},
}


def measure(model: nn.Module, windows: Tensor, calibration: Tensor) -> dict[str, dict[str, Any]]:
    """Quality and formats by rule; "float" is the model itself."""
    batches = [batch for batch in windows.split(BATCH) if len(batch) == BATCH]
    base = LanguageQuality()
    for batch in batches:
        logits = model(batch).logits
        base.add(logits, logits, batch)
    rows: dict[str, dict[str, Any]] = {"float": {"perplexity": base.perplexity, "kl": 0.0}}
    for name, rule in RULES.items():
        recipe = recipe_from_table({"name": name, "rules": [rule]})
        plan = qcompile.calibrate(model, calibration.split(BATCH), recipe, progress=False)
        torch._dynamo.reset()
        run = torch.compile(model, dynamic=False, backend="qcompile", options={"plan": plan, "lower": False})
        quality = LanguageQuality()
        for batch in batches:
            quality.add(model(batch).logits, run(batch).logits, batch)
        formats = Counter(str(d.weight) for d in plan.decisions.values() if d.weight is not None)
        rows[name] = {
            "perplexity": quality.perplexity,
            "change": quality.perplexity / base.perplexity - 1,
            "kl": quality.kl,
            "rule": rule,
            "weights": dict(formats),
        }
        print(name, rows[name], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--tokens", type=Path, required=True)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--windows", type=int, default=32)
    given = parser.parse_args()
    model = load_model(given.model).to(given.device)
    tokens = read_tokens(given.tokens, given.model, int(model.config.vocab_size))
    windows = token_windows(tokens, WINDOW, given.windows).to(given.device)
    calibration = tokens[: CALIBRATION * WINDOW].reshape(CALIBRATION, WINDOW).to(given.device)
    with torch.no_grad():
        rows = measure(model, windows, calibration)
    about = {
        "command": "python examples/benchmarks/format_choice.py --model DIR --tokens FILE",
        "model": given.model.name,
        "windows": [len(windows) // BATCH * BATCH, WINDOW],
        "calibration_windows": CALIBRATION,
        "dtype": str(next(model.parameters()).dtype),
        "machine": device(given.device),
    }
    write_result(RESULTS / "format_choice.json", about | {"rows": rows})


if __name__ == "__main__":
    main()
