"""Factors of channels that no fold could move elsewhere are multiplied with by the op that quantizes, on the CPU."""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

pytest.importorskip("triton")

import qcompile
from qcompile.backends.fx import lower as lower_module
from qcompile.backends.fx.fuse import fuse
from qcompile.backends.fx.graph import FxGraph
from qcompile.backends.fx.lower import lower
from qcompile.backends.fx.rows import QUANTIZE_ROWS
from qcompile.backends.fx.values import attribute
from qcompile.pipeline import quantize
from qcompile.plan import Plan
from qcompile.presets import parse_recipe
from tests.families import build, tokens
from tests.hosts import FX, result
from tests.triton import fp4_on_cpu
from tests.triton.fused import CASES, OPS, K, Net, fused, pair
from tests.triton.on_cpu import HOPPER, Packs, on_cpu

SPLIT = (3, 17, 30)
WITHOUT_NORM = [name for name, case in CASES.items() if "norm" not in case[2]]


@pytest.fixture(scope="module", autouse=True)
def emulated() -> Iterator[None]:
    with on_cpu(**OPS, fp4_mm=fp4_on_cpu.multiplied):
        yield


class Factor(nn.Module):
    """What the model multiplies with, as the folds leave it or as its own."""

    def __init__(self, *size: int, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.register_buffer("factor", torch.rand(size, dtype=dtype) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


@pytest.mark.parametrize("outliers", [None, {"q": SPLIT, "k": SPLIT}], ids=["whole", "split"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("recipe", ["int8", "fp8"])
@pytest.mark.parametrize("name", WITHOUT_NORM)
def test_a_factor_of_each_channel_joins_the_op(name: str, recipe: str, dtype: torch.dtype, outliers: Any) -> None:
    before, _, kind, second, _ = CASES[name]
    factor = Factor(K, dtype=dtype)
    net = Net(lambda x, y, norm: norm(before(x, y, None)), factor, dtype)
    (arguments,) = fused(net, *pair(dtype), recipe=recipe, outliers=outliers)
    assert arguments[4] == kind
    assert (arguments[1] is not None) is second
    assert torch.equal(attribute(arguments[2]), factor.factor)
    assert (len(arguments) > 9) is (outliers is not None)


def test_the_factor_may_come_first() -> None:
    (arguments,) = fused(Net(lambda x, y, norm: norm.factor * x, Factor(K)), *pair())
    assert arguments[2] is not None


@pytest.mark.parametrize(
    ("before", "factor"),
    [
        pytest.param(lambda x, y, factor: factor(x + y), Factor(K), id="of what Inductor makes"),
        pytest.param(lambda x, y, factor: factor(F.rms_norm(x, (K,), None, 1e-5)), Factor(K), id="of a norm"),
        pytest.param(lambda x, y, factor: factor(factor(x)), Factor(K), id="a second one"),
        pytest.param(lambda x, y, factor: (v := factor(x), v), Factor(K), id="the product is read by others"),
        pytest.param(lambda x, y, factor: x * y[0, 0], Factor(K), id="no constant"),
        pytest.param(lambda x, y, factor: factor(x), Factor(3, K), id="of tokens and channels"),
        pytest.param(lambda x, y, factor: factor(x), Factor(1), id="one for all channels"),
        pytest.param(lambda x, y, factor: factor(x), Factor(), id="a number"),
        pytest.param(lambda x, y, factor: factor(x), Factor(2, 3, K), id="of each element"),
    ],
)
def test_products_that_stay(before: Callable[..., Any], factor: nn.Module) -> None:
    assert fused(Net(before, factor), *pair()) == []


def test_a_factor_in_another_dtype_stays() -> None:
    class Wide(Net):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.q(self.norm(x.to(torch.bfloat16))).float()

    factor = Factor(K)
    net = Wide(lambda x, y, norm: x, factor)
    assert fused(net, *pair()) == []


def test_a_factor_that_is_written_in_place_stays() -> None:
    class Written(Net):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            value = self.norm(x)
            self.norm.factor.mul_(2)
            return self.q(value)

    graph = FX.open(Written(lambda x, y, norm: x, Factor(K)), *pair())
    quantize(graph, parse_recipe("int8"))
    assert fuse(graph, (9, 0)) == 0


class Llama(nn.Module):
    """A tiny one that returns its keys and values, which then are outputs of the graph, or does not make them."""

    def __init__(self, cache: bool) -> None:
        super().__init__()
        self.model, self.cache = build("llama").bfloat16(), cache

    def forward(self, ids: Tensor) -> tuple[Tensor, ...]:
        found = self.model(input_ids=ids, use_cache=self.cache)
        layers = found.past_key_values.layers if self.cache else ()
        return (found.logits, *(part for layer in layers for part in (layer.keys, layer.values)))


def lowered(model: Llama, ids: Tensor, plan: Plan) -> FxGraph:
    """The model as a GPU would run it."""
    graph = FX.open(model, ids)
    quantize(graph, plan, lower=lambda graph, plan: len(lower(graph, HOPPER, Packs())))
    return graph


def ops_of(graph: FxGraph) -> Counter[Any]:
    return Counter(node.target for node in graph.module.graph.nodes if node.op == "call_function")


@pytest.mark.parametrize("cache", [False, True], ids=["no cache", "cache"])
def test_folds_add_no_op_to_a_llama(cache: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = Llama(cache).eval(), tokens(2, 10)
    recipe = parse_recipe("fp4-token")
    # the formats and scales that data finds change no op
    rules = tuple(replace(rule, format=None, solver="round") for rule in recipe.rules)
    raised = qcompile.calibrate(model, [ids], recipe=replace(recipe, rules=rules), progress=False)
    # values that are kept for the next token cannot be scaled
    assert sum(not fold.into for fold in raised.folds) == (2 if cache else 0)
    plain = {name: replace(decision, shift=()) for name, decision in raised.decisions.items()}
    graph, ops = lowered(model, ids, raised), ops_of(lowered(model, ids, replace(raised, decisions=plain, folds=())))
    assert ops_of(graph) == ops
    assert ops[QUANTIZE_ROWS] == 8
    monkeypatch.setattr(lower_module, "fuse", lambda graph, capability: 0)
    assert torch.equal(result(graph, ids), result(lowered(model, ids, raised), ids))
