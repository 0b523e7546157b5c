"""W8A8 on fp8 tensor cores, through `torch._scaled_mm` (cuBLASLt, CUTLASS).

codes: fp8 [..., K], or those of a float of fewer bits that E4M3 holds, named `narrow`; scale float32 [..., 1] or [];
weight uint8 [N, K] (the bits of fp8), weight_scale float32 [N, 1]. A bfloat16 result takes both scales inside the
matmul; others take them after it, in float32, because row-wise scaling returns bfloat16 only.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from qcompile.backends.fx.kernels.narrow_floats import factor, is_narrow, widened
from qcompile.backends.fx.kernels.problem import Kernel, Problem
from qcompile.backends.fx.registry import REGISTRY
from qcompile.formats import Float, Format, parse_format
from qcompile.numerics import QParams
from qcompile.spec import ALL, Spec

# cuBLASLt: leading dimensions of fp8 operands are multiples of 16 bytes
MULTIPLE = 16
FIRST_CAPABILITY = (8, 9)

REGISTRY.define(
    "linear_fp8(Tensor codes, Tensor scale, Tensor weight, Tensor weight_scale, Tensor? bias, ScalarType dtype,"
    " ScalarType input_format, ScalarType weight_format, str narrow) -> Tensor"
)


def _linear_fp8(
    codes: Tensor,
    scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    input_format: torch.dtype,
    weight_format: torch.dtype,
    narrow: str,
) -> Tensor:
    codes, scale = as_e4m3(codes, scale, narrow)
    # codes keep the strides of what was quantized, and cuBLASLt takes rows
    rows = codes.reshape(-1, codes.shape[-1]).contiguous()
    x, w = rows.view(input_format), weight.view(weight_format).t()
    row_scale = scale.expand(*codes.shape[:-1], 1).reshape(-1, 1)
    channel_scale = weight_scale.reshape(1, -1)
    if dtype is not torch.bfloat16:
        one = torch.ones((), device=codes.device)
        y = torch._scaled_mm(x, w, one, one, out_dtype=torch.float32) * (row_scale * channel_scale)
    else:
        y = torch._scaled_mm(x, w, row_scale.contiguous(), channel_scale, out_dtype=dtype, use_fast_accum=True)
    y = y if bias is None else y + bias
    return y.to(dtype).reshape(*codes.shape[:-1], weight.shape[0])


def as_e4m3(codes: Tensor, scale: Tensor, narrow: str) -> tuple[Tensor, Tensor]:
    """Codes and scale of an input in E4M3; as they are if no narrow format is named."""
    if not narrow:
        return codes, scale
    fmt = parse_format(narrow)
    return widened(codes, fmt), scale * factor(fmt)


def narrow_name(spec: Spec) -> str:
    """The name of a spec's format if it has fewer bits than E4M3, which holds it; else empty."""
    return spec.format.name if is_narrow(spec.format) else ""


REGISTRY.impl("linear_fp8", _linear_fp8, "CompositeImplicitAutograd")


def _is_plain_fp8(spec: Spec) -> bool:
    return (
        _fp8_dtype(spec.format) in (torch.float8_e4m3fn, torch.float8_e5m2)
        and spec.granularity.columns == ALL
        and spec.scale == "fp32"
    )


def why_not(p: Problem) -> str | None:
    """None if fp8 tensor cores can run `p`, else the reason."""
    if p.input is None:
        return "the input is not quantized"
    if not (_is_plain_fp8(p.weight) and _is_plain_fp8(p.input)):
        return f"weight {p.weight} and input {p.input} are not both fp8 with one scale a channel and token"
    if _fp8_dtype(p.weight.format) == _fp8_dtype(p.input.format) == torch.float8_e5m2:
        return "cuBLASLt multiplies e5m2 only with e4m3"
    if p.device != "cuda":
        return f"no fp8 matmul that is faster than a float one on device {p.device!r}"
    if p.capability is None or p.capability < FIRST_CAPABILITY:
        return f"fp8 tensor cores begin with sm_89, this is sm_{''.join(map(str, p.capability or ()))}"
    if p.K % MULTIPLE or p.N % MULTIPLE:
        return f"cuBLASLt needs N and K to divide by {MULTIPLE}, got N={p.N}, K={p.K}"
    return None


def pack(codes: Tensor, qparams: QParams, dtype: torch.dtype) -> dict[str, Tensor]:
    """The codes as they are or, of fewer bits, in E4M3; and one scale a channel."""
    scale = qparams.scale.expand(codes.shape[0], 1) if qparams.scale.dim() == 0 else qparams.scale
    codes, scale = as_e4m3(codes, scale, narrow_name(qparams.spec))
    return {"weight": codes.contiguous(), "scale": scale.contiguous()}


def _arguments(p: Problem, x: tuple[Any, ...], packed: Mapping[str, Any], bias: Any) -> tuple[Any, ...]:
    assert p.input is not None
    formats = (_fp8_dtype(p.input.format), _fp8_dtype(p.weight.format))
    codes, scale, _ = x
    return (codes, scale, packed["weight"], packed["scale"], bias, p.dtype, *formats, narrow_name(p.input))


def _fp8_dtype(fmt: Format) -> torch.dtype | None:
    """In which tensor cores take the numbers of a format."""
    if is_narrow(fmt):
        return torch.float8_e4m3fn
    return fmt.dtype if isinstance(fmt, Float) else None


KERNEL = Kernel(
    name="fp8",
    why_not=why_not,
    pack=pack,
    op=torch.ops.qcompile.linear_fp8.default,
    arguments=_arguments,
    takes_codes=True,
    # narrow matmuls leave multiprocessors idle
    joins=lambda p: p.device == "cuda",
)
