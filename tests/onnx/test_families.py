"""Whole models, exported with dynamic sizes: the sites, edges and results that they have in PyTorch."""

from typing import Any

import pytest
import torch

from qcompile.backends.onnx.door import open_onnx
from qcompile.channels import tied
from qcompile.edges import find_edges
from qcompile.folds import Fold
from qcompile.graph import Graph
from qcompile.passes.fold_smooth import count_multiplications, fold_smooth
from qcompile.sites import find_sites
from tests.families import FAMILIES, build, tokens
from tests.hosts import exported_onnx, open_fx, result
from tests.passes.test_fold_families import EXPECTED, MORE

pytestmark = pytest.mark.slow
# the exporter does not know the ops of their experts
EXPERTS = ("mixtral", "qwen2-moe")
# of the opsets that onnxruntime runs with any batch: at 23 the exporter writes rotary embeddings that it does not
OPSET = 18


def opened(name: str) -> tuple[Any, Graph[Any]]:
    torch.manual_seed(0)
    model = build(name) if name in FAMILIES else MORE[name]().eval()
    model.config.use_cache = False
    for parameter in model.parameters():
        if parameter.dim() == 1:
            # norms as they are trained: the exporter merges equal ones
            torch.nn.init.normal_(parameter, 0.5, 0.3)
    sizes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length")}
    return model, open_onnx(exported_onnx(model, tokens(2, 9), opset=OPSET, dynamic_shapes=(sizes,)))


@pytest.mark.parametrize("name", [n for n in EXPECTED if n not in EXPERTS])
def test_a_family_is_what_it_is_in_pytorch(name: str) -> None:
    model, graph = opened(name)
    ids = tokens(3, 7, seed=5)
    with torch.no_grad():
        expected = model(ids)[0]
    before = result(graph, ids)
    # sums in another order, over a few layers
    assert float((before - expected).abs().max() / expected.abs().max()) < 2e-6
    theirs = {f.site.name: tuple(f.site.weight.shape) for f in find_sites(open_fx(model, tokens(2, 9)))}
    assert {f.site.name: tuple(f.site.weight.shape) for f in find_sites(graph)} == theirs
    edges = find_edges(graph)
    kinds = [0 if e.producer is not None else 1 if e.multiply else 2 for e in edges]
    assert tuple(kinds.count(i) for i in range(3)) == EXPECTED[name]
    folds = [_fold(edge, seed) for seed, edge in enumerate(edges)]
    assert count_multiplications(graph, folds) == kinds.count(1) + kinds.count(2)
    fold_smooth(graph, folds)
    after = result(graph, ids)
    # scales over 2 ** 12 make each product round once more
    assert float((after - before).abs().max() / before.abs().max()) < 1e-5


def _fold(edge: Any, seed: int) -> Fold:
    exponents = 12 * torch.rand(len(edge.channels), generator=torch.Generator().manual_seed(seed)) - 6
    scale = tied(torch.exp2(exponents), edge.channels) if edge.producer is not None else torch.exp2(exponents)
    return Fold(sites=tuple(f.site.name for f in edge.consumers), scale=scale)
