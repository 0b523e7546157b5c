"""The quantized values, kept as floats: a plain float matmul, where nothing faster runs the spec on this device.

It keeps the result of quantization and the speed of the float model; it saves no memory, so it refuses when
memory was asked for.
"""

import torch
from torch import Tensor

from qcompile.backends.fx.kernels.problem import Kernel, Problem
from qcompile.numerics import QParams, dequantize


def why_not(p: Problem) -> str | None:
    """None unless memory matters more than speed."""
    return "free_weights asks for small weights" if p.small else None


def pack(codes: Tensor, qparams: QParams, dtype: torch.dtype) -> dict[str, Tensor]:
    """The dequantized weight [N, K]."""
    return {"weight": dequantize(codes, qparams, dtype)}


KERNEL = Kernel(
    name="dense",
    why_not=why_not,
    pack=pack,
    op=torch.ops.aten.linear.default,
    arguments=lambda p, x, packed, bias: (*x, packed["weight"], bias),
)
