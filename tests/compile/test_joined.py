"""Linears that read one input run as one matmul where a kernel joins them, with the results of each alone."""

from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from qcompile.backends.fx import kernels
from qcompile.backends.fx.kernels import int8
from qcompile.quantized import PACKS
from tests.variants import variants

K = 64


class Block(nn.Module):
    def __init__(self, *, bias: bool = False) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(K, n, bias=bias) for n in (K, 16, 24))
        self.gate, self.up = (nn.Linear(K, 96, bias=bias) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        # a view over rows and columns together needs them to lie one behind the other
        q, k, v = self.q(x).view(-1), self.k(x), self.v(x).transpose(0, 1)
        h = q.view_as(x) + k.sum(-1, keepdim=True) + v.mean()
        return silu(self.gate(h)) * self.up(h)


@pytest.fixture
def matmuls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """N of every integer matmul that runs."""
    seen: list[int] = []
    plain = torch._int_mm
    monkeypatch.setattr(int8, "has_integer_units", lambda: True)
    monkeypatch.setattr(torch, "_int_mm", lambda a, b, **more: seen.append(b.shape[1]) or plain(a, b, **more))
    return seen


@pytest.fixture
def joining(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels join on the CPU, too."""
    joins = replace(int8.KERNEL, joins=lambda p: True)
    monkeypatch.setattr(kernels, "KERNELS", (joins, *kernels.KERNELS[1:]))


def packed(weight: Tensor) -> Tensor:
    """The codes that a kernel reads in place of a weight."""
    (pack,) = PACKS._entries[id(weight)].packs.values()
    return pack.tensors["weight"]


def run(model: nn.Module, x: Tensor, **options: Any) -> Tensor:
    torch._dynamo.reset()
    fast = torch.compile(model, backend="qcompile", fullgraph=True, options={"recipe": "int8", **options})
    with torch.no_grad():
        return fast(x)


@pytest.mark.parametrize("shape", variants([((1, 1, K),), ((2, 17, K),)], quick=[((2, 17, K),)]))
@pytest.mark.parametrize("bias", [False, True])
def test_one_matmul_has_the_results_of_several(
    shape: tuple[int, ...], bias: bool, matmuls: list[int], request: pytest.FixtureRequest
) -> None:
    model, x = Block(bias=bias).eval(), torch.randn(shape)
    alone = run(model, x)
    assert sorted(matmuls) == [16, 24, 64, 96, 96]
    matmuls.clear()
    request.getfixturevalue("joining")
    together = run(model, x)
    assert sorted(matmuls) == [104, 192]
    assert torch.equal(together, alone)


def test_packs_are_views_of_the_one(joining: None) -> None:
    model, x = Block().eval(), torch.randn(2, 5, K)
    reports: list[Any] = []
    run(model, x, report=reports.append)
    # 8 bits and a scale and a sum a row
    sizes = {site.name: site.bytes_after for site in reports[0].sites}
    assert sizes == {name: n * (K + 8) for name, n in {"q": 64, "k": 16, "v": 24, "gate": 96, "up": 96}.items()}
    places = [packed(module.weight) for module in (model.q, model.k, model.v)]
    assert len({tensor.untyped_storage().data_ptr() for tensor in places}) == 1
    assert [tensor.storage_offset() for tensor in places] == [0, 64 * K, 80 * K]
    # what is in place is not moved again
    run(model, torch.randn(3, 5, K))
    assert [packed(module.weight).data_ptr() for module in (model.q, model.k, model.v)] == [
        t.data_ptr() for t in places
    ]


def test_packs_that_were_joined_otherwise_are_joined_anew(joining: None, matmuls: list[int]) -> None:
    model, x = Block().eval(), torch.randn(2, 5, K)

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.v, self.q = model.v, model.q

        def forward(self, x: Tensor) -> Tensor:
            return self.v(x).sum() + self.q(x)

    alone = [run(module, x, lower=False) for module in (deepcopy(model), deepcopy(Two()))]
    two = Two().eval()
    for _ in range(2):
        for module, expected in zip((model, two), alone, strict=True):
            torch.testing.assert_close(run(module, x), expected, rtol=1e-4, atol=1e-4)
    assert set(matmuls) == {104, 192, 88}


def test_a_weight_that_changes_is_joined_anew(joining: None, matmuls: list[int]) -> None:
    model, x = Block().eval(), torch.randn(2, 5, K)
    fast = torch.compile(model, backend="qcompile", fullgraph=True, options={"recipe": "int8"})
    with torch.no_grad():
        before = fast(x)
        model.k.weight.mul_(2)
        model.up.weight.copy_(torch.randn(96, K))
        after = fast(x)
        assert not torch.equal(before, after)
        matmuls.clear()
        torch.testing.assert_close(after, run(model, x, lower=False), rtol=1e-4, atol=1e-4)


def test_a_bias_that_changes_is_joined_anew(joining: None, matmuls: list[int]) -> None:
    model, x = Block(bias=True).eval(), torch.randn(2, 5, K)
    fast = torch.compile(model, backend="qcompile", fullgraph=True, options={"recipe": "int8"})
    with torch.no_grad():
        before = fast(x)
        model.k.bias.add_(2)
        model.up.bias.copy_(torch.randn(96))
        after = fast(x)
    assert not torch.equal(before, after)
    assert set(matmuls) == {104, 192}
    torch.testing.assert_close(after, run(model, x, lower=False), rtol=1e-4, atol=1e-4)


def test_what_has_no_bias_gets_zeros(joining: None, matmuls: list[int]) -> None:
    model, x = Block(bias=True).eval(), torch.randn(2, 5, K)
    # as in Whisper
    model.k.bias = model.gate.bias = None
    y = run(model, x)
    assert set(matmuls) == {104, 192}
    torch.testing.assert_close(y, run(model, x, lower=False), rtol=1e-4, atol=1e-4)


def test_biases_are_joined_where_weights_are_freed(joining: None) -> None:
    model, inputs = Block(bias=True).eval(), (torch.randn(2, 5, K), torch.randn(1, 9, K))
    reference = deepcopy(model)
    expected = [run(reference, x) for x in inputs]
    torch._dynamo.reset()
    options = {"recipe": "int8", "free_weights": True}
    fast = torch.compile(model, backend="qcompile", fullgraph=True, dynamic=False, options=options)
    with torch.no_grad():
        for x, y in zip((*inputs, inputs[0]), (*expected, expected[0]), strict=True):
            assert torch.equal(fast(x), y)
    assert bool(model.q.weight.isnan().all())
    assert not bool(model.q.bias.isnan().any())


def test_free_weights_and_another_shape_find_the_joined_packs(joining: None) -> None:
    model, first, second = Block().eval(), torch.randn(2, 5, K), torch.randn(1, 9, K)
    # what runs in float is never freed
    reference = deepcopy(model)
    expected = [run(reference, x, lower=False) for x in (first, second)]
    fast = torch.compile(
        model, backend="qcompile", fullgraph=True, dynamic=False, options={"recipe": "int8", "free_weights": True}
    )
    with torch.no_grad():
        found = [fast(x) for x in (first, second, first)]
    for a, b in zip(found, [*expected, expected[0]], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert bool(model.q.weight.isnan().all())


def test_what_is_not_alike_runs_alone(joining: None, matmuls: list[int]) -> None:
    class Others(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(K, 32, bias=False), nn.Linear(K, 32, bias=False)
            self.scale = nn.Parameter(torch.rand(32))
            self.c = nn.Linear(K, 40, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            # a bias that is computed; one weight twice; another input
            b = torch.nn.functional.linear(x, self.b.weight, self.scale * 2)
            return self.a(x) + b + self.a(x) + self.c(x + 1).sum()

    model, x = Others().eval(), torch.randn(3, K)
    y = run(model, x)
    assert set(matmuls) == {32, 40}
    torch.testing.assert_close(y, run(model, x, lower=False), rtol=1e-4, atol=1e-4)
