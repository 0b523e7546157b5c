"""Channels are followed through ops that move elements as onnxruntime moves them, over axes of any size."""

import math
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch

from qcompile.backends.onnx.door import open_onnx
from qcompile.backends.onnx.sizes import sizes, sizes_of_reshape
from qcompile.channels import numbered
from qcompile.graph import Op
from tests.onnx.models import model

B, T, K = 2, 3, 12
NUMBERS: dict[str, Any] = {
    "zero": np.array([0]),
    "one": np.array([1]),
    "two": np.array([2]),
    "last": np.array([-1]),
    "far": np.array([2**62]),
    "back": np.array([-(2**62)]),
    "first": np.array(0),
    "heads": np.array([0, 0, 4, 3]),
    "flat": np.array([-1, 12]),
    "some": np.array([11, 3, -2]),
    "table": np.array([[0, 1], [5, 0]]),
    "slices": np.array([[11], [-2]]),
    "batches": np.array([[[1], [0]]]),
    "thirds": np.array([5, 4, 3]),
    "grown": np.array([4, 1, 1, 12]),
    "twice": np.array([1, 2, 3]),
    "axes": np.array([1, 3]),
}
HEADS = "h = Reshape(x, heads) "
SIZES = "s = Shape(x) b = Gather(s, first) u = Unsqueeze(b, zero) "

MOVES = {
    "identity": "y = Identity(x)",
    "cast": "c = Cast<to = 10>(x) y = Cast<to = 1>(c)",
    "reshape": "y = Reshape(x, heads)",
    "reshape, the rest": "y = Reshape(x, flat)",
    "heads": HEADS + "y = Transpose<perm = [0, 2, 1, 3]>(h)",
    "heads and back": HEADS
    + "t = Transpose<perm = [0, 2, 1, 3]>(h) v = Transpose<perm = [0, 2, 1, 3]>(t) s = Shape(x) y = Reshape(v, s)",
    "heads in batches": HEADS
    + "t = Transpose<perm = [0, 2, 1, 3]>(h) s = Shape(x) q = Slice(s, one, two) m = Concat<axis = 0>(last, q, d) "
    "v = Reshape(t, m) w = Concat<axis = 0>(last, four, q, d) y = Reshape(v, w)",
    "a computed shape": SIZES + "m = Concat<axis = 0>(u, last, twelve) y = Reshape(x, m)",
    "sizes multiplied": "s = Shape(x) a = Slice(s, zero, two) p = ReduceProd<keepdims = 1>(a, zero) "
    "m = Concat<axis = 0>(p, last) y = Reshape(x, m)",
    "all turned": "y = Transpose(x)",
    "flatten": "y = Flatten<axis = 2>(x)",
    "unsqueeze": "y = Unsqueeze(x, axes)",
    "unsqueeze and squeeze": "u = Unsqueeze(x, axes) y = Squeeze(u, axes)",
    "slice of channels": "y = Slice(x, one, last, two)",
    "slice with steps": "y = Slice(x, one, far, two, two)",
    "slice backwards": "y = Slice(x, last, back, two, last)",
    "slice of tokens": "y = Slice(x, zero, two, one)",
    "split": "a, y, c = Split<axis = -1>(x, thirds)",
    "split evenly": "a, y = Split<axis = 2, num_outputs = 2>(x)",
    "split unevenly": "c = Slice(x, zero, last, two) a, y = Split<axis = 2, num_outputs = 2>(c)",
    "gather": "y = Gather<axis = 2>(x, some)",
    "gather by a table": "y = Gather<axis = -1>(x, table)",
    "gather one": "y = Gather<axis = 2>(x, first)",
    "gather a token": "y = Gather<axis = 1>(x, first)",
    "gather slices": "t = Transpose<perm = [2, 0, 1]>(x) y = GatherND(t, slices)",
    "gather batches": "y = GatherND(x, batches)",
    "expand": "y = Expand(x, grown)",
    "tile": "y = Tile(x, twice)",
}


def opened(body: str, returns: str, sizes: str = "B, T, 12", opset: int = 21) -> Any:
    numbers = NUMBERS | {"four": np.array([4]), "twelve": np.array([12]), "d": np.array([3])}
    return open_onnx(model(body, inputs=f"float[{sizes}] x", returns=returns, opset=opset, **numbers))


