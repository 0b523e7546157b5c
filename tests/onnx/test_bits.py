"""What a file quantizes and dequantizes has the same bits in ONNX's reference evaluator and in onnxruntime.

Of `portable` files, test_emit_portable compares whole outputs; here it is what stands around the matmuls of the others.
"""

import onnx_ir as ir
import pytest
import torch
from onnx_ir.passes.common import RemoveUnusedNodesPass

from qcompile.backends.onnx.emit import emit
from qcompile.numerics import find_qparams
from qcompile.spec import ALL, parse_spec
from tests.onnx.canonical import linear_model, run_onnxruntime, run_reference

# the types of what each op makes; codes of a QuantizeLinear for TensorRT are seen through its DequantizeLinear alone
MAKES = {
    "QuantizeLinear": (ir.DataType.UINT8,),
    "DequantizeLinear": (ir.DataType.FLOAT,),
    "DynamicQuantizeLinear": (ir.DataType.UINT8, ir.DataType.FLOAT, ir.DataType.UINT8),
}
SEEN = {"tensorrt": ("DequantizeLinear",), "ort-cpu": ("QuantizeLinear", "DynamicQuantizeLinear")}


@pytest.mark.parametrize("size", [1e-2, 1.0, 1e2])
@pytest.mark.parametrize(("target", "weight", "given"), [
    ("tensorrt", "int8/channel", None), ("tensorrt", "int8/tensor", None), ("tensorrt", "int4/g64", None),
    ("tensorrt", "int4/g128/bf16", None), ("tensorrt", "int8/channel", "int8/tensor"),
    ("tensorrt", "fp8_e4m3/channel", "fp8_e4m3/tensor"), ("ort-cpu", "int8/channel", "int8/tensor"),
    ("ort-cpu", "int8/channel", "int8/tensor/asym"), ("ort-cpu", "int8/channel", "int8/token"),
    ("ort-cpu", "int8/channel", "dynamic"),
])  # fmt: skip
def test_the_reference_and_onnxruntime_agree(target: str, weight: str, given: str | None, size: float) -> None:
    torch.manual_seed(0)
    x = size * torch.randn(5, 128)
    spec = None if given is None else "int8/tensor/asym" if given == "dynamic" else given
    static = spec is not None and given != "dynamic" and parse_spec(spec).granularity.rows == ALL
    qparams = find_qparams(x, parse_spec(spec)) if static and spec is not None else spec
    model = emit(linear_model(weight=weight, given=qparams, shape=("M", 128))[0], target).model
    made = []
    for node in model.graph:
        if node.op_type in SEEN[target]:
            for value, dtype in zip(node.outputs, MAKES[node.op_type], strict=True):
                value.dtype = dtype
                made.append(value)
    assert made
    model.graph.outputs.clear()
    model.graph.outputs.extend(made)
    RemoveUnusedNodesPass()(model)
    for mine, other in zip(run_reference(model, x), run_onnxruntime(model, x, optimize=False), strict=True):
        torch.testing.assert_close(other, mine, rtol=0, atol=0)
