"""From a model folder to a quantized ONNX file, shown and compared."""

import json
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import nn
from typer.testing import CliRunner, Result

from qcompile.cli import app
from tests.variants import variants


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "200"})


def test_a_language_model_becomes_a_quantized_file(tiny_llama: Path, tokens: Path, tmp_path: Path) -> None:
    plain, small, report = tmp_path / "float.onnx", tmp_path / "small.onnx", tmp_path / "report.json"
    assert run("export", tiny_llama, plain, "--recipe", "float").exit_code == 0
    result = run(
        *("export", tiny_llama, small, "--recipe", "int8-smooth-static", "--data", tokens, "--windows", 4),
        *("--json", report),
    )
    assert result.exit_code == 0, result.output
    assert small.stat().st_size < 0.6 * plain.stat().st_size
    written = json.loads(report.read_text())
    # the second half of the data, which calibration did not see
    assert (written["comparison"]["batches"], written["comparison"]["seen"]) == (4, False)
    assert written["agreement"]["batches"] == 4
    assert "agree on 4 batches" in result.output
    sites = {site["name"]: site for site in written["sites"]}
    assert sites["model.layers.0.self_attn.q_proj"]["kernel"] == "MatMulIntegerToFloat"
    shown = run("show", plain).output
    assert '"model.layers.1.mlp.down_proj"' in shown
    assert "rms_norm" in shown
    batches = tmp_path / "batches.jsonl"
    ids = torch.randint(0, 128, (2, 16), generator=torch.Generator().manual_seed(0))
    batches.write_text(json.dumps({"input_ids": ids.tolist()}) + "\n")
    same, other = (run("compare", plain, file, "--data", batches) for file in (plain, small))
    assert same.exit_code == other.exit_code == 0
    assert "inf" in same.output
    row = next(line.split() for line in other.output.splitlines() if "logits" in line)
    assert 15 < float(row[1]) < 80
    assert float(row[3]) > 0.97


def test_an_exported_program_becomes_a_quantized_file(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 32)).eval()
    program, output = tmp_path / "mlp.pt2", tmp_path / "mlp.onnx"
    torch.export.save(torch.export.export(model, (torch.randn(4, 64),)), program)
    result = run("export", program, output, "--recipe", "int8")
    assert result.exit_code == 0, result.output
    assert "2 of 2 sites" in result.output
    # on the inputs that it was exported with
    assert "agree on 1 batch" in result.output
    assert "not compared" in result.output
    refused = run("export", program, output, "--dtype", "float16")
    assert refused.exit_code == 2
    assert "--dtype is for model folders" in refused.output


@pytest.mark.parametrize(
    ("target", "dtype", "expected"),
    variants(
        [("ort-cuda", None, "FLOAT16"), ("ort-cuda", "float32", "FLOAT"), ("portable", "float16", "FLOAT16")],
        quick=[],
    ),
)
def test_what_stays_float_has_the_dtype_of_the_target_or_the_users(
    target: str, dtype: str | None, expected: str, tiny_llama: Path, tmp_path: Path
) -> None:
    output = tmp_path / "small.onnx"
    given = () if dtype is None else ("--dtype", dtype)
    result = run("export", tiny_llama, output, "--recipe", "int8-weight+embeddings", "--target", target, *given)
    assert result.exit_code == 0, result.output
    graph = ir.load(output).graph
    (logits,) = graph.outputs
    assert logits.dtype == ir.DataType[expected]
    # frequencies of rotary embeddings stay what they are: in 16 bits, late positions would turn by other angles
    kept = [v.const_value.numpy().ravel() for v in graph.initializers.values() if v.const_value is not None]
    frequencies = 10000.0 ** -(np.arange(0, 16, 2, dtype=np.float32) / 16)
    assert any(len(x) == 8 and np.allclose(x.astype(np.float64), frequencies, rtol=1e-6, atol=0) for x in kept)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("export", "absent", "out.onnx"), "no folder"),
        (("show", "absent.onnx"), "absent.onnx"),
        (("compare", "absent.onnx", "b.onnx", "--data", "c.npz"), "c.npz"),
    ],
)
def test_mistakes_are_one_line(arguments: tuple[str, ...], words: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert words in result.output
