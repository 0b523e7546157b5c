"""What calibration costs on the CPU: its time beside that of running the model plainly, and its memory.

    python examples/benchmarks/calibration_cost.py --model DIR --tokens FILE

A causal language model on 64 windows of 512 tokens, in batches of 1 and of 8 windows: `qcompile.calibrate` from start
to plan, and before each of its batches the float model alone on the same one, so that a machine that slows down slows
both. Activations of small batches are looked at together, so that what counts is the sum over all batches; of it, and
of what follows the last batch, the median over the rounds. Memory
is of a process of its own that calibrates on 16 or on 256 batches of one window: the most that it ever holds, and what
it holds before the last batch once the allocator has given back what is free, which it keeps as it happens to lie.
Writes examples/benchmarks/results/calibration_cost.json.
"""

import argparse
import ctypes
import resource
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from result_files import RESULTS, machine, write_result
from torch import Tensor, nn

import qcompile
from qcompile.cli.language import read_tokens
from qcompile.cli.models import load_model
from qcompile.report.quality import token_windows

WINDOW, WINDOWS = 512, 64
BATCHES = (1, 8)
# static ranges alone, and with folds and splits sought
RECIPES = ("int8-static", "int8-smooth-split-static")
FEW, MANY = 16, 256


def windows_of(model: Any, folder: Path, tokens: Path, count: int) -> Tensor:
    """int64 [count, WINDOW]."""
    return token_windows(read_tokens(tokens, folder, int(model.config.vocab_size)), WINDOW, count)


class Timed:
    """Calibrations on the same batches, each run plainly before: seconds of both, and of what follows, a round each."""

    def __init__(self, model: nn.Module, recipe: str, batches: Sequence[dict[str, Any]]) -> None:
        self._model, self._recipe, self._batches = model, recipe, batches
        self.plain: list[float] = []
        self.calibrated: list[float] = []
        self.rest: list[float] = []

    def run(self) -> None:
        """One calibration, from start to plan."""
        asked = plain = calibrated = 0.0

        def batches() -> Iterator[dict[str, Any]]:
            nonlocal asked, plain, calibrated
            for batch in self._batches:
                start = time.perf_counter()
                self._model(**batch)
                given = time.perf_counter()
                yield batch
                asked = time.perf_counter()
                plain += given - start
                calibrated += asked - given

        qcompile.calibrate(self._model, batches(), recipe=self._recipe, progress=False)
        self.rest.append(time.perf_counter() - asked)
        self.plain.append(plain)
        self.calibrated.append(calibrated)

    def row(self) -> dict[str, float]:
        """Of all batches, the median over the rounds."""
        plain, each, rest = (median(times) for times in (self.plain, self.calibrated, self.rest))
        found = {"plain": plain, "calibrating": each + rest, "after_the_last_batch": rest}
        return {
            **{f"{name}_seconds": round(seconds, 3) for name, seconds in found.items()},
            "over_plain": round((each + rest) / plain, 3),
        }


def time_row(model: nn.Module, windows: Tensor, size: int, rounds: int) -> dict[str, Any]:
    """Each recipe's calibration beside the plain run."""
    batches = [{"input_ids": batch, "use_cache": False} for batch in windows.split(size)]
    timed = {name: Timed(model, name, batches) for name in RECIPES}
    for _ in range(rounds):
        for one in timed.values():
            one.run()
    row = {"batch": size, **{name: one.row() for name, one in timed.items()}}
    print(row, flush=True)
    return row


def resident_megabytes(folder: Path, tokens: Path, recipe: str, batches: int) -> dict[str, float]:
    """Of a process that calibrates on so many batches: the most, and what is held before the last."""
    command = [sys.executable, __file__, "--model", str(folder), "--tokens", str(tokens)]
    command += ["--only-calibrate", recipe, "--windows", str(batches)]
    most, held = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-2:]
    return {"most": round(float(most), 1), "held": round(float(held), 1)}


def calibrate_and_tell(folder: Path, tokens: Path, recipe: str, count: int) -> None:
    """Print the most megabytes that this process ever held, and those before the last batch."""
    model = load_model(folder)
    ids = read_tokens(tokens, folder, int(model.config.vocab_size))
    held = 0.0

    def batches() -> Iterator[dict[str, Any]]:
        nonlocal held
        # short files are read from their start again: memory does not depend on which tokens they are
        for number in range(count):
            at = number % (len(ids) // WINDOW) * WINDOW
            held = held_megabytes() if number == count - 1 else 0.0
            yield {"input_ids": ids[at : at + WINDOW][None], "use_cache": False}

    plan = qcompile.calibrate(model, batches(), recipe=recipe, progress=False)
    assert any(decision.weight is not None for decision in plan.decisions.values())
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, held)


def held_megabytes() -> float:
    """Resident memory without what the allocator keeps for later."""
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of a Hugging Face causal language model")
    parser.add_argument("--tokens", type=Path, required=True, help="its token ids, uint16")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--windows", type=int, default=WINDOWS)
    parser.add_argument("--only-calibrate", metavar="RECIPE", help="print the memory that this takes, and end")
    given = parser.parse_args()
    if given.only_calibrate:
        calibrate_and_tell(given.model, given.tokens, given.only_calibrate, given.windows)
        return
    memory = {
        recipe: {str(count): resident_megabytes(given.model, given.tokens, recipe, count) for count in (FEW, MANY)}
        for recipe in RECIPES
    }
    print(memory, flush=True)
    model = load_model(given.model)
    windows = windows_of(model, given.model, given.tokens, given.windows)
    with torch.no_grad():
        rows = [time_row(model, windows, size, given.rounds) for size in BATCHES]
    result = {
        "command": "python examples/benchmarks/calibration_cost.py --model DIR --tokens FILE",
        "model": given.model.name,
        "windows": [len(windows), WINDOW],
        "machine": machine(),
        "resident_megabytes": memory,
        "time": rows,
    }
    write_result(RESULTS / "calibration_cost.json", result)


if __name__ == "__main__":
    main()
