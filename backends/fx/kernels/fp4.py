"""4-bit floats under 4- or 8-bit ones on fp8 tensor cores, stored as codes: `qcompile.backends.triton.fp4_linear`.

codes: fp8_e4m3 [..., K], or those of a float of fewer bits that E4M3 holds, named `narrow`; scale float32 [..., 1] or
[]; words as `qcompile.backends.triton.int4_int8_words` packs them; weight_scale float32 [N, 1], of E4M3 as
`narrow_floats` makes it; shift int8 [1, K], octaves by which columns of the weight were lowered (`qcompile.shifts`).

Lowering a column of the weight is lowering that channel of x. It is done there: what quantizes x writes each number
once, while every tile of y reads the weight anew. E4M3 has room for 14 octaves below the numbers of 4 bits; where the
input needs all of E4M3, `fp4_lowered` lowers the weight.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from qcompile.backends.fx.kernels.fp8 import as_e4m3, narrow_name
from qcompile.backends.fx.kernels.narrow_floats import factor, is_narrow, lowered
from qcompile.backends.fx.kernels.problem import Kernel, Problem
from qcompile.backends.fx.registry import REGISTRY
from qcompile.backends.triton import int4_int8_words
from qcompile.backends.triton.ready import missing
from qcompile.backends.triton.widths import ROWS
from qcompile.formats import Float, parse_format
from qcompile.numerics import QParams, dequantize, exact_exp2, on_device, quantize
from qcompile.shifts import raised, room
from qcompile.spec import ALL, Spec

BITS = 4

REGISTRY.define(
    "fp4_mm(Tensor codes, Tensor scale, Tensor words, Tensor weight_scale, int mantissa, ScalarType dtype,"
    " Tensor? octaves=None, Tensor? pairs=None) -> Tensor"
)
REGISTRY.define(
    "linear_fp4(Tensor codes, Tensor scale, Tensor words, Tensor weight_scale, Tensor? shift, Tensor? bias, str weight,"
    " str narrow, ScalarType dtype) -> Tensor"
)


def _fp4_mm(
    codes: Tensor,
    scale: Tensor,
    words: Tensor,
    weight_scale: Tensor,
    mantissa: int,
    dtype: torch.dtype,
    octaves: Tensor | None = None,
    pairs: Tensor | None = None,
) -> Tensor:
    """codes [M, K], the bits of e4m3; scale [M, 1] or []; y [M, N]."""
    from qcompile.backends.triton.fp4_linear import Operands, fp4_linear

    o = Operands(
        x=codes.contiguous().view(torch.float8_e4m3fn),
        scale_x=scale,
        words=words,
        scale_w=weight_scale,
        mantissa=mantissa,
        dtype=dtype,
        octaves=octaves,
        pairs=None if pairs is None else pairs.view(torch.float8_e4m3fn),
    )
    return fp4_linear(o)


def _fp4_mm_meta(
    codes: Tensor, scale: Tensor, words: Tensor, weight_scale: Tensor, mantissa: int, dtype: torch.dtype, *more: Any
) -> Tensor:
    return codes.new_empty((codes.shape[0], weight_scale.shape[0]), dtype=dtype)


def _linear_fp4(
    codes: Tensor,
    scale: Tensor,
    words: Tensor,
    weight_scale: Tensor,
    shift: Tensor | None,
    bias: Tensor | None,
    weight: str,
    narrow: str,
    dtype: torch.dtype,
) -> Tensor:
    codes, scale = _as_e4m3(codes, scale, shift, narrow)
    return multiplied(codes, scale, words, weight_scale, None, bias, weight, dtype)


def multiplied(
    codes: Tensor,
    scale: Tensor,
    words: Tensor,
    weight_scale: Tensor,
    octaves: Tensor | None,
    bias: Tensor | None,
    weight: str,
    dtype: torch.dtype,
    pairs: Tensor | None = None,
) -> Tensor:
    """y of codes in E4M3.  weight: the format of the codes in the words.  pairs: those of few rows, with octaves."""
    fmt = parse_format(weight)
    assert isinstance(fmt, Float)
    rows = codes.reshape(-1, codes.shape[-1])
    row_scale = scale if scale.dim() < 2 else scale.reshape(-1, 1)
    y = torch.ops.qcompile.fp4_mm(rows, row_scale, words, weight_scale, fmt.mantissa, dtype, octaves, pairs)
    y = y if bias is None else y + bias
    return y.to(dtype).reshape(*codes.shape[:-1], weight_scale.shape[0])


def _as_e4m3(codes: Tensor, scale: Tensor, shift: Tensor | None, narrow: str) -> tuple[Tensor, Tensor]:
    """Codes of x in E4M3, lowered as the weight is, and their scale."""
    if shift is None:
        return as_e4m3(codes, scale, narrow)
    fmt = parse_format(narrow)
    return lowered(codes, fmt, shift[0]), scale * 2.0 ** -raised(fmt)


REGISTRY.impl("fp4_mm", _fp4_mm, "CUDA")
REGISTRY.impl("fp4_mm", _fp4_mm_meta, "Meta")
REGISTRY.impl("linear_fp4", _linear_fp4, "CompositeImplicitAutograd")


def why_not(p: Problem) -> str | None:
    """None if the kernel can run `p`, else the reason."""
    return unfit(p) or _no_room(p) or absent(p)


def unfit(p: Problem) -> str | None:
    """Why these are no 4-bit floats under floats that E4M3 holds, None if they are."""
    if p.input is None:
        return "the input is not quantized"
    weight = stored(p)
    if not _one_scale(weight) or not is_narrow(weight.format) or weight.format.bits != BITS:
        return f"weight {weight} is not 4-bit floats with one scale a channel"
    if not _one_scale(p.input) or not (p.input.format.name == "fp8_e4m3" or is_narrow(p.input.format)):
        return f"input {p.input} is not floats that E4M3 holds, with one scale a token or tensor"
    return None


def absent(p: Problem) -> str | None:
    """Why there is no kernel for such floats on the device, or for the result; None if there is one."""
    if p.dtype not in (torch.bfloat16, torch.float16):
        return f"y is {str(p.dtype).removeprefix('torch.')}, and the kernel makes bfloat16 and float16"
    if p.capability is None:
        return "it needs a CUDA device"
    if (reason := missing("fp4_linear")) is not None:
        return reason
    from qcompile.backends.triton import fp4_linear

    return fp4_linear.why_not(p.N, p.K, p.capability, p.dtype, small=p.small)


def stored(p: Problem) -> Spec:
    """Of the numbers that are stored: those before columns were lowered."""
    return p.weight if p.lowered is None else p.lowered.narrow.spec


def _one_scale(spec: Spec) -> bool:
    return spec.granularity.columns == ALL and spec.scale == "fp32"


def _no_room(p: Problem) -> str | None:
    """Why E4M3 does not hold an input whose channels are lowered, None if it does or none is."""
    if p.lowered is None or p.input is None:
        return None
    shift, given = p.lowered.shift, p.input.format
    most = room(given) if is_narrow(given) else 0
    if min(shift) >= 0 and max(shift) <= most:
        return None
    return (
        f"columns are lowered by up to {max(shift)} octaves, and E4M3 has room for {most} below {given.name}: "
        "the weight is lowered instead"
    )


def pack(codes: Tensor, qparams: QParams, dtype: torch.dtype) -> dict[str, Tensor]:
    """Words of 4-bit codes, scales and, of columns that were lowered, octaves."""
    codes, qparams, octaves = before(codes, qparams)
    shift = {} if octaves is None else {"shift": octaves[None]}
    scale = qparams.scale.expand(codes.shape[0], 1) * factor(qparams.spec.format)
    return {"words": int4_int8_words.pack_words(codes), "scale": scale.contiguous(), **shift}


def before(codes: Tensor, qparams: QParams) -> tuple[Tensor, QParams, Tensor | None]:
    """Codes and qparams as they were before columns were lowered, and by how many octaves, int8 [K]; None: by none."""
    if qparams.lowered is None:
        return codes, qparams, None
    octaves = torch.tensor(qparams.lowered.shift, dtype=torch.int8, device=codes.device)
    narrow = on_device(qparams.lowered.narrow, codes.device)
    # numbers of the grid of fewer bits, which find their codes again
    return quantize(dequantize(codes, qparams) * exact_exp2(octaves), narrow), narrow, octaves


def _arguments(p: Problem, x: tuple[Any, ...], packed: Mapping[str, Any], bias: Any) -> tuple[Any, ...]:
    codes, scale, _ = x
    assert p.input is not None
    weight, narrow = stored(p).format.name, narrow_name(p.input)
    return (codes, scale, packed["words"], packed["scale"], packed.get("shift"), bias, weight, narrow, p.dtype)


KERNEL = Kernel(
    name="fp4",
    why_not=why_not,
    pack=pack,
    op=torch.ops.qcompile.linear_fp4.default,
    arguments=_arguments,
    takes_codes=True,
    device="cuda",
    # packs are whole units of rows
    joins=lambda p: p.N % ROWS == 0,
)
