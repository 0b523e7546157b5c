"""Quantization of rows together with what comes before it, as one opaque op for a Triton kernel.

Opaque because Inductor reads a row two or three times for the same: once for the norm, once for the scale, once for
the codes.
"""

import torch
from torch import Tensor

from qcompile.backends.fx.kernels.narrow_floats import is_narrow
from qcompile.backends.fx.registry import REGISTRY
from qcompile.backends.triton.eight_bit_table import tail_width
from qcompile.backends.triton.pairs import MOST_ROWS
from qcompile.backends.triton.ready import missing
from qcompile.formats import Integer
from qcompile.shifts import raised
from qcompile.spec import Spec, parse_spec

REGISTRY.define(
    "quantize_rows(Tensor x, Tensor? second, Tensor? weight, Tensor? bias, str before, float eps, str spec,"
    " int offset, bool keep_total, Tensor? shift=None, Tensor? keep=None, Tensor? channels=None) -> Tensor[]"
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
    shift: Tensor | None = None,
    keep: Tensor | None = None,
    channels: Tensor | None = None,
) -> list[Tensor]:
    """Codes [..., K], scale [..., 1], zero [..., 1] of asymmetric specs, the sum x + second if it is kept, tail, pairs.

    Without a norm, channels are multiplied with `weight`, [K], at the end.
    Of floats of fewer bits the codes are E4M3, dtype and all, and channels lowered by `shift`, [1, K]; of E4M3 itself
    the pairs are lowered by it, uint8 [2 * MOST_ROWS, K], and only those of a few rows are written (`pairs`). With
    `keep` the codes are of what is made of x times it; the tail [..., tail_width(T)] holds T channels as they were, and
    zeros.
    """
    from qcompile.backends.triton.quantize_rows import quantize_rows

    parsed = parse_spec(spec)
    found = quantize_rows(
        x,
        parsed,
        before=before,
        second=second,
        weight=weight,
        bias=bias,
        shift=shift,
        keep=keep,
        channels=channels,
        eps=eps,
        offset=offset,
        raised=raised(parsed.format) if is_narrow(parsed.format) else 0,
        keep_total=keep_total,
    )
    made = (found.codes, found.scale, found.zero, found.total, found.tail, found.pairs)
    return [t for t in made if t is not None]


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
    shift: Tensor | None = None,
    keep: Tensor | None = None,
    channels: Tensor | None = None,
) -> list[Tensor]:
    parsed = parse_spec(spec)
    signed = isinstance(parsed.format, Integer) and (parsed.symmetric or offset != 0)
    narrow = is_narrow(parsed.format)
    dtype = torch.float8_e4m3fn if narrow else torch.int8 if signed else torch.uint8
    made = [x.new_empty(x.shape, dtype=dtype)]
    parameters = 1 if parsed.symmetric else 2
    made += [x.new_empty((*x.shape[:-1], 1), dtype=torch.float32) for _ in range(parameters)]
    made += [x.new_empty(x.shape)] if keep_total else []
    made += [] if channels is None else [x.new_empty((*x.shape[:-1], tail_width(len(channels))))]
    return made if shift is None or narrow else [*made, x.new_empty((2 * MOST_ROWS, x.shape[-1]), dtype=dtype)]


REGISTRY.impl("quantize_rows", _quantize_rows, "CUDA")
REGISTRY.impl("quantize_rows", _quantize_rows_meta, "Meta")

QUANTIZE_ROWS = torch.ops.qcompile.quantize_rows.default


def why_not(spec: Spec, dtype: torch.dtype, K: int, capability: tuple[int, int]) -> str | None:
    """None if the op is the fastest way known to quantize rows of K elements of `dtype`, else the reason."""
    if (reason := missing("quantize_rows")) is not None:
        return reason
    if spec.format.bits < 8 and not isinstance(spec.format, Integer) and not is_narrow(spec.format):
        return f"{spec} is no float that E4M3 holds"
    from qcompile.backends.triton import quantize_rows

    return quantize_rows.why_not(spec, dtype, K, capability)
