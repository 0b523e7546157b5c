"""Plans that split outlier channels, compiled: one graph, changing weights, freed weights, many shapes."""

from collections.abc import Mapping
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch._functorch import config as aot
from torch._inductor import config as inductor
from torch._inductor.utils import run_and_get_code

import qcompile
from qcompile.backends.fx.kernels import tail
from qcompile.graph import Op
from qcompile.plan import Plan
from tests.families import DECODERS, build, tokens
from tests.variants import variants

graphs_only = pytest.mark.usefixtures("graphs_only")


class Layer(nn.Module):
    """Channels of fc1 can only be gathered, those of fc2 can be numbered anew."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, 2 * width)
        self.fc2 = nn.Linear(2 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc2(torch.relu(self.fc1(self.norm(x))))


class Stack(nn.Module):
    def __init__(self, layers: int = 2) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def split(plan: Plan, outliers: Mapping[str, tuple[int, ...]] | None = None, threshold: float | None = None) -> Plan:
    """The plan with those channels split, or two channels of every linear that differ from site to site."""

    def chosen(i: int, K: int) -> tuple[int, ...]:
        return (i % K, (3 * i + 7) % K) if (i - 3 * i - 7) % K else (i % K, (i + 1) % K)

    decisions = {}
    for i, (name, d) in enumerate(plan.decisions.items()):
        if d.op is not Op.LINEAR or d.weight is None:
            decisions[name] = d
        elif threshold is not None:
            decisions[name] = replace(d, threshold=threshold)
        else:
            decisions[name] = replace(d, outliers=chosen(i, d.shape[-1]) if outliers is None else outliers[name])
    return replace(plan, decisions=decisions)


def plan_of(model: nn.Module, x: object, recipe: str = "int8", **more: object) -> Plan:
    return split(qcompile.calibrate(model, [x], recipe=recipe, progress=False), **more)


def reference(model: nn.Module, x: Tensor, plan: Plan) -> Tensor:
    torch._dynamo.reset()
    y = torch.compile(model, backend="qcompile", fullgraph=True, options={"lower": False, "plan": plan})(x)
    torch._dynamo.reset()
    return y


def assert_same(y: Tensor, expected: Tensor) -> None:
    # float32 rounding almost everywhere; a value on the edge between two codes may move its row by a step
    assert float((y - expected).abs().median()) < 1e-6
    assert float((y - expected).norm() / expected.norm()) < 1e-2


def graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.mark.parametrize(
    ("dtype", "recipe"),
    variants(
        product((torch.float32, torch.bfloat16), ("int8", "int8-static")),
        quick=((torch.bfloat16, "int8-static"),),
    ),
)
def test_compiled_code_equals_the_graph(dtype: torch.dtype, recipe: str) -> None:
    model, inputs = Stack(1).eval().to(dtype), [torch.randn(*shape, 32, dtype=dtype) for shape in ((3, 5), (2, 9))]
    plan = plan_of(model, inputs[0], recipe)
    expected = [reference(model, x, plan) for x in inputs]
    fast = torch.compile(model, backend="qcompile", fullgraph=True, dynamic=True, options={"plan": plan})
    before = graphs()
    limit = 1e-5 if dtype is torch.float32 else 1e-2
    for x, y in zip(inputs, expected, strict=True):
        assert float((fast(x) - y).norm() / y.norm()) < limit
    assert graphs() - before == 1
    assert [(s.kernel, s.outliers) for s in qcompile.report(fast).sites if s.weight] == [("int8 + tail", 2)] * 2


@pytest.mark.parametrize("recipe", ["int8", "int8-static"])
@pytest.mark.parametrize("shape", [(5,), (2, 3)], ids=str)
def test_the_product_of_many_outliers_is_added_where_the_quantized_one_is_made(
    recipe: str, shape: tuple[int, ...]
) -> None:
    model, x = Layer(3 * tail.MOST_FUSED).eval(), torch.randn(*shape, 3 * tail.MOST_FUSED)
    plain = qcompile.calibrate(model, [x], recipe=recipe, progress=False)
    many = {name: tuple(range(0, d.shape[-1], 2)) for name, d in plain.decisions.items()}
    plan = split(plain, many)
    expected = reference(model, x, plan)
    fast = torch.compile(model, backend="qcompile", fullgraph=True, options={"plan": plan})
    with aot.patch(enable_autograd_cache=False), inductor.patch(fx_graph_cache=False):
        y, code = run_and_get_code(fast, x)
    assert float((y - expected).norm() / expected.norm()) < 1e-5
    # addmm would copy the quantized product first
    assert [text.count("extern_kernels.mm(") for text in code] == [2]
    assert not any("addmm" in text for text in code)


def test_outliers_found_while_running_compile_whole() -> None:
    model, x = Stack(1).eval(), torch.randn(3, 5, 32)
    plan = plan_of(model, x, threshold=2.5)
    # other inputs have other outliers, and other numbers of them
    inputs = (x, 100 * x, torch.zeros(3, 5, 32))
    expected = [reference(model, given, plan) for given in inputs]
    fast = torch.compile(model, backend="qcompile", fullgraph=True, options={"plan": plan})
    before = graphs()
    for given, y in zip(inputs, expected, strict=True):
        assert_same(fast(given), y)
    assert graphs() - before == 1
    assert {s.kernel for s in qcompile.report(fast).sites if s.weight} == {"llm-int8"}


@graphs_only
def test_one_code_serves_all_shapes() -> None:
    model = Stack().eval()
    plan = plan_of(model, torch.randn(3, 5, 32))
    fast = torch.compile(model, backend="qcompile", fullgraph=True, dynamic=True, options={"plan": plan})
    before = graphs()
    for shape in ((3, 5, 32), (2, 9, 32), (7, 4, 32)):
        x = torch.randn(shape)
        assert float((fast(x) - model(x)).norm() / model(x).norm()) < 0.05
    assert graphs() - before == 1


@graphs_only
def test_layers_with_their_own_channels_share_code() -> None:
    model, x = Stack(4).eval(), torch.randn(3, 32)
    plan = plan_of(model, x)
    expected = reference(model, x, plan)
    for layer in model.layers:
        layer.compile(backend="qcompile", options={"plan": plan})
    before = graphs()
    for _ in range(2):
        assert_same(model(x), expected)
    assert graphs() - before == 1


def _bias(model: nn.Module) -> None:
    model.layers[0].fc1.bias.add_(1)


def _weight(model: nn.Module) -> None:
    model.layers[0].fc1.weight.mul_(-3)


def _load(model: nn.Module) -> None:
    model.load_state_dict(Stack().state_dict())


@graphs_only
@pytest.mark.parametrize("change", [_bias, _weight, _load])
def test_what_was_made_of_parameters_follows_them(change: object) -> None:
    model, x = Stack().eval(), torch.randn(3, 32)
    plan = plan_of(model, x)
    fast = torch.compile(model, backend="qcompile", options={"plan": plan})
    old = fast(x)
    change(model)
    new = fast(x)
    assert not torch.allclose(old, new, atol=1e-2)
    assert_same(new, reference(model, x, plan))


@graphs_only
@pytest.mark.slow
@pytest.mark.parametrize("threshold", [None, 2.5])
def test_freed_weights_leave_their_outliers_behind(threshold: float | None) -> None:
    model, ids = build("llama"), tokens(2, 8)
    plan = plan_of(model, ids, threshold=threshold)
    expected = model(ids).logits
    fast = torch.compile(model, backend="qcompile", options={"plan": plan, "free_weights": True})
    first = fast(ids).logits
    assert float((first - expected).norm() / expected.norm()) < 0.05
    assert model.model.layers[0].mlp.down_proj.weight.isnan().all()
    # a second shape compiles again, from the packs alone
    torch.testing.assert_close(fast(ids[:, :5]).logits, first[:, :5], atol=2e-2, rtol=0)
    assert torch.equal(fast(ids).logits, first)


@graphs_only
def test_freed_weights_cannot_be_split_anew() -> None:
    model, ids = build("llama"), tokens(2, 8)
    plain = qcompile.calibrate(model, [ids], recipe="int8", progress=False)
    torch.compile(model, backend="qcompile", options={"plan": plain, "free_weights": True})(ids)
    torch._dynamo.reset()
    with pytest.raises(Exception, match=r"(?s)WeightError.*was freed by free_weights=True.*load it again"):
        torch.compile(model, backend="qcompile", options={"plan": split(plain)})(ids)


@graphs_only
def test_plain_and_split_plans_keep_their_own_packs() -> None:
    model, x = Stack().eval(), torch.randn(3, 32)
    plain = qcompile.calibrate(model, [x], recipe="int8", progress=False)
    others = [{name: channels for name in plain.decisions} for channels in ((0, 5), (1, 2))]
    plans = [plain, *(split(plain, outliers) for outliers in others)]
    expected = [reference(model, x, plan) for plan in plans]
    for _ in range(2):
        for plan, y in zip(plans, expected, strict=True):
            torch._dynamo.reset()
            assert_same(torch.compile(model, backend="qcompile", options={"plan": plan})(x), y)


@graphs_only
@pytest.mark.parametrize("family", variants((*DECODERS, "bert"), quick=()))
def test_families(family: str) -> None:
    model, ids = build(family), tokens(2, 8)
    plan = plan_of(model, ids)
    fast = torch.compile(model, backend="qcompile", options={"plan": plan})
    y, expected = next(iter(fast(ids).values())), next(iter(model(ids).values()))
    assert float((y - expected).norm() / expected.norm()) < 0.1
    report = qcompile.report(fast)
    assert {s.outliers for s in report.sites if s.weight} == {2}
    plain = torch.compile(model, backend="qcompile", options={"recipe": "int8"})
    plain(ids)
    # two columns of float32 for every weight, and nothing else
    added = sum(2 * 4 * s.shape[0] for s in report.sites if s.weight)
    assert report.bytes_after - qcompile.report(plain).bytes_after == added


@graphs_only
def test_a_saved_plan_splits_alike(tmp_path: Path) -> None:
    model, x = Stack().eval(), torch.randn(3, 32)
    plan = plan_of(model, x, "int8-static")
    qcompile.save(plan, tmp_path / "plan")
    again = qcompile.load(tmp_path / "plan", model)
    y = torch.compile(model, backend="qcompile", options={"plan": plan})(x)
    torch._dynamo.reset()
    assert torch.equal(torch.compile(model, backend="qcompile", options={"plan": again})(x), y)
