"""Integers, floats and code books of 16 numbers under 16-bit inputs, on NVIDIA GPUs: `width_linear`.

x: [..., K] bfloat16 or float16, as it is or, where no kernel multiplies its codes, of the numbers that they stand for,
as those of MXFP4 and NVFP4; words, scales and levels as `qcompile.backends.triton.widths` packs them. One opaque op
that chooses its kernel by the number of rows at each call, so that no number of rows compiles a graph anew. Weights of
several kinds that multiply one x are one op, too, whose kernels run side by side: mixed bits follow their bits only so.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from qcompile.backends.fx.kernels.problem import Kernel, Problem, Several
from qcompile.backends.fx.registry import REGISTRY
from qcompile.backends.triton.ready import missing
from qcompile.backends.triton.width_packs import kind_of, no_groups, pack_weight
from qcompile.backends.triton.widths import LEVELS, ROWS, Packed
from qcompile.formats import CodeBook, Float, Integer
from qcompile.numerics import QParams, decode
from qcompile.spec import ALL, SCALES, Spec

FIRST_CAPABILITY = (8, 0)
# elsewhere a float matmul of the dequantized weight may be faster, and takes more memory
MEASURED = (9, 0)
# copies of 16 bytes
MULTIPLE = 8

_ARGUMENTS = (
    "Tensor x, Tensor words, Tensor scales, Tensor? levels, Tensor? bias, int N, str width, bool minimum, int integers"
)
REGISTRY.define(f"weight_mm({_ARGUMENTS}) -> Tensor")
REGISTRY.define(f"linear_weight({_ARGUMENTS}) -> Tensor")
_SEVERAL = (
    "Tensor x, Tensor[] words, Tensor[] scales, Tensor?[] levels, int[] N, str[] width, bool[] minimum, int[] integers"
)
REGISTRY.define(f"weights_mm({_SEVERAL}) -> Tensor")
REGISTRY.define(f"linear_weights({_SEVERAL}) -> Tensor")


def _weight_mm(
    x: Tensor,
    words: Tensor,
    scales: Tensor,
    levels: Tensor | None,
    bias: Tensor | None,
    N: int,
    width: str,
    minimum: bool,
    integers: int,
) -> Tensor:
    from qcompile.backends.triton.width_linear import width_linear

    weight = Packed(words=words, scales=scales, levels=levels, width=width, minimum=minimum, integers=integers)
    return width_linear(x, weight, bias, N)


def _linear_weight(
    x: Tensor,
    words: Tensor,
    scales: Tensor,
    levels: Tensor | None,
    bias: Tensor | None,
    N: int,
    width: str,
    minimum: bool,
    integers: int,
) -> Tensor:
    bias = None if bias is None else bias.expand(N).contiguous()
    rows = x.reshape(-1, x.shape[-1])
    y = torch.ops.qcompile.weight_mm(rows, words, scales, levels, bias, N, width, minimum, integers)
    return y.reshape(*x.shape[:-1], N)


def _weights_mm(
    x: Tensor,
    words: Sequence[Tensor],
    scales: Sequence[Tensor],
    levels: Sequence[Tensor | None],
    N: Sequence[int],
    width: Sequence[str],
    minimum: Sequence[bool],
    integers: Sequence[int],
) -> Tensor:
    from qcompile.backends.triton.width_linear import width_linears

    weights = [
        Packed(words=w, scales=s, levels=table, width=name, minimum=has_minimum, integers=groups)
        for w, s, table, name, has_minimum, groups in zip(words, scales, levels, width, minimum, integers, strict=True)
    ]
    return width_linears(x, weights, N)


def _linear_weights(x: Tensor, words: Any, scales: Any, levels: Any, N: Sequence[int], *kind: Any) -> Tensor:
    y = torch.ops.qcompile.weights_mm(x.reshape(-1, x.shape[-1]), words, scales, levels, N, *kind)
    return y.reshape(*x.shape[:-1], sum(N))


REGISTRY.impl("weight_mm", _weight_mm, "CUDA")
REGISTRY.impl("weight_mm", lambda x, words, scales, levels, bias, N, *kind: x.new_empty(x.shape[0], N), "Meta")
REGISTRY.impl("linear_weight", _linear_weight, "CompositeImplicitAutograd")
REGISTRY.impl("weights_mm", _weights_mm, "CUDA")
REGISTRY.impl("weights_mm", lambda x, words, scales, levels, N, *kind: x.new_empty(x.shape[0], sum(N)), "Meta")
REGISTRY.impl("linear_weights", _linear_weights, "CompositeImplicitAutograd")


def why_not(p: Problem) -> str | None:
    """None if the kernels can run `p`, else the reason."""
    width, minimum, integers = kind_of(read_as(p.weight))
    if width is None:
        return (
            f"weight {p.weight} is not integers, floats of up to 5 bits of exponent and mantissa, or a table of "
            f"{LEVELS} numbers"
        )
    if minimum and p.weight.granularity.columns == ALL:
        return f"weight {p.weight} has minima by channel, and kernels have them by group"
    if (reason := unfit(p, integers) or _beyond_float16(p)) is not None:
        return reason
    if p.device != "cuda":
        return "these kernels are for NVIDIA GPUs"
    if p.capability is None or p.capability < FIRST_CAPABILITY:
        return f"the kernels begin with sm_80, this is sm_{''.join(map(str, p.capability or ()))}"
    if p.K % MULTIPLE:
        return f"K={p.K} is not a multiple of {MULTIPLE}"
    if p.capability != MEASURED and not p.small and not _is_worth(width, p):
        sm = "".join(map(str, p.capability))
        return f"these kernels were measured on sm_90, this is sm_{sm}: `qcompile tune` measures them here"
    return missing("width_linear")


def read_as(spec: Spec) -> Spec:
    """The spec of what packs hold: a float of one bit of exponent, whose numbers are all as far apart, is an integer.

    Only where its mantissa has more bits than a kernel's bytes, and the factor between the two can go into scales.
    """
    equal = isinstance(spec.format, Float) and spec.format.exponent == 1
    if not equal or kind_of(spec)[0] is not None or SCALES[spec.scale].shared:
        return spec
    return replace(spec, format=Integer(bits=spec.format.bits))


def pack(codes: Tensor, qparams: QParams, dtype: torch.dtype) -> dict[str, Tensor]:
    """As `pack_weight`, of what `read_as` says."""
    spec, fmt = read_as(qparams.spec), qparams.spec.format
    if spec == qparams.spec:
        return pack_weight(codes, qparams, dtype)
    assert isinstance(fmt, Float)
    numbers = (decode(codes, fmt) / fmt.step).to(torch.int8)
    return pack_weight(numbers, replace(qparams, spec=spec, scale=qparams.scale * fmt.step), dtype)


def unfit(p: Problem, integers: int = 0) -> str | None:
    """None if packs can hold the weight's scales, and tensor cores take results of its dtype, else the reason.

    integers: groups of a block whose scales stay integers.
    """
    if p.dtype not in (torch.bfloat16, torch.float16):
        return f"the input is {str(p.dtype).removeprefix('torch.')}, and tensor cores take bfloat16 and float16"
    return None if integers else no_groups(p.weight)


def _beyond_float16(p: Problem) -> str | None:
    """Why float16 does not hold all numbers of a float of as many bits of exponent, None if it does."""
    fmt = p.weight.format
    # what is all ones in IEEE 754 stands for Inf and NaN
    if p.dtype is torch.float16 and isinstance(fmt, Float) and (fmt.finite - 1) >> fmt.mantissa == 31:
        return f"the largest numbers of {fmt.name} are no numbers in float16: use bfloat16"
    return None


def _is_worth(width: str, p: Problem) -> bool:
    """Whether it was tuned on this device, and is nowhere slower than bfloat16."""
    if missing("tuned") is not None:
        return False
    from qcompile.backends.triton.tuned import is_worth
    from qcompile.backends.triton.width_table import tuned_name

    return is_worth(tuned_name(width), p.N, p.K)


def _arguments(p: Problem, x: tuple[Any, ...], packed: Mapping[str, Any], bias: Any) -> tuple[Any, ...]:
    return (*x, packed["words"], packed["scales"], packed.get("levels"), bias, p.N, *kind_of(read_as(p.weight)))


def _several(problems: Sequence[Problem], x: tuple[Any, ...], packed: Sequence[Mapping[str, Any]]) -> tuple[Any, ...]:
    each = [_arguments(p, (), pack, None) for p, pack in zip(problems, packed, strict=True)]
    words, scales, levels, _, *kind = (list(of) for of in zip(*each, strict=True))
    return (*x, words, scales, levels, *kind)


def _is_whole(p: Problem) -> bool:
    """Whether a pack is whole units of rows, so that nothing stands behind it."""
    return p.N % ROWS == 0


def _joins(p: Problem) -> bool:
    """Of tables that were learned, one behind the other, the first is read."""
    return _is_whole(p) and not (isinstance(p.weight.format, CodeBook) and p.weight.format.levels is None)


KERNEL = Kernel(
    name="weight-triton",
    why_not=why_not,
    pack=pack,
    op=torch.ops.qcompile.linear_weight.default,
    arguments=_arguments,
    device="cuda",
    joins=_joins,
    several=Several(op=torch.ops.qcompile.linear_weights.default, arguments=_several, takes=_is_whole),
)
