"""The command line as a user meets it: versions, graphs as text, and mistakes in one line."""

from pathlib import Path

import pytest
import torch
from torch import nn
from typer.testing import CliRunner, Result

from qcompile.cli import app, mistake
from qcompile.errors import RecipeError
from qcompile.presets import PRESETS


def run(*arguments: object) -> Result:
    # wide, so that no table breaks a word
    return CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "200"})


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    """A file of torch.export with two linears."""
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 16)).eval()
    path = tmp_path / "mlp.pt2"
    torch.export.save(torch.export.export(model, (torch.ones(2, 32),)), path)
    return path


def test_version() -> None:
    assert run("--version").output.startswith("qcompile 0.")


def test_doctor_names_versions_and_a_kernel_for_every_preset() -> None:
    output = run("doctor").output
    assert torch.__version__ in output
    assert all(name in output for name in PRESETS)


def test_show_prints_the_graph(exported: Path) -> None:
    lines = run("show", exported).output.splitlines()
    assert 'const[64, 32] "0.weight"' in lines[1]
    assert [line.split()[2] for line in lines[:-1]] == ["input", "linear", "relu", "linear"]
    assert lines[-1] == "return %3"


def test_show_prints_a_quantized_file(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    from qcompile import quantize_onnx
    from qcompile.backends.onnx.export import export_model

    export_model(nn.Linear(32, 16), torch.ones(2, 32), tmp_path / "float.onnx")
    quantize_onnx(tmp_path / "float.onnx", tmp_path / "int8.onnx")
    shown = run("show", tmp_path / "int8.onnx")
    assert (shown.exit_code, "MatMulIntegerToFloat" in shown.output) == (0, True)
    assert "quantized already" in run("show", tmp_path / "int8.onnx", "--recipe", "int8").output


def test_show_dumps_the_text_after_every_pass(exported: Path, tmp_path: Path) -> None:
    folder = tmp_path / "dump"
    output = run("show", exported, "--recipe", "int8", "--dump", folder).output
    names = sorted(p.name for p in folder.iterdir())
    assert names[:2] == ["00_opened.txt", "01_fold_smooth.txt"]
    assert "quantize" not in (folder / names[0]).read_text()
    assert (folder / names[-1]).read_text().strip() == output.strip()
    assert "quantize %0 int8/token" in output


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("show", "absent"), "neither a Hugging Face model folder nor a .pt2"),
        (("show", "{folder}"), "config"),
        (("show", "{exported}", "--recipe", "int9"), "unknown recipe 'int9'; nearest presets: 'int8'"),
        (("demo", "--recipes", "int8,nf5"), "unknown recipe 'nf5'"),
        (("demo", "--model", "{folder}"), "--model and --tokens go together"),
    ],
    ids=["no model", "empty folder", "recipe of show", "recipe of demo", "model without tokens"],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    arguments: tuple[str, ...], words: str, exported: Path, tmp_path: Path
) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    result = run(*(a.format(folder=empty, exported=exported) for a in arguments))
    assert result.exit_code == 2
    assert words in result.output
    assert "Traceback" not in result.output
    assert result.output.startswith("error: ")
    assert result.output.count("\n") == 1


def test_debug_keeps_the_traceback() -> None:
    result = run("--debug", "demo", "--recipes", "nf5")
    assert isinstance(result.exception, RecipeError)


def test_an_unknown_command_is_an_error_too() -> None:
    assert run("shw").exit_code == 2


def test_the_mistake_behind_a_wrapped_error_is_found() -> None:
    class Wrapper(Exception):
        inner_exception = RecipeError("the rule")

    assert str(mistake(Wrapper())) == "the rule"
    assert mistake(KeyError("ours")) is None
