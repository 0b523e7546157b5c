"""8-, 3- and 2-bit weights and code books of 16 numbers under 16-bit inputs, on NVIDIA GPUs: `width_linear`.

x: [..., K] bfloat16 or float16; words, scales and levels as `qcompile.backends.triton.widths` packs them. One opaque op
that chooses its kernel by the number of rows at each call, so that no number of rows compiles a graph anew.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from qcompile.backends.fx.kernels.int4 import BFLOAT16_SCALES, fits, unfit
from qcompile.backends.fx.kernels.problem import Kernel, Problem
from qcompile.backends.fx.registry import REGISTRY
from qcompile.backends.triton.ready import missing
from qcompile.backends.triton.widths import (
    COLUMNS,
    LEVELS,
    ROWS,
    SMALL_GROUPS,
    WIDTHS,
    Packed,
    pack_codes,
    pack_levels,
    pack_scales,
)
from qcompile.formats import CodeBook, Format, Integer, code_values
from qcompile.numerics import QParams
from qcompile.spec import ALL

_ARGUMENTS = "Tensor x, Tensor words, Tensor scales, Tensor? levels, Tensor? bias, int N, str width"
REGISTRY.define(f"weight_mm({_ARGUMENTS}) -> Tensor")
REGISTRY.define(f"linear_weight({_ARGUMENTS}) -> Tensor")


def _weight_mm(
    x: Tensor, words: Tensor, scales: Tensor, levels: Tensor | None, bias: Tensor | None, N: int, width: str
) -> Tensor:
    from qcompile.backends.triton.width_linear import width_linear

    return width_linear(x, Packed(words=words, scales=scales, levels=levels, width=width), bias, N)


def _linear_weight(
    x: Tensor, words: Tensor, scales: Tensor, levels: Tensor | None, bias: Tensor | None, N: int, width: str
) -> Tensor:
    bias = None if bias is None else bias.expand(N).contiguous()
    y = torch.ops.qcompile.weight_mm(x.reshape(-1, x.shape[-1]), words, scales, levels, bias, N, width)
    return y.reshape(*x.shape[:-1], N)


REGISTRY.impl("weight_mm", _weight_mm, "CUDA")
REGISTRY.impl("weight_mm", lambda x, words, scales, levels, bias, N, width: x.new_empty(x.shape[0], N), "Meta")
REGISTRY.impl("linear_weight", _linear_weight, "CompositeImplicitAutograd")


def width_of(fmt: Format) -> str | None:
    """The name in `WIDTHS` of what holds a format's codes, None if nothing does."""
    if not isinstance(fmt, Integer):
        return "book" if 2**fmt.bits == LEVELS else None
    # the kernel "int4" has those of 4 bits
    return fmt.name if fmt.name in WIDTHS and fmt.bits != 4 else None


def why_not(p: Problem) -> str | None:
    """None if the kernels can run `p`, else the reason."""
    if p.input is not None:
        return "the input is quantized"
    if width_of(p.weight.format) is None or p.weight.granularity.rows != 1:
        return f"weight {p.weight} is not 8-, 3- or 2-bit integers or a table of {LEVELS} numbers, by channel or group"
    return unfit(p) or missing("width_linear")


def pack(codes: Tensor, qparams: QParams, dtype: torch.dtype) -> dict[str, Tensor]:
    """Codes, scales and levels in the layouts of `widths`; groups of more columns than a block are several groups."""
    fmt, columns = qparams.spec.format, qparams.spec.granularity.columns
    name = width_of(fmt)
    assert name is not None
    width, scale, zero = WIDTHS[name], qparams.scale, qparams.zero
    narrow = qparams.spec.scale in BFLOAT16_SCALES and fits(scale, dtype)
    if isinstance(fmt, Integer) and zero is None:
        codes = codes.view(torch.uint8) + width.center
        zero = torch.full_like(scale, width.center) if narrow else None
    if columns != ALL:
        span = columns if columns in SMALL_GROUPS else COLUMNS
        blocks = -(-codes.shape[1] // COLUMNS) * (COLUMNS // span)
        group = (torch.arange(blocks, device=codes.device) * span // columns).clamp(max=scale.shape[1] - 1)
        scale, zero = scale[:, group], None if zero is None else zero[:, group]
    packed = {"words": pack_codes(codes, width), "scales": pack_scales(scale, zero, narrow=narrow)}
    if not width.book:
        return packed
    levels = code_values(fmt).to(codes.device) if qparams.levels is None else qparams.levels
    return packed | {"levels": pack_levels(levels, dtype)}


def _arguments(p: Problem, x: tuple[Any, ...], packed: Mapping[str, Any], bias: Any) -> tuple[Any, ...]:
    return (*x, packed["words"], packed["scales"], packed.get("levels"), bias, p.N, width_of(p.weight.format))


def _joins(problems: Sequence[Problem]) -> bool:
    """Packs are whole units of rows; of tables, one behind the other, the first is read."""
    learned = any(isinstance(p.weight.format, CodeBook) and p.weight.format.levels is None for p in problems)
    return not learned and all(p.N % ROWS == 0 for p in problems)


KERNEL = Kernel(
    name="weight-triton",
    why_not=why_not,
    pack=pack,
    op=torch.ops.qcompile.linear_weight.default,
    arguments=_arguments,
    device="cuda",
    joins=_joins,
)
