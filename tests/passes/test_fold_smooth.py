"""A factor that moved changes no result, leaves no op behind where algebra allows, and touches no shared constant."""

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qcompile.channels import tied
from qcompile.edges import find_edges
from qcompile.errors import GraphError
from qcompile.folds import Fold
from qcompile.graph import Graph, Op
from qcompile.passes.fold_smooth import count_multiplications, fold_smooth
from qcompile.sites import find_sites
from tests.blocks import GptBlock, LlamaBlock, PostBlock
from tests.edges import CASES, H, K, Net, attended, built, linear
from tests.fx.capture import dynamo_graph, dynamo_graphs, exported_graph
from tests.hosts import ONNX, Host, exported_onnx, ordered_text

# an exported file holds no writes, and no shapes where they are fixed: there is less that forbids a fold
EXPORTED_AWAY = ("relu in place, shared", "written", "norm, written", "norm, its shape serves another")
# onnxruntime has no kernel for them in float64, the reference of onnx has
NO_KERNEL = ("gelu", "geglu", "leaky relu", "prelu", "both gates are no linear", "from a linear that runs twice")
# scales over 2 ** 12 make each of a few thousand products round once more, by 2 ** -24 or 2 ** -53
WITHIN = {torch.float32: 1e-5, torch.float64: 1e-12}


@cache
def exported_case(name: str, dtype: torch.dtype) -> Any:
    return exported_onnx(*built(name, dtype))


def opened(host: Host, name: str, dtype: torch.dtype = torch.float32) -> Graph[Any]:
    """The graph of a case, which ONNX exports once for all tests."""
    if host is not ONNX:
        return host.open(*built(name, dtype))
    from qcompile.backends.onnx.door import open_onnx

    return open_onnx(exported_case(name, dtype))


def scale(count: int, seed: int, *, whole: bool = False) -> Tensor:
    """Log-uniform in [1/64, 64]; whole: powers of two."""
    exponents = 12 * torch.rand(count, generator=torch.Generator().manual_seed(seed)) - 6
    return torch.exp2(exponents.round() if whole else exponents)


def folds(graph: Graph[Any], *, whole: bool = False) -> list[Fold]:
    """One for each edge, tied where the edge can be folded."""
    found: dict[tuple[str, ...], Fold] = {}
    for seed, edge in enumerate(find_edges(graph)):
        sites = tuple(f.site.name for f in edge.consumers)
        found[sites] = Fold(sites=sites, scale=tied(scale(len(edge.channels), seed, whole=whole), edge.channels))
    return list(found.values())


def outputs(graph: Graph[Any], *args: object) -> tuple[Tensor, ...]:
    # a net may write to its input
    result = graph.run([a.clone() if isinstance(a, Tensor) else a for a in args], [])[0]
    return tuple(t.clone() for t in (result if isinstance(result, tuple | list) else [result]) if isinstance(t, Tensor))


def by_reference(graph: Graph[Any], x: Tensor) -> list[Tensor]:
    from qcompile.backends.onnx.emit import emit
    from tests.onnx.canonical import run_reference

    return run_reference(emit(graph.model, "portable").model, x)


def assert_same(after: Sequence[Tensor], before: Sequence[Tensor], within: float) -> None:
    for a, b in zip(after, before, strict=True):
        assert float((a - b).abs().max()) <= within * float(b.abs().max())


def ops(graph: Graph[Any]) -> int:
    return sum(graph.op(value) is not Op.CONSTANT for value in graph.values())


def constants(graph: Graph[Any]) -> dict[str, Tensor]:
    """By the names that the constants had before they were folded."""
    found = {graph.name(v): graph.constant(v) for v in graph.values() if graph.op(v) is Op.CONSTANT}
    return {name.partition(".folded_")[0]: tensor for name, tensor in found.items()}


@pytest.mark.parametrize("name", CASES)
def test_results_stay_and_legal_folds_leave_no_op(name: str, host: Host) -> None:
    check_legal_folds(name, opened(host, name))


@pytest.mark.parametrize("name", CASES)
def test_results_stay_in_frames_of_dynamo(name: str) -> None:
    check_legal_folds(name, dynamo_graph(*built(name)))


def check_legal_folds(name: str, graph: Graph[Any]) -> None:
    x = built(name)[1]
    before, count, sites = outputs(graph, x), ops(graph), [f.site.name for f in find_sites(graph)]
    legal = [f for f in folds(graph) if f.sites[0] in CASES[name].folds]
    assert count_multiplications(graph, legal) == 0
    assert fold_smooth(graph, legal) >= len(legal)
    graph.prune()
    assert ops(graph) <= count
    assert_same(outputs(graph, x), before, WITHIN[torch.float32])
    assert [f.site.name for f in find_sites(graph)] == sites


