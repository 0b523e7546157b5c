"""What is known before a graph runs: vectors that norms compute from their weights, and constants like a value."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from qcompile.backends.fx.graph import FxGraph
from qcompile.errors import GraphError
from qcompile.graph import Op
from qcompile.sites import constant_name, find_sites, left_over
from tests.fx.capture import dynamo_graph, exported_graph, ops_of

K = 6
OPENED = [dynamo_graph, exported_graph]


class Offset(nn.Module):
    """x times a vector made of the weight, which may be written to."""

    def __init__(self, make: Callable[[Tensor], Tensor], dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.make = make
        self.weight = nn.Parameter(torch.randn(K).to(dtype), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.make(self.weight)


VECTORS: dict[str, Callable[[Tensor], Tensor]] = {
    "one plus": lambda w: 1.0 + w,
    "a cast": lambda w: w.double(),
    "one plus a cast": lambda w: (1.0 + w.float()).to(w.dtype),
    "with itself": lambda w: torch.mul(w, w).add(w),
    "a view": lambda w: 2 * w.view(2, 3).reshape(K) + 1,
}


@pytest.mark.parametrize("opened", OPENED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", VECTORS)
def test_vectors_computed_from_constants_are_known(
    name: str, dtype: torch.dtype, opened: Callable[..., FxGraph]
) -> None:
    model = Offset(VECTORS[name], dtype)
    graph = opened(model, torch.randn(2, K, dtype=dtype))
    vector = graph.inputs(ops_of(graph, Op.MUL)[-1])[1]
    found, expected = graph.constant(vector), VECTORS[name](model.weight)
    assert found.dtype is expected.dtype
    assert torch.equal(found, expected)
    assert constant_name(graph, vector) == "weight"
    assert not list(left_over(graph))


def test_vectors_of_weights_without_values_are_shapes() -> None:
    graph = dynamo_graph(Offset(VECTORS["one plus a cast"]), torch.randn(2, K), meta=True)
    found = graph.constant(graph.inputs(ops_of(graph, Op.MUL)[-1])[1])
    assert found.is_meta
    assert found.shape == (K,)


@pytest.mark.parametrize("opened", OPENED)
@pytest.mark.parametrize(
    "make",
    [
        lambda w: w.sin() + 1,
        lambda w: w.clone().add_(1) + 1,
        lambda w: torch.arange(K) + w,
        lambda w: (1 + w).unsqueeze(0) + torch.ones(2, 1),
        lambda w: (v := 1 + w).mul_(2) * 0 + v,
    ],
)
def test_what_is_not_arithmetic_on_constants_alone_is_not_known(
    make: Callable[[Tensor], Tensor], opened: Callable[..., FxGraph]
) -> None:
    graph = opened(Offset(make), torch.randn(2, K))
    assert graph.constant(graph.inputs(ops_of(graph, Op.MUL)[-1])[1]) is None


@pytest.mark.parametrize("opened", OPENED)
def test_matrices_are_not_computed(opened: Callable[..., FxGraph]) -> None:
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base, self.change = nn.Parameter(torch.randn(3, K)), nn.Parameter(torch.randn(3, K))

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(x, self.base + self.change)

    assert find_sites(opened(Sum(), torch.randn(2, K))) == []


@pytest.mark.parametrize("opened", OPENED)
def test_a_norm_over_several_dimensions_is_no_norm_of_channels(opened: Callable[..., FxGraph]) -> None:
    several, last = nn.LayerNorm((3, K), elementwise_affine=False), nn.LayerNorm(K, elementwise_affine=False)
    graph = opened(nn.Sequential(several, last), torch.randn(2, 3, K))
    assert len(ops_of(graph, Op.LAYER_NORM)) == 1


def test_a_constant_like_a_value_has_its_dtype_and_device() -> None:
    graph = dynamo_graph(Offset(lambda w: w), torch.randn(2, K, dtype=torch.bfloat16))
    (product,) = ops_of(graph, Op.MUL)
    x = graph.inputs(product)[0]
    node = graph.add_constant("new.scale", torch.full((K,), 1 / 3, dtype=torch.float64), like=x)
    found = graph.constant(node)
    assert found.dtype is torch.bfloat16
    assert torch.equal(found, torch.full((K,), 1 / 3).to(torch.bfloat16))
    assert graph.name(node) == "new.scale"
    x.meta.pop("example_value")
    with pytest.raises(GraphError, match=r"the dtype of .* is not known, which 'other' should take"):
        graph.add_constant("other", torch.ones(K), like=x)
