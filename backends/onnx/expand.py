"""Nodes as onnxruntime runs them: ops of the canonical form in standard ones, bfloat16 computed in float32."""

import math
from collections.abc import Callable, Mapping, Sequence

import onnx_ir as ir
import torch
from onnx import NodeProto, TensorProto, helper

from qcompile.backends.onnx.ops import DOMAIN, GELU, LINEAR, RMS_NORM, SILU, attribute, is_op, standard
from qcompile.backends.onnx.values import constant, is_constant

_FLOAT = TensorProto.FLOAT


# onnxruntime runs these on bfloat16; of all else on the CPU it has no kernel
_TAKE_BFLOAT16 = ("Cast", "Shape", "Size", "Identity", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Gather")


def runnable(node: ir.Node, opset: int) -> Sequence[NodeProto]:
    """Standard nodes that onnxruntime's CPU has kernels for, and that make the same values under the same names.

    Names of values in between start with that of the result. An op on bfloat16 is computed in float32, and its
    results are rounded once.
    """
    made = _standard(node, opset)
    narrow = [v for v in (*node.inputs, *node.outputs) if v is not None and v.dtype is ir.DataType.BFLOAT16]
    if not narrow or is_op(node, *_TAKE_BFLOAT16) or any(a.g.node for p in made for a in p.attribute):
        return made
    wide = {str(v.name): f"{node.outputs[0].name}::{v.name}::float32" for v in narrow}
    for proto in made:
        for names in (proto.input, proto.output):
            names[:] = [wide.get(name, name) for name in names]
    read = dict.fromkeys(str(v.name) for v in node.inputs if v in narrow)
    written = [str(v.name) for v in node.outputs if v in narrow]
    return [
        *(helper.make_node("Cast", [name], [wide[name]], to=_FLOAT) for name in read),
        *made,
        *(helper.make_node("Cast", [wide[name]], [name], to=TensorProto.BFLOAT16) for name in written),
    ]


def _standard(node: ir.Node, opset: int) -> Sequence[NodeProto]:
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
    turned, product = turned_name(node), names.output if bias is None else names.between("product")
    made = [helper.make_node("MatMul", [x, turned or names.between("turned")], [product])]
    if turned is None:
        made.insert(0, helper.make_node("Transpose", [weight], [names.between("turned")], perm=[1, 0]))
    return made if bias is None else [*made, helper.make_node("Add", [product, bias], [names.output])]


def turned_name(linear: ir.Node) -> str | None:
    """What a linear's weight is called as [K, N], if it lies in memory like that: then nothing is copied to turn it."""
    weight = linear.inputs[1] if is_op(linear, LINEAR, domain=DOMAIN) else None
    held = constant(weight) if weight is not None and is_constant(weight) else None
    lies_turned = held is not None and not held.is_contiguous() and held.t().is_contiguous()
    is_wide = held is not None and held.dtype is not torch.bfloat16
    return f"{weight.name}::turned" if weight is not None and lies_turned and is_wide else None


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
    return _FLOAT if x is None or x.dtype in (None, ir.DataType.BFLOAT16) else int(x.dtype or _FLOAT)


def _constant(name: str, kind: int, dims: Sequence[int], numbers: Sequence[float]) -> NodeProto:
    return helper.make_node("Constant", [], [name], value=helper.make_tensor(name, kind, dims, numbers))


_EXPANSIONS: Mapping[str, Callable[[ir.Node, _Names, int], list[NodeProto]]] = {
    LINEAR: _linear,
    RMS_NORM: _rms_norm,
    SILU: _silu,
    GELU: _gelu,
}
