"""One compiled frame serves many sets of weights: layers that share it, and weights that change."""

import gc
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import qcompile
from qcompile.graph import Op
from qcompile.recipe import Recipe, Rule
from qcompile.spec import parse_spec
from tests.families import build, tokens

LAYERS = 11  # more than Dynamo's recompile limit of 8

pytestmark = pytest.mark.usefixtures("graphs_only")


class Layer(nn.Module):
    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, 2 * width)
        self.fc2 = nn.Linear(2 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc2(torch.relu(self.fc1(self.norm(x))))


class Stack(nn.Module):
    """Layers with a graph break between them, if asked."""

    def __init__(self, layers: int = LAYERS, *, breaks: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(layers))
        self.breaks = breaks

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
            if self.breaks:
                torch._dynamo.graph_break()
        return x


def reference(model: nn.Module, x: Tensor, **options: object) -> Tensor:
    """The Q/DQ graph of the whole model, without breaks, in eager torch."""
    torch._dynamo.reset()
    breaks, model.breaks = model.breaks, False
    y = torch.compile(model, backend="qcompile", fullgraph=True, options={"lower": False, **options})(x)
    model.breaks = breaks
    torch._dynamo.reset()
    return y


def assert_same(y: Tensor, expected: Tensor) -> None:
    # float32 rounding almost everywhere; a value on the edge between two codes may move its row by a step
    assert float((y - expected).abs().median()) < 1e-6
    assert float((y - expected).norm() / expected.norm()) < 1e-2


def test_layers_compiled_one_by_one_share_code_and_not_weights() -> None:
    model, x = Stack().eval(), torch.randn(3, 5, 32)
    expected = reference(model, x)
    for layer in model.layers:
        layer.compile(backend="qcompile")
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert_same(model(x), expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] - before == 1
    assert_same(model(x), expected)
    names = {site.name for site in qcompile.report(model).sites if site.weight}
    assert names == {f"layers.{i}.fc{n}" for i in range(LAYERS) for n in (1, 2)}


def test_graph_breaks_between_layers() -> None:
    model, x = Stack(breaks=True).eval(), torch.randn(3, 5, 32)
    expected = reference(model, x)
    fast = torch.compile(model, backend="qcompile")
    assert_same(fast(x), expected)
    assert_same(fast(x), expected)


def test_a_plan_that_differs_from_layer_to_layer() -> None:
    model, x = Stack().eval(), torch.randn(4, 32)
    rules = (
        Rule(match="layers.3.*"),
        Rule(match="layers.5.fc1", weight=parse_spec("int4/channel")),
        Rule(weight=parse_spec("int8/channel"), input=parse_spec("int8/token")),
    )
    plan = qcompile.calibrate(model, [x], recipe=Recipe(name="mixed", rules=rules), progress=False)
    expected = reference(model, x, plan=plan)
    for layer in model.layers:
        layer.compile(backend="qcompile", options={"plan": plan})
    for _ in range(2):
        assert_same(model(x), expected)
    weights = {site.name: site.weight for site in qcompile.report(model).sites}
    assert weights["layers.5.fc1"] == "int4/channel"
    assert weights["layers.3.fc1"] is None
    assert weights["layers.4.fc1"] == "int8/channel"


def _replace(model: nn.Module) -> None:
    model.layers[1].fc1.weight = nn.Parameter(torch.randn_like(model.layers[1].fc1.weight))


def _write(model: nn.Module) -> None:
    model.layers[0].fc2.weight.mul_(-3)


def _load(model: nn.Module) -> None:
    model.load_state_dict(Stack(2).state_dict())


def _assign(model: nn.Module) -> None:
    model.load_state_dict(Stack(2).state_dict(), assign=True)


def _set_data(model: nn.Module) -> None:
    model.layers[1].fc2.weight.data = torch.randn_like(model.layers[1].fc2.weight)


@pytest.mark.parametrize("change", [_replace, _write, _load, _assign, _set_data])
def test_changed_weights_are_packed_again(change: object) -> None:
    model, x = Stack(2).eval(), torch.randn(3, 32)
    fast = torch.compile(model, backend="qcompile")
    old = fast(x)
    change(model)
    new = fast(x)
    assert not torch.allclose(old, new, atol=1e-2)
    assert_same(new, reference(model, x))


def test_a_moved_model_is_packed_again() -> None:
    model, x = Stack(2).eval(), torch.randn(3, 32)
    fast = torch.compile(model, backend="qcompile")
    fast(x)
    model.double()
    assert fast(x.double()).dtype is torch.float64
    torch.testing.assert_close(fast(x.double()), model(x.double()), atol=0.3, rtol=0)


def test_packs_die_with_their_weights() -> None:
    model, x = Stack(2).eval(), torch.randn(3, 32)
    fast = torch.compile(model, backend="qcompile")
    fast(x)
    sizes = {(64, 32), (32, 64)}

    def packs() -> int:
        gc.collect()
        return sum(type(o) is Tensor and o.dtype is torch.int8 and tuple(o.shape) in sizes for o in gc.get_objects())

    assert packs() == 4
    for _ in range(3):
        model.layers[0].fc1.weight = nn.Parameter(torch.randn(64, 32))
        fast(x)
    assert packs() == 4


def test_two_recipes_on_one_model_have_their_own_reports() -> None:
    model = build("llama")
    first = torch.compile(model, backend="qcompile", options={"recipe": "int8"})
    second = torch.compile(model, backend="qcompile", options={"recipe": "int8-weight"})
    first(tokens(2, 8))
    second(tokens(2, 8))
    assert qcompile.report(second).recipe == "int8-weight"
    assert qcompile.report(first).recipe == "int8"


def test_a_calibrated_plan_is_the_same_after_saving(tmp_path: Path) -> None:
    model, ids = build("llama"), tokens(2, 8)
    plan = qcompile.calibrate(model, [{"input_ids": tokens(4, 16)}], recipe="int8-static", progress=False)
    qcompile.save(plan, tmp_path / "plan")
    again = qcompile.load(tmp_path / "plan", model)
    y = torch.compile(model, backend="qcompile", options={"plan": plan})(ids).logits
    torch._dynamo.reset()
    assert torch.equal(torch.compile(model, backend="qcompile", options={"plan": again})(ids).logits, y)
    torch._dynamo.reset()
    slow = torch.compile(model, backend="qcompile", options={"plan": again, "lower": False})(ids).logits
    assert float((y - slow).abs().median() / slow.abs().mean()) < 1e-5


def test_equal_plans_serve_models_that_share_their_code() -> None:
    batch = [{"input_ids": tokens(4, 16)}]
    first, second = build("llama"), build("llama")
    plans = [qcompile.calibrate(model, batch, recipe="int8-static", progress=False) for model in (first, second)]
    assert plans[0] == plans[1]
    ids = tokens(2, 8)
    found = [
        torch.compile(model, backend="qcompile", options={"plan": plan})(ids).logits
        for model, plan in zip((first, second), plans, strict=True)
    ]
    assert torch.equal(*found)
    assert all(site.kernel for site in qcompile.report(second).sites if site.weight is not None)


def test_plan_of_another_model_is_refused() -> None:
    plan = qcompile.calibrate(build("gpt2"), [tokens(1, 8)], recipe="int8", progress=False)
    with pytest.raises(Exception, match=r"(?s)PlanError.*bound to another model"):
        torch.compile(build("llama"), backend="qcompile", options={"plan": plan})(tokens(1, 8))


def test_unbound_plan_of_another_model_is_refused(tmp_path: Path) -> None:
    class Net(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.fc = nn.Linear(8, width)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x)

    plan = qcompile.calibrate(Net(4), [torch.randn(3, 8)], recipe="int8", progress=False)
    qcompile.save(plan, tmp_path / "plan")
    unbound = qcompile.load(tmp_path / "plan")
    with pytest.raises(Exception, match=r"(?s)PlanError.*'fc' is \[5, 8\] here and \[4, 8\] in the plan"):
        torch.compile(Net(5), backend="qcompile", options={"plan": unbound})(torch.randn(3, 8))
    other = nn.Sequential(nn.Linear(8, 4))
    with pytest.raises(Exception, match=r"(?s)PlanError.*knows none of this graph's sites.*another model"):
        torch.compile(other, backend="qcompile", options={"plan": unbound})(torch.randn(3, 8))


class Both(nn.Module):
    """One square matrix, read both ways by modules of different names."""

    def __init__(self) -> None:
        super().__init__()
        self.encode, self.decode = nn.Linear(32, 32, bias=False), nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.encode(x)) @ self.encode.weight


