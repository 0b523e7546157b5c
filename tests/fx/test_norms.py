from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn

from qcompile.backends.fx import ops
from qcompile.graph import Op
from tests.fx.capture import dynamo_graph, dynamo_graphs, exported_graph, ops_of, result

K = 24


def llama(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.to(torch.float32)
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * wide.to(x.dtype)


def gemma(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return (wide * (1.0 + weight.float())).type_as(x)


def t5(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    variance = x.to(torch.float32).pow(2).mean(-1, keepdim=True)
    return weight * (x * torch.rsqrt(variance + eps)).to(weight.dtype)


def cast_last(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.float()
    return (weight * (torch.rsqrt(eps + torch.mean(wide * wide, dim=2, keepdim=True)) * wide)).to(x.dtype)


def quotient(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.float()
    return weight * (wide * (1 / torch.sqrt(torch.square(wide).mean((-1,), True) + eps))).to(x.dtype)


def cast_twice(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    normed = x.float() * torch.rsqrt(x.to(torch.float32).pow(2).mean(-1, keepdim=True) + eps)
    return weight * normed.type_as(x)


def divided(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.float()
    return weight * (wide / torch.sqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


def divided_as_it_is(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return (x.div(((x.float() ** 2).mean(-1, keepdim=True) + eps).sqrt()) * weight).to(x.dtype)


def reciprocal(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.float()
    return (wide * ((wide**2).mean(-1, keepdim=True) + eps).sqrt().reciprocal()).to(x.dtype) * weight


def wide_result(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps))


def without_weight(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


SPELLINGS = (
    llama,
    gemma,
    t5,
    cast_last,
    cast_twice,
    quotient,
    divided,
    divided_as_it_is,
    reciprocal,
    wide_result,
    without_weight,
)


class Norm(nn.Module):
    def __init__(self, function: Callable[[Tensor, Tensor, float], Tensor], dtype: torch.dtype) -> None:
        super().__init__()
        self.function = function
        self.weight = nn.Parameter(torch.randn(K, dtype=dtype))
        self.eps = 1e-5

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.weight, self.eps)


@pytest.mark.parametrize("opened", [dynamo_graph, exported_graph])
@pytest.mark.parametrize("function", SPELLINGS)
@pytest.mark.parametrize(
    ("dtype", "weight_dtype"),
    [
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float16),
        (torch.bfloat16, torch.float32),
    ],
)
def test_every_spelling_is_one_op_of_the_same_bits(opened, function, dtype, weight_dtype):
    torch.manual_seed(0)
    norm = Norm(function, weight_dtype)
    # large enough that the place of a rounding shows
    x = 30 * torch.randn(3, 5, K).to(dtype)
    graph = opened(norm, x)
    (found,) = ops_of(graph, Op.RMS_NORM)
    assert found.target is ops.RMS_NORM
    expected = norm(x)
    assert result(graph, x).dtype is expected.dtype
    assert torch.equal(result(graph, x), expected)


def test_the_weight_and_what_is_normed_are_the_inputs():
    graph = dynamo_graph(Norm(llama, torch.bfloat16), torch.randn(2, K, dtype=torch.bfloat16))
    (found,) = ops_of(graph, Op.RMS_NORM)
    x, weight = graph.inputs(found)
    assert graph.op(x) is Op.INPUT
    assert graph.name(weight) == "weight"


def test_eps_may_be_known_only_while_running():
    x = torch.randn(3, K)
    norm = Norm(llama, torch.float32)
    (opened,) = dynamo_graphs(norm, x, dynamic=True)
    (found,) = ops_of(opened.graph, Op.RMS_NORM)
    assert isinstance(found.args[2], fx.Node)
    assert opened.graph.shape(found) == (None, K)
    assert torch.equal(result(opened.graph, *opened.inputs), norm(x))


class Shared(nn.Module):
    """Its variance, or its normed value, is read by something else."""

    def __init__(self, leak: str) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(K))
        self.leak = leak

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        variance = x.pow(2).mean(-1, keepdim=True)
        inverse = torch.rsqrt(variance + 1e-6)
        normed = x * inverse
        return self.weight * normed, {"variance": variance, "inverse": inverse}[self.leak]


@pytest.mark.parametrize("leak", ["variance", "inverse"])
def test_a_chain_that_something_else_reads_is_left_alone(leak):
    assert not ops_of(dynamo_graph(Shared(leak), torch.randn(2, K)), Op.RMS_NORM)


def subtracted(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return weight * ((x - 1) * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps))


def cube(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return weight * (x * torch.rsqrt(x.pow(3).abs().mean(-1, keepdim=True) + eps))


def other_axis(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return weight * (x * torch.rsqrt(x.pow(2).mean(0, keepdim=True) + eps))


def dropped_axis(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return weight * (x * torch.rsqrt(x.pow(2).mean(-1) + eps))


def other_numerator(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return weight * (x * (2 / torch.sqrt(x.pow(2).mean(-1, keepdim=True) + eps)))


def squared_inverse(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    inverse = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
    return weight * (inverse * inverse) * x


def named_arguments(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    root = torch.sqrt(input=torch.square(input=x).mean(-1, keepdim=True) + eps)
    return weight * torch.div(x, other=root) * torch.rsqrt(input=root)


def written(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    x = x * 1
    inverse = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
    x.mul_(2)
    return weight * (x * inverse)


@pytest.mark.parametrize(
    "function", [subtracted, cube, other_axis, dropped_axis, other_numerator, squared_inverse, named_arguments, written]
)
def test_what_only_looks_like_a_norm_is_left_alone(function):
    assert not ops_of(dynamo_graph(Norm(function, torch.float32), torch.randn(K, K)), Op.RMS_NORM)


def test_a_norm_computed_in_bfloat16_is_left_alone():
    def narrow(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps))

    x = torch.randn(2, K, dtype=torch.bfloat16)
    assert not ops_of(dynamo_graph(Norm(narrow, torch.bfloat16), x), Op.RMS_NORM)


def test_torchs_own_norm_stays_as_it_is():
    norm = nn.RMSNorm(K)
    for opened in (dynamo_graph, exported_graph):
        graph = opened(norm, torch.randn(2, K))
        (found,) = ops_of(graph, Op.RMS_NORM)
        assert found.target is not ops.RMS_NORM
        assert graph.constant(graph.inputs(found)[1]) is norm.weight
