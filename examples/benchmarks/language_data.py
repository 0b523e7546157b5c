"""A language model, windows of text to measure it on, and others to calibrate on, as several benchmarks take them."""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from result_files import device
from torch import Tensor, nn

from qcompile.cli.language import read_tokens
from qcompile.cli.models import load_model
from qcompile.report.quality import token_windows

WINDOW, BATCH = 512, 16


@dataclass(frozen=True, kw_only=True, eq=False)
class Language:
    """batches: int64 [BATCH, WINDOW] each, of the second half of the file; calibration: likewise, of the first half.

    about: what a result says of them.
    """

    model: nn.Module
    batches: list[Tensor]
    calibration: list[Tensor]
    about: dict[str, Any]


def arguments(doc: str | None, *, windows: int, calibration: int) -> argparse.ArgumentParser:
    """What `language` reads, and these numbers of windows if none are given."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--tokens", type=Path, required=True)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--windows", type=int, default=windows)
    parser.add_argument("--calibration", type=int, default=calibration)
    return parser


def language(given: argparse.Namespace, *, first: int = 0) -> Language:
    """first: window to calibrate from."""
    model = load_model(given.model).to(given.device)
    tokens = read_tokens(given.tokens, given.model, int(model.config.vocab_size))
    batches = list(token_windows(tokens, WINDOW, given.windows).to(given.device).split(BATCH))
    seen = tokens[first * WINDOW : (first + given.calibration) * WINDOW]
    return Language(
        model=model,
        batches=batches,
        calibration=list(seen.view(-1, WINDOW).to(given.device).split(BATCH)),
        about={
            "model": given.model.name,
            "dtype": str(model.dtype),
            "windows": [len(batches) * BATCH, WINDOW],
            "calibration_windows": given.calibration,
            "machine": device(given.device),
        },
    )
