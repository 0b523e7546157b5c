"""How a scale is kept: rounded to 16 bits, to a power of two, under a second scale, or quantized itself.

Sources: OCP Microscaling v1.0 section 6.3 (e8m0); NVIDIA Transformer Engine's NVFP4 reference (fp8_e4m3);
QLoRA section 3, double quantization (dq256); ggml's K-quants (integers under one float16); QServe section 4.1,
progressive group quantization (integers of a row).
"""

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import pad

from qcompile.formats import FORMATS, dynamic_levels
from qcompile.packing import pack, unpack
from qcompile.spec import SCALES, ScaleKind

Stored = dict[str, Tensor]
# of a scale and, in their order, the other arguments of `keep_scale`
_Keep = Callable[[Tensor, Tensor, float, Tensor | float, Tensor | None], tuple[Tensor, Stored]]

_E4M3 = FORMATS["fp8_e4m3"].max
_E4M3_SMALLEST = 2.0**-9
# exponent code of a float32 that is Inf or NaN
_NOT_FINITE = 255
DOUBLE_BLOCK = 256
# in the bits of a float32 whose significand has four, from it to the next
_STEP = 1 << 20
# an octave of them, both ends included
_OCTAVE = 9


def over(x: Tensor, number: float) -> Tensor:
    """x / number, also on CUDA, where eager torch multiplies with the rounded inverse of a Python number."""
    return x / torch.full((), number, dtype=x.dtype, device=x.device)


def keep_scale(
    scale: Tensor,
    kind: str,
    amax: Tensor,
    element_max: float,
    clip: Tensor | float = 1.0,
    below: Tensor | None = None,
) -> tuple[Tensor, Stored]:
    """`scale` as storage of this kind gives it back, and the tensors that are stored.

    scale: float32, any shape, not 0, negative only if the kind is signed; amax: largest magnitude of each tile, same
    shape; element_max: of the format; clip: the part of amax that scale covers; below: how far each tile reaches below
    0, same shape, where below / scale will be its zero point.
    Returns float32 shaped like scale, and tensors by name.
    A tile's result under fp8_e4m3 does not depend on clip elsewhere: the tensor's scale is that of clip 1.
    """
    return _KEEP[kind](scale, amax, element_max, clip, below)


def stored_scale(stored: Stored, kind: str, count: int) -> Tensor:
    """The float32 scale that `keep_scale` returned, from what it stored.  count: of its last dimension."""
    return _RESTORE[kind](stored, count)


def keep_minimum(minimum: Tensor, kind: str) -> tuple[Tensor, Stored]:
    """The minimum of each tile as storage of this kind gives it back, and the tensors that are stored.

    minimum: float32, shaped like the scale, at most 0 if the kind is not signed.  kind: one that can keep a minimum.
    """
    if SCALES[kind].shared:
        # what is stored is subtracted
        kept, stored = _integers(SCALES[kind], -minimum, least=0)
        return -kept, {f"minimum_{name}": tensor for name, tensor in stored.items()}
    dtype = _MINIMUM_DTYPE[kind]
    limit = torch.finfo(dtype).max
    held = minimum.clamp(-limit, limit).to(dtype)
    return held.float(), {"minimum": held}


def stored_minimum(stored: Stored, kind: str, count: int) -> Tensor:
    """The float32 minimum that `keep_minimum` returned, from what was stored with the scale.  count: as above."""
    if not SCALES[kind].shared:
        return stored["minimum"].float()
    return -_restored(SCALES[kind], {name: stored[f"minimum_{name}"] for name in ("code", "outer")}, count)


def _as_it_is(
    scale: Tensor, amax: Tensor, element_max: float, clip: Tensor | float, below: Tensor | None
) -> tuple[Tensor, Stored]:
    return scale, {"scale": scale}


def _rounded(dtype: torch.dtype) -> _Keep:
    limits = torch.finfo(dtype)
    dropped = 23 + round(math.log2(limits.eps))
    # distance of the subnormal numbers
    step = limits.smallest_normal * limits.eps

    def keep(
        scale: Tensor, amax: Tensor, element_max: float, clip: Tensor | float, below: Tensor | None
    ) -> tuple[Tensor, Stored]:
        # in integers, because a compiler that fuses a cast down with a cast up leaves out the rounding
        size = scale.abs()
        bits = size.view(torch.int32)
        half = (1 << (dropped - 1)) - 1 + ((bits >> dropped) & 1)
        normal = (((bits + half) >> dropped) << dropped).view(torch.float32).clamp(max=limits.max)
        subnormal = (size / step).round().clamp(min=1.0) * step
        finite = torch.where(size < limits.smallest_normal, subnormal, normal)
        # NaN and Inf stay, so that a poisoned tile is not hidden
        kept = torch.where(torch.isfinite(scale), finite, size).copysign(scale)
        return kept, {"scale": kept.to(dtype)}

    return keep


