"""Running a file with what it says and no more: onnxruntime's kernels may round inputs that no one asked to round."""

from collections.abc import Iterator
from contextlib import contextmanager

import onnx_ir as ir
import onnxruntime as ort

from qcompile.backends.onnx.runtime import session

# of MatMulNBits: inputs stay float32. Source: ContribOperators.md of onnxruntime, accuracy_level
_FLOAT = 1
# it makes MatMulNBits of DequantizeLinear and MatMul too, and rounds inputs by default
_SETTINGS = {"session.qdq_matmulnbits_accuracy_level": str(_FLOAT)}


@contextmanager
def exact_session(model: ir.Model, name: str) -> Iterator[ort.InferenceSession]:
    """A session that computes what a quantized model says, inputs of narrow matmuls in float.  name: see `session`."""
    copy = model.clone()
    for node in copy.graph.all_nodes():
        if node.op_type == "MatMulNBits":
            node.attributes["accuracy_level"] = ir.AttrInt64("accuracy_level", _FLOAT)
    with session(copy, name, settings=_SETTINGS) as running:
        yield running


def rounds_inputs(model: ir.Model) -> bool:
    """Whether onnxruntime's default may round inputs of a matmul that the model does not round."""
    kinds = {node.op_type for node in model.graph.all_nodes()}
    return "MatMulNBits" in kinds or ("DequantizeLinear" in kinds and "QuantizeLinear" not in kinds)


def finds_scales(model: ir.Model) -> bool:
    """Whether inputs get scales as onnxruntime finds them, one a call, whatever a plan says."""
    return any(node.op_type == "DynamicQuantizeLinear" for node in model.graph.all_nodes())
