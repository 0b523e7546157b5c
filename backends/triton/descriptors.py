"""Matrices as kernels of Gluon see them through Hopper's copy engine."""

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

GLUON_TYPES = {
    torch.int8: gl.int8,
    torch.float8_e4m3fn: gl.float8e4nv,
    torch.int32: gl.int32,
    torch.bfloat16: gl.bfloat16,
    torch.float16: gl.float16,
    torch.float32: gl.float32,
}


def described(matrix: Tensor, block: list[int]) -> TensorDescriptor:
    """A matrix that is copied block by block, swizzled as its dtype and the block's width ask for."""
    layout = gl.NVMMASharedLayout.get_default_for(block, GLUON_TYPES[matrix.dtype])
    return TensorDescriptor.from_tensor(matrix, block, layout)