def _power_of_two(
    scale: Tensor, amax: Tensor, element_max: float, clip: Tensor | float, below: Tensor | None
) -> tuple[Tensor, Stored]:
    # float32 log2 is off by one just below powers of two; the exponent field is exact
    exponent = ((clip * amax).view(torch.int32) >> 23) & 255
    # frexp counts from a significand below 1, OCP from one below 2
    element_exponent = math.frexp(element_max)[1] - 1
    code = (exponent - element_exponent).clamp(0, 254)
    code = torch.where(amax == 0, 127, code)
    code = torch.where(exponent == _NOT_FINITE, _NOT_FINITE, code).to(torch.uint8)
    stored = {"code": code}
    return _restore_power_of_two(stored), stored


def _restore_power_of_two(stored: Stored) -> Tensor:
    code = stored["code"].to(torch.int32)
    # 2**-127 is the one power here that float32 holds as a subnormal
    bits = torch.where(code == 0, 1 << 22, code << 23)
    return torch.where(code == _NOT_FINITE, torch.nan, bits.view(torch.float32))


def _under_tensor_scale(
    scale: Tensor, amax: Tensor, element_max: float, clip: Tensor | float, below: Tensor | None
) -> tuple[Tensor, Stored]:
    top = amax.amax()
    outer = torch.where(top == 0, 1.0, over(top, _E4M3 * element_max).clamp(min=torch.finfo(torch.float32).tiny))
    # a block far below the tensor's largest keeps the smallest scale there is, rather than none
    inner = (scale / outer).clamp(_E4M3_SMALLEST, _E4M3).to(torch.float8_e4m3fn)
    stored = {"code": inner.view(torch.uint8), "outer": outer}
    return _restore_under_tensor_scale(stored), stored


def _restore_under_tensor_scale(stored: Stored) -> Tensor:
    return stored["code"].view(torch.float8_e4m3fn).float() * stored["outer"]


def _double(
    scale: Tensor, amax: Tensor, element_max: float, clip: Tensor | float, below: Tensor | None
) -> tuple[Tensor, Stored]:
    # a tile of zeros takes the mean, so that it costs its neighbours no precision
    live = (amax != 0).flatten()
    flat = torch.where(live, scale.flatten(), 0.0)
    # in float64, so that the order of summation does not show
    offset = (flat.double().sum() / live.sum().clamp(min=1)).float()
    centred = torch.where(live, flat - offset, 0.0)
    centred = pad(centred, (0, -flat.numel() % DOUBLE_BLOCK)).unflatten(0, (-1, DOUBLE_BLOCK))
    outer = centred.abs().amax(1).clamp(min=torch.finfo(torch.float32).tiny)
    levels = torch.tensor(dynamic_levels(8), device=scale.device)
    code = torch.bucketize(centred / outer[:, None], (levels[1:] + levels[:-1]) / 2)
    stored = {
        "code": code.to(torch.uint8).flatten()[: flat.numel()].reshape(scale.shape),
        "outer": outer,
        "offset": offset,
    }
    return _restore_double(stored), stored


def _restore_double(stored: Stored) -> Tensor:
    code = stored["code"]
    levels = torch.tensor(dynamic_levels(8), device=code.device)
    flat = pad(levels[code.flatten().long()], (0, -code.numel() % DOUBLE_BLOCK))
    centred = flat.unflatten(0, (-1, DOUBLE_BLOCK)) * stored["outer"][:, None]
    restored = centred.flatten()[: code.numel()].reshape(code.shape) + stored["offset"]
    return restored.clamp(min=torch.finfo(torch.float32).tiny)


def _as_integers(kind: ScaleKind) -> _Keep:
    def keep(
        scale: Tensor, amax: Tensor, element_max: float, clip: Tensor | float, below: Tensor | None
    ) -> tuple[Tensor, Stored]:
        # a tile of zeros has any scale, and costs its neighbours no precision
        return _integers(kind, torch.where(amax == 0, 0.0, scale), least=1)

    return keep


def _integers(kind: ScaleKind, values: Tensor, *, least: int) -> tuple[Tensor, Stored]:
    """Integers times one float16 for so many values of a row.  values: [..., G].  least: magnitude of an integer."""
    count = values.shape[-1]
    together = pad(values, (0, -count % kind.shared)).unflatten(-1, (-1, kind.shared))
    largest = together.gather(-1, together.abs().argmax(-1, keepdim=True)).squeeze(-1)
    low, high = integer_range(kind)
    # the largest magnitude is the integer that is furthest from 0; of zeros alone, no negative one
    outer, stored = _KEEP["fp16"](over(largest, low or high) + 0.0, largest, 1.0, 1.0, None)
    exact = together / outer[..., None]
    codes = exact.round().clamp(low, high)
    sign = torch.where(exact < 0, -1.0, 1.0)
    kept = torch.where(codes.abs() < least, sign * least, codes).flatten(-2)
    # what is not finite shows by the float16
    code = torch.where(kept.isfinite(), kept, 0.0).to(torch.int8)
    both = {"code": pack(code, kind.code_bits), "outer": stored["scale"]}
    return _restored(kind, both, count), both


