"""How ONNX stores what a spec makes: the types of codes, packed constants, and scales as small as they are.

A type that ONNX lacks (or the target cannot hold) is stored as plain unsigned codes, and read through a table.
"""

from typing import Any

import numpy as np
import onnx_ir as ir

from qcompile.backends.onnx.operands import Array
from qcompile.backends.onnx.writer import Writer
from qcompile.formats import Float, Format, Integer
from qcompile.spec import Spec

_D = ir.DataType

# by bits, signed and unsigned; the next wider type holds what has none of its own
_INTEGERS = {
    True: {2: _D.INT2, 3: _D.INT4, 4: _D.INT4, **dict.fromkeys(range(5, 9), _D.INT8)},
    False: {2: _D.UINT2, 3: _D.UINT4, 4: _D.UINT4, **dict.fromkeys(range(5, 9), _D.UINT8)},
}
# codes of these are the bits of the ONNX type
_FLOATS = {
    "fp8_e4m3": _D.FLOAT8E4M3FN,
    "fp8_e5m2": _D.FLOAT8E5M2,
    "fp8_e4m3fnuz": _D.FLOAT8E4M3FNUZ,
    "fp8_e5m2fnuz": _D.FLOAT8E5M2FNUZ,
    "fp4_e2m1": _D.FLOAT4E2M1,
}
_SCALES = {"fp16": _D.FLOAT16, "bf16": _D.BFLOAT16, "u4row": _D.BFLOAT16, "e8m0": _D.FLOAT8E8M0}
_E4M3 = _D.FLOAT8E4M3FN.numpy()


def integer_type(bits: int, signed: bool) -> ir.DataType:
    """The narrowest ONNX integer that holds `bits` bits."""
    return _INTEGERS[signed][bits]


def code_type(fmt: Format, symmetric: bool, writer: Writer) -> ir.DataType | None:
    """The ONNX type whose numbers are those of the format; None if there is none, or the target cannot hold it."""
    if isinstance(fmt, Integer):
        dtype: ir.DataType | None = integer_type(fmt.bits, symmetric)
    else:
        dtype = _FLOATS.get(fmt.name) if isinstance(fmt, Float) else None
    return None if dtype in writer.lacks else dtype


def typed(codes: Array, dtype: ir.DataType) -> ir.Tensor:
    """Codes, one a byte, as a tensor of that type: integers keep their value, floats their bits."""
    target = dtype.numpy()
    if dtype.is_floating_point():
        return ir.Tensor(np.ascontiguousarray(codes.astype(np.uint8)).view(target), dtype)
    return ir.Tensor(np.ascontiguousarray(codes).astype(target), dtype)


def code_constant(writer: Writer, name: str, codes: Array, spec: Spec) -> tuple[ir.Value, bool]:
    """Codes of any shape as an initializer, and whether its type gives their numbers without a table."""
    dtype = code_type(spec.format, spec.symmetric, writer)
    if dtype is not None:
        return writer.constant(name, typed(codes, dtype)), True
    return writer.constant(name, typed(codes, integer_type(spec.format.bits, signed=False))), False


def is_whole(zero: Array | None) -> bool:
    """Whether zero points are whole numbers, as all integer ops of ONNX need them."""
    return zero is None or bool((zero == np.round(zero)).all())


def scale_constant(writer: Writer, name: str, scale: Array, spec: Spec) -> ir.Value:
    """The float32 scale, bit for bit, stored as the spec keeps it where ONNX can: 16 or 8 bits and a Cast.

    scale: any shape.  A runtime folds the Cast when it loads the file.
    """
    if spec.scale == "fp8_e4m3" and (found := split_scale(scale)) is not None:
        codes, outer = found
        stored = writer.constant(name, ir.Tensor(codes, _D.FLOAT8E4M3FN))
        return writer.op("Mul", writer.cast(stored, _D.FLOAT), writer.number(float(outer)))
    dtype = _SCALES.get(spec.scale)
    if dtype is None or dtype in writer.lacks:
        return writer.constant(name, ir.Tensor(scale, _D.FLOAT))
    narrow = scale.astype(dtype.numpy())
    if not np.array_equal(narrow.astype(np.float32), scale):
        return writer.constant(name, ir.Tensor(scale, _D.FLOAT))
    return writer.cast(writer.constant(name, ir.Tensor(narrow, dtype)), _D.FLOAT)


def split_scale(scale: Array) -> tuple[Array, np.float32] | None:
    """E4M3 numbers and the one float32 whose product is `scale`, bit for bit; None if there are none.

    The plan keeps only the product. The largest block has one of 126 E4M3 numbers, and rounding moved the product
    by at most half a step, so few factors can be the one.
    """
    top = scale.max(initial=0)
    if not (np.isfinite(scale).all() and top > 0):
        return None
    numbers = np.arange(1, 127, dtype=np.uint8).view(_E4M3).astype(np.float32)[::-1]
    # most factors fail on a few scales already
    sample = scale.ravel()[:256]
    for number in numbers:
        middle = np.float32(top / number)
        for outer in (middle, np.nextafter(middle, np.float32(0)), np.nextafter(middle, np.float32(np.inf))):
            if _splits(sample, outer) and _splits(scale, outer):
                return (scale / outer).astype(_E4M3), outer
    return None


def _splits(scale: Array, outer: np.float32) -> bool:
    inner = (scale / outer).astype(_E4M3).astype(np.float32)
    return bool(np.array_equal(inner * outer, scale))


def lift(fmt: Format, levels: Array) -> tuple[Array, float] | None:
    """Each code's number times a power of two as an int8, and that power's inverse; None if they do not fit.

    So E2M1 (0, 0.5 ... 6) becomes 0, 1 ... 12 and 0.5: integer kernels multiply it exactly.
    """
    finite = levels[np.isfinite(levels)]
    for exponent in range(8):
        whole = finite * 2.0**exponent
        if np.abs(whole).max() > 127:
            return None
        if (whole == np.round(whole)).all():
            table = np.where(np.isfinite(levels), levels, 0) * 2.0**exponent
            return table.astype(np.int8), 2.0**-exponent
    return None


def pack_bytes(codes: Array, bits: int) -> Array:
    """Codes [..., n] as dense bytes [..., ceil(n * bits / 8)], low bits first, for bits that divide 8."""
    count = 8 // bits
    padded = np.pad(codes, [(0, 0)] * (codes.ndim - 1) + [(0, -codes.shape[-1] % count)])
    fields: Array = padded.reshape(*padded.shape[:-1], -1, count).astype(np.uint8)
    shifts: Any = np.arange(0, 8, bits, dtype=np.uint8)
    packed: Array = (fields << shifts).sum(-1, dtype=np.uint8)
    return packed
