"""Batch norms end in the weights before them, on both hosts, where nobody else sees what they read."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qcompile.graph import Op
from qcompile.passes.fold_batch_norm import fold_batch_norm, folded
from tests.hosts import FX, Host, exported_onnx, ordered_text, result

C = 6


def trained(norm: nn.Module) -> nn.Module:
    """The norm with numbers as training leaves them."""
    with torch.no_grad():
        for name in ("running_mean", "bias"):
            getattr(norm, name).uniform_(-1, 1)
        for name in ("running_var", "weight"):
            getattr(norm, name).uniform_(0.5, 2)
    return norm


class Net(nn.Module):
    """One op, and the batch norm behind it."""

    def __init__(self, first: nn.Module, norm: nn.Module) -> None:
        super().__init__()
        self.first, self.norm = first, trained(norm)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(self.first(x)))


class Shared(Net):
    """Others read what the norm reads."""

    def forward(self, x: Tensor) -> Tensor:
        made = self.first(x)
        return self.norm(made) + made


class Returned(Net):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        made = self.first(x)
        return self.norm(made), made


class Twice(Net):
    """One weight before a norm, and without one."""

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.first(x)) + self.first(x.neg())


def open_unfolded(host: Host, model: nn.Module, x: Tensor) -> Any:
    """The graph with its norms: torch's exporter to ONNX folds them itself if it may."""
    if host is FX:
        return FX.open(model, x)
    from qcompile.backends.onnx.door import open_onnx

    return open_onnx(exported_onnx(model, x, opset=21, optimize=False))


def ops_of(graph: Any, op: Op) -> list[Any]:
    return [value for value in graph.values() if graph.op(value) is op]


NETS = {
    "conv": (nn.Conv2d(3, C, 3, bias=False), nn.BatchNorm2d(C), (2, 3, 7, 9)),
    "bias": (nn.Conv2d(3, C, 3, stride=2, padding=1), nn.BatchNorm2d(C), (2, 3, 7, 9)),
    "depthwise": (nn.Conv2d(C, C, 3, groups=C), nn.BatchNorm2d(C, eps=0.1), (2, C, 5, 5)),
    "conv1d": (nn.Conv1d(3, C, 3, dilation=2), nn.BatchNorm1d(C), (2, 3, 9)),
    "linear": (nn.Linear(5, C), nn.BatchNorm1d(C), (4, 5)),
}


@pytest.mark.parametrize("net", NETS)
def test_a_norm_ends_in_the_weight_before_it(host: Host, net: str) -> None:
    torch.manual_seed(0)
    first, norm, shape = NETS[net]
    model, x = Net(first, norm).eval(), torch.randn(shape)
    graph = open_unfolded(host, model, x)
    (before,) = ops_of(graph, Op.BATCH_NORM)
    kind = graph.op(graph.inputs(before)[0])
    assert fold_batch_norm(graph) == 1
    graph.prune()
    assert not ops_of(graph, Op.BATCH_NORM)
    (made,) = ops_of(graph, kind)
    names = [graph.name(v) for v in graph.inputs(made)[1:]]
    assert (graph.name(made), names) == ("first", ["first.weight", "first.bias"])
    # the algebra is exact: two roundings of the weights, and those of the products
    torch.testing.assert_close(result(graph, x), model(x), rtol=1e-5, atol=1e-5)
    assert fold_batch_norm(graph) == 0


@pytest.mark.parametrize("net", [Shared, Returned])
def test_a_norm_stays_where_others_read_what_it_reads(host: Host, net: type[Net]) -> None:
    model, x = net(nn.Conv2d(3, C, 3), nn.BatchNorm2d(C)), torch.randn(2, 3, 7, 7)
    graph = open_unfolded(host, model, x)
    before = ordered_text(graph)
    assert fold_batch_norm(graph) == 0
    assert ordered_text(graph) == before


def test_a_norm_over_tokens_is_none_over_channels(host: Host) -> None:
    model, x = Net(nn.Linear(5, C), nn.BatchNorm1d(4)), torch.randn(2, 4, 5)
    assert fold_batch_norm(open_unfolded(host, model, x)) == 0


def test_a_norm_before_which_nothing_takes_factors_stays(host: Host) -> None:
    model, x = Net(nn.ReLU(), nn.BatchNorm2d(3)), torch.randn(2, 3, 5, 5)
    assert fold_batch_norm(open_unfolded(host, model, x)) == 0


def test_a_weight_that_others_read_keeps_its_numbers(host: Host) -> None:
    torch.manual_seed(0)
    model, x = Twice(nn.Conv2d(3, C, 3), nn.BatchNorm2d(C)).eval(), torch.randn(2, 3, 7, 7)
    graph = open_unfolded(host, model, x)
    assert fold_batch_norm(graph) == 1
    torch.testing.assert_close(result(graph, x), model(x), rtol=1e-5, atol=1e-5)
    weights = [graph.constant(graph.inputs(v)[1]) for v in ops_of(graph, Op.CONV)]
    assert sum(torch.equal(w, model.first.weight) for w in weights) == 1


def test_factors_that_a_weight_cannot_hold_are_not_folded(host: Host) -> None:
    model, x = Net(nn.Conv2d(3, C, 3), nn.BatchNorm2d(C)), torch.randn(2, 3, 7, 7)
    with torch.no_grad():
        # divided by the root of eps, beyond float32
        model.norm.weight[2], model.norm.running_var[2] = 1e38, 0.0
    assert fold_batch_norm(open_unfolded(host, model, x)) == 0


def test_factors_are_those_of_the_norm_in_float64() -> None:
    torch.manual_seed(0)
    norm = trained(nn.BatchNorm1d(C, eps=1e-3).double()).eval()
    x = torch.randn(50, C, dtype=torch.float64)
    factor, moved = folded(norm.weight, norm.bias, norm.running_mean, norm.running_var, 1e-3)
    torch.testing.assert_close(x * factor + moved, norm(x), rtol=1e-13, atol=1e-13)
    bare = nn.BatchNorm1d(C, affine=False).double().eval()
    factor, moved = folded(None, None, bare.running_mean, bare.running_var, bare.eps)
    torch.testing.assert_close(x * factor + moved, bare(x), rtol=1e-13, atol=1e-13)
