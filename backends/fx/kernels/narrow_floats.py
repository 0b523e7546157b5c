"""Floats of fewer bits as bits of E4M3, whose tensor cores then multiply them exactly.

A float of e <= 4 exponent and m <= 3 mantissa bits that reserves no code becomes E4M3 by moving its magnitude's bits up
to the top of E4M3's mantissa: normal and subnormal numbers alike stand for 2**(bias - 7) of what they were. That is
the lower end of E4M3; channels that are to be lowered by octaves start from its upper end.
"""

import torch
from torch import Tensor

from qcompile.formats import Float, Format, parse_format
from qcompile.numerics import exact_exp2
from qcompile.shifts import raised

_E4M3 = parse_format("fp8_e4m3")
assert isinstance(_E4M3, Float)
_EXPONENT, _MANTISSA, _BIAS = _E4M3.exponent, _E4M3.mantissa, _E4M3.bias


def is_narrow(fmt: Format) -> bool:
    """Whether E4M3 holds the numbers of this float of fewer bits."""
    if not isinstance(fmt, Float) or fmt.bits >= 8 or fmt.reserved or fmt.negative_zero_is_nan:
        return False
    return fmt.exponent <= _EXPONENT and fmt.mantissa <= _MANTISSA and fmt.max * factor(fmt) ** -1 <= _E4M3.max


def factor(fmt: Format) -> float:
    """What numbers of E4M3 that `widened` makes are multiplied by to be those of the format."""
    assert isinstance(fmt, Float)
    return 2.0 ** (_BIAS - fmt.bias)


def widened(codes: Tensor, fmt: Format) -> Tensor:
    """Codes of a narrow float as the bits of E4M3, uint8."""
    assert isinstance(fmt, Float)
    magnitude = (codes & (2 ** (fmt.bits - 1) - 1)) << (_MANTISSA - fmt.mantissa)
    return magnitude | ((codes << (8 - fmt.bits)) & 128)


def lowered(codes: Tensor, fmt: Format, shift: Tensor) -> Tensor:
    """Codes [..., K] of a narrow float as bits of E4M3, uint8, of 2**(raised - shift[k]) times their numbers.

    shift: int8 [K], from 0 to `room`.
    """
    assert isinstance(fmt, Float)
    powers = exact_exp2(_BIAS - fmt.bias + raised(fmt) - shift.to(torch.int32))
    return (widened(codes, fmt).view(torch.float8_e4m3fn).float() * powers).to(torch.float8_e4m3fn).view(torch.uint8)
