"""A file is proven before it gets its name: each way of breaking one is found, and nothing is written then."""

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor

import qcompile
from qcompile import files
from qcompile.backends.onnx.export import export_model
from qcompile.backends.onnx.prove import check_written
from qcompile.errors import CalibrationError, ModelError, UnsupportedError
from tests.onnx.files import snapshot
from tests.onnx.test_quantize import batch, net

GROUPS = {"name": "groups", "rules": [{"match": "*", "weight": "int4/g32/asym/fp16"}]}
RECIPES: dict[str, Any] = {"static": "int8-static", "dynamic": "int8", "narrow": GROUPS}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("float") / "net.onnx"
    export_model(net(), batch(0), path)
    return path


@pytest.fixture(scope="module")
def emitted(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """A sound file of each kind."""
    folder = tmp_path_factory.mktemp("sound")
    for kind, recipe in RECIPES.items():
        qcompile.quantize_onnx(source, folder / kind, recipe, batches=[batch(1)])
    return {kind: (folder / kind).read_bytes() for kind in RECIPES}


Break = Callable[[onnx.ModelProto], None]


def initializer(proto: onnx.ModelProto, ending: str) -> onnx.TensorProto:
    return next(t for t in proto.graph.initializer if t.name.endswith(ending))


def first_value(ending: str, value: float) -> Break:
    """The first number of the first constant of that name becomes this one."""

    def change(proto: onnx.ModelProto) -> None:
        tensor = initializer(proto, ending)
        array = numpy_helper.to_array(tensor).copy()
        array.reshape(-1)[0] = value
        tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))

    return change


def shorter(ending: str) -> Break:
    """The last part of the first constant of that name is gone, and no shape is declared that tells."""

    def change(proto: onnx.ModelProto) -> None:
        proto.graph.ClearField("value_info")
        tensor = initializer(proto, ending)
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor)[:-1].copy(), tensor.name))

    return change


def attribute(op: str, name: str, value: int) -> Break:
    def change(proto: onnx.ModelProto) -> None:
        node = next(n for n in proto.graph.node if n.op_type == op)
        next(a for a in node.attribute if a.name == name).i = value

    return change


def without_attribute(op: str, name: str) -> Break:
    def change(proto: onnx.ModelProto) -> None:
        node = next(n for n in proto.graph.node if n.op_type == op)
        node.attribute.remove(next(a for a in node.attribute if a.name == name))

    return change


def opset(domain: str, version: int) -> Break:
    def change(proto: onnx.ModelProto) -> None:
        next(o for o in proto.opset_import if o.domain == domain).version = version

    return change


def renamed_output(proto: onnx.ModelProto) -> None:
    name = proto.graph.output[0].name
    node = next(n for n in proto.graph.node if name in n.output)
    node.output[0] = proto.graph.output[0].name = f"{name}_new"


SCALE = "weight_codes_scale"
BREAKS: dict[str, tuple[str, Break, str]] = {
    **{
        f"scale {value} {kind}": (kind, first_value(SCALE, value), "finite and greater than zero")
        for kind in RECIPES
        for value in (0.0, -1.0, math.nan, math.inf)
    },
    "short scale": ("static", shorter(SCALE), f"{SCALE}' [95]"),
    "short scales of groups": ("narrow", shorter(SCALE), "the scales"),
    "short zero points": ("narrow", shorter("weight_codes_zero"), "zero-points"),
    "short codes in groups": ("narrow", shorter("weight_codes_1"), "the codes"),
    "other K": ("narrow", attribute("MatMulNBits", "K", 4096), "K=4096"),
    "other N": ("narrow", attribute("MatMulNBits", "N", 3), "N=3"),
    "other bits": ("narrow", attribute("MatMulNBits", "bits", 8), "8 bits"),
    "odd blocks": ("narrow", attribute("MatMulNBits", "block_size", 33), "power of two"),
    "no K": ("narrow", without_attribute("MatMulNBits", "K"), "lacks the attribute 'K'"),
    "unknown opset": ("static", opset("", 99), "opset 99"),
    "unknown opset of onnxruntime": ("narrow", opset("com.microsoft", 2), "opset 2 of 'com.microsoft'"),
    "other output": ("static", renamed_output, "outputs"),
}


@pytest.mark.parametrize("case", BREAKS)
def test_a_broken_file_is_found(case: str, emitted: dict[str, bytes], source: Path, tmp_path: Path) -> None:
    kind, change, words = BREAKS[case]
    path = tmp_path / "out.onnx"
    path.write_bytes(emitted[kind])
    check_written(path, "ort-cpu", source)
    proto = onnx.load(path)
    change(proto)
    path.write_bytes(proto.SerializeToString())
    with pytest.raises(ModelError) as caught:
        check_written(path, "ort-cpu", source)
    assert words in str(caught.value)


def test_external_data_that_is_too_short_is_found(emitted: dict[str, bytes], source: Path, tmp_path: Path) -> None:
    path = tmp_path / "out.onnx"
    proto = onnx.load_model_from_string(emitted["static"])
    onnx.save(proto, path, save_as_external_data=True, location="out.onnx.data", size_threshold=1024)
    check_written(path, "ort-cpu", source)
    data = tmp_path / "out.onnx.data"
    data.write_bytes(data.read_bytes()[:-1])
    with pytest.raises(ModelError, match="cut off"):
        check_written(path, "ort-cpu", source)


def emitting(monkeypatch: pytest.MonkeyPatch, change: Callable[[ir.Model], None]) -> None:
    """What is emitted gets a defect."""
    emit = files.emit

    def broken(model: ir.Model, target: str) -> Any:
        found = emit(model, target)
        # calibration runs on a portable form
        if target != "portable":
            change(found.model)
        return found

    monkeypatch.setattr(files, "emit", broken)


