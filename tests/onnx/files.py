"""Small ONNX files, sound or broken on purpose."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

FLOAT, INT8, UINT8 = TensorProto.FLOAT, TensorProto.INT8, TensorProto.UINT8
WEIGHT = np.arange(16, dtype=np.float32).reshape(4, 4) / 8


def matmul(**changes: Any) -> onnx.NodeProto:
    return helper.make_node(**{"op_type": "MatMul", "inputs": ["x", "w"], "outputs": ["y"], "name": "mm", **changes})


def weight(name: str = "w", values: np.ndarray = WEIGHT) -> onnx.TensorProto:
    return numpy_helper.from_array(values, name)


def model(
    nodes: Sequence[onnx.NodeProto] | None = None,
    initializers: Sequence[onnx.TensorProto] | None = None,
    *,
    opset: int = 21,
    ir_version: int = 10,
    **more: Any,
) -> onnx.ModelProto:
    """y = x [B, 4] @ w [4, 4], or what `nodes` and `initializers` say."""
    graph = helper.make_graph(
        list(nodes or [matmul()]),
        "g",
        [helper.make_tensor_value_info("x", FLOAT, ["B", 4])],
        [helper.make_tensor_value_info("y", FLOAT, ["B", None])],
        [weight()] if initializers is None else list(initializers),
    )
    imports = [helper.make_opsetid("", opset)]
    return helper.make_model(graph, **{"opset_imports": imports, "ir_version": ir_version, **more})


def external(location: str, *, offset: int = 0, length: int | None = 64, shape: Sequence[int] = (4, 4)) -> TensorProto:
    """The weight, said to lie in a file."""
    tensor = TensorProto(name="w", data_type=FLOAT, dims=shape, data_location=TensorProto.EXTERNAL)
    for key, value in (("location", location), ("offset", offset), ("length", length)):
        if value is not None:
            tensor.external_data.add(key=key, value=str(value))
    return tensor


def save(proto: onnx.ModelProto, path: Path) -> Path:
    path.write_bytes(proto.SerializeToString())
    return path


def snapshot(folder: Path) -> dict[str, bytes]:
    """Everything that a folder holds, by name."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