@pytest.mark.parametrize("name", CASES)
def test_powers_of_two_change_no_bit_even_where_a_multiplication_is_left(host: Host, name: str) -> None:
    x = built(name)[1]
    graph = opened(host, name)
    before, count = outputs(graph, x), ops(graph)
    every = folds(graph, whole=True)
    expected = count_multiplications(graph, every)
    if host is not ONNX or name not in EXPORTED_AWAY:
        assert expected >= len(CASES[name].refused)
    fold_smooth(graph, every)
    assert ops(graph) == count + expected
    assert all(torch.equal(a, b) for a, b in zip(outputs(graph, x), before, strict=True))


# what computes in float32 on the way has other bits to round there
@pytest.mark.parametrize("name", [n for n in CASES if not any(w in n for w in ("casts", "integers", "by hand,"))])
def test_in_float64_everything_agrees(host: Host, name: str) -> None:
    x = built(name, torch.float64)[1]
    graph = opened(host, name, torch.float64)
    run = by_reference if host is ONNX and name in NO_KERNEL else outputs
    before = run(graph, x)
    fold_smooth(graph, folds(graph))
    assert_same(run(graph, x), before, WITHIN[torch.float64])


@pytest.mark.parametrize("name", CASES)
def test_a_fold_and_its_inverse_are_the_identity(host: Host, name: str) -> None:
    graph = opened(host, name)
    legal = [f for f in folds(graph, whole=True) if f.sites[0] in CASES[name].folds]
    before = constants(graph)
    fold_smooth(graph, legal)
    graph.prune()
    fold_smooth(graph, [replace(f, scale=1 / f.scale) for f in legal])
    graph.prune()
    after = constants(graph)
    # a norm without weight has gained one, of ones; one plus weight is one constant now
    if "plus" not in name:
        assert all(torch.equal(after[name], before.get(name, torch.ones(K))) for name in after)


@pytest.mark.parametrize(("block", "left"), [(LlamaBlock, 0), (GptBlock, 1), (PostBlock, 3)])
def test_blocks(host: Host, block: type[nn.Module], left: int, assert_text: Callable[[str, str], None]) -> None:
    torch.manual_seed(0)
    model, x = block(), torch.randn(2, 4, 16)
    for parameter in model.parameters():
        # the exporter makes one constant of norms that are equal
        nn.init.normal_(parameter, 0.3 if parameter.dim() == 1 else 0.0, 0.4)
    graph = host.open(model.requires_grad_(False), x)
    # ONNX has one op that splits, and no list of which parts are got
    name = f"fold_{block.__name__}" + ("_onnx" if host is ONNX and block is GptBlock else "")
    assert_text(f"{name}_before", re.sub(r"folded_\w+", "folded", ordered_text(graph)))
    before, every = outputs(graph, x), folds(graph)
    assert count_multiplications(graph, every) == left
    fold_smooth(graph, every)
    graph.prune()
    assert_text(f"{name}_after", re.sub(r"folded_\w+", "folded", ordered_text(graph)))
    assert_same(outputs(graph, x), before, WITHIN[torch.float32])


def test_weights_round_once_whatever_the_order() -> None:
    torch.manual_seed(0)
    model, x = LlamaBlock().to(torch.bfloat16).eval(), torch.randn(2, 4, 16).to(torch.bfloat16)
    original = {name: p.clone() for name, p in model.named_parameters()}
    found = []
    for turn in (1, -1):
        graph = dynamo_graph(model, x)
        every = folds(graph)
        fold_smooth(graph, every[::turn])
        graph.prune()
        found.append(constants(graph))
    assert all(torch.equal(found[0][name], found[1][name]) for name in original)
    by_site = {f.sites[-1]: f.scale for f in every}
    # heads of queries that share a head of values have equal scales
    rows = by_site["o"].view(2, 2, 4)[:, 0].flatten()
    exact = original["v.weight"].float() * by_site["v"] / rows[:, None]
    assert torch.equal(found[0]["v.weight"], exact.to(torch.bfloat16))
    assert all(torch.equal(p, original[name]) for name, p in model.named_parameters())


def test_bfloat16_loses_no_more_than_it_did() -> None:
    torch.manual_seed(0)
    model, x = LlamaBlock().to(torch.bfloat16).eval(), torch.randn(2, 4, 16).to(torch.bfloat16)
    with torch.no_grad():
        truth = LlamaBlock().double()
        truth.load_state_dict(model.state_dict())
        exact = truth(x.double())
    graph = exported_graph(model, x)
    before = outputs(graph, x)[0]
    fold_smooth(graph, folds(graph))
    after = outputs(graph, x)[0]
    assert after.dtype is torch.bfloat16
    # every weight is rounded a second time, and its rounding is as large as that of an activation
    assert float((after - exact).norm()) < 2 * float((before - exact).norm())


