"""Narrow weights alone on the CPU for bfloat16 models: torch's packed kernels for a few tokens, a float matmul above.

A decoder reads every weight for each token: with few tokens, 8 or 4 bits a weight are read faster than 16. With many,
the float matmul is faster, so its weight is kept beside the codes, and M decides at each call. x: [..., K] bfloat16.
Floats whose numbers are whole multiples of the smallest, up to 127, are integers to them.
Source of the layouts: torch's `_weight_int8pack_mm` and `_weight_int4pack_mm_for_cpu`.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from qcompile.backends.fx.kernels.lifted import INT8_MAX, largest, whole_weight
from qcompile.backends.fx.kernels.problem import Kernel, Problem
from qcompile.backends.fx.registry import REGISTRY
from qcompile.formats import Integer
from qcompile.numerics import QParams, dequantize
from qcompile.spec import ALL, Zero

# most rows of x for which the packed kernels beat the float matmul: measured on Sapphire Rapids, 2 threads
MOST_ROWS = 4
# what torch's 4-bit kernel takes
GROUPS = (32, 64, 128, 256)
INT4_MULTIPLE = 16

REGISTRY.define("narrow_int8(Tensor x, Tensor codes, Tensor scale, Tensor dense) -> Tensor")
REGISTRY.define("narrow_int4(Tensor x, Tensor codes, Tensor scale_zero, Tensor dense, int group) -> Tensor")
REGISTRY.define("linear_narrow(Tensor x, Tensor codes, Tensor scale, Tensor dense, Tensor? bias, int group) -> Tensor")


def _narrow_int8(x: Tensor, codes: Tensor, scale: Tensor, dense: Tensor) -> Tensor:
    if 0 < x.shape[0] <= MOST_ROWS:
        return torch._weight_int8pack_mm(x, codes, scale)
    return torch.nn.functional.linear(x, dense)


def _narrow_int4(x: Tensor, codes: Tensor, scale_zero: Tensor, dense: Tensor, group: int) -> Tensor:
    if 0 < x.shape[0] <= MOST_ROWS:
        return torch.ops.aten._weight_int4pack_mm_for_cpu(x, codes, group, scale_zero)
    return torch.nn.functional.linear(x, dense)


def _linear_narrow(x: Tensor, codes: Tensor, scale: Tensor, dense: Tensor, bias: Tensor | None, group: int) -> Tensor:
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    if group == ALL:
        y = torch.ops.qcompile.narrow_int8(rows, codes, scale, dense)
    else:
        y = torch.ops.qcompile.narrow_int4(rows, codes, scale, dense, group)
    y = y.reshape(*x.shape[:-1], dense.shape[0])
    return y if bias is None else y + bias


REGISTRY.impl("narrow_int8", _narrow_int8, "CPU")
REGISTRY.impl("narrow_int4", _narrow_int4, "CPU")
REGISTRY.impl("narrow_int8", lambda x, codes, scale, dense: x.new_empty(x.shape[0], dense.shape[0]), "Meta")
REGISTRY.impl("narrow_int4", lambda x, codes, scale, dense, group: x.new_empty(x.shape[0], dense.shape[0]), "Meta")
REGISTRY.impl("linear_narrow", _linear_narrow, "CompositeImplicitAutograd")


def why_not(p: Problem) -> str | None:
    """None if torch has a packed kernel for `p` and both its weights may be kept, else the reason."""
    if p.device != "cpu":
        return "torch's packed kernels for weights are for the CPU"
    if p.input is not None:
        return "the input is quantized"
    if p.dtype is not torch.bfloat16:
        return f"torch's packed kernels are slower than its matmul in {str(p.dtype).removeprefix('torch.')}"
    if p.small:
        return "free_weights asks for small weights, and this keeps floats beside the codes"
    fmt, granularity = p.weight.format, p.weight.granularity
    top = largest(fmt)
    if top is None or granularity.rows != 1:
        return f"weight {p.weight} is not integers, or multiples of one number, by channel or group"
    if top <= INT8_MAX and granularity.columns == ALL and p.weight.symmetric:
        return None
    four = isinstance(fmt, Integer) and fmt.bits == 4 and not p.weight.symmetric
    if four and granularity.columns in GROUPS and p.N % INT4_MULTIPLE == 0:
        return None
    return (
        f"torch packs symmetric channels of up to 8 bits, and int4 asymmetric in groups with N a multiple of "
        f"{INT4_MULTIPLE}"
    )


def pack(codes: Tensor, qparams: QParams, dtype: torch.dtype) -> dict[str, Tensor]:
    """Codes and scales in torch's layout, and the dequantized weight."""
    dense = dequantize(codes, qparams, dtype)
    if qparams.zero is None:
        numbers, scale = whole_weight(codes, qparams)
        return {"codes": numbers, "scale": scale.squeeze(-1).to(dtype), "dense": dense}
    # w = (code - 8) * scale + zero in torch's kernel, so its zero is a float: what code 8 stands for
    zero = qparams.zero if qparams.spec.zero is Zero.MINIMUM else -qparams.zero * qparams.scale
    scale_zero = torch.stack([qparams.scale, 8 * qparams.scale + zero], dim=-1).transpose(0, 1)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.to(torch.int32).contiguous(), 1)
    return {"codes": packed, "scale": scale_zero.to(dtype).contiguous(), "dense": dense}


def _arguments(p: Problem, x: tuple[Any, ...], packed: Mapping[str, Any], bias: Any) -> tuple[Any, ...]:
    return (*x, packed["codes"], packed["scale"], packed["dense"], bias, p.weight.granularity.columns)


KERNEL = Kernel(
    name="narrow",
    why_not=why_not,
    pack=pack,
    op=torch.ops.qcompile.linear_narrow.default,
    arguments=_arguments,
)
