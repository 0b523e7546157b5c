"""`qcompile study formats`: which number format suits which data, on distributions and on a model's tensors."""

import shlex
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from statistics import mean
from typing import Annotated

import torch
import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from qcompile.calibrate import require_data
from qcompile.cli.models import load_model
from qcompile.cli.subjects import DEMO, open_subject
from qcompile.errors import OptionsError
from qcompile.fitting import check_tiles, check_weight
from qcompile.formats import parse_format
from qcompile.observers import Part
from qcompile.presets import PRESETS
from qcompile.report.findings import short
from qcompile.report.formats import draw_study, require_plots
from qcompile.report.report import write_text
from qcompile.study import (
    BOUNDS,
    DENSITIES,
    FAMILIES,
    PARTS,
    Study,
    Subject,
    format_spec,
    require_studied,
    study_density,
    study_tensor,
    study_weight,
)
from qcompile.watch import Seen, watch

# of the batch that shows which weights a model has
TOKENS = 8

study = typer.Typer(no_args_is_help=True)


@study.callback()
def studies() -> None:
    """What number formats do to data."""


@study.command("formats")
def study_formats(
    model: Annotated[
        str | None, typer.Argument(help=f"A Hugging Face model folder, or {DEMO!r}: its tensors are studied, too.")
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(help="Tokens or .txt, or a folder of them: inputs are studied, too, not only weights."),
    ] = None,
    formats: Annotated[
        str,
        typer.Option(
            help="Formats, separated by commas; 'int8/asym' has a zero point. If none: families of 8, 6, 4 bits."
        ),
    ] = "",
    weights: Annotated[str, typer.Option(help="Who shares a scale of a weight: tensor, channel, g128 ...")] = "channel",
    inputs: Annotated[str, typer.Option(help="Who shares a scale of an input: tensor, token, g128 ...")] = "tensor",
    png: Annotated[Path | None, typer.Option(help="Draw the accuracies here; needs matplotlib.")] = None,
    json: Annotated[Path | None, typer.Option(help="Write all findings as JSON here.")] = None,
    windows: Annotated[int, typer.Option(min=1, help="Windows of tokens, or batches of sentences, to run.")] = 8,
) -> None:
    """Bits of accuracy of number formats at their best clip, on distributions and on a model's tensors."""
    console = Console()
    names = [name.strip() for name in formats.split(",") if name.strip()] or [f for fs in FAMILIES.values() for f in fs]
    _check(names, (weights, inputs), (png, json))
    if png is not None:
        require_plots()
    if model is None and data is not None:
        raise OptionsError("--data is of no use without a model: name the model that it is run through")
    # what a user asks for is tried as it is; else the bound of each family stands below it
    tried = names if formats else sorted([*names, *BOUNDS], key=lambda name: -parse_format(name).bits)
    subjects = [study_density(name, tried) for name in DENSITIES]
    if model is not None:
        subjects += _tensors(console, model, _seen(console, model, data, windows), (weights, inputs), names)
    command = _command(model, data, formats, (weights, inputs), windows)
    found = Study(formats=tuple(tried), subjects=tuple(subjects), command=command)
    _print(console, found)
    if png is not None:
        draw_study(found, png)
        console.print(f"wrote {png}", style="dim", markup=False)
    if json is not None:
        write_text(json, found.to_json())
        console.print(f"wrote {json}", style="dim", markup=False)


def _check(names: Sequence[str], granularities: Sequence[str], paths: Sequence[Path | None]) -> None:
    """Raise what the user cannot mean before anything is computed."""
    for granularity in granularities:
        for name in names:
            require_studied(format_spec(name, granularity))
    for path in paths:
        if path is not None and not path.resolve().parent.is_dir():
            raise OptionsError(f"{path} cannot be written: there is no folder {str(path.resolve().parent)!r}")


