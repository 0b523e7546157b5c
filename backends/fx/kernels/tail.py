"""The outlier channels of a split linear: y = x @ weight, a product of few channels.

x: [..., n], weight [n, N] in x's dtype. Few channels are written as sums, which Inductor fuses into the epilogue of
the quantized product; a matmul would write y once more, and read it again. More channels are a matmul, whose product
is read in that epilogue.
"""

import torch
from torch import Tensor

from qcompile.backends.fx.kernels.kept import kept
from qcompile.backends.fx.registry import REGISTRY

# Measured on the CPU (Zen 4), M from 1 to 1024: up to here sums are faster, up to 41 channels neither is
MOST_FUSED = 16
# Inductor unrolls reductions of less than 8 (its unroll_reductions_threshold), and fuses only those it unrolls
UNROLLED = 7

REGISTRY.define("linear_tail(Tensor x, Tensor weight) -> Tensor")


def _linear_tail(x: Tensor, weight: Tensor) -> Tensor:
    n = weight.shape[0]
    if n > MOST_FUSED:
        # matmul would be a product of batches, if x has strides
        y = torch.mm(x.reshape(-1, n), weight)
        # else Inductor would make one addmm of it and the sum that reads it, which copies the other summand first
        return kept(y).reshape(*x.shape[:-1], weight.shape[1])
    # else Inductor would gather x, and compute what makes it, anew for every few columns of y
    x = kept(x)
    parts = [
        (x[..., i : i + UNROLLED, None].float() * weight[i : i + UNROLLED].float()).sum(-2)
        for i in range(0, n, UNROLLED)
    ]
    return sum(parts[1:], parts[0]).to(x.dtype)


REGISTRY.impl("linear_tail", _linear_tail, "CompositeImplicitAutograd")

OP = torch.ops.qcompile.linear_tail.default


def pack(weight: Tensor) -> dict[str, Tensor]:
    """The columns [N, n], as rows."""
    return {"weight": weight.t().contiguous()}
