"""What the report of a file says of bytes is what the file holds."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from typer.testing import CliRunner

import qcompile
from qcompile.backends.onnx.files import read_model, size_on_disk, write_model
from qcompile.cli import app
from tests.onnx.models import by_onnxruntime, model

TABLE, WIDTH, HIDDEN = 48, 64, 96


def tied(folder: Path, data: str | None = None) -> Path:
    """An embedding, a linear, and the embedding's table again as the last linear."""
    torch.manual_seed(0)
    body = """h = Gather(embed__weight, ids) p = MatMul(h, fc__weight) z = Relu(p) q = MatMul(z, back__weight)
        t = Transpose<perm = [1, 0]>(embed__weight) y = MatMul(q, t)"""
    weights = {"embed__weight": (TABLE, WIDTH), "fc__weight": (WIDTH, HIDDEN), "back__weight": (HIDDEN, WIDTH)}
    constants = {name: torch.randn(shape) for name, shape in weights.items()}
    source = model(body, inputs="int64[B, T] ids", returns=f"float[B, T, {TABLE}] y", **constants)
    ir.save(source, folder / "float.onnx", external_data=data)
    return folder / "float.onnx"


def held_bytes(path: Path) -> int:
    """Of all constants but single numbers, and shapes."""
    graph = read_model(path, quantized=True).graph
    tensors = [value.const_value for value in graph.initializers.values()]
    return sum(t.nbytes for t in tensors if t is not None and t.size > 1 and t.dtype is not ir.DataType.INT64)


def recipe_of(weight: str, *ops: str) -> dict[str, Any]:
    return {"rules": [{"ops": list(ops), "weight": weight}]}


@pytest.mark.parametrize("target", ["ort-cpu", "ort-cuda", "portable"])
@pytest.mark.parametrize("ops", [("linear",), ("linear", "embedding")])
@pytest.mark.parametrize(
    "weight",
    ["int8/channel", "int4/g32", "int3/g32", "int4/channel/asym", "fp4_e2m1/g32", "nf4/g32", "fp8_e4m3/channel"],
)
def test_bytes_are_those_of_the_file(weight: str, ops: tuple[str, ...], target: str, tmp_path: Path) -> None:
    report = qcompile.quantize_onnx(tied(tmp_path), tmp_path / "out.onnx", recipe_of(weight, *ops), target=target)
    assert report.bytes_before == held_bytes(tmp_path / "float.onnx")
    assert report.bytes_after == held_bytes(tmp_path / "out.onnx")


@pytest.mark.parametrize("data", [None, "float.onnx.data"])
def test_a_tied_table_counts_once_before_and_as_often_after_as_it_is_stored(data: str | None, tmp_path: Path) -> None:
    report = qcompile.quantize_onnx(tied(tmp_path, data), tmp_path / "out.onnx", recipe_of("int8/channel", "linear"))
    by_op = {site.op: site for site in report.sites if site.shape == (TABLE, WIDTH)}
    whole = 4 * TABLE * WIDTH
    assert (by_op["embedding"].bytes_before, by_op["embedding"].bytes_after) == (0, whole)
    assert (by_op["linear"].bytes_before, by_op["linear"].bytes_after) == (whole, TABLE * WIDTH + 4 * TABLE)


def test_the_command_line_counts_external_data(tmp_path: Path) -> None:
    source = tied(tmp_path, "float.onnx.data")
    whole = sum(file.stat().st_size for file in tmp_path.iterdir())
    assert size_on_disk(source) == whole
    large, args = tmp_path / "large.onnx", {"env": {"COLUMNS": "200"}}
    # a file of more than half a megabyte, so that a tenth of one tells
    big = model("y = MatMul(x, w)", inputs="float[B, 600] x", returns="float[B, 600] y", w=torch.randn(600, 600))
    write_model(big, large, external=True)
    result = CliRunner().invoke(app, ["quantize", str(large), str(tmp_path / "out.onnx")], **args)
    assert "out.onnx: 0.4 MB, the float file is 1.4 MB" in result.output
    np.savez(tmp_path / "x.npz", x=np.ones((2, 600), np.float32))
    pair = [str(large), str(tmp_path / "out.onnx"), "--data", str(tmp_path / "x.npz")]
    assert "large.onnx 1.4 MB, out.onnx 0.4 MB" in CliRunner().invoke(app, ["compare", *pair], **args).output
    assert len(by_onnxruntime(big, torch.ones(2, 600))) == 1