def _command(model: str | None, data: Path | None, formats: str, granularities: tuple[str, str], windows: int) -> str:
    """What was called, but for where it is written; files are called by their names, not by where they lie."""
    options = {"--formats": formats} if formats else {}
    if model is not None:
        options |= zip(("--weights", "--inputs"), granularities, strict=True)
    if data is not None:
        options["--data"] = data.resolve().name
    if data is not None or model == DEMO:
        options["--windows"] = str(windows)
    named = [] if model is None else [model if model == DEMO else Path(model).resolve().name]
    return shlex.join(["qcompile", "study", "formats", *named, *chain.from_iterable(options.items())])


def _seen(console: Console, name: str, data: Path | None, windows: int) -> Seen:
    """The sites of a model, with stats of their inputs if there is data."""
    with console.status(f"running {name} ..."):
        if data is None and name != DEMO:
            # a few tokens show which weights there are; what they look like as inputs would mean nothing
            model = load_model(Path(name))
            tokens = torch.arange(TOKENS)[None] % int(model.config.vocab_size)
            seen = replace(watch(model, [{"input_ids": tokens}], Part.NONE, progress=False), stats={})
        else:
            subject = open_subject(name, data, windows)
            seen = watch(subject.model, subject.calibrate, PARTS)
    require_data(PRESETS["int8"], seen)
    return seen


def _tensors(
    console: Console, model: str, seen: Seen, granularities: tuple[str, str], formats: Sequence[str]
) -> Iterator[Subject]:
    """The weights of a model's sites, each followed by the input, if that is known and no other site before read it."""
    weights, inputs = granularities
    done: set[int] = set()
    for site in seen.sites.values():
        check_weight(site)
        check_tiles(site, format_spec(formats[0], weights), "weight")
        if site.name in seen.stats:
            check_tiles(site, format_spec(formats[0], inputs), "input")
    with console.status("") as status:
        for site in seen.sites.values():
            status.update(f"{model}: {escape(site.name)} ...")
            yield study_weight(site.name, site.weight, weights, formats)
            stats = seen.stats.get(site.name)
            if stats is not None and id(stats) not in done:
                done.add(id(stats))
                yield study_tensor(site.name, "input", stats, inputs, formats)


def _print(console: Console, found: Study) -> None:
    console.print(_of_distributions(found))
    for kind, what in (("weight", "weights"), ("input", "inputs")):
        subjects = found.of(kind)
        if subjects:
            console.print(_of_tensors(f"Best formats of {what}, a scale for each {subjects[0].granularity}", subjects))
            for line in _summary(what, subjects):
                console.print(line, markup=False)


def _of_distributions(found: Study) -> Table:
    subjects = found.of("distribution")
    table = _table("Bits of accuracy at the best clip", "format", *(f"{s.name}" for s in subjects))
    width = 0
    for name in found.formats:
        bits = format_spec(name, "tensor").format.bits
        if width not in (0, bits):
            table.add_section()
        width = bits
        cells = (
            f"[bold]{s.bits(name):.2f}[/]" if s.best.get(bits) == name else f"{s.bits(name):.2f}" for s in subjects
        )
        table.add_row(escape(name), *cells)
    return table


def _of_tensors(title: str, subjects: Sequence[Subject]) -> Table:
    table = _table(title, "site", *(f"{bits} bits" for bits in subjects[0].best), "why")
    for subject in subjects:
        best = (f"{name} {subject.bits(name):.2f}" for name in subject.best.values())
        table.add_row(escape(short(subject.name)), *best, escape(subject.reason))
    table.columns[-1].justify = "left"
    return table


def _summary(what: str, subjects: Sequence[Subject]) -> Iterator[str]:
    """For each number of bits: of how many tensors each format is the best, and the mean of its bits over all."""
    for bits in subjects[0].best:
        best = Counter(subject.best[bits] for subject in subjects)
        tried = [fit.format for fit in subjects[0].fits if format_spec(fit.format, "tensor").format.bits == bits]
        parts = (f"{name} {mean(s.bits(name) for s in subjects):.2f} (best of {best[name]})" for name in tried)
        yield f"{bits} bits over {len(subjects)} {what}, mean accuracy: {', '.join(parts)}"


def _table(title: str, first: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, pad_edge=False)
    table.add_column(first, overflow="fold")
    for column in columns:
        table.add_column(column, justify="right")
    return table
