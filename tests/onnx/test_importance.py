"""Weights of ONNX files solved by the importance of their columns, or beforehand on the PyTorch model."""

from dataclasses import replace
from pathlib import Path

import onnx_ir as ir
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import qcompile
from qcompile.backends.onnx.export import export_model
from qcompile.errors import CalibrationError
from qcompile.numerics import dequantize
from qcompile.presets import PRESETS
from qcompile.recipe import Recipe
from tests.compile.test_importance import data, trained
from tests.onnx.canonical import run_onnxruntime
from tests.onnx.test_quantize import run

PRESET = PRESETS["int4-imatrix"]
IN_TURN = Recipe(name="gptq", rules=(replace(PRESET.rules[-1], solver="gptq"),))


def batch(seed: int) -> dict[str, Tensor]:
    return {"x": data(seed)}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("float") / "net.onnx"
    export_model(trained(), batch(0), path)
    return path


def error(path: Path) -> float:
    with torch.no_grad():
        return float((run(path, batch(9)) - trained()(**batch(9))).norm())


def test_weights_are_solved_by_what_batches_show(source: Path, tmp_path: Path) -> None:
    report = qcompile.quantize_onnx(source, tmp_path / "own.onnx", PRESET, batches=[batch(1), batch(2)])
    assert {site.kernel for site in report.quantized} == {"MatMulNBits"}
    assert [site.weight for site in report.quantized] == ["int4/g32/asym/bf16"] * 3
    plain = Recipe(name="mse", rules=(replace(PRESET.rules[-1], solver="mse"),))
    qcompile.quantize_onnx(source, tmp_path / "mse.onnx", plain)
    assert error(tmp_path / "own.onnx") < 0.9 * error(tmp_path / "mse.onnx")


def test_a_plan_of_the_torch_model_solves_the_same(source: Path, tmp_path: Path) -> None:
    batches = [batch(1), batch(2)]
    plan = qcompile.calibrate(trained(), batches, PRESET, progress=False)
    qcompile.quantize_onnx(source, tmp_path / "torch.onnx", plan)
    qcompile.quantize_onnx(source, tmp_path / "own.onnx", PRESET, batches=batches)
    own, torchs = (run(tmp_path / f"{name}.onnx", batch(9)) for name in ("own", "torch"))
    # sums in another order move the importance by its last bits, which changes few codes if any
    assert float((own - torchs).norm() / own.norm()) < 1e-3


def test_without_batches_the_error_says_what_to_give(source: Path, tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=r"recipe 'int4-imatrix' needs data: give batches.*'x'"):
        qcompile.quantize_onnx(source, tmp_path / "none.onnx", "int4-imatrix")
    assert not (tmp_path / "none.onnx").exists()


def test_codes_that_were_chosen_on_the_torch_model_run(source: Path, tmp_path: Path) -> None:
    model = trained()
    plan = qcompile.calibrate(model, [batch(1), batch(2)], IN_TURN, progress=False)
    report = qcompile.quantize_onnx(source, tmp_path / "gptq.onnx", plan, target="portable")
    solved = {name: d.solved for name, d in plan.decisions.items() if d.solved is not None}
    assert {site.name: site.snr_db for site in report.quantized} == {
        name: pytest.approx(one.snr_db, abs=1e-4) for name, one in solved.items()
    }
    with torch.no_grad():
        for name, one in solved.items():
            assert one.qparams.codes is not None
            model.get_submodule(name).weight.copy_(dequantize(one.qparams.codes, one.qparams))
        # optimized, onnxruntime rounds what 4-bit weights multiply
        (found,) = run_onnxruntime(ir.load(tmp_path / "gptq.onnx"), batch(9)["x"], optimize=False)
        assert_close(found, model(**batch(9)), rtol=1e-4, atol=1e-5)


FISHER = {"weight": "fp4_e2m1/channel", "input": "fp4_e2m1/token", "format": "float", "objective": "fisher"}


@pytest.mark.parametrize("recipe", [IN_TURN, "mixed", {"rules": [FISHER]}], ids=["gptq", "mixed", "fisher"])
def test_a_file_alone_has_no_model_that_runs(recipe: object, source: Path, tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="chooses codes, widths or formats while the PyTorch model runs"):
        qcompile.quantize_onnx(source, tmp_path / "none.onnx", recipe, batches=[batch(1)])
    assert not (tmp_path / "none.onnx").exists()
