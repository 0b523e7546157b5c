"""README and CONTRIBUTING stay true: their code parses, what they import exists, and so do the files they name."""

import ast
import importlib
import re
import sys
import tomllib
from pathlib import Path

import pytest

from qcompile.options import Options
from qcompile.recipe import recipe_from_table

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = ("README.md", "CONTRIBUTING.md")


def blocks(document: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / document).read_text(), re.DOTALL)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_python_parses_and_its_names_exist(document: str) -> None:
    found = blocks(document, "python")
    assert found
    for code in found:
        # a line of a table is no statement: it stands inside a call
        tree = ast.parse(code if not code.rstrip().endswith(",") else f"table({code})")
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom):
                module = importlib.import_module(str(node.module))
                assert all(hasattr(module, alias.name) for alias in node.names)
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "qcompile":
                assert node.attr in importlib.import_module("qcompile").__all__


@pytest.mark.parametrize("document", DOCUMENTS)
def test_named_files_and_folders_exist(document: str) -> None:
    named = re.findall(r"`((?:qcompile|passes|backends|tests|examples)/[\w./]*)`", (ROOT / document).read_text())
    assert named
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_the_recipe_in_the_readme_is_one() -> None:
    (text,) = blocks("README.md", "toml")
    assert len(recipe_from_table(tomllib.loads(text)).rules) == 3


def test_the_readme_names_every_option() -> None:
    named = re.findall(r"^\| `(\w+)` \|", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert set(Options.__dataclass_fields__) <= set(named)


def test_make_targets_that_are_named_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    text = "".join((ROOT / d).read_text() for d in DOCUMENTS)
    assert set(re.findall(r"\bmake ([a-z-]+)", text)) - {"it"} <= targets


def test_measured_tables_are_those_of_the_result_files() -> None:
    sys.path.insert(0, str(ROOT / "examples" / "benchmarks"))
    tables = importlib.import_module("tables").tables()
    sys.path.pop(0)
    assert tables in (ROOT / "README.md").read_text(), "stale: run `python examples/benchmarks/tables.py`"
