"""Ops of the canonical form that have an exact standard spelling, written in it for onnxruntime."""

import math
from collections.abc import Callable, Mapping, Sequence

import onnx_ir as ir
from onnx import NodeProto, TensorProto, helper

from qcompile.backends.onnx.ops import DOMAIN, GELU, LINEAR, RMS_NORM, SILU, attribute, standard

_FLOAT = TensorProto.FLOAT


def expanded(node: ir.Node, opset: int) -> Sequence[NodeProto]:
    """Standard nodes that make the same values under the same names; the node itself if it is standard.

    Names of values in between start with that of the result.
    """
    expand = _EXPANSIONS.get(node.op_type) if standard(node.domain) == DOMAIN else None
    return [ir.serde.serialize_node(node)] if expand is None else expand(node, _Names(node), opset)


class _Names:
    """The inputs and the output of a node by name, and new names for what lies between."""

    def __init__(self, node: ir.Node) -> None:
        self.inputs = [None if v is None else v.name for v in node.inputs]
        self.output = str(node.outputs[0].name)

    def between(self, part: str) -> str:
        return f"{self.output}::{part}"


def _linear(node: ir.Node, names: _Names, opset: int) -> list[NodeProto]:
    x, weight, bias = (*names.inputs, None)[:3]
    turned, product = names.between("turned"), names.output if bias is None else names.between("product")
    made = [
        helper.make_node("Transpose", [weight], [turned], perm=[1, 0]),
        helper.make_node("MatMul", [x, turned], [product]),
    ]
    return made if bias is None else [*made, helper.make_node("Add", [product, bias], [names.output])]


def _rms_norm(node: ir.Node, names: _Names, opset: int) -> list[NodeProto]:
    x, weight = names.inputs
    wide, square, mean, safe, root, inverse, normed, epsilon, narrow = map(
        names.between, ("wide", "square", "mean", "safe", "root", "inverse", "normed", "epsilon", "narrow")
    )
    kind = _kind(node)
    # half precision is computed in float32, as torch does
    inner = kind if kind == TensorProto.DOUBLE else _FLOAT
    axes = {"axes": [-1]} if opset < 18 else {}
    read = [square] if opset < 18 else [square, names.between("axes")]
    constants = [_constant(epsilon, inner, [], [attribute(node, "epsilon")])]
    constants += [] if opset < 18 else [_constant(names.between("axes"), TensorProto.INT64, [1], [-1])]
    return [
        *constants,
        helper.make_node("Cast", [x], [wide], to=inner),
        helper.make_node("Mul", [wide, wide], [square]),
        helper.make_node("ReduceMean", read, [mean], keepdims=1, **axes),
        helper.make_node("Add", [mean, epsilon], [safe]),
        helper.make_node("Sqrt", [safe], [root]),
        helper.make_node("Reciprocal", [root], [inverse]),
        helper.make_node("Mul", [wide, inverse], [normed]),
        helper.make_node("Cast", [normed], [narrow], to=kind),
        helper.make_node("Mul", [narrow, weight], [names.output]),
    ]


def _silu(node: ir.Node, names: _Names, opset: int) -> list[NodeProto]:
    gate = names.between("gate")
    return [
        helper.make_node("Sigmoid", names.inputs, [gate]),
        helper.make_node("Mul", [*names.inputs, gate], [names.output]),
    ]


def _gelu(node: ir.Node, names: _Names, opset: int) -> list[NodeProto]:
    form = attribute(node, "approximate", "none")
    if opset >= 20:
        return [helper.make_node("Gelu", names.inputs, [names.output], approximate=form)]
    (x,) = names.inputs
    kind = _kind(node)
    numbers = {"one": 1.0, "half": 0.5, "root": math.sqrt(0.5), "scale": math.sqrt(2 / math.pi), "cubic": 0.044715}
    made = [_constant(names.between(name), kind, [], [number]) for name, number in numbers.items()]

    def op(op_type: str, read: Sequence[str | None], part: str) -> str:
        made.append(helper.make_node(op_type, read, [part]))
        return part

    name = names.between
    if form == "none":
        curve = op("Erf", [op("Mul", [x, name("root")], name("scaled"))], name("curve"))
    else:
        cube = op("Mul", [op("Mul", [x, x], name("square")), x], name("cube"))
        inner = op("Add", [x, op("Mul", [cube, name("cubic")], name("term"))], name("inner"))
        curve = op("Tanh", [op("Mul", [inner, name("scale")], name("scaled"))], name("curve"))
    gate = op("Mul", [op("Add", [curve, name("one")], name("total")), name("half")], name("gate"))
    op("Mul", [x, gate], names.output)
    return made


def _kind(node: ir.Node) -> int:
    x = node.inputs[0]
    return _FLOAT if x is None or x.dtype is None else int(x.dtype)


def _constant(name: str, kind: int, dims: Sequence[int], numbers: Sequence[float]) -> NodeProto:
    return helper.make_node("Constant", [], [name], value=helper.make_tensor(name, kind, dims, numbers))


_EXPANSIONS: Mapping[str, Callable[[ir.Node, _Names, int], list[NodeProto]]] = {
    LINEAR: _linear,
    RMS_NORM: _rms_norm,
    SILU: _silu,
    GELU: _gelu,
}