def test_a_scale_that_breaks_a_tie_leaves_one_multiplication(host: Host) -> None:
    torch.manual_seed(0)
    model, x = attended(few=2).build().eval(), torch.randn(2, 5, K)
    graph = host.open(model, x)
    before = outputs(graph, x)
    free = Fold(sites=("o",), scale=scale(K, 3))
    assert count_multiplications(graph, [free]) == 1
    assert fold_smooth(graph, [free]) == 2
    assert_same(outputs(graph, x), before, WITHIN[torch.float32])


def test_a_fold_of_some_readers_multiplies_for_them_alone(host: Host) -> None:
    torch.manual_seed(0)
    parts = {"norm": nn.LayerNorm(K), "a": linear(K, 5), "b": linear(K, 6), "c": linear(K, 7)}
    model = Net(lambda net, x: [f(net.norm(x)) for f in (net.a, net.b, net.c)], **parts)
    y = Net(lambda net, x: [f(y) for y in [net.norm(x)] for f in (net.a, net.b, net.c)], **parts)
    x = torch.randn(2, 5, K)
    # the exporter merges norms that compute the same
    assert len(find_edges(host.open(model, x))) == (1 if host is ONNX else 3)
    graph = host.open(y, x)
    before = outputs(graph, x)
    some = Fold(sites=("a", "c"), scale=scale(K, 3))
    assert count_multiplications(graph, [some]) == 1
    fold_smooth(graph, [some])
    assert_same(outputs(graph, x), before, WITHIN[torch.float32])
    assert torch.equal(constants(graph)["norm.weight"], model.norm.weight)


def test_views_that_serve_the_same_linears_share_the_multiplication() -> None:
    def run(net: Net, x: Tensor) -> object:
        y = net.norm(x)
        flat = y.view(-1, K)
        return y + 1, net.a(flat), net.b(flat.unsqueeze(0)), net.c(flat.unsqueeze(1)[:2])

    torch.manual_seed(0)
    model = Net(run, norm=nn.LayerNorm(K), a=linear(K, 5), b=linear(K, 6), c=linear(K, 7))
    x = torch.randn(2, 5, K)
    graph = dynamo_graph(model, x)
    before = outputs(graph, x)
    every = folds(graph)
    assert [f.sites for f in every] == [("a", "b", "c")]
    assert count_multiplications(graph, every) == 1
    fold_smooth(graph, every)
    assert_same(outputs(graph, x), before, WITHIN[torch.float32])


def test_folds_of_one_activation_leave_one_multiplication(host: Host) -> None:
    model, x = built("norm into a residual")
    graph = host.open(model, x)
    before = outputs(graph, x)
    two = [Fold(sites=("b",), scale=scale(K, seed)) for seed in (1, 2)]
    assert count_multiplications(graph, two) == 1
    fold_smooth(graph, two)
    assert_same(outputs(graph, x), before, WITHIN[torch.float32])


def test_folds_of_different_readers_add_up(host: Host) -> None:
    model, x = built("layer norm")
    graph = host.open(model, x)
    before = outputs(graph, x)
    some = [Fold(sites=sites, scale=scale(K, i)) for i, sites in enumerate((("a",), ("b", "a"), ("b",)))]
    # the second goes into the norm; the others differ
    assert count_multiplications(graph, some) == 2
    fold_smooth(graph, some)
    assert_same(outputs(graph, x), before, WITHIN[torch.float32])
    model, x = built("norm, a view is returned, several")
    graph = host.open(model, x)
    before = outputs(graph, x)
    assert count_multiplications(graph, some) == 2
    fold_smooth(graph, some)
    assert_same(outputs(graph, x), before, WITHIN[torch.float32])


def test_what_shares_a_constant_keeps_its_own(host: Host) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(7, K)
            self.norm = nn.LayerNorm(K)
            self.other = nn.LayerNorm(K)
            self.other.weight = self.norm.weight
            self.head = nn.Linear(K, 7, bias=False)
            self.head.weight = self.table.weight

        def forward(self, ids: Tensor) -> Tensor:
            x = self.table(ids)
            return self.head(self.norm(x + self.other(x)))

    torch.manual_seed(0)
    model, ids = Tied().eval(), torch.arange(6).view(2, 3)
    graph = host.open(model, ids)
    before = outputs(graph, ids)
    every = folds(graph)
    assert [f.sites for f in every] == [("head",)]
    fold_smooth(graph, every)
    graph.prune()
    assert_same(outputs(graph, ids), before, WITHIN[torch.float32])
    text = ordered_text(graph)
    # of several names an exported file keeps the last
    assert len(re.findall(r'"(?:table|head)\.weight', text)) == len(re.findall(r'"(?:norm|other)\.weight', text)) == 2
    (embedding,) = (v for v in graph.values() if graph.op(v) is Op.EMBEDDING)
    assert torch.equal(graph.constant(graph.inputs(embedding)[1]), model.table.weight)
    assert count_multiplications(graph, every) == 0


