"""How ONNX spells what the lens tells apart: one line for each op, and the attributes that decide."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir

from qcompile.graph import Op

# ops of the canonical form that standard ONNX does not have; nothing of this domain is left in a written file
DOMAIN, VERSION = "qcompile", 1
LINEAR, RMS_NORM, GELU, SILU = "Linear", "RMSNorm", "Gelu", "Silu"
QUANTIZE, QUANTIZE_DYNAMIC, DEQUANTIZE, OUTLIERS = "Quantize", "QuantizeDynamic", "Dequantize", "Outliers"
MODULE_PATH = "qcompile.module_path"
# of those that do not say theirs; source: BatchNormalization, ONNX operators
BATCH_NORM_EPSILON = 1e-5


@dataclass(frozen=True, kw_only=True)
class Spelling:
    """An op type: its kind, and which inputs of the node are those that `Op` states."""

    op: Op
    operands: tuple[int, ...]


def _ours(op: Op, count: int) -> Spelling:
    return Spelling(op=op, operands=tuple(range(count)))


SPELLINGS: dict[tuple[str, str], Spelling] = {
    (DOMAIN, LINEAR): _ours(Op.LINEAR, 3),
    (DOMAIN, RMS_NORM): _ours(Op.RMS_NORM, 2),
    (DOMAIN, GELU): _ours(Op.GELU, 1),
    (DOMAIN, SILU): _ours(Op.SILU, 1),
    (DOMAIN, QUANTIZE): _ours(Op.QUANTIZE, 1),
    (DOMAIN, QUANTIZE_DYNAMIC): _ours(Op.QUANTIZE, 1),
    (DOMAIN, DEQUANTIZE): _ours(Op.DEQUANTIZE, 1),
    (DOMAIN, OUTLIERS): _ours(Op.OUTLIERS, 2),
    ("", "MatMul"): _ours(Op.MATMUL, 2),
    ("", "Conv"): _ours(Op.CONV, 3),
    ("", "LayerNormalization"): _ours(Op.LAYER_NORM, 3),
    ("", "BatchNormalization"): _ours(Op.BATCH_NORM, 5),
    ("", "Add"): _ours(Op.ADD, 2),
    ("", "Mul"): _ours(Op.MUL, 2),
    ("", "Gelu"): _ours(Op.GELU, 1),
    ("", "Relu"): _ours(Op.RELU, 1),
    ("", "LeakyRelu"): _ours(Op.LEAKY_RELU, 1),
    ("", "PRelu"): _ours(Op.LEAKY_RELU, 2),
    ("", "Softmax"): _ours(Op.SOFTMAX, 1),
    ("", "Attention"): _ours(Op.ATTENTION, 3),
    ("", "Reshape"): _ours(Op.RESHAPE, 1),
    ("", "Flatten"): _ours(Op.RESHAPE, 1),
    ("", "Squeeze"): _ours(Op.RESHAPE, 1),
    ("", "Unsqueeze"): _ours(Op.RESHAPE, 1),
    ("", "Identity"): _ours(Op.RESHAPE, 1),
    ("", "Transpose"): _ours(Op.TRANSPOSE, 1),
}
# a Gather is one or the other, or neither
EMBEDDING = Spelling(op=Op.EMBEDDING, operands=(1, 0))
SELECT = Spelling(op=Op.SELECT, operands=(0, 1))

# constants are seen through these, and vectors through those too
VIEWS = ("Transpose", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Identity")
VECTOR_OPS = ("Cast", "Add", "Mul")


def attribute(node: ir.Node, name: str, default: Any = None) -> Any:
    """Value of an attribute."""
    found = node.attributes.get(name)
    return default if found is None else found.value


def is_op(node: ir.Node | None, *types: str, domain: str = "") -> bool:
    """True for a node of one of these op types."""
    return node is not None and node.op_type in types and standard(node.domain) == domain


def standard(domain: str) -> str:
    """The standard domain has two names."""
    return "" if domain == "ai.onnx" else domain


def spelling(value: ir.Value) -> Spelling | None:
    """How the op that makes `value` is spelled; None if it is of no kind that the lens knows."""
    node = value.producer()
    if node is None or not _is_only_output(node, value):
        return None
    if is_op(node, "Gather"):
        return _gather(node)
    found = SPELLINGS.get((standard(node.domain), node.op_type))
    return found if found is not None and _IS_MEANT.get(found.op, _always)(node) else None


def _is_only_output(node: ir.Node, value: ir.Value) -> bool:
    if is_op(node, QUANTIZE_DYNAMIC, domain=DOMAIN):
        return value.index() == 0
    return value.index() == 0 and not any(v.uses() or v.is_graph_output() for v in node.outputs[1:])


def _gather(node: ir.Node) -> Spelling | None:
    data, indices = node.inputs[:2]
    axis = attribute(node, "axis", 0)
    if data is None or indices is None or data.shape is None:
        return None
    rank = len(data.shape)
    if _is_weight(data):
        return EMBEDDING if axis in (0, -rank) and rank == 2 else None
    is_list = indices.is_initializer() and indices.shape is not None and len(indices.shape) == 1
    return SELECT if is_list and axis in (-1, rank - 1) else None


def _is_weight(value: ir.Value) -> bool:
    """True for a constant, and for one that is quantized."""
    while (node := value.producer()) is not None and is_op(node, DEQUANTIZE, QUANTIZE, domain=DOMAIN):
        read = node.inputs[0]
        assert read is not None
        value = read
    return value.is_initializer()


def _always(node: ir.Node) -> bool:
    return True


def _is_over_last(node: ir.Node) -> bool:
    x = node.inputs[0]
    last = -1 if x is None or x.shape is None else len(x.shape) - 1
    return standard(node.domain) == DOMAIN or attribute(node, "axis", -1) in (-1, last)


def _is_inference(node: ir.Node) -> bool:
    return attribute(node, "training_mode", 0) == 0


def _mixes_heads_alone(node: ir.Node) -> bool:
    """No cache is read; tokens of each head are mixed, and heads lie where the lens looks for them."""
    q = node.inputs[0]
    if any(v is not None for v in node.inputs[4:6]) or q is None or q.shape is None:
        return False
    return len(q.shape) == 4 or attribute(node, "q_num_heads") == attribute(node, "kv_num_heads")


_IS_MEANT: Mapping[Op, Any] = {
    Op.LAYER_NORM: _is_over_last,
    Op.BATCH_NORM: _is_inference,
    Op.ATTENTION: _mixes_heads_alone,
}
