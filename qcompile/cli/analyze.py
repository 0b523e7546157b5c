"""`qcompile analyze`: where a model loses accuracy under a recipe, why, and what would help."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from qcompile.advice import Advice, measured
from qcompile.analysis import Analysis, analyze, remedied
from qcompile.cli.examine import Examined, examine, output_snr
from qcompile.cli.subjects import DEMO, Subject, open_subject
from qcompile.errors import OptionsError
from qcompile.expected import expected_report
from qcompile.outliers import outlier_notes
from qcompile.presets import parse_recipe
from qcompile.report import Report
from qcompile.report.findings import short
from qcompile.report.report import write_text

# rows of a table on the terminal
TOP = 12


def analyze_model(
    model: Annotated[str, typer.Argument(help=f"A Hugging Face model folder, or {DEMO!r} for the demo's model.")],
    data: Annotated[
        Path | None, typer.Option(help="Tokens or .txt (a line is a sentence, to an encoder), or a folder of them.")
    ] = None,
    recipe: Annotated[str, typer.Option(help="The recipe to judge: a name or a TOML file.")] = "int8-static",
    html: Annotated[Path | None, typer.Option(help="Write the page with all findings here.")] = None,
    json: Annotated[Path | None, typer.Option(help="Write all findings as JSON here.")] = None,
    windows: Annotated[
        int, typer.Option(min=1, help="Windows of tokens, or batches of sentences, to calibrate on.")
    ] = 8,
    tries: Annotated[int, typer.Option(min=0, help="Pieces of advice to try on the model.")] = 4,
) -> None:
    """Where a model loses accuracy under a recipe, why, and what would help."""
    console = Console()
    parsed = parse_recipe(recipe)
    for path in (html, json):
        if path is not None and not path.resolve().parent.is_dir():
            raise OptionsError(f"{path} cannot be written: there is no folder {str(path.resolve().parent)!r}")
    subject = open_subject(model, data, windows)
    with console.status(f"running {subject.name} on {len(subject.calibrate)} batches ..."):
        examined = examine(subject.model, subject.calibrate, parsed)
    with console.status("measuring each site ..."):
        found = analyze(examined.sites, examined.groups, examined.plan, smoothable=examined.smoothable)
        report = expected_report(examined.plan, examined.sites, examined.left)
    if tries and found.advice:
        with console.status("trying advice on the model ..."):
            found = replace(found, advice=tuple(_tried(subject, examined, found.advice, tries)))
    _print(console, subject, report, found)
    if html is not None:
        report.to_html(html, found, title=f"{subject.name} under {parsed.name}")
        console.print(f"wrote {html}", style="dim", markup=False)
    if json is not None:
        write_text(json, found.to_json())
        console.print(f"wrote {json}", style="dim", markup=False)


def _tried(subject: Subject, examined: Examined, advice: Sequence[Advice], tries: int) -> list[Advice]:
    """The advice, the first few followed one by one."""
    measure = output_snr(subject.model, subject.measure)
    before = measure(examined.plan)

    def gain(one: Advice) -> float:
        other = remedied(examined.plan, one, examined.sites, examined.groups, smoothable=examined.smoothable)
        return measure(other) - before

    return measured(advice, gain, tries=tries)


def _print(console: Console, subject: Subject, report: Report, found: Analysis) -> None:
    console.print(f"{subject.name}: {report.summary()}", style="bold", markup=False)
    for note in report.notes:
        console.print(note, markup=False)
    channels = found.outliers.by_channel()
    if channels:
        console.print(_channels(found))
    for note in outlier_notes(found.outliers):
        console.print(note, markup=False)
    if found.sites:
        console.print(_noise(found))
    console.print(_advice(found) if found.advice else "no site would gain a decibel by a remedy that is known here")


def _channels(found: Analysis) -> Table:
    table = _table("Outlier channels", "channel", "inputs", "to median", "rms", "|x| >= 6", "strongest before")
    items = list(found.outliers.by_channel().items())
    for (_, channel), places in items[:TOP]:
        activation, strongest = max(places, key=lambda place: place[1].ratio)
        table.add_row(
            str(channel),
            str(len(places)),
            f"{strongest.ratio:.1f}x",
            f"{strongest.rms_ratio:.1f}x",
            f"{max(c.exceeding for _, c in places):.0%}",
            escape(short(activation.sites[0])),
        )
    if len(items) > TOP:
        table.caption = f"and {len(items) - TOP} more"
    return table


def _noise(found: Analysis) -> Table:
    folded = any(site.unfolded_db is not None for site in found.sites)
    columns = ("quantized", *(("unfolded",) if folded else ()), "inputs only", "weights only", "clipping")
    table = _table("Lowest signal to noise, dB", "site", *columns)
    for site in sorted(found.sites, key=lambda s: s.noise.snr_db)[:TOP]:
        noise = site.noise
        table.add_row(
            escape(short(site.name)),
            f"{noise.snr_db:.1f}",
            *(("" if site.unfolded_db is None else f"{site.unfolded_db:.1f}",) if folded else ()),
            "" if noise.input_db is None else f"{noise.input_db:.1f}",
            "" if noise.weight_db is None else f"{noise.weight_db:.1f}",
            "" if noise.input_db is None else f"{noise.clipping:.0%}",
        )
    return table


def _advice(found: Analysis) -> Table:
    table = _table("What would help", "site, cause and remedy", "predicted", "measured")
    seen: set[tuple[str, ...]] = set()
    for one in found.advice[:TOP]:
        gained = "" if one.measured_db is None else f"{one.measured_db:+.2f} dB"
        text = f"or {one.action}" if one.sites in seen else one.text
        seen.add(one.sites)
        table.add_row(escape(text), f"+{one.predicted_db:.1f} dB", gained)
    return table


def _table(title: str, first: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, pad_edge=False)
    table.add_column(first, overflow="fold")
    for column in columns:
        table.add_column(column, justify="right" if column != columns[-1] or column == "measured" else "left")
    return table
