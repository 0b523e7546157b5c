"""Names are those of the PyTorch model, as far as an exporter left any trace of them."""

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import Tensor, nn

from qcompile.backends.onnx.door import open_onnx
from qcompile.graph import Op
from qcompile.sites import find_sites
from tests.fx.nets import NETS, net
from tests.hosts import FX, ONNX, exported_onnx
from tests.onnx.models import K, model, ops_of

W = np.ones((K, K), "f")


def named(body: str, scopes: dict[str, Any], constants: dict[str, str] | None = None) -> Any:
    """A model whose nodes, by their outputs, have these scopes or names, and whose constants go by these names."""
    source = model(body, returns=f"float[B, T, {K}] y", w=W, v=2 * W, b=np.ones(K, "f"))
    for node in source.graph:
        given = scopes.get(str(node.outputs[0].name))
        if isinstance(given, list):
            node.metadata_props["pkg.torch.onnx.name_scopes"] = repr(given)
        elif given is not None:
            node.name = given
    for before, after in (constants or {}).items():
        source.graph.initializers[before].name = after
    return open_onnx(source)


def sites(graph: Any) -> list[tuple[str, str]]:
    return [(graph.name(f.value), graph.name(graph.inputs(f.value)[1])) for f in find_sites(graph)]


@pytest.mark.parametrize(
    ("scope", "weight", "bias", "site", "called"),
    [
        (["", "a", "a.fc", "linear"], "val_3", "a.fc.bias", "a.fc", "a.fc.weight"),
        (["", "a", "a.fc", "linear"], "a.fc.weight", "a.fc.bias", "a.fc", "a.fc.weight"),
        # the module above calls it as a function
        (["", "a", "linear"], "val_3", "a.fc.bias", "a.fc", "a.fc.weight"),
        (["", "a", "linear"], "a.fc.weight", "val_4", "a.fc", "a.fc.weight"),
        (["", "a", "linear"], "val_3", "val_4", "a", "a.weight"),
        # a weight that belongs to another module says nothing
        (["", "head", "linear"], "table.weight", "val_4", "head", "table.weight"),
        (["", "a", "linear"], "a.up_proj", "val_4", "a.up_proj", "a.up_proj"),
        # the TorchScript exporter
        ("/layer.0/dense/MatMul", "onnx::MatMul_7", "layer.0.dense.bias", "layer.0.dense", "layer.0.dense.weight"),
        ("/layer.0/dense/MatMul", "onnx::MatMul_7", "onnx::Add_8", "layer.0.dense", "layer.0.dense.weight"),
        # a file that no torch wrote
        ("MatMul_3", "layer.0.dense.weight", "17", "layer.0.dense", "layer.0.dense.weight"),
        ("MatMul_3", "18", "17", "MatMul_3", "MatMul_3.weight"),
    ],
)
def test_where_a_site_gets_its_name(scope: Any, weight: str, bias: str, site: str, called: str) -> None:
    graph = named("p = MatMul(x, w) y = Add(p, b)", {"p": scope}, {"w": weight, "b": bias})
    assert sites(graph) == [(site, called)]
    assert called in graph.model.graph.initializers


def test_what_a_constant_was_folded_from_is_its_name() -> None:
    source = model("y = MatMul(x, w)", returns=f"float[B, T, {K}] y", w=W)
    source.graph.initializers["w"].metadata_props["pkg.onnxscript.optimizer.folded_from"] = "['a.fc.weight']"
    assert sites(open_onnx(source)) == [("a.fc", "a.fc.weight")]


def test_nameless_weights_get_names_of_their_own() -> None:
    scope = ["", "a", "linear"]
    graph = named("p = MatMul(x, w) q = MatMul(p, v) y = MatMul(q, w)", {"p": scope, "q": scope, "y": scope})
    # one weight that is read twice is one module that runs twice
    assert sites(graph) == [("a", "a.weight"), ("a_2", "a_2.weight"), ("a", "a.weight")]


def test_borrowed_weights_of_one_module_get_names_of_their_own() -> None:
    scope = ["", "a", "linear"]
    weights = {"w": "bank.0.weight", "v": "bank.1.weight"}
    graph = named("p = MatMul(x, w) q = MatMul(p, v) y = MatMul(q, w)", dict.fromkeys("pqy", scope), weights)
    assert sites(graph) == [("a", "bank.0.weight"), ("bank.1", "bank.1.weight"), ("a", "bank.0.weight")]


@pytest.mark.parametrize(
    "scopes", ["not a list", "[]", "[''", "['', '_empty_nn_module_stack_from_metadata_hook', 'x']"]
)
def test_scopes_that_say_nothing(scopes: str) -> None:
    source = model("y = MatMul(x, w)", returns=f"float[B, T, {K}] y", w=W)
    next(iter(source.graph)).metadata_props["pkg.torch.onnx.name_scopes"] = scopes
    assert sites(open_onnx(source)) == [("y", "y.weight")]


@pytest.mark.parametrize("opset", [18, 23])
@pytest.mark.parametrize("name", [n for n in NETS if n != "tied"])
def test_sites_are_called_as_on_the_other_host(name: str, opset: int) -> None:
    built, x = net(name)
    graph = open_onnx(exported_onnx(built, x, opset=opset))
    assert {f.site.name for f in find_sites(graph)} == {f.site.name for f in find_sites(FX.open(built, x))}
    weights = {f.site.name: f.site.weight for f in find_sites(FX.open(built, x))}
    assert all(torch.equal(f.site.weight, weights[f.site.name]) for f in find_sites(graph))


class Head(nn.Module):
    """A head too large for the exporter to fold its transpose, so that it reads the table itself."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(4000, 64)
        self.norm = nn.LayerNorm(64)
        self.lm_head = nn.Linear(64, 4000, bias=False)
        self.lm_head.weight = self.embed_tokens.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.lm_head(self.norm(self.embed_tokens(ids)))


def test_a_tied_head_goes_by_its_module_and_its_weight_by_the_table() -> None:
    ids = torch.tensor([[0, 3, 1]])
    for host in (FX, ONNX):
        graph = host.open(Head(), ids)
        found = {f.site.name: f.site.op for f in find_sites(graph)}
        assert found == {"embed_tokens": Op.EMBEDDING, "lm_head": Op.LINEAR}
        assert "embed_tokens.weight" in {graph.name(v) for v in graph.values()}


def test_equal_norms_that_the_exporter_merged_keep_their_modules() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.fc = nn.LayerNorm(K), nn.LayerNorm(K), nn.Linear(K, K)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.fc(self.first(x)))

    graph = ONNX.open(Two(), torch.randn(2, 3, K))
    norms = ops_of(graph, Op.LAYER_NORM)  # type: ignore[arg-type]
    assert [graph.name(v) for v in norms] == ["first", "second"]
    assert graph.inputs(norms[0])[1] is graph.inputs(norms[1])[1]


def test_names_in_a_file_are_unique() -> None:
    graph = named("p = MatMul(x, w) q = Relu(w) y = MatMul(p, q)", {}, {"w": "a.weight"})
    names = [v.name for v in graph.values()]
    assert len(names) == len(set(names))
    assert ir.to_proto(graph.model) is not None
