"""W8A8 on integer units as one Triton kernel, dequantization, bias and outlier channels included.

Operands and packs as for `int8`, and of a split linear: x_tail [..., n], or wider with zeros up to a multiple of
TAIL_MULTIPLE, and weight_tail [n, N], both in the dtype of y.
M is known to the opaque op alone.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from qcompile.backends.fx.kernels import int8
from qcompile.backends.fx.kernels.problem import Kernel, Problem
from qcompile.backends.fx.registry import REGISTRY
from qcompile.backends.triton.eight_bit_table import TAIL_MULTIPLE
from qcompile.backends.triton.ready import missing

_SCHEMA = (
    "(Tensor codes, Tensor scale, Tensor? zero, Tensor weight, Tensor weight_scale, Tensor weight_sum, Tensor? bias,"
    " Tensor? x_tail, Tensor? weight_tail, ScalarType dtype) -> Tensor"
)
REGISTRY.define(f"int8_matmul{_SCHEMA}")
REGISTRY.define(f"linear_int8_triton{_SCHEMA}")


def _int8_matmul(
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    weight: Tensor,
    weight_scale: Tensor,
    weight_sum: Tensor,
    bias: Tensor | None,
    x_tail: Tensor | None,
    weight_tail: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """codes int8 [M, K]; scale and zero [M, 1] or []; y [M, N]."""
    from qcompile.backends.triton.eight_bit import Operands
    from qcompile.backends.triton.int8_matmul import int8_matmul

    operands = Operands(
        x=codes,
        w=weight,
        scale_x=scale,
        scale_w=weight_scale,
        dtype=dtype,
        zero=zero,
        sum_w=weight_sum,
        bias=bias,
        x_tail=x_tail,
        w_tail=weight_tail,
    )
    return int8_matmul(operands)


def _int8_matmul_meta(codes: Tensor, scale: Tensor, zero: Tensor | None, weight: Tensor, *rest: Any) -> Tensor:
    return codes.new_empty((codes.shape[0], weight.shape[0]), dtype=rest[-1])


def _linear_int8_triton(
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    weight: Tensor,
    weight_scale: Tensor,
    weight_sum: Tensor,
    bias: Tensor | None,
    x_tail: Tensor | None,
    weight_tail: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    # a kernel that quantizes may have taken the offset off already
    if codes.dtype is torch.uint8:
        codes = (codes.float() - int8.OFFSET).to(torch.int8)
    bias = None if bias is None else bias.expand(weight.shape[0]).contiguous()
    if x_tail is not None:
        # a pad by nothing would be a copy
        if missing_columns := -x_tail.shape[-1] % TAIL_MULTIPLE:
            x_tail = torch.nn.functional.pad(x_tail, (0, missing_columns))
        x_tail = x_tail.reshape(-1, x_tail.shape[-1])
    y = torch.ops.qcompile.int8_matmul(
        codes.reshape(-1, codes.shape[-1]),
        _by_rows(scale),
        None if zero is None else _by_rows(zero),
        weight,
        weight_scale,
        weight_sum,
        bias,
        x_tail,
        weight_tail,
        dtype,
    )
    return y.reshape(*codes.shape[:-1], weight.shape[0])


def _by_rows(scale: Tensor) -> Tensor:
    return scale if scale.dim() < 2 else scale.reshape(-1, 1)


REGISTRY.impl("int8_matmul", _int8_matmul, "CUDA")
REGISTRY.impl("int8_matmul", _int8_matmul_meta, "Meta")
REGISTRY.impl("linear_int8_triton", _linear_int8_triton, "CompositeImplicitAutograd")


def why_not(p: Problem) -> str | None:
    """None if the Triton kernel can run `p` and is the fastest, else the reason."""
    reason = int8.why_not(p)
    if reason is not None:
        return reason
    if p.capability is None:
        return "it needs a CUDA device"
    if (reason := missing("int8_matmul")) is not None:
        return reason
    from qcompile.backends.triton import int8_matmul

    return int8_matmul.why_not(p.N, p.K, p.capability)


def _arguments(p: Problem, x: tuple[Any, ...], packed: Mapping[str, Any], bias: Any) -> tuple[Any, ...]:
    return (*x, packed["weight"], packed["scale"], packed["sum"], bias, None, None, p.dtype)


def _with_tail(p: Problem, arguments: tuple[Any, ...], x: Any, weight: Any) -> tuple[Any, ...] | None:
    # no tensor core multiplies float32 as it is
    if p.dtype.itemsize != 2:
        return None
    *linear, _, _, dtype = arguments
    return (*linear, x, weight, dtype)


KERNEL = Kernel(
    name="int8-triton",
    why_not=why_not,
    pack=int8.pack,
    op=torch.ops.qcompile.linear_int8_triton.default,
    arguments=_arguments,
    takes_codes=True,
    device="cuda",
    # one matmul for q, k and v takes little longer than that for q: narrow ones leave multiprocessors idle
    joins=lambda p: True,
    with_tail=_with_tail,
)
