"""`qcompile recipes` and `qcompile formats` say what the tables of the core say."""

import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from qcompile.cli import app
from qcompile.cli.tables import RECIPE_COLUMNS, format_row, markdown_table, recipe_row
from qcompile.formats import FORMATS
from qcompile.presets import PRESETS

README = Path(__file__).resolve().parents[2] / "README.md"


def run(*arguments: str) -> str:
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    return result.output


def test_every_preset_is_listed() -> None:
    lines = run("recipes", "--markdown").splitlines()
    assert [line.split(" | ")[0].removeprefix("| ") for line in lines[2:]] == list(PRESETS)


def test_every_format_is_listed() -> None:
    lines = run("formats", "--markdown").splitlines()
    assert [line.split(" | ")[0].removeprefix("| ") for line in lines[2:]] == list(FORMATS)


@pytest.mark.parametrize(
    ("name", "bits", "numbers", "largest", "smallest"),
    [
        ("int4", "4", "16", "7", "1"),
        ("fp8_e4m3", "8", "253", "448", "0.00195"),
        ("fp8_e5m2", "8", "247", "57344", "1.53e-05"),
        ("fp4_e2m1", "4", "15", "6", "0.5"),
        ("nf4", "4", "16", "1", "0.0796"),
        ("lloyd4", "4", "16 learned", "1", "learned"),
    ],
)
def test_numbers_of_a_format(name: str, bits: str, numbers: str, largest: str, smallest: str) -> None:
    assert format_row(FORMATS[name])[2:6] == (bits, numbers, largest, smallest)


def test_terminal_tables_name_everything() -> None:
    assert all(name in run("recipes") for name in PRESETS)
    assert all(name in run("formats") for name in FORMATS)


def test_readme_lists_the_presets_that_there_are(request: pytest.FixtureRequest) -> None:
    table = markdown_table(RECIPE_COLUMNS, [recipe_row(recipe) for recipe in PRESETS.values()])
    if request.config.getoption("--accept"):
        head = re.escape(markdown_table(RECIPE_COLUMNS, []))
        README.write_text(re.sub(rf"{head}\n(?:\|.*\n)*", lambda _: f"{table}\n", README.read_text()))
    assert f"{table}\n\n" in README.read_text(), "stale: run `pytest --accept`, or `qcompile recipes --markdown`"
