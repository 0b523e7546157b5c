"""Convolutional networks: what passes the door, and what quantized files of them compute and run."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import qcompile
from qcompile.backends.onnx.door import open_onnx
from qcompile.backends.onnx.export import export_model
from qcompile.errors import CalibrationError, SpecError
from qcompile.files import run_onnx
from qcompile.graph import Op
from qcompile.pipeline import quantize
from qcompile.presets import parse_recipe
from qcompile.recipe import Recipe, Rule
from qcompile.sites import left_over
from qcompile.spec import parse_spec
from tests.hosts import exported_onnx, ordered_text, result
from tests.onnx.canonical import run_reference
from tests.onnx.models import ops_of


class Block(nn.Module):
    def __init__(self, inner: int, outer: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inner, outer, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outer)
        self.conv2 = nn.Conv2d(outer, outer, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outer)
        self.down = nn.Conv2d(inner, outer, 1, stride) if stride > 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + self.down(x))


class ResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.blocks = nn.Sequential(Block(8, 8), Block(8, 16, 2))
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(F.max_pool2d(F.relu(self.stem(x)), 2))
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    built = ResNet()
    for module in built.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -1, 1)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 2)
    return built.eval()


@pytest.mark.parametrize("optimize", [False, True])
def test_a_residual_network_keeps_its_results_and_names(model: nn.Module, optimize: bool) -> None:
    sizes = {0: torch.export.Dim("batch")}
    source = exported_onnx(model, torch.randn(2, 3, 9, 9), opset=21, dynamic_shapes=(sizes,), optimize=optimize)
    graph = open_onnx(source)
    x = torch.randn(5, 3, 9, 9)
    with torch.no_grad():
        torch.testing.assert_close(result(graph, x), model(x), rtol=1e-4, atol=1e-4)
    convs = [graph.name(v) for v in ops_of(graph, Op.CONV)]
    assert convs == ["stem", *(f"blocks.{i}.{n}" for i in (0, 1) for n in ("conv1", "conv2")), "blocks.1.down"]
    norms = ops_of(graph, Op.BATCH_NORM)
    # the optimizer folds those that alone read a convolution
    assert [graph.name(v) for v in norms] == ([] if optimize else [f"blocks.{i}.bn{n}" for i in (0, 1) for n in (1, 2)])
    assert len(ops_of(graph, Op.RELU)) == 5
    assert "Conv" in {left.reader for left in left_over(graph)}


def test_the_head_is_quantized(model: nn.Module) -> None:
    x = torch.randn(2, 3, 9, 9)
    graph = open_onnx(exported_onnx(model, x, opset=21))
    plan = quantize(graph, parse_recipe("int8"))
    assert plan.decisions["head"].weight is not None
    assert 'dequantize const[10, 16] "head.weight_codes" int8/channel static' in ordered_text(graph)
    with torch.no_grad():
        expected = model(x)
    assert float((result(graph, x) - expected).norm() / expected.norm()) < 0.02


CONVS = ("stem", "blocks.0.conv1", "blocks.0.conv2", "blocks.1.conv1", "blocks.1.conv2", "blocks.1.down")
SYMMETRIC = Recipe(
    name="symmetric",
    rules=(
        Rule(
            ops=(Op.CONV,),
            weight=parse_spec("int8/channel"),
            input=parse_spec("int8/tensor"),
            output=parse_spec("int8/tensor"),
        ),
        Rule(weight=parse_spec("int8/channel"), input=parse_spec("int8/tensor")),
    ),
)


def batches(count: int) -> Iterator[Mapping[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return ({"x": torch.randn(8, 3, 9, 9, generator=generator)} for _ in range(count))


@pytest.fixture(scope="module")
def source(model: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("float") / "float.onnx"
    export_model(model, torch.randn(2, 3, 9, 9), path)
    return path


def error(path: Path, model: nn.Module) -> float:
    """Relative to the float model, on data that calibration did not see."""
    (batch,) = list(batches(5))[4:]
    (found,) = (next(iter(y.values())) for y in run_onnx(path, [batch]))
    with torch.no_grad():
        expected = model(batch["x"])
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("recipe", ["int8-static", "int8-smooth-static", SYMMETRIC])
def test_every_convolution_runs_on_codes(recipe: str | Recipe, model: nn.Module, source: Path, tmp_path: Path) -> None:
    path = tmp_path / "int8.onnx"
    report = qcompile.quantize_onnx(source, path, recipe, batches=batches(4))
    kernels = {site.name: site.kernel for site in report.sites}
    assert kernels == {**dict.fromkeys(CONVS, "QLinearConv"), "head": "MatMulIntegerToFloat"}
    assert report.coverage == 1
    assert "6 QLinearConv" in "\n".join(report.notes)
    assert error(path, model) < 0.04
    assert path.stat().st_size < source.stat().st_size


def test_a_model_that_kept_its_norms_is_quantized_like_one_without(model: nn.Module, tmp_path: Path) -> None:
    x = torch.randn(2, 3, 9, 9)
    ir.save(exported_onnx(model, x, opset=21, optimize=False, input_names=["x"]), tmp_path / "norms.onnx")
    ir.save(exported_onnx(model, x, opset=21, input_names=["x"]), tmp_path / "folded.onnx")
    made = []
    for name in ("norms", "folded"):
        report = qcompile.quantize_onnx(
            tmp_path / f"{name}.onnx", tmp_path / f"{name}_8.onnx", "int8-static", batches=({"x": x} for _ in range(2))
        )
        assert {site.name for site in report.sites if site.kernel == "QLinearConv"} == set(CONVS)
        made.append(next(run_onnx(tmp_path / f"{name}_8.onnx", [{"x": x}])))
    first, second = (next(iter(one.values())) for one in made)
    # the exporter folds in float32, so that a code here and there differs
    assert float((first - second).norm() / second.norm()) < 0.02


def test_portable_files_give_the_numbers_of_the_kernels(model: nn.Module, source: Path, tmp_path: Path) -> None:
    (batch,) = list(batches(5))[4:]
    found = {}
    for target in ("portable", "ort-cpu"):
        path = tmp_path / f"{target}.onnx"
        qcompile.quantize_onnx(source, path, "int8-static", batches=batches(4), target=target)
        found[target] = next(iter(next(run_onnx(path, [batch])).values()))
    found["reference"] = run_reference(ir.load(tmp_path / "portable.onnx"), batch["x"])[0]
    for name in ("ort-cpu", "reference"):
        # kernels round biases to the step of a product, which moves a code here and there
        assert float((found[name] - found["portable"]).norm() / found["portable"].norm()) < 0.01


def test_weights_alone_make_a_small_file_of_float_convolutions(model: nn.Module, source: Path, tmp_path: Path) -> None:
    path = tmp_path / "small.onnx"
    report = qcompile.quantize_onnx(source, path, "int8-weight")
    kernels = {site.name: site.kernel for site in report.sites}
    expected = "its input is not quantized: the weight becomes float when the file is loaded"
    assert [kernels[name] for name in CONVS] == [expected] * len(CONVS)
    assert report.coverage == 1
    assert error(path, model) < 0.01


class Shared(nn.Module):
    """One convolution is called twice, and its second result is returned."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.conv(x))