def test_a_part_of_a_model_folds_what_it_holds(host: Host) -> None:
    torch.manual_seed(0)
    model = Net(lambda net, x: net.a(net.norm(x)), norm=nn.LayerNorm(K), a=linear(K, 5))
    x = torch.randn(2, 5, K)
    graph = host.open(model, x)
    before = outputs(graph, x)
    elsewhere = Fold(sites=("a", "in another part"), scale=scale(K, 1))
    nothing = Fold(sites=("in another part",), scale=scale(99, 1))
    assert count_multiplications(graph, [elsewhere, nothing]) == 0
    assert fold_smooth(graph, [elsewhere, nothing]) == 2
    assert_same(outputs(graph, x), before, WITHIN[torch.float32])


def test_weights_that_are_only_shapes_fold_as_shapes() -> None:
    torch.manual_seed(0)
    model, x = LlamaBlock().eval(), torch.randn(2, 4, 16)
    graphs = [dynamo_graph(model, x, meta=meta) for meta in (False, True)]
    for graph in graphs:
        every = folds(graph)
        assert len(every) == 4
        assert fold_smooth(graph, every) == 9
        graph.prune()
    assert ordered_text(graphs[0]) == ordered_text(graphs[1])
    assert all(t.is_meta for t in graphs[1].constants().values())


def test_a_multiplication_before_weights_that_are_only_shapes_has_values() -> None:
    model, x = built("norm into a residual")
    graph = dynamo_graph(model, x, meta=True)
    fold_smooth(graph, folds(graph))
    (factor,) = (t for name, t in constants(graph).items() if "inverse" in name)
    assert factor.device == x.device
    assert torch.allclose(factor, 1 / folds(exported_graph(model, x))[0].scale)


def test_dynamic_sizes_fold_as_fixed_ones_do() -> None:
    torch.manual_seed(0)
    model, x = LlamaBlock().eval(), torch.randn(2, 4, 16)
    (opened,) = dynamo_graphs(model, x, dynamic=True)
    every = folds(opened.graph)
    assert count_multiplications(opened.graph, every) == 0
    fold_smooth(opened.graph, every)
    with torch.no_grad():
        assert_same(outputs(opened.graph, *opened.inputs), (model(x),), WITHIN[torch.float32])


@pytest.mark.parametrize(
    "bad", [torch.ones(H), torch.zeros(K), -torch.ones(K), torch.full((K,), torch.nan), torch.full((K,), torch.inf)]
)
def test_a_scale_that_does_not_fit_is_refused(bad: Tensor) -> None:
    graph = exported_graph(*built("linears"))
    with pytest.raises(GraphError, match=r"of 'fc1' has a scale .* needs 12 numbers"):
        fold_smooth(graph, [Fold(sites=("fc1",), scale=bad)])


@pytest.mark.parametrize(
    ("name", "site", "value"), [("layer norm", "a", 1e-6), ("relu", "fc1", 1e9), ("relu", "fc1", 1e-9)]
)
def test_an_overflow_is_refused(name: str, site: str, value: float) -> None:
    graph = exported_graph(*built(name, torch.float16))
    (sites,) = (f.sites for f in folds(graph) if site in f.sites)
    with pytest.raises(GraphError, match=r"overflow float16.*clip the scale"):
        fold_smooth(graph, [Fold(sites=sites, scale=torch.full((K,), value))])


def test_no_fold_changes_nothing(host: Host) -> None:
    graph = opened(host, "relu")
    text = ordered_text(graph)
    assert fold_smooth(graph, []) == count_multiplications(graph, []) == 0
    assert ordered_text(graph) == text


def test_a_norm_in_float32_before_linears_in_bfloat16_takes_the_scale() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.fc = nn.LayerNorm(K, elementwise_affine=False), linear(K, 5).to(torch.bfloat16)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.norm(x.float()).to(x.dtype))

    torch.manual_seed(0)
    model, x = Mixed().eval().requires_grad_(False), torch.randn(2, 5, K).to(torch.bfloat16)
    graph = dynamo_graph(model, x)
    before, every = outputs(graph, x), folds(graph, whole=True)
    assert count_multiplications(graph, every) == 0
    assert fold_smooth(graph, every) == 2
    assert constants(graph)["norm.weight"].dtype is torch.float32
    assert torch.equal(outputs(graph, x)[0], before[0])
