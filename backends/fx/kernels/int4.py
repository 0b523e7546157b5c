"""4-bit weights under 16-bit inputs on NVIDIA GPUs: the Triton kernels of `qcompile.backends.triton.int4_linear`.

x: [..., K] bfloat16 or float16; words and scales as `qcompile.backends.triton.int4_words` packs them. One opaque op
that chooses its kernel by the number of rows at each call, so that no number of rows compiles a graph anew.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from qcompile.backends.fx.kernels.problem import Kernel, Problem
from qcompile.backends.fx.registry import REGISTRY
from qcompile.backends.triton.int4_words import COLUMNS, ROWS, SIGNED_ZERO, SMALL_GROUPS, pack_scales, pack_words
from qcompile.backends.triton.ready import missing
from qcompile.formats import Integer
from qcompile.numerics import QParams
from qcompile.spec import ALL

FIRST_CAPABILITY = (8, 0)
# elsewhere a float matmul of the dequantized weight may be faster, and takes more memory
MEASURED = (9, 0)
# copies of 16 bytes
MULTIPLE = 8
# kinds of scales that bfloat16 holds
BFLOAT16_SCALES = ("bf16", "e8m0")

REGISTRY.define("int4_mm(Tensor x, Tensor words, Tensor scales, Tensor? bias, int N) -> Tensor")
REGISTRY.define("linear_int4(Tensor x, Tensor words, Tensor scales, Tensor? bias, int N) -> Tensor")


def _int4_mm(x: Tensor, words: Tensor, scales: Tensor, bias: Tensor | None, N: int) -> Tensor:
    from qcompile.backends.triton.int4_linear import int4_linear

    return int4_linear(x, words, scales, bias, N)


def _linear_int4(x: Tensor, words: Tensor, scales: Tensor, bias: Tensor | None, N: int) -> Tensor:
    bias = None if bias is None else bias.expand(N).contiguous()
    y = torch.ops.qcompile.int4_mm(x.reshape(-1, x.shape[-1]), words, scales, bias, N)
    return y.reshape(*x.shape[:-1], N)


REGISTRY.impl("int4_mm", _int4_mm, "CUDA")
REGISTRY.impl("int4_mm", lambda x, words, scales, bias, N: x.new_empty(x.shape[0], N), "Meta")
REGISTRY.impl("linear_int4", _linear_int4, "CompositeImplicitAutograd")


def why_not(p: Problem) -> str | None:
    """None if the kernels can run `p`, else the reason."""
    if p.input is not None:
        return "the input is quantized"
    return no_weight(p) or unfit(p) or missing("int4_linear")


def unfit(p: Problem) -> str | None:
    """None if kernels of words in blocks can run groups, device, dtype and shape of `p`, else the reason."""
    if (reason := _no_blocks(p)) is not None:
        return reason
    if p.device != "cuda":
        return "these kernels are for NVIDIA GPUs"
    if p.capability is None or p.capability < FIRST_CAPABILITY:
        return f"the kernels begin with sm_80, this is sm_{''.join(map(str, p.capability or ()))}"
    if p.K % MULTIPLE:
        return f"K={p.K} is not a multiple of {MULTIPLE}"
    if p.capability != MEASURED and not p.small and not _is_worth(p):
        sm = "".join(map(str, p.capability))
        return f"these kernels were measured on sm_90, this is sm_{sm}: `qcompile tune` measures 4-bit ones here"
    return None


def no_weight(p: Problem) -> str | None:
    """None if words and scales can hold the weight, and tensor cores take results of its dtype, else the reason."""
    fmt = p.weight.format
    if not isinstance(fmt, Integer) or fmt.bits != 4 or p.weight.granularity.rows != 1:
        return f"weight {p.weight} is not 4-bit integers by channel or group"
    return _no_blocks(p)


def _no_blocks(p: Problem) -> str | None:
    columns = p.weight.granularity.columns
    if columns not in (ALL, *SMALL_GROUPS) and columns % COLUMNS:
        return f"groups are {', '.join(map(str, SMALL_GROUPS))} or multiples of {COLUMNS} columns, got {columns}"
    if p.dtype not in (torch.bfloat16, torch.float16):
        return f"the input is {str(p.dtype).removeprefix('torch.')}, and tensor cores take bfloat16 and float16"
    return None


def _is_worth(p: Problem) -> bool:
    """Whether it was tuned on this device, and is nowhere slower than bfloat16."""
    if not isinstance(p.weight.format, Integer) or p.weight.format.bits != 4 or missing("tuned") is not None:
        return False
    from qcompile.backends.triton.tuned import is_worth

    return is_worth("int4", p.N, p.K)


def pack(codes: Tensor, qparams: QParams, dtype: torch.dtype) -> dict[str, Tensor]:
    """Codes and scales in the layouts of `int4_words`."""
    stored, scales = codes_and_scales(codes, qparams, dtype)
    return {"words": pack_words(stored.contiguous()), "scales": scales}


def codes_and_scales(codes: Tensor, qparams: QParams, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Codes 0..15, and packed scales; groups of more columns than a block are several groups."""
    K = codes.shape[1]
    if qparams.zero is None:
        codes, zero = codes + SIGNED_ZERO, torch.full_like(qparams.scale, SIGNED_ZERO)
    else:
        zero = qparams.zero
    columns = qparams.spec.granularity.columns
    width = columns if columns in SMALL_GROUPS else COLUMNS
    blocks = -(-K // COLUMNS) * (COLUMNS // width)
    group = torch.arange(blocks, device=codes.device) * width // (columns or K)
    group = group.clamp(max=qparams.scale.shape[1] - 1)
    scale = qparams.scale[:, group]
    narrow = qparams.spec.scale in BFLOAT16_SCALES and fits(scale, dtype)
    return codes, pack_scales(scale, zero[:, group], narrow=narrow)


def fits(scale: Tensor, dtype: torch.dtype) -> bool:
    """Whether numbers of dtype hold these scales in full: kernels that multiply single weights need that."""
    limits = torch.finfo(dtype)
    return bool(((scale == 0) | ((scale >= limits.smallest_normal) & (scale <= limits.max))).all())


def _arguments(p: Problem, x: tuple[Any, ...], packed: Mapping[str, Any], bias: Any) -> tuple[Any, ...]:
    return (*x, packed["words"], packed["scales"], bias, p.N)


KERNEL = Kernel(
    name="int4",
    why_not=why_not,
    pack=pack,
    op=torch.ops.qcompile.linear_int4.default,
    arguments=_arguments,
    device="cuda",
    # packs are whole units of rows
    joins=lambda problems: all(p.N % ROWS == 0 for p in problems),
)
