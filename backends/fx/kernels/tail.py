"""The outlier channels of a split linear: y = x @ weight, a product of few channels.

x: [..., n], weight [n, N] in x's dtype. Up to MOST_FUSED channels it is written as sums, which Inductor fuses into the
epilogue of the quantized product: a matmul would write y once more and read it again. More channels are a matmul.
"""

import torch
from torch import Tensor

# Measured on the CPU (Zen 4, 2 threads), M from 1 to 1024: 15 channels cost as much as a matmul or less, 41 more
MOST_FUSED = 16
# Inductor unrolls reductions of less than 8 (its unroll_reductions_threshold), and fuses only those it unrolls
UNROLLED = 7

_LIBRARY = torch.library.Library("qcompile", "FRAGMENT")
_LIBRARY.define("linear_tail(Tensor x, Tensor weight) -> Tensor")


def _linear_tail(x: Tensor, weight: Tensor) -> Tensor:
    n = weight.shape[0]
    if n > MOST_FUSED:
        return torch.matmul(x, weight)
    parts = [
        (x[..., i : i + UNROLLED, None].float() * weight[i : i + UNROLLED].float()).sum(-2)
        for i in range(0, n, UNROLLED)
    ]
    return sum(parts[1:], parts[0]).to(x.dtype)


_LIBRARY.impl("linear_tail", _linear_tail, "CompositeImplicitAutograd")

OP = torch.ops.qcompile.linear_tail.default


def pack(weight: Tensor) -> dict[str, Tensor]:
    """The columns [N, n], as rows."""
    return {"weight": weight.t().contiguous()}
