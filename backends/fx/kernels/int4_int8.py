"""W4A8 on Hopper: 4-bit weights under 8-bit inputs, the Triton kernel of `qcompile.backends.triton.int4_int8_linear`.

codes int8 (or uint8, with zero) [..., K], scale and zero float32 [..., 1] or []; words, scales, sums, and row and
totals where scales are integers of a row, as `qcompile.backends.triton.int4_int8_words` packs them. Products of codes
are summed exactly, in int32, group by group, or for many rows of x all of a row of the weight, as int8; M is known to
the opaque op alone.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from qcompile.backends.fx.kernels import int8, weight_triton
from qcompile.backends.fx.kernels.problem import Kernel, Problem
from qcompile.backends.fx.registry import REGISTRY
from qcompile.backends.triton.int4_int8_words import pack_weight
from qcompile.backends.triton.ready import missing
from qcompile.backends.triton.widths import ROWS
from qcompile.formats import Integer
from qcompile.spec import ALL, Zero

REGISTRY.define(
    "int4_int8_mm(Tensor codes, Tensor scale, Tensor? zero, Tensor words, Tensor scales, Tensor sums, Tensor? row,"
    " Tensor? totals, Tensor? bias, ScalarType dtype) -> Tensor"
)
REGISTRY.define(
    "linear_int4_int8(Tensor codes, Tensor scale, Tensor? zero, Tensor words, Tensor scales, Tensor sums,"
    " Tensor? row, Tensor? totals, Tensor? bias, ScalarType dtype) -> Tensor"
)


def _int4_int8_mm(
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    words: Tensor,
    scales: Tensor,
    sums: Tensor,
    row: Tensor | None,
    totals: Tensor | None,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """codes int8 [M, K]; scale and zero [M, 1] or []; y [M, N]."""
    from qcompile.backends.triton.int4_int8_linear import Operands, int4_int8_linear

    pack = {"words": words, "scales": scales, "sums": sums}
    o = Operands(x=codes, scale_x=scale, zero=zero, **pack, row=row, totals=totals, bias=bias)
    return int4_int8_linear(o, dtype)


def _int4_int8_mm_meta(
    codes: Tensor, scale: Tensor, zero: Tensor | None, words: Tensor, scales: Tensor, sums: Tensor, *rest: Any
) -> Tensor:
    return codes.new_empty((codes.shape[0], sums.shape[0]), dtype=rest[-1])


def _linear_int4_int8(
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    words: Tensor,
    scales: Tensor,
    sums: Tensor,
    row: Tensor | None,
    totals: Tensor | None,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    N = sums.shape[0]
    # a kernel that quantizes may have taken the offset off already
    if codes.dtype is torch.uint8:
        codes = (codes.float() - int8.OFFSET).to(torch.int8)
    y = torch.ops.qcompile.int4_int8_mm(
        codes.reshape(-1, codes.shape[-1]),
        _by_rows(scale),
        None if zero is None else _by_rows(zero),
        words,
        scales,
        sums,
        row,
        totals,
        None if bias is None else bias.expand(N).contiguous(),
        dtype,
    )
    return y.reshape(*codes.shape[:-1], N)


def _by_rows(scale: Tensor) -> Tensor:
    return scale if scale.dim() < 2 else scale.reshape(-1, 1)


REGISTRY.impl("int4_int8_mm", _int4_int8_mm, "CUDA")
REGISTRY.impl("int4_int8_mm", _int4_int8_mm_meta, "Meta")
REGISTRY.impl("linear_int4_int8", _linear_int4_int8, "CompositeImplicitAutograd")


def why_not(p: Problem) -> str | None:
    """None if the kernel can run `p`, else the reason."""
    if p.input is None:
        return "the input is not quantized"
    if not isinstance(p.input.format, Integer) or p.input.granularity.columns != ALL:
        return f"input {p.input} is not integers with one scale a token or tensor"
    if p.weight.format.name != "int4" or p.weight.zero is Zero.MINIMUM:
        return f"weight {p.weight} is not 4-bit integers, with or without zero points"
    if (reason := weight_triton.unfit(p)) is not None:
        return reason
    if p.capability is None:
        return "it needs a CUDA device"
    if (reason := missing("int4_int8_linear")) is not None:
        return reason
    from qcompile.backends.triton import int4_int8_linear

    return int4_int8_linear.why_not(p.N, p.K, p.capability)


def _arguments(p: Problem, x: tuple[Any, ...], packed: Mapping[str, Any], bias: Any) -> tuple[Any, ...]:
    rows = packed.get("row"), packed.get("totals")
    return (*x, packed["words"], packed["scales"], packed["sums"], *rows, bias, p.dtype)


KERNEL = Kernel(
    name="int4-int8",
    why_not=why_not,
    pack=pack_weight,
    op=torch.ops.qcompile.linear_int4_int8.default,
    arguments=_arguments,
    takes_codes=True,
    device="cuda",
    # packs are whole units of rows
    joins=lambda p: p.N % ROWS == 0,
)
