"""The ops of a Q/DQ graph on torch.fx, registered as qcompile::*.

All are composite: eager torch runs the oracle of `qcompile.numerics`, and a compiler that traces them sees plain
torch ops, which it may fuse. Specs cross as text, because an op's schema knows no classes.
"""

import torch
from torch import Tensor

from qcompile.backends.fx.registry import REGISTRY
from qcompile.numerics import QParams, dequantize, find_qparams, quantize
from qcompile.spec import parse_spec


def _quantize(x: Tensor, scale: Tensor, zero: Tensor | None, levels: Tensor | None, spec: str) -> Tensor:
    return quantize(x, QParams(spec=parse_spec(spec), scale=scale, zero=zero, levels=levels))


def _quantize_dynamic(x: Tensor, spec: str) -> list[Tensor]:
    qparams = find_qparams(x, parse_spec(spec))
    return [quantize(x, qparams), qparams.scale, *([] if qparams.zero is None else [qparams.zero])]


def _dequantize(
    codes: Tensor, scale: Tensor, zero: Tensor | None, levels: Tensor | None, spec: str, dtype: torch.dtype
) -> Tensor:
    return dequantize(codes, QParams(spec=parse_spec(spec), scale=scale, zero=zero, levels=levels), dtype)


def _rms_norm(x: Tensor, weight: Tensor | None, eps: float, weight_last: bool, divides: bool = False) -> Tensor:
    """RMSNorm as models write it by hand, in float32; `weight_last`: the cast back comes before the weight.

    divides: by a root, instead of a product with its inverse.
    """
    wide = x.float()
    variance = wide.pow(2).mean(-1, keepdim=True) + eps
    normed = wide / torch.sqrt(variance) if divides else wide * torch.rsqrt(variance)
    if weight is None:
        return normed.to(x.dtype)
    return weight * normed.to(x.dtype) if weight_last else (weight * normed).to(x.dtype)


def _outliers(x: Tensor, threshold: Tensor) -> Tensor:
    """Source: LLM.int8 (Dettmers 2022), section 3.2, with a mask in place of indices, whose number depends on data."""
    reached = (x.abs() >= threshold).reshape(-1, x.shape[-1]).any(0)
    return torch.where(reached, x, torch.zeros((), dtype=x.dtype, device=x.device))


_SCHEMAS = {
    "quantize(Tensor x, Tensor scale, Tensor? zero, Tensor? levels, str spec) -> Tensor": _quantize,
    "quantize_dynamic(Tensor x, str spec) -> Tensor[]": _quantize_dynamic,
    "dequantize(Tensor codes, Tensor scale, Tensor? zero, Tensor? levels, str spec, ScalarType dtype) -> Tensor": (
        _dequantize
    ),
    "rms_norm(Tensor x, Tensor? weight, float eps, bool weight_last, bool divides=False) -> Tensor": _rms_norm,
    "outliers(Tensor x, Tensor threshold) -> Tensor": _outliers,
}

for _schema, _body in _SCHEMAS.items():
    REGISTRY.define(_schema)
    REGISTRY.impl(_schema.split("(")[0], _body, "CompositeImplicitAutograd")

QUANTIZE = torch.ops.qcompile.quantize.default
QUANTIZE_DYNAMIC = torch.ops.qcompile.quantize_dynamic.default
DEQUANTIZE = torch.ops.qcompile.dequantize.default
RMS_NORM = torch.ops.qcompile.rms_norm.default
OUTLIERS = torch.ops.qcompile.outliers.default
