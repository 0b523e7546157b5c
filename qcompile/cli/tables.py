"""`qcompile recipes` and `qcompile formats`: what there is to choose from, read from the tables of the core."""

from collections.abc import Sequence
from typing import Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from qcompile.formats import FORMATS, CodeBook, Float, Format, Integer, code_values
from qcompile.presets import PRESETS
from qcompile.recipe import Recipe, Rule

Markdown = Annotated[bool, typer.Option("--markdown", help="As a Markdown table, as in the README.")]

RECIPE_COLUMNS = ("recipe", "weight", "input", "but", "what it is for")
FORMAT_COLUMNS = ("format", "kind", "bits", "numbers", "largest", "smallest above 0", "memory")


def recipes(markdown: Markdown = False) -> None:
    """The recipes that have a name."""
    show_table(RECIPE_COLUMNS, [recipe_row(recipe) for recipe in PRESETS.values()], markdown=markdown)


def formats(markdown: Markdown = False) -> None:
    """The number formats; any other float of 3 to 8 bits is written by its bits, like e3m2."""
    show_table(FORMAT_COLUMNS, [format_row(fmt) for fmt in FORMATS.values()], markdown=markdown)


def recipe_row(recipe: Recipe) -> tuple[str, ...]:
    """Name, specs of the last rule, which decides what no other does, specs of the others, summary."""
    *exceptions, main = recipe.rules
    summary = f"{recipe.summary}; needs calibration" if recipe.needs_data else recipe.summary
    return recipe.name, *_specs(main), "; ".join(_exception(rule) for rule in exceptions), summary


def format_row(fmt: Format) -> tuple[str, ...]:
    """Name, kind, bits, count of numbers, range, and the memory of one code."""
    kinds = {Integer: "integer", Float: "float", CodeBook: "code book"}
    kind = kinds[type(fmt)]
    if isinstance(fmt, CodeBook) and fmt.levels is None:
        return fmt.name, kind, str(fmt.bits), f"{2**fmt.bits} learned", "1", "learned", _memory(fmt.bits)
    values = code_values(fmt)
    finite = values[values.isfinite()].unique()
    smallest = float(finite[finite > 0].min())
    return fmt.name, kind, str(fmt.bits), str(finite.numel()), f"{fmt.max:g}", f"{smallest:.3g}", _memory(fmt.bits)


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, one line a row."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |" for cells in lines)


def show_table(columns: Sequence[str], rows: Sequence[Sequence[str]], *, markdown: bool) -> None:
    """Prints the rows, for a reader or as Markdown."""
    if markdown:
        typer.echo(markdown_table(columns, rows))
        return
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column(columns[0], no_wrap=True)
    for column in columns[1:]:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*row)
    Console().print(table)


def _exception(rule: Rule) -> str:
    first, *more = rule.match.split("|")
    name = first.strip("*.") + (" etc." if more else "") or ", ".join(op.value for op in rule.ops)
    return f"{name}: {' x '.join(_specs(rule))}"


def _specs(rule: Rule) -> tuple[str, str]:
    return str(rule.weight or "float"), str(rule.input or "float")


def _memory(bits: int) -> str:
    return "1 byte" if bits == 8 else f"{bits} bits, packed"
