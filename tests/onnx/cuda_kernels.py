"""onnxruntime's narrow matmuls on CUDA, computed by the words of their schemas."""

import warnings
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun
from torch import Tensor

from tests.onnx.canonical import to_tensor

E4M3 = ir.DataType.FLOAT8E4M3FN.numpy()
# sign and magnitude; source: OCP microscaling formats 1.0
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)


def spread(scale: Any, block: int, k: int) -> Any:
    return np.repeat(scale.astype(np.float32), block, 1)[:, :k]


def product(x: Any, weight: Any, bias: Any) -> tuple[Any]:
    y = x.astype(np.float64) @ weight.T.astype(np.float64)
    return ((y if bias is None else y + bias.astype(np.float64)).astype(x.dtype),)


class MatMulBlockQuantizedFp8Weight(OpRun):  # type: ignore[misc]
    op_domain = "com.microsoft"

    def _run(self, a: Any, b: Any, b_scale: Any, a_scale: Any = None, bias: Any = None, block_size: int = 128) -> Any:
        n, k = b.shape
        assert b.dtype == E4M3
        assert b_scale.shape == (n, -(-k // block_size))
        if a_scale is not None:
            assert a_scale.shape == ()
            a = ((a.astype(np.float32) / a_scale).clip(-448, 448).astype(E4M3).astype(np.float32) * a_scale).astype(
                a.dtype
            )
        return product(a, b.astype(np.float32) * spread(b_scale, block_size, k), bias)


class MatMulBlockQuantizedFp4Weight(OpRun):  # type: ignore[misc]
    op_domain = "com.microsoft"

    def _run(
        self, a: Any, b: Any, scale: Any, outer: Any, given: Any = None, bias: Any = None, block_size: int = 16
    ) -> Any:
        n, k = b.shape[0], 2 * b.shape[1]
        assert (b.dtype, scale.dtype, outer.shape) == (np.uint8, np.uint8, ())
        assert scale.shape == (n, -(-k // block_size))
        assert given is None
        values = E2M1[np.stack([b & 15, b >> 4], -1).reshape(n, k)]
        return product(a, values * (outer * spread(scale.view(E4M3), block_size, k)), bias)


def run_by_schema(model: ir.Model, x: Tensor) -> Tensor:
    """What a file for CUDA gives, in float64."""
    ops = [MatMulBlockQuantizedFp8Weight, MatMulBlockQuantizedFp4Weight]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        (y,) = ReferenceEvaluator(ir.to_proto(model), new_ops=ops).run(None, {"x": to_tensor(x).numpy()})
    return torch.from_numpy(np.asarray(y).astype(np.float64))