def constants(model: ir.Model, ending: str) -> Iterator[ir.Value]:
    return (value for name, value in model.graph.initializers.items() if name.endswith(ending))


def times(factor: float) -> Callable[[ir.Model], None]:
    def change(model: ir.Model) -> None:
        for value in constants(model, SCALE):
            array = value.const_value.numpy()
            value.const_value = ir.tensor((array * factor).astype(array.dtype), name=value.name)

    return change


def refused(source: Path, output: Path, expected: type[Exception], words: str, **given: Any) -> None:
    output.write_bytes(b"old")
    before = snapshot(output.parent)
    with pytest.raises(expected) as caught:
        qcompile.quantize_onnx(source, output, **{"batches": [batch(1)], "recipe": "int8-static", **given})
    assert words in str(caught.value)
    assert snapshot(output.parent) == before


def test_what_is_emitted_broken_is_not_written(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    emitting(monkeypatch, times(0))
    refused(source, tmp_path / "out.onnx", ModelError, "what was written for target 'ort-cpu' is broken")


def test_a_result_that_is_not_finite_is_not_written(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def poison(model: ir.Model) -> None:
        for value in constants(model, "down.bias"):
            value.const_value = ir.tensor(np.full_like(value.const_value.numpy(), np.inf), name=value.name)

    emitting(monkeypatch, poison)
    refused(source, tmp_path / "out.onnx", ModelError, "are NaN or Inf in the quantized file")


@pytest.mark.parametrize("recipe", ["int8-static", "int8", GROUPS], ids=str)
def test_a_file_that_disagrees_with_its_plan_is_not_written(
    recipe: Any, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    emitting(monkeypatch, times(1.5))
    words = "DISAGREE"
    refused(source, tmp_path / "out.onnx", UnsupportedError, words, recipe=recipe, model=net())


def test_held_out_inputs_are_what_is_compared(source: Path, tmp_path: Path) -> None:
    """Numbers are those of the files' own outputs, padding left out."""
    output = tmp_path / "out.onnx"
    held = [batch(8), batch(9)]
    report = qcompile.quantize_onnx(source, output, "int8-smooth-static", batches=[batch(1)], held_out=iter(held))
    assert report.comparison is not None
    assert (report.comparison.batches, report.comparison.seen) == (2, False)
    (found,) = report.comparison.outputs
    wanted, given = (_real(path, held) for path in (source, output))
    error = wanted - given
    assert found.name == "output"
    assert found.relative == pytest.approx(float(error.norm() / wanted.norm()), rel=1e-6)
    assert found.snr_db == pytest.approx(float(20 * torch.log10(wanted.norm() / error.norm())), rel=1e-6)
    cosines = torch.nn.functional.cosine_similarity(wanted, given, dim=-1)
    assert found.lowest_cosine == pytest.approx(float(cosines.min()), rel=1e-9)
    assert found.largest == pytest.approx(float(error.abs().max()), rel=1e-9)
    text = str(report.comparison)
    assert "2 batches, which calibration did not see" in text
    assert "onnxruntime" in text


def _real(path: Path, held: list[dict[str, Tensor]]) -> Tensor:
    """Rows of tokens, float64 [rows, D]."""
    results = files.run_onnx(path, held)
    return torch.cat([r["output"][b["attention_mask"] > 0] for r, b in zip(results, held, strict=True)]).double()


def test_without_held_out_inputs_the_last_batch_is_compared_and_the_report_says_so(
    source: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out.onnx"
    one_pass = (batch(seed) for seed in (1, 2, 3))
    report = qcompile.quantize_onnx(source, output, "int8-static", batches=one_pass)
    assert report.comparison is not None
    assert (report.comparison.batches, report.comparison.seen) == (1, True)
    assert "may have seen" in report.to_text()
    same = qcompile.quantize_onnx(
        source, output, "int8-static", batches=[batch(s) for s in (1, 2, 3)], held_out=[batch(3)]
    )
    assert same.comparison is not None
    assert same.comparison.outputs == report.comparison.outputs


def test_a_plan_is_compared_on_the_batches_that_come_with_it(source: Path, tmp_path: Path) -> None:
    plan = qcompile.calibrate(net(), [batch(1)], "int8-static", progress=False)
    report = qcompile.quantize_onnx(source, tmp_path / "out.onnx", plan, batches=iter([batch(1), batch(2)]))
    assert report.comparison is not None
    assert len(report.comparison.outputs) == 1


def test_without_data_the_report_says_that_nothing_was_compared(source: Path, tmp_path: Path) -> None:
    report = qcompile.quantize_onnx(source, tmp_path / "out.onnx", "int8")
    assert report.comparison is not None
    assert report.comparison.outputs == ()
    assert "not compared" in report.to_text()
    assert "--held-out" in report.to_text()


def test_data_that_does_not_fit_writes_nothing(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.onnx"
    refused(source, out, CalibrationError, "held_out is empty", held_out=[])
    refused(source, out, CalibrationError, "batch 0 lacks", held_out=[{"x": batch(1)["x"]}])
    refused(source, out, CalibrationError, "held_out is one dict", held_out=batch(1))


def test_a_file_that_this_machine_cannot_run_says_so(source: Path, tmp_path: Path) -> None:
    rule = {"match": "*", "weight": "fp4_e2m1/channel"}
    report = qcompile.quantize_onnx(
        source, tmp_path / "out.onnx", {"rules": [rule]}, target="portable", held_out=[batch(1)]
    )
    assert report.comparison is not None
    assert report.comparison.outputs == ()
    assert "onnxruntime" in report.comparison.reason
    assert "where the file is meant to run" in report.comparison.reason
