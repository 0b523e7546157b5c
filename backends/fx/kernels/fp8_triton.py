"""W8A8 on fp8 tensor cores with a Triton kernel for few rows, and `torch._scaled_mm` (cuBLASLt) for more.

Operands and packs as for `fp8`, in e4m3, y in bfloat16. M is known to the opaque op alone.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from qcompile.backends.fx.kernels import fp8
from qcompile.backends.fx.kernels.narrow_floats import is_narrow
from qcompile.backends.fx.kernels.problem import Kernel, Problem
from qcompile.backends.fx.registry import REGISTRY
from qcompile.backends.triton.ready import missing

REGISTRY.define("fp8_matmul(Tensor codes, Tensor scale, Tensor weight, Tensor weight_scale) -> Tensor")
REGISTRY.define(
    "linear_fp8_triton(Tensor codes, Tensor scale, Tensor weight, Tensor weight_scale, Tensor? bias, str narrow)"
    " -> Tensor"
)


def _fp8_matmul(codes: Tensor, scale: Tensor, weight: Tensor, weight_scale: Tensor) -> Tensor:
    """codes [M, K] and weight [N, K], the bits of e4m3; scale [M, 1]; y bfloat16 [M, N]."""
    from qcompile.backends.triton.eight_bit import Operands
    from qcompile.backends.triton.fp8_matmul import fp8_matmul

    # codes keep the strides of what was quantized, and rows are read as such
    x, w = codes.contiguous().view(torch.float8_e4m3fn), weight.view(torch.float8_e4m3fn)
    return fp8_matmul(Operands(x=x, w=w, scale_x=scale, scale_w=weight_scale, dtype=torch.bfloat16))


def _fp8_matmul_meta(codes: Tensor, scale: Tensor, weight: Tensor, weight_scale: Tensor) -> Tensor:
    return codes.new_empty((codes.shape[0], weight.shape[0]), dtype=torch.bfloat16)


def _linear_fp8_triton(
    codes: Tensor, scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, narrow: str
) -> Tensor:
    codes, scale = fp8.as_e4m3(codes, scale, narrow)
    row_scale = scale.expand(*codes.shape[:-1], 1).reshape(-1, 1)
    y = torch.ops.qcompile.fp8_matmul(codes.reshape(-1, codes.shape[-1]), row_scale, weight, weight_scale)
    y = y if bias is None else y + bias
    return y.to(torch.bfloat16).reshape(*codes.shape[:-1], weight.shape[0])


REGISTRY.impl("fp8_matmul", _fp8_matmul, "CUDA")
REGISTRY.impl("fp8_matmul", _fp8_matmul_meta, "Meta")
REGISTRY.impl("linear_fp8_triton", _linear_fp8_triton, "CompositeImplicitAutograd")


def why_not(p: Problem) -> str | None:
    """None if the Triton kernel can run `p` for few rows, and cuBLASLt for more; else the reason."""
    reason = fp8.why_not(p)
    if reason is not None:
        return reason
    if p.capability is None:
        return "it needs a CUDA device"
    if p.dtype is not torch.bfloat16:
        return f"scales inside the matmul need bfloat16, y is {str(p.dtype).removeprefix('torch.')}"
    held = [
        spec is not None and (spec.format.name == "fp8_e4m3" or is_narrow(spec.format)) for spec in (p.weight, p.input)
    ]
    if not all(held):
        return f"weight {p.weight} and input {p.input} are not both e4m3"
    if (reason := missing("fp8_matmul")) is not None:
        return reason
    from qcompile.backends.triton import fp8_matmul

    return fp8_matmul.why_not(p.N, p.K, p.capability)


def _arguments(p: Problem, x: tuple[Any, ...], packed: Mapping[str, Any], bias: Any) -> tuple[Any, ...]:
    codes, scale, _ = x
    assert p.input is not None
    return (codes, scale, packed["weight"], packed["scale"], bias, fp8.narrow_name(p.input))


KERNEL = Kernel(
    name="fp8-triton",
    why_not=why_not,
    pack=fp8.pack,
    op=torch.ops.qcompile.linear_fp8_triton.default,
    arguments=_arguments,
    takes_codes=True,
    device="cuda",
    joins=lambda p: True,
)