def integer_range(kind: ScaleKind) -> tuple[int, int]:
    """Smallest and largest of the integers that stand for scales of this kind."""
    if not kind.signed:
        return 0, 2**kind.code_bits - 1
    return -(2 ** (kind.code_bits - 1)), 2 ** (kind.code_bits - 1) - 1


def _restored(kind: ScaleKind, stored: Stored, count: int) -> Tensor:
    outer = stored["outer"].float()
    codes = unpack(stored["code"], kind.code_bits, outer.shape[-1] * kind.shared, kind.signed)
    return (codes.unflatten(-1, (-1, kind.shared)) * outer[..., None]).flatten(-2)[..., :count]


def _integers_of_row(
    kind: ScaleKind, scale: Tensor, amax: Tensor, element_max: float, clip: Tensor | float, below: Tensor | None
) -> tuple[Tensor, Stored]:
    """Integers 1 .. 2**bits times one number of the row, of those that an octave has the one that errs least.

    scale: [..., G].  That number has four significant bits, so that bfloat16 holds its products, too.
    """
    most, top = 2**kind.code_bits, 2 * element_max + 1
    # a tile of zeros has any scale, and costs its neighbours no precision
    wanted = torch.where(amax == 0, 0.0, scale)
    largest = wanted.amax(-1, keepdim=True)
    largest = torch.where(largest == 0, float(most), largest)
    least = over(largest, most).clamp(min=torch.finfo(torch.float32).tiny)
    # what is not finite shows by the row's number
    bits = torch.where(least.isfinite(), (least.view(torch.int32) + (_STEP - 1)) & -_STEP, least.view(torch.int32))
    best, lowest = (least, torch.ones_like(scale)), torch.full_like(largest, torch.inf, dtype=torch.float64)
    for step in range(_OCTAVE):
        outer = (bits + step * _STEP).view(torch.float32)
        code = (wanted / outer).round().clamp(1, most)
        kept = code * outer
        error = torch.where(wanted == 0, 0.0, (kept - wanted) / largest).double().square().sum(-1, keepdim=True)
        # at the end of the octave, integers of half the range fit whatever the zero point is
        fits = True if below is None else _are_int8(code, (below / kept).round().clamp(0, top), top)
        better = (error < lowest) & fits
        best = (torch.where(better, outer, best[0]), torch.where(better, code, best[1]))
        lowest = torch.where(better, error, lowest)
    outer, code = best
    both = {"code": pack((code - 1).to(torch.uint8), kind.code_bits), "outer": outer.to(torch.bfloat16)}
    return _restored_row(kind, both, scale.shape[-1]), both


def _are_int8(integer: Tensor, zero: Tensor, top: float) -> Tensor:
    """Whether (code - zero) * integer is an int8 for codes 0 .. top in all groups of a row.  [..., G] -> [..., 1]"""
    return ((zero * integer <= 128) & ((top - zero) * integer <= 127)).all(-1, keepdim=True)


def _restored_row(kind: ScaleKind, stored: Stored, count: int) -> Tensor:
    return (unpack(stored["code"], kind.code_bits, count, False).float() + 1) * stored["outer"].float()


_MINIMUM_DTYPE = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_KEEP: dict[str, _Keep] = {
    "fp32": _as_it_is,
    "fp16": _rounded(torch.float16),
    "bf16": _rounded(torch.bfloat16),
    "e8m0": _power_of_two,
    "fp8_e4m3": _under_tensor_scale,
    "dq256": _double,
    **{name: _as_integers(kind) for name, kind in SCALES.items() if kind.shared},
    **{name: partial(_integers_of_row, kind) for name, kind in SCALES.items() if kind.row_bits},
}
_RESTORE: dict[str, Callable[[Stored, int], Tensor]] = {
    "fp32": lambda stored, count: stored["scale"],
    "fp16": lambda stored, count: stored["scale"].float(),
    "bf16": lambda stored, count: stored["scale"].float(),
    "e8m0": lambda stored, count: _restore_power_of_two(stored),
    "fp8_e4m3": lambda stored, count: _restore_under_tensor_scale(stored),
    "dq256": lambda stored, count: _restore_double(stored),
    **{name: partial(_restored, kind) for name, kind in SCALES.items() if kind.shared},
    **{name: partial(_restored_row, kind) for name, kind in SCALES.items() if kind.row_bits},
}