@pytest.mark.parametrize("sizes", ["B, T, 12", "2, 3, 12"], ids=["dynamic", "fixed"])
@pytest.mark.parametrize("name", MOVES)
def test_moves_are_those_of_onnxruntime(name: str, sizes: str) -> None:
    graph = opened(MOVES[name], "float[] y", sizes)
    (y,) = graph.outputs()
    way = [y]
    while graph.op(way[0]) is not Op.INPUT:
        way.insert(0, graph.inputs(way[0])[0])
    carried: Any = numbered(3, K)
    for value in way[1:]:
        carried = graph.moved(value, carried)
        assert carried is not None, (value.name, graph.label(value))
    found = graph.run([numbered(3, K).expand(B, T, K).float()], [])[0]
    assert carried.dim() == found.dim()
    # along an axis on which they change, dynamic or not, they are as many as there are: a batch is so in no model
    assert torch.equal(found, carried[: found.shape[0]].expand(found.shape).float())


@pytest.mark.parametrize(
    "body",
    [
        "y = Relu(x)",
        "c = Cast<to = 7>(x) y = Cast<to = 1>(c)",
        "y = Concat<axis = -1>(x, x)",
        "s = Shape(x) y = ConstantOfShape(s)",
        "i = Cast<to = 7>(x) y = Slice(x, i, i)",
        "y = Slice(x, two, two, two)",
        "y = Pad(x, some)",
    ],
    ids=["another op", "to integers", "joined", "looks", "unknown", "empty", "padded"],
)
def test_what_does_more_than_to_move_is_not_followed(body: str) -> None:
    graph = opened(body, "float[] y")
    (y,) = graph.outputs()
    carried: Any = numbered(3, K)
    way = [y]
    while graph.op(way[0]) is not Op.INPUT:
        way.insert(0, graph.inputs(way[0])[0])
    for value in way[1:]:
        carried = None if carried is None else graph.moved(value, carried)
    assert carried is None


def test_sizes_that_torch_writes_as_products_are_products() -> None:
    graph = opened("y = Reshape(x, flat)", "float[M, 12] y")
    (y,) = graph.outputs()
    y.shape = ir.Shape(["T*B", 12])
    assert sizes(y) == sizes_of_reshape(y.producer())
    assert sizes(y)[0] == math.prod(sizes(graph.inputs(y)[0])[:2])
    # what cannot be computed is a size of its own
    graph = opened("y = Slice(x, zero, two, one)", "float[B, M, 12] y")
    graph.outputs()[0].shape = ir.Shape(["B", "Min(2, T)", 12])
    assert len(set(sizes(graph.outputs()[0]))) == 3


def test_a_shape_is_looked_at_alone() -> None:
    graph = opened("s = Shape(x) y = Cast<to = 1>(s)", "float[3] y")
    shape = graph.users(graph.model.graph.inputs[0])[0]
    assert graph.moved(shape, numbered(3, K)).numel() == 0


def test_channels_among_tokens_are_no_channels_of_the_last_axis() -> None:
    graph = opened("t = Transpose<perm = [0, 2, 1]>(x) s = Shape(x) y = Reshape(t, s)", "float[] y")
    (y,) = graph.outputs()
    carried = graph.moved(y, graph.moved(graph.inputs(y)[0], numbered(3, K)))
    assert carried is None or carried.shape[-2] > 1


def test_slices_and_splits_of_old_opsets() -> None:
    graph = opened("y = Slice<axes = [2], starts = [2], ends = [7]>(x)", "float[] y", opset=9)
    assert graph.moved(graph.outputs()[0], numbered(3, K)).flatten().tolist() == [2, 3, 4, 5, 6]
    graph = opened("a, y = Split<axis = 2, split = [5, 7]>(x)", "float[] y", opset=11)
    assert graph.moved(graph.outputs()[0], numbered(3, K)).flatten().tolist() == [5, 6, 7, 8, 9, 10, 11]


def test_numbers_of_another_shape_are_refused() -> None:
    graph = opened("y = Identity(x) z = Transpose(y)", "float[] z")
    (z,) = graph.outputs()
    assert graph.moved(z, numbered(2, K)) is None
    assert graph.moved(z, numbered(3, K + 1)) is None