def test_one_weight_in_two_orientations_has_two_packs() -> None:
    model, x = Both().eval(), torch.randn(4, 32)
    fast = torch.compile(model, backend="qcompile", options={"recipe": "int8"})
    assert float((fast(x) - model(x)).norm() / model(x).norm()) < 0.03


def test_the_reference_follows_changed_weights_too() -> None:
    model, x = Stack(2).eval(), torch.randn(3, 32)
    slow = torch.compile(model, backend="qcompile", options={"lower": False})
    slow(x)
    _write(model)
    assert float((slow(x) - model(x)).norm() / model(x).norm()) < 0.03


def test_quantized_embeddings_with_a_tied_head() -> None:
    model, rules = build("llama"), (Rule(match="*", ops=(Op.LINEAR, Op.EMBEDDING), weight=parse_spec("int8/channel")),)
    options = {"recipe": Recipe(name="all", rules=rules), "free_weights": True}
    fast = torch.compile(model, backend="qcompile", options=options)
    for shape in ((2, 8), (3, 5)):
        y = fast(tokens(*shape)).logits
        assert float((y - build("llama")(tokens(*shape)).logits).norm() / y.norm()) < 0.05
    assert {s.name: s.kernel for s in qcompile.report(fast).sites}["model.embed_tokens"] == "embedding"


def test_a_weight_kept_as_a_buffer_is_quantized_and_reported() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("matrix", torch.randn(16, 32))

        def forward(self, x: Tensor) -> Tensor:
            return torch.nn.functional.linear(x, self.matrix)

    model, seen = Net(), []
    y = torch.compile(model, backend="qcompile", options={"report": seen.append})(torch.ones(2, 32))
    assert y.shape == (2, 16)
    assert [(s.name, s.weight) for s in seen[0].sites] == [("matrix", "int8/channel")]


def test_reports_of_functions_and_of_models_without_sites() -> None:
    model = nn.LayerNorm(8)
    fast = torch.compile(model, backend="qcompile")
    fast(torch.randn(2, 8))
    assert qcompile.report(fast).sites == ()
    run = torch.compile(lambda x: model(x), backend="qcompile")
    run(torch.randn(2, 8))
    with pytest.raises(qcompile.QcompileError, match=r"options=\{'report'"):
        qcompile.report(run)
