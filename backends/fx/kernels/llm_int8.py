"""W8A8 on integer units, with the channels that hold outliers in this very input multiplied in float (LLM.int8).

    reached[k] = any |x[..., k]| >= threshold
    y = int8(x without reached) @ int8(weight).T, as `int8` has it + x[..., reached] @ dequantized(weight)[:, reached].T

x: [..., K] floating, threshold []; packs as for `int8`. Which channels they are depends on data, their number too:
only the op that adds their product sees it, so every shape outside of it is known.
Source: LLM.int8 (Dettmers 2022), section 3.2; the weight of the outliers is dequantized, as in bitsandbytes' inference.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from qcompile.backends.fx.kernels import int8, int8_triton
from qcompile.backends.fx.kernels.problem import Kernel, Problem
from qcompile.backends.fx.registry import REGISTRY

REGISTRY.define(
    "add_outliers_(Tensor(a!) y, Tensor x, Tensor reached, Tensor weight, Tensor weight_scale) -> ()",
    # how many channels there are decides how much is computed, which no CUDA graph can replay
    tags=(torch.Tag.cudagraph_unsafe,),
)
REGISTRY.define(
    "linear_llm_int8(Tensor x, Tensor threshold, Tensor weight, Tensor weight_scale, Tensor weight_sum, Tensor? bias,"
    " str spec, ScalarType dtype, bool triton=False) -> Tensor"
)


def _add_outliers(y: Tensor, x: Tensor, reached: Tensor, weight: Tensor, weight_scale: Tensor) -> None:
    """y float32 [M, N] += x[:, reached] @ (weight * weight_scale)[:, reached].T; x [M, K], reached bool [K]."""
    channels = reached.nonzero().squeeze(-1)
    if channels.numel() == 0:
        return
    columns = weight.index_select(1, channels).float() * weight_scale
    y.addmm_(x.index_select(1, channels).float(), columns.t())


def _linear_llm_int8(
    x: Tensor,
    threshold: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    weight_sum: Tensor,
    bias: Tensor | None,
    spec: str,
    dtype: torch.dtype,
    triton: bool = False,
) -> Tensor:
    rows = x.reshape(-1, x.shape[-1])
    reached = (rows.abs() >= threshold).any(0)
    # a product, so that NaN and Inf reach y through the row's scale too
    codes, scale, *zero = torch.ops.qcompile.quantize_dynamic(rows * reached.logical_not(), spec)
    given = (codes, scale, zero[0] if zero else None, weight, weight_scale, weight_sum, bias)
    if triton:
        y = torch.ops.qcompile.linear_int8_triton(*given, None, None, torch.float32)
    else:
        y = torch.ops.qcompile.linear_int8(*given, torch.float32)
    torch.ops.qcompile.add_outliers_(y, rows, reached, weight, weight_scale)
    return y.to(dtype).reshape(*x.shape[:-1], weight.shape[0])


REGISTRY.impl("add_outliers_", _add_outliers, "CPU")
REGISTRY.impl("add_outliers_", _add_outliers, "CUDA")
REGISTRY.impl("add_outliers_", lambda y, x, reached, weight, weight_scale: None, "Meta")
REGISTRY.impl("linear_llm_int8", _linear_llm_int8, "CompositeImplicitAutograd")


def _arguments(p: Problem, x: tuple[Any, ...], packed: Mapping[str, Any], bias: Any) -> tuple[Any, ...]:
    fused = p.device == "cuda" and int8_triton.why_not(p) is None
    return (*x, packed["weight"], packed["scale"], packed["sum"], bias, str(p.input), p.dtype, fused)


# x: (x, threshold)
KERNEL = Kernel(
    name="llm-int8",
    why_not=int8.why_not,
    pack=int8.pack,
    op=torch.ops.qcompile.linear_llm_int8.default,
    arguments=_arguments,
)
