"""Convolutions in canonical form: a bias that is only zeros is none."""

import onnx_ir as ir

from qcompile.backends.onnx.edit import Editor
from qcompile.backends.onnx.ops import is_op
from qcompile.backends.onnx.values import constant

# the exporter computes the zeros of a missing bias: one number, cast like the input, and expanded to [N]
_SPREAD = ("Expand", "CastLike", "Cast", "Identity")


def drop_zero_biases(edit: Editor) -> int:
    """Remove the biases of convolutions that are zeros spread out from one constant; returns how many."""
    count = 0
    for node in list(edit.graph):
        bias = node.inputs[2] if is_op(node, "Conv") and len(node.inputs) > 2 else None
        if bias is None or not _is_zero(bias):
            continue
        node.resize_inputs(2)
        if (maker := bias.producer()) is not None:
            edit.drop(maker)
        count += 1
    return count


def _is_zero(value: ir.Value) -> bool:
    node = value.producer()
    while node is not None and is_op(node, *_SPREAD):
        source = node.inputs[0]
        assert source is not None
        value, node = source, source.producer()
    held = constant(value)
    return held is not None and held.is_floating_point() and not bool(held.any())
