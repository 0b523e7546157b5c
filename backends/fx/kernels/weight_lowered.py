"""4-bit floats whose columns are lowered by octaves, under bfloat16: the kernels of `weight_triton` multiply the codes.

x: [..., K] bfloat16; factor bfloat16 [1, K], 2**-octaves of each column; words, scales and levels of the numbers before
that. x is lowered in place of the weight: powers of two are exact in bfloat16, and Inductor multiplies by them where it
makes x.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from qcompile.backends.fx.kernels import fp4, weight_triton
from qcompile.backends.fx.kernels.problem import Kernel, Problem
from qcompile.backends.fx.registry import REGISTRY
from qcompile.backends.triton.width_packs import pack_weight
from qcompile.numerics import QParams, exact_exp2

REGISTRY.define(
    "linear_weight_lowered(Tensor x, Tensor factor, Tensor words, Tensor scales, Tensor? levels, Tensor? bias, int N,"
    " str width, bool minimum, int integers) -> Tensor"
)


def _linear_weight_lowered(x: Tensor, factor: Tensor, *weight: Any) -> Tensor:
    y: Tensor = torch.ops.qcompile.linear_weight(x * factor[0], *weight)
    return y


REGISTRY.impl("linear_weight_lowered", _linear_weight_lowered, "CompositeImplicitAutograd")


def why_not(p: Problem) -> str | None:
    """None if the kernels can run `p`, else the reason."""
    if p.lowered is None:
        return "no columns of the weight are lowered"
    if p.input is not None:
        return "the input is quantized"
    if (bits := p.lowered.narrow.spec.format.bits) > fp4.BITS:
        return f"codes of {bits} bits fill bytes here, as those of the lowered weight do"
    if p.dtype is not torch.bfloat16:
        return f"an input in {str(p.dtype).removeprefix('torch.')} cannot be lowered without loss, as bfloat16 can"
    return weight_triton.why_not(_before(p))


def _before(p: Problem) -> Problem:
    """As if no columns were lowered."""
    return replace(p, weight=fp4.stored(p), lowered=None)


def pack(codes: Tensor, qparams: QParams, dtype: torch.dtype) -> dict[str, Tensor]:
    """What `weight_triton` reads of the numbers before columns were lowered, and the factor."""
    codes, narrow, octaves = fp4.before(codes, qparams)
    assert octaves is not None
    return {**pack_weight(codes, narrow, dtype), "factor": exact_exp2(-octaves).to(dtype)[None]}


def _arguments(p: Problem, x: tuple[Any, ...], packed: Mapping[str, Any], bias: Any) -> tuple[Any, ...]:
    given, *weight = weight_triton.KERNEL.arguments(_before(p), x, packed, bias)
    return (given, packed["factor"], *weight)


KERNEL = Kernel(
    name="weight-lowered",
    why_not=why_not,
    pack=pack,
    op=torch.ops.qcompile.linear_weight_lowered.default,
    arguments=_arguments,
    device="cuda",
    joins=weight_triton.KERNEL.joins,
)
