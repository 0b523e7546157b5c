"""Quantization of rows together with what comes before it, as one opaque op for a Triton kernel.

Opaque because Inductor reads a row two or three times for the same: once for the norm, once for the scale, once for
the codes.
"""

import torch
from torch import Tensor

from qcompile.backends.fx.registry import REGISTRY
from qcompile.backends.triton.ready import missing
from qcompile.formats import Integer
from qcompile.spec import Spec, parse_spec

REGISTRY.define(
    "quantize_rows(Tensor x, Tensor? second, Tensor? weight, Tensor? bias, str before, float eps, str spec,"
    " int offset, bool keep_total) -> Tensor[]"
)


def _quantize_rows(
    x: Tensor,
    second: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    before: str,
    eps: float,
    spec: str,
    offset: int,
    keep_total: bool,
) -> list[Tensor]:
    """Codes [..., K], scale [..., 1], zero [..., 1] of asymmetric specs, and the sum x + second if it is kept."""
    from qcompile.backends.triton.quantize_rows import quantize_rows

    found = quantize_rows(
        x,
        parse_spec(spec),
        before=before,
        second=second,
        weight=weight,
        bias=bias,
        eps=eps,
        offset=offset,
        keep_total=keep_total,
    )
    return [t for t in (found.codes, found.scale, found.zero, found.total) if t is not None]


def _quantize_rows_meta(
    x: Tensor,
    second: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    before: str,
    eps: float,
    spec: str,
    offset: int,
    keep_total: bool,
) -> list[Tensor]:
    parsed = parse_spec(spec)
    signed = isinstance(parsed.format, Integer) and (parsed.symmetric or offset != 0)
    made = [x.new_empty(x.shape, dtype=torch.int8 if signed else torch.uint8)]
    parameters = 1 if parsed.symmetric else 2
    made += [x.new_empty((*x.shape[:-1], 1), dtype=torch.float32) for _ in range(parameters)]
    return [*made, x.new_empty(x.shape)] if keep_total else made


REGISTRY.impl("quantize_rows", _quantize_rows, "CUDA")
REGISTRY.impl("quantize_rows", _quantize_rows_meta, "Meta")

QUANTIZE_ROWS = torch.ops.qcompile.quantize_rows.default


def why_not(spec: Spec, dtype: torch.dtype, K: int, capability: tuple[int, int]) -> str | None:
    """None if the op is the fastest way known to quantize rows of K elements of `dtype`, else the reason."""
    if (reason := missing("quantize_rows")) is not None:
        return reason
    from qcompile.backends.triton import quantize_rows

    return quantize_rows.why_not(spec, dtype, K, capability)
