"""Ways to run one model, compiled, timed in turns, and compared in a table."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import nn

from qcompile.report import Report
from qcompile.report.timing import Timing, time_in_turns

FLOAT = "fp32"

Compiled = Callable[..., Any]


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One way to run the model. report: None for the float one."""

    run: Compiled
    report: Report | None


def compile_candidates(
    model: nn.Module, names: list[str], example: Mapping[str, torch.Tensor], console: Console
) -> dict[str, Candidate]:
    """The model compiled by Inductor in float, and under each recipe; every one has run once on `example`."""
    candidates: dict[str, Candidate] = {}
    for name in [FLOAT, *names]:
        with console.status(f"compiling {name} ..."):
            candidates[name] = _compile(model, None if name == FLOAT else name, example)
    return candidates


def _compile(model: nn.Module, recipe: str | None, example: Mapping[str, torch.Tensor]) -> Candidate:
    from qcompile.compile import report

    compiled = (
        torch.compile(model) if recipe is None else torch.compile(model, backend="qcompile", options={"recipe": recipe})
    )
    compiled(**example)
    return Candidate(run=compiled, report=None if recipe is None else report(compiled))


def time_candidates(
    candidates: Mapping[str, Candidate], example: Mapping[str, torch.Tensor], rounds: int, console: Console
) -> dict[str, Timing]:
    """Milliseconds of one call on `example`, candidates in turns."""

    def call(run: Compiled) -> Callable[[], object]:
        return lambda: run(**example)

    with console.status("measuring time ..."):
        return time_in_turns({name: call(c.run) for name, c in candidates.items()}, rounds=rounds)


def comparison(
    title: str,
    quality: Mapping[str, tuple[str, ...]],
    columns: tuple[str, ...],
    candidates: Mapping[str, Candidate],
    timings: Mapping[str, Timing],
) -> Table:
    """A row for each candidate: quality, then milliseconds of the median call, speed-up, weight bytes, coverage.

    quality: cells of `columns`, by candidate.
    """
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column("recipe", no_wrap=True)
    for column in (*columns, "ms", "speed", "weights\nMB", "covered"):
        table.add_column(column, justify="right", no_wrap=True)
    whole = next((c.report.bytes_before for c in candidates.values() if c.report is not None), 0)
    for name, candidate in candidates.items():
        kept = whole if candidate.report is None else candidate.report.bytes_after
        table.add_row(
            name,
            *quality[name],
            f"{timings[name].median:.1f}",
            f"{timings[FLOAT].median / timings[name].median:.2f}x",
            f"{kept / 1e6:.1f}",
            "" if candidate.report is None else f"{candidate.report.coverage:.0%}",
        )
    return table