@pytest.mark.parametrize("target", ["ort-cpu", "ort-cuda", "tensorrt", "portable"])
def test_what_a_shared_convolution_returns_is_not_rounded(target: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    shared, x = Shared().eval(), torch.randn(2, 3, 9, 9)
    export_model(shared, x, tmp_path / "float.onnx")
    report = qcompile.quantize_onnx(
        tmp_path / "float.onnx", tmp_path / "out.onnx", SYMMETRIC, batches=[{"x": x}], target=target
    )
    assert report.coverage == 1
    last = ir.load(tmp_path / "out.onnx").graph.outputs[0].producer()
    assert last is not None
    assert last.op_type == "Conv"
    assert error(tmp_path / "out.onnx", shared) < 0.04


def test_a_recipe_that_scales_token_by_token_leaves_convolutions_float(source: Path, tmp_path: Path) -> None:
    report = qcompile.quantize_onnx(source, tmp_path / "dynamic.onnx", "int8")
    reasons = {site.name: site.reason for site in report.sites if site.weight is None}
    assert reasons == dict.fromkeys(CONVS, "no rule of recipe 'int8' matches this conv")
    asked = Recipe(name="asked", rules=(Rule(ops=(Op.LINEAR, Op.CONV), **_specs("int8/channel", "int8/token")),))
    report = qcompile.quantize_onnx(source, tmp_path / "asked.onnx", asked)
    reasons = {site.name: site.reason for site in report.sites if site.weight is None}
    reason = "rule 1 gives inputs int8/token, and those of a convolution have one scale each"
    assert reasons == dict.fromkeys(CONVS, reason)


def _specs(weight: str, given: str) -> dict[str, object]:
    return {"weight": parse_spec(weight), "input": parse_spec(given)}


def test_groups_do_not_fit_a_convolution(source: Path, tmp_path: Path) -> None:
    recipe = Recipe(name="groups", rules=(Rule(ops=(Op.CONV,), weight=parse_spec("int4/g9")),))
    with pytest.raises(
        SpecError, match="convolution 'stem', which has one scale a channel or a tensor; int4/channel fits"
    ):
        qcompile.quantize_onnx(source, tmp_path / "groups.onnx", recipe)
    assert not (tmp_path / "groups.onnx").exists()


def test_static_convolutions_need_data(source: Path, tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="recipe 'int8-static' needs data"):
        qcompile.quantize_onnx(source, tmp_path / "static.onnx", "int8-static")


def test_multiplications_are_counted_by_pixel(source: Path, tmp_path: Path) -> None:
    report = qcompile.quantize_onnx(source, tmp_path / "small.onnx", "int8-weight")
    macs = {site.name: site.macs for site in report.sites}
    assert (macs["stem"], macs["blocks.1.down"], macs["head"]) == (8 * 27 * 81, 16 * 8 * 4, 160)


def test_tensorrt_adds_one_quantized_addend_to_a_result_that_is_not(
    model: nn.Module, source: Path, tmp_path: Path
) -> None:
    """TensorRT's documented rules: see `qcompile.backends.onnx.pairs.free_results` for their source."""
    path = tmp_path / "tensorrt.onnx"
    qcompile.quantize_onnx(source, path, SYMMETRIC, batches=batches(4), target="tensorrt")
    file = ir.load(path)
    nodes = list(file.graph)
    for node in nodes:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            assert not np.asarray(node.inputs[2].const_value.numpy()).any() if len(node.inputs) > 2 else True
            assert (np.asarray(node.inputs[1].const_value.numpy()) > 0).all()
    convs = [node for node in nodes if node.op_type == "Conv"]
    assert len(convs) == len(CONVS)
    for node in convs:
        x, weight = (value.producer() for value in node.inputs[:2])
        assert (x.op_type, weight.op_type) == ("DequantizeLinear", "DequantizeLinear")
        assert weight.attributes["axis"].as_int() == 0
    sums = [node for node in nodes if node.op_type == "Add" and len(node.outputs[0].shape or ()) == 4]
    makers = [sorted(value.producer().op_type for value in node.inputs) for node in sums]
    assert makers == [["Conv", "DequantizeLinear"]] * 2
    # one convolution is added to another: only one of the two has a pair behind it
    behind = [use.node.op_type for node in convs for use in node.outputs[0].uses()]
    assert behind.count("QuantizeLinear") == 1
    assert error(path, model) < 0.04
    (batch,) = list(batches(5))[4:]
    assert torch.isfinite(run_reference(file, batch["x"])[0]).all()
