"""Floats of few bits on the integer units of a CPU: their numbers are whole multiples of the smallest, exactly.

    y = float(x_whole @ w_whole.T) * (scale * weight_scale) + x[..., channels] @ columns + bias

x_whole are the input's numbers over its format's smallest, w_whole int8 [N, K] those of the weight. A weight whose
columns were lowered by octaves takes those that lie within what int8 has to spare; the few columns beyond it are zeros
there, and `columns`, float32 [n, N], beside it. Numbers beyond int8 are two or three digits to the base of 256, which
are rows of one matmul, those of a weight under scales that are as many times larger: E4M3 has 18 bits. Sums are exact
in int32, digit by digit.
Only the matmul is opaque, as in `int8`: what makes whole numbers of codes is fused with what makes the codes.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from qcompile.backends.fx.kernels import int8, tail
from qcompile.backends.fx.kernels.kept import kept
from qcompile.backends.fx.kernels.problem import Kernel, Problem
from qcompile.backends.fx.registry import REGISTRY
from qcompile.formats import CodeBook, Float, Format, Integer, parse_format
from qcompile.numerics import QParams, decode, dequantize
from qcompile.shifts import raised
from qcompile.spec import ALL

INT8_MAX, BASE, MOST_DIGITS = 127, 256, 3
# of digits of weights beyond int8 with those of inputs: with the quantization, more take longer than a float32 matmul,
# and two take longer than one of bfloat16 (found with AMX, by hand)
MOST_PRODUCTS = 2
# columns beside the integer matmul take as long as it does where they are a quarter of all: measured with AVX512-VNNI
MOST_BESIDE = 0.5

REGISTRY.define(
    "linear_lifted(Tensor codes, Tensor scale, Tensor? zero, Tensor weight, Tensor weight_scale, Tensor weight_sum,"
    " Tensor? channels, Tensor? columns, Tensor? bias, str input, int digits, ScalarType dtype) -> Tensor"
)


def _linear_lifted(
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    weight: Tensor,
    weight_scale: Tensor,
    weight_sum: Tensor,
    channels: Tensor | None,
    columns: Tensor | None,
    bias: Tensor | None,
    input: str,
    digits: int,
    dtype: torch.dtype,
) -> Tensor:
    """digits: of the weight's numbers, whose rows stand one below the other, the lowest first."""
    fmt = parse_format(input)
    scale = kept(scale) if scale.dim() > 0 else scale
    if isinstance(fmt, Integer):
        numbers, step = codes.to(torch.int32), scale
        y = torch.ops.qcompile.linear_int8(codes, scale, zero, weight, weight_scale, weight_sum, None, torch.float32)
        numbers = numbers if zero is None else numbers - zero.to(torch.int32)
    else:
        assert isinstance(fmt, Float)
        numbers, step = whole(codes, fmt), scale * fmt.step
        y = _product(numbers, weight, _digits(fmt) or 1) * (step * weight_scale.squeeze(-1))
    y = y.unflatten(-1, (digits, -1)).sum(-2) if digits > 1 else y
    if channels is not None and columns is not None:
        y = y + tail.OP(numbers[..., channels].float() * step, columns)
    return (y if bias is None else y + bias).to(dtype)


def _product(numbers: Tensor, weight: Tensor, digits: int) -> Tensor:
    """numbers @ weight.T, float32.  numbers: int32 [..., K] of as many digits."""
    rows = numbers.reshape(-1, numbers.shape[-1])
    stacked = torch.cat(_split(rows, digits)) if digits > 1 else rows.to(torch.int8)
    product = torch.ops.qcompile.int_mm(stacked, weight).float().unflatten(0, (digits, -1))
    total = sum((product[i] * float(BASE**i) for i in range(1, digits)), product[0])
    return total.reshape(*numbers.shape[:-1], weight.shape[0])


