"""The oracle: what quantize and dequantize mean, in plain torch, for every format and spec.

Every kernel and every host is tested against this file. Save for learned code books, all of it can be
traced (no value of a tensor decides the control flow), so that a compiler may fuse it as it stands.

One rule rounds: to the nearest number of the format, ties to the even significand; in a code book, ties to
the lower number.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

import torch
from torch import Tensor

from qcompile.codebooks import learned_levels
from qcompile.errors import SpecError
from qcompile.formats import CodeBook, Float, Integer, code_values
from qcompile.scales import keep_minimum, keep_scale, over
from qcompile.spec import ALL, Granularity, Spec, Zero

# smallest normal float32: what is below may be flushed to zero
SMALLEST_SCALE = 2.0**-126
FLOAT32_BIAS = 127
# elements that are compared in float64 at a time: of a large weight, all would take many times its memory
_PART = 2**20


@dataclass(frozen=True, kw_only=True, eq=False)
class QParams:
    """What one spec got on one tensor: `x ~ (q - zero) * scale`, tile by tile; with a minimum `q * scale + zero`.

    scale: float32, as its storage rounds it. For x: [..., K] it is [] for tensor, [..., 1] for channel and
        token, [..., K / g] for groups; [N / r, K / c] for blocks of several rows of [N, K]. A weight [N, C, H, W]
        of a convolution has one a row of [N, C * H * W], as [N, 1, 1, 1].
    zero: the code of 0, or the minimum, which is what code 0 stands for; float32, shaped like scale; None if symmetric.
    levels: float32 [2**bits], for code books learned from the tensor.
    stored: what is stored in place of scale and minimum (see `qcompile.scales`).
    codes: as of `quantize`, chosen together for this one tensor, on any device; None for the nearest.
    lowered: of which numbers of fewer bits these are made; None where of none.
    """

    spec: Spec
    scale: Tensor
    zero: Tensor | None = None
    levels: Tensor | None = None
    stored: dict[str, Tensor] = field(default_factory=dict)
    codes: Tensor | None = None
    lowered: "Lowered | None" = None


@dataclass(frozen=True, kw_only=True, eq=False)
class Lowered:
    """Numbers of fewer bits under powers of two: x[n, k] = narrow number[n, k] * 2**-shift[k].

    narrow: qparams of the numbers of fewer bits.  shift: octaves, one a column.
    """

    narrow: QParams
    shift: tuple[int, ...]


def tiles(x: Tensor, granularity: Granularity) -> tuple[Tensor, tuple[int, ...]]:
    """View of x in which the elements of one tile lie along the returned dimensions.

    x: [..., K]; [N, K] for blocks of several rows.  Raises SpecError if the tile does not divide the shape.
    """
    if granularity.columns == ALL:
        return (x, tuple(range(x.dim()))) if granularity.rows == ALL else (x.unsqueeze(-2), (-1,))
    divides = x.dim() > 0 and x.shape[-1] % granularity.columns == 0
    if granularity.rows != 1:
        divides = divides and x.dim() == 2 and x.shape[0] % granularity.rows == 0
    if not divides:
        shape = "[..., K]" if granularity.rows == 1 else "[N, K]"
        raise SpecError(
            f"granularity {granularity.name!r} needs {shape} that divides by "
            f"{granularity.rows} x {granularity.columns}, got shape {list(x.shape)}; take a smaller group"
        )
    view = x.unflatten(-1, (-1, granularity.columns))
    return (view, (-1,)) if granularity.rows == 1 else (view.unflatten(0, (-1, granularity.rows)), (1, 3))


def over_tiles(parameter: Tensor, granularity: Granularity) -> Tensor:
    """A scale or zero point in the shape that broadcasts over `tiles(x)`."""
    if granularity.rows == ALL:
        return parameter
    return parameter.unsqueeze(-1) if granularity.rows == 1 else parameter[:, None, :, None]


def find_qparams(x: Tensor, spec: Spec, *, clip: Tensor | float = 1.0) -> QParams:
    """Scale (and zero point) that cover the range of each tile of x.

    x: floating, any shape that the tiles divide.  clip: multiplies the range, a number or shaped like the scale.
    A tile of zeros gets a positive scale. A tile with NaN or Inf gets a scale that is not finite, so that it
    propagates. Raises SpecError if the tiles do not divide x.
    """
    # extremes in the dtype of a narrow x may be rounded in one kernel that a compiler makes of this and not in another:
    # codes found with one scale would then meet another
    view, dims = tiles(x.float(), spec.granularity)
    qparams = qparams_of_range(view.amin(dims), view.amax(dims), spec, clip=clip)
    if not isinstance(spec.format, CodeBook) or spec.format.levels is not None:
        return qparams
    scaled = view / over_tiles(qparams.scale, spec.granularity)
    return replace(qparams, levels=learned_levels(spec.format, scaled))


def qparams_of_range(low: Tensor, high: Tensor, spec: Spec, *, clip: Tensor | float = 1.0) -> QParams:
    """Scale (and zero point) for values between low and high, without the levels of a learned code book.

    low, high: float32, shaped like the scale.  clip: as for `find_qparams`.
    """
    if spec.symmetric:
        amax = torch.maximum(high, -low)
        scale = over(clip * amax, -spec.code_range[0] if spec.zero is Zero.FULL else spec.format.max)
    else:
        if not spec.free_minimum:
            # 0 belongs to the range, so that padding and dead weights stay exactly 0
            low, high = low.clamp(max=0.0), high.clamp(min=0.0)
        amax = high - low
        scale = over(clip * amax, spec.code_range[1])
    scale = torch.where(scale == 0, 1.0, scale.clamp(min=SMALLEST_SCALE))
    if spec.zero is Zero.FULL:
        # the end that reaches further gets the code that the other lacks
        scale = torch.where(high > -low, -scale, scale)
    below = -clip * low if spec.zero is Zero.CODE else None
    scale, stored = keep_scale(scale, spec.scale, amax, _element_max(spec), clip, below)
    if spec.zero is Zero.MINIMUM:
        minimum, more = keep_minimum(clip * low, spec.scale)
        return QParams(spec=spec, scale=scale, zero=minimum, stored=stored | more)
    zero = None if below is None else (below / scale).round().clamp(*spec.code_range)
    return QParams(spec=spec, scale=scale, zero=zero, stored=stored)


def _element_max(spec: Spec) -> float:
    # a code book may end at a power of two, and the one at or below amax would cover half of the tile: just below it
    return spec.format.max * (1 - 2.0**-24) if isinstance(spec.format, CodeBook) else spec.format.max


def over_dimensions(qparams: QParams, dims: int) -> QParams:
    """The qparams of a weight [N, K] for the same weight when K is spread over dims - 1 dimensions.

    qparams: of one scale a tensor, or one a row, [N, 1], which becomes [N, 1, ..., 1].
    """
    if dims == 2 or qparams.spec.granularity.rows == ALL:
        return qparams
    shape = (-1, *[1] * (dims - 1))
    zero = None if qparams.zero is None else qparams.zero.reshape(shape)
    return replace(qparams, scale=qparams.scale.reshape(shape), zero=zero)


def quantize(x: Tensor, qparams: QParams) -> Tensor:
    """Codes of x: the nearest number of the format for x / scale + zero, clipped to its range.

    x: floating.  Returns int8 for symmetric integers, uint8 for all else, one code an element, shape of x.
    The division is exact division, not a multiplication with the inverse (they differ at ties).
    NaN under a finite scale has no defined code: only qparams found from x itself propagate it.
    Where a solver chose the codes, they are those.  Raises SpecError if it did for a tensor of another shape.
    """
    spec = qparams.spec
    if qparams.codes is not None:
        if qparams.codes.shape != x.shape:
            raise SpecError(
                f"these qparams hold the codes of a tensor {list(qparams.codes.shape)}, got {list(x.shape)}; "
                "find others for it"
            )
        return qparams.codes.to(x.device)
    view, _ = tiles(x.float(), spec.granularity)
    if qparams.zero is not None and spec.zero is Zero.MINIMUM:
        view = view - over_tiles(qparams.zero, spec.granularity)
    scaled = view / over_tiles(qparams.scale, spec.granularity)
    if not isinstance(spec.format, Integer):
        return encode(scaled, spec.format, qparams.levels).reshape(x.shape)
    codes = scaled.round()
    if qparams.zero is not None and spec.zero is Zero.CODE:
        codes = codes + over_tiles(qparams.zero, spec.granularity)
    return codes.clamp(*spec.code_range).to(code_dtype(spec)).reshape(x.shape)


def code_dtype(spec: Spec) -> torch.dtype:
    """What holds one code: int8 for symmetric integers, uint8 for all else."""
    return torch.int8 if spec.symmetric and isinstance(spec.format, Integer) else torch.uint8


def dequantize(codes: Tensor, qparams: QParams, dtype: torch.dtype = torch.float32) -> Tensor:
    """The numbers that codes stand for, computed in float32 and rounded once to dtype.  Shape of codes."""
    spec = qparams.spec
    if isinstance(spec.format, Integer):
        values = codes.float()
    else:
        values = decode(codes, spec.format, qparams.levels)
    view, _ = tiles(values, spec.granularity)
    scale = over_tiles(qparams.scale, spec.granularity)
    if qparams.zero is None:
        view = view * scale
    elif spec.zero is Zero.MINIMUM:
        view = view * scale + over_tiles(qparams.zero, spec.granularity)
    else:
        view = (view - over_tiles(qparams.zero, spec.granularity)) * scale
    return view.reshape(codes.shape).to(dtype)


def rounded(x: Tensor, qparams: QParams) -> Tensor:
    """dequantize(quantize(x)) in fewer steps, to try many qparams: of integers no codes are made.

    x: floating.  Returns float32, shape of x.
    """
    spec = qparams.spec
    if qparams.codes is not None or not isinstance(spec.format, Integer):
        return dequantize(quantize(x, qparams), qparams)
    view, _ = tiles(x.float(), spec.granularity)
    scale = over_tiles(qparams.scale, spec.granularity)
    zero = None if qparams.zero is None else over_tiles(qparams.zero, spec.granularity)
    if zero is None:
        made = view.div(scale).round_().clamp_(*spec.code_range).mul_(scale)
    elif spec.zero is Zero.MINIMUM:
        made = view.sub(zero).div_(scale).round_().clamp_(*spec.code_range).mul_(scale).add_(zero)
    else:
        made = view.div(scale).round_().add_(zero).clamp_(*spec.code_range).sub_(zero).mul_(scale)
    return made.reshape(x.shape)


def fake_quantize(x: Tensor, spec: Spec) -> Tensor:
    """x rounded to what `spec` can hold: dequantize(quantize(x)).  Same shape and dtype as x."""
    qparams = find_qparams(x, spec)
    return dequantize(quantize(x, qparams), qparams, x.dtype)


def encode(x: Tensor, fmt: Float | CodeBook, levels: Tensor | None = None) -> Tensor:
    """Code of the number of the format nearest to x, clipped to its range; ties as the module states.

    x: float32.  levels: of a learned code book.  Returns uint8, shape of x.
    NaN becomes the format's NaN where it has one, else the largest value: callers propagate it by the scale.
    """
    if isinstance(fmt, CodeBook):
        return _encode_learned(x, levels) if fmt.levels is None else _encode_fixed(x, fmt.levels)
    if fmt.dtype is not None:
        # what a cast does beyond the range differs by dtype, device and version
        return x.clamp(-fmt.max, fmt.max).to(fmt.dtype).view(torch.uint8)
    # the comparison sends NaN to the largest value, too
    magnitude = torch.where(x.abs() < fmt.max, x.abs(), fmt.max)
    # exponent code of the binade; the lowest one holds the subnormals, equally spaced with its normal numbers
    p = ((magnitude.view(torch.int32) >> 23) - FLOAT32_BIAS + fmt.bias).clamp(min=1)
    step = exact_exp2(p - fmt.mantissa - fmt.bias)
    # rounding up to the next binade carries into the exponent code by itself
    code = ((p - 1) << fmt.mantissa) + (magnitude / step).round().to(torch.int32)
    return (code + (torch.signbit(x).to(torch.int32) << (fmt.bits - 1))).to(torch.uint8)


def _encode_fixed(x: Tensor, levels: Sequence[float]) -> Tensor:
    # of equal levels the lowest code is used
    codes = {level: code for code, level in reversed(list(enumerate(levels)))}
    ordered = sorted(codes)
    edges = [(a + b) / 2 for a, b in pairwise(ordered)]
    order = torch.tensor([codes[level] for level in ordered], dtype=torch.uint8, device=x.device)
    return order[torch.bucketize(x.contiguous(), torch.tensor(edges, dtype=torch.float32, device=x.device))]


def _encode_learned(x: Tensor, levels: Tensor | None) -> Tensor:
    assert levels is not None, "a learned code book needs the levels of its qparams"
    return torch.bucketize(x.contiguous(), (levels[1:] + levels[:-1]) / 2).to(torch.uint8)


def decode(codes: Tensor, fmt: Float | CodeBook, levels: Tensor | None = None) -> Tensor:
    """The float32 number of each code; what is no number gives NaN, or Inf for the two codes of E5M2 that mean it.

    codes: uint8.  levels: of a learned code book.
    """
    if isinstance(fmt, Float) and fmt.dtype is not None:
        return codes.view(fmt.dtype).float()
    values = code_values(fmt).to(codes.device) if levels is None else levels
    return values[codes.long()]


def exact_exp2(octaves: Tensor) -> Tensor:
    """2**octaves to the last bit on every device, where exp2 may round.

    octaves: integers from -126 to 127, any shape.  Returns float32, shaped alike.
    """
    return ((octaves.to(torch.int32) + FLOAT32_BIAS) << 23).view(torch.float32)


def exponent_bias(scale: Tensor, fmt: Float) -> Tensor:
    """The real-valued exponent bias that is the same as `scale`: values are 2**-bias times those of bias 0.

    scale: > 0.  Returns float64, shaped like scale, so that `scale_of_bias` gives the float32 scale back exactly.
    Source: Kuzmin 2022 (FP8 Quantization: The Power of the Exponent); LLM-FP4.
    """
    return fmt.bias - scale.double().log2()


def scale_of_bias(bias: Tensor, fmt: Float) -> Tensor:
    """The float32 scale that is the same as the real-valued exponent bias `bias`, see `exponent_bias`."""
    return torch.exp2(fmt.bias - bias.double()).float()


def snr_db(reference: Tensor, approximation: Tensor) -> float:
    """Signal-to-noise ratio in dB: 10 log10(sum reference**2 / sum (reference - approximation)**2)."""
    parts = zip(reference.reshape(-1).split(_PART), approximation.reshape(-1).split(_PART), strict=True)
    sums = [(a.double().square().sum(), (a.double() - b.double()).square().sum()) for a, b in parts]
    signal, noise = (torch.stack(terms).sum() for terms in zip(*sums, strict=True))
    # NaN is no number without noise
    return float("inf") if noise == 0 else float(10 * torch.log10(signal / noise))


def widened(qparams: QParams, octaves: float) -> QParams:
    """Qparams whose range is wider by so many octaves, below 0 narrower.  qparams: with float32 scales, symmetric."""
    if octaves == 0:
        return qparams
    scale = qparams.scale * 2.0**octaves
    # what is stored of a float32 scale is the scale
    return replace(qparams, scale=scale, stored={"scale": scale})


def on_device(qparams: QParams, device: torch.device) -> QParams:
    """The same qparams there; codes stay where they are, and `quantize` brings them."""
    if qparams.scale.device == device:
        return qparams
    return replace(
        qparams,
        scale=qparams.scale.to(device),
        zero=None if qparams.zero is None else qparams.zero.to(device),
        levels=None if qparams.levels is None else qparams.levels.to(device),
        stored={name: tensor.to(device) for name, tensor in qparams.stored.items()},
    )
