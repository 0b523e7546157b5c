"""y[M, N] = the sum of float32 parts [P, M, N], first to last, + bias: what kernels that cut K leave to do."""

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from qcompile.backends.triton.dependent import is_dependent
from qcompile.backends.triton.launch import launch

BLOCK = 512


@triton.jit
def reduce_kernel(
    parts_ptr,
    bias_ptr,
    y_ptr,
    size,
    N,
    stride,
    PARTS: tl.constexpr,
    BIAS: tl.constexpr,
    DEPENDENT: tl.constexpr,
    SIZE: tl.constexpr,
):
    """y = sum of the parts, first to last, + bias.  stride: from a row of y to the next one."""
    if DEPENDENT:
        gdc_wait()
        gdc_launch_dependents()
    i = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    inside = i < size
    acc = tl.load(parts_ptr + i, mask=inside, other=0.0)
    for part in tl.static_range(1, PARTS):
        acc += tl.load(parts_ptr + part * size + i, mask=inside, other=0.0)
    if BIAS:
        acc += tl.load(bias_ptr + i % N, mask=inside, other=0.0).to(tl.float32)
    to = i // N * stride + i % N
    tl.store(y_ptr + to, acc.to(y_ptr.dtype.element_ty), mask=inside)


def add_parts(parts: Tensor, bias: Tensor | None, y: Tensor) -> None:
    """Write the sum of contiguous parts [P, M, N] and bias [N] to y [M, N], columns of which are neighbours."""
    dependent = is_dependent(y.device)
    launch(
        reduce_kernel,
        (triton.cdiv(y.numel(), BLOCK), 1, 1),
        (parts, y if bias is None else bias, y, y.numel(), y.shape[1], y.stride(0)),
        {"PARTS": parts.shape[0], "BIAS": bias is not None, "DEPENDENT": dependent, "SIZE": BLOCK},
        num_warps=4,
        **({"launch_pdl": True} if dependent else {}),
    )
