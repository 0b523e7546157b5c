"""Small ONNX models from their text form, and what onnxruntime makes of them."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import torch
from torch import Tensor

from qcompile.backends.onnx.graph import OnnxGraph
from qcompile.backends.onnx.runtime import keep_sums_exact
from qcompile.graph import Op

K, N = 6, 4


def model(body: str, *, returns: str = "float[B, T, N] y", opset: int = 21, inputs: str = "", **constants: Any) -> Any:
    """An ir.Model of that body, which reads x: float[B, T, 6] or what `inputs` says, and these constants."""
    read = inputs or f"float[B, T, {K}] x"
    found = ir.from_onnx_text(f'<ir_version: 10, opset_import: ["" : {opset}]> g ({read}) => ({returns}) {{ {body} }}')
    for name, value in constants.items():
        array = value.numpy() if isinstance(value, Tensor) else np.asarray(value)
        held = ir.tensor(array, name=name)
        qualified = name.replace("__", ".")
        for node in found.graph.all_nodes():
            for index, v in enumerate(node.inputs):
                if v is not None and v.name == name:
                    node.replace_input_with(index, _initializer(found.graph, qualified, held))
    return found


def _initializer(graph: ir.Graph, name: str, held: Any) -> ir.Value:
    if name not in graph.initializers:
        value = ir.Value(name=name, shape=ir.Shape(held.shape), type=ir.TensorType(held.dtype), const_value=held)
        graph.register_initializer(value)
    return graph.initializers[name]


def by_onnxruntime(source: ir.Model, *args: Tensor) -> list[Tensor]:
    """What the model gives as it came."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    keep_sums_exact(options)
    session = ort.InferenceSession(ir.to_proto(source).SerializeToString(), options, ["CPUExecutionProvider"])
    feeds = {i.name: a.numpy() for i, a in zip(session.get_inputs(), args, strict=True)}
    return [torch.from_numpy(found) for found in session.run(None, feeds)]


def ops_of(graph: OnnxGraph, op: Op) -> list[ir.Value]:
    return [value for value in graph.values() if graph.op(value) is op]


def all_results(graph: OnnxGraph, *args: Tensor) -> Sequence[Tensor]:
    found = graph.run(args, [])[0]
    return found if isinstance(found, tuple) else (found,)