def _split(numbers: Tensor, digits: int) -> list[Tensor]:
    """Digits of whole numbers, int8, the lowest first.  numbers: int32, of as many digits."""
    parts = []
    for _ in range(digits - 1):
        parts.append(((numbers + BASE // 2) & (BASE - 1)) - BASE // 2)
        numbers = (numbers - parts[-1]) >> 8
    return [part.to(torch.int8) for part in (*parts, numbers)]


def whole(codes: Tensor, fmt: Float) -> Tensor:
    """The numbers of codes over the smallest positive one, int32, by arithmetic that compilers vectorize."""
    if fmt.dtype is not None:
        return (codes.view(fmt.dtype).float() * (1 / fmt.step)).to(torch.int32)
    magnitude = codes.to(torch.int32) & (2 ** (fmt.bits - 1) - 1)
    exponent, fraction = magnitude >> fmt.mantissa, magnitude & (2**fmt.mantissa - 1)
    number = torch.where(exponent == 0, fraction, (fraction + 2**fmt.mantissa) << (exponent - 1).clamp(min=0))
    return torch.where(codes.to(torch.int32) >> (fmt.bits - 1) == 1, -number, number)


REGISTRY.impl("linear_lifted", _linear_lifted, "CompositeImplicitAutograd")


def largest(fmt: Format) -> int | None:
    """The largest of the whole numbers; None for numbers that are no multiples of one."""
    match fmt:
        case Integer():
            return int(fmt.max)
        case Float():
            return int(fmt.max / fmt.step)
        case CodeBook():
            return None


def whole_weight(codes: Tensor, qparams: QParams) -> tuple[Tensor, Tensor]:
    """The numbers of a weight as int8 [N, K], and the scale [N, 1] under which they are what they were."""
    fmt = qparams.spec.format
    if not isinstance(fmt, Float):
        return codes.contiguous(), qparams.scale.expand(codes.shape[0], 1).contiguous()
    numbers = (decode(codes, fmt) / fmt.step).to(torch.int8)
    return numbers, (qparams.scale * fmt.step).expand(codes.shape[0], 1).contiguous()


def _stacked(codes: Tensor, qparams: QParams) -> tuple[Tensor, Tensor]:
    """As `whole_weight` for numbers of any digits: int8 [digits * N, K], and the scale of each row."""
    fmt, digits = qparams.spec.format, _digits(qparams.spec.format)
    if digits is None or digits == 1:
        return whole_weight(codes, qparams)
    assert isinstance(fmt, Float)
    numbers = (decode(codes, fmt) / fmt.step).to(torch.int32)
    scale = (qparams.scale * fmt.step).expand(codes.shape[0], 1)
    return torch.cat(_split(numbers, digits)), torch.cat([scale * float(BASE**i) for i in range(digits)])


def _digits(fmt: Format) -> int | None:
    """Digits of the whole numbers, each from -128 to 127; None for numbers that are not whole, or of more digits."""
    top = largest(fmt)
    if top is None:
        return None
    most = (INT8_MAX * (BASE**n - 1) // (BASE - 1) for n in range(1, MOST_DIGITS + 1))
    return next((digits for digits, number in enumerate(most, start=1) if top <= number), None)


def window(shift: tuple[int, ...], fmt: Format) -> range:
    """The octaves of columns that int8 holds together, most columns.  shift: of each column; fmt: int8 holds it."""
    spare = (INT8_MAX // (largest(fmt) or INT8_MAX)).bit_length()
    starts = sorted(set(shift), reverse=True)
    return max((range(start, start + spare) for start in starts), key=lambda octaves: sum(s in octaves for s in shift))


def why_not(p: Problem) -> str | None:
    """None if integer units can run `p`, else the reason."""
    if p.device != "cpu":
        return "for the CPU: elsewhere floats have units of their own"
    if p.input is None:
        return "the input is not quantized"
    weight, shift = (p.weight, ()) if p.lowered is None else (p.lowered.narrow.spec, p.lowered.shift)
    if (weight.granularity.columns, p.input.granularity.columns) != (ALL, ALL) or not weight.symmetric:
        return f"weight {weight} and input {p.input} are not symmetric with one scale a channel, and one a token"
    if p.K > int8.MAX_K:
        return f"K={p.K} can overflow int32 (largest K: {int8.MAX_K})"
    if (reason := _too_long(p, weight.format, p.input.format)) is not None:
        return reason
    octaves = window(shift, weight.format) if shift else range(1)
    beside = sum(s not in octaves for s in shift)
    if beside > MOST_BESIDE * p.K:
        return (
            f"{beside} of {p.K} columns are lowered by more octaves than int8 has to spare beside {weight.format.name}"
        )
    return None


def _too_long(p: Problem, weight: Format, given: Format) -> str | None:
    """Why integer units are not given the digits of weight and input, None if they are."""
    digits, others = _digits(weight), _digits(given)
    if digits is None or others is None:
        return f"numbers of {(given if digits else weight).name} are no multiples of the smallest by up to 24 bits"
    if digits == 1:
        return None
    taken = f"numbers of {weight.name} are {digits} digits of 8 bits"
    if p.lowered is not None:
        return f"{taken}, and columns that were lowered need more"
    if p.small:
        return f"{taken}, and free_weights asks for small weights"
    if p.dtype is not torch.float32:
        name = str(p.dtype).removeprefix("torch.")
        return f"{taken}: so many matmuls of integers take longer than one in bfloat16, and y is {name}"
    if not int8.has_integer_units():
        return f"{taken}, and this CPU has no integer units: `qcompile doctor` says what it has"
    if digits * others > MOST_PRODUCTS:
        return (
            f"{taken}, those of {given.name} {others}: {digits * others} matmuls of integers take longer than one of "
            f"floats; {MOST_PRODUCTS} do not"
        )
    return None


def pack(codes: Tensor, qparams: QParams, dtype: torch.dtype) -> dict[str, Tensor]:
    """Whole numbers [N, K] under one scale a channel, their sums, and the columns beside them with their places."""
    packed, lowered = {}, qparams.lowered
    if lowered is None:
        weight, scale = _stacked(codes, qparams)
    else:
        held, narrow = qparams.spec.format, lowered.narrow.spec.format
        assert isinstance(held, Float)
        assert isinstance(narrow, Float)
        octaves = window(lowered.shift, narrow)
        # in the container, a number is as many octaves up as there is room, less its column's shift
        step = narrow.step * 2.0 ** (raised(narrow) - octaves[-1])
        beside = torch.tensor([s not in octaves for s in lowered.shift], device=codes.device)
        if beside.any():
            packed["columns"] = dequantize(codes, qparams)[:, beside].t().contiguous()
            packed["channels"] = beside.nonzero().squeeze(-1)
        weight = (decode(codes, held).masked_fill(beside, 0.0) / step).to(torch.int8)
        scale = (qparams.scale * step).expand(codes.shape[0], 1).contiguous()
    return packed | {"weight": weight, "scale": scale, "sum": weight.sum(1, dtype=torch.int32)}


def _arguments(p: Problem, x: tuple[Any, ...], packed: Mapping[str, Any], bias: Any) -> tuple[Any, ...]:
    assert p.input is not None
    beside = (packed.get("channels"), packed.get("columns"))
    digits = 1 if p.lowered is not None else _digits(p.weight.format)
    operands = (*x, packed["weight"], packed["scale"], packed["sum"], *beside, bias)
    return (*operands, p.input.format.name, digits, p.dtype)


KERNEL = Kernel(
    name="lifted",
    why_not=why_not,
    pack=pack,
    op=torch.ops.qcompile.linear_lifted.default,
    arguments=_arguments,
    takes_codes=True,
    device="cpu",
)
