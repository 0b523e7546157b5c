"""Older operators in their newer forms, before anything of a model is made canonical."""

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass
from onnxscript.version_converter import ConvertVersionPass

from qcompile.backends.onnx.writer import BASE_OPSET
from qcompile.errors import UnsupportedError


def raised(model: ir.Model) -> ir.Model:
    """The model at the opset that emitters write, or a later one; the model itself stays as it is.

    Raises UnsupportedError if it cannot be brought there.
    """
    opset = model.opset_imports.get("", 0)
    if not 0 < opset < BASE_OPSET:
        return model
    copy = model.clone()
    # onnx's own converter knows what changed before opset 18
    ConvertVersionPass(BASE_OPSET, fallback=True)(copy)
    RemoveUnusedNodesPass()(copy)
    if copy.opset_imports.get("", 0) < BASE_OPSET:
        raise UnsupportedError(
            f"the model has opset {opset} and could not be brought to {BASE_OPSET}; export it with opset {BASE_OPSET}"
        )
    return copy
