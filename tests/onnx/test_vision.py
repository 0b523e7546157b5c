"""Convolutional networks pass the door whole: kinds of ops, names, and results."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qcompile.backends.onnx.door import open_onnx
from qcompile.graph import Op
from qcompile.pipeline import quantize
from qcompile.presets import parse_recipe
from qcompile.sites import left_over
from tests.hosts import exported_onnx, ordered_text, result
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


@pytest.fixture
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
