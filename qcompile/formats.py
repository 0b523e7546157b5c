"""Formats: which numbers exist, and what memory holds them.

A format is a finite set of numbers, each with a code. Everything else (who shares a scale, how the
scale is kept) is a spec's business, see `qcompile.spec`. To add a format, add a line to `FORMATS`.
Source: OCP 8-bit and Microscaling specifications v1.0; QLoRA (Dettmers 2023) for NF4;
bitsandbytes for its FP4 and dynamic map; ggml for IQ4_NL; Kuzmin 2022 for floats that reserve no code.
"""

import math
import re
from dataclasses import dataclass
from itertools import pairwise
from statistics import NormalDist

import torch
from torch import Tensor

from qcompile.errors import SpecError, nearest


@dataclass(frozen=True, kw_only=True)
class Integer:
    """Two's complement integers of `bits` bits."""

    bits: int

    @property
    def name(self) -> str:
        return f"int{self.bits}"

    @property
    def max(self) -> float:
        """Largest magnitude of the symmetric range; -2**(bits-1) is left out so that -x has a code."""
        return float(2 ** (self.bits - 1) - 1)


@dataclass(frozen=True, kw_only=True)
class Float:
    """Sign, exponent, mantissa, with subnormals: `2**(p-bias) * (1 + f / 2**mantissa)` for exponent code p >= 1.

    bias is whole; a real-valued one is the same thing as a scale, see `qcompile.numerics.exponent_bias`.
    """

    name: str
    exponent: int
    mantissa: int
    bias: int
    # how many of the largest magnitudes stand for NaN or Inf
    reserved: int = 0
    # AMD's FNUZ: the code of -0 is the only NaN
    negative_zero_is_nan: bool = False
    dtype: torch.dtype | None = None

    @property
    def bits(self) -> int:
        return 1 + self.exponent + self.mantissa

    @property
    def finite(self) -> int:
        """How many codes without sign stand for a number: 0 to finite - 1."""
        return 2 ** (self.exponent + self.mantissa) - self.reserved

    @property
    def max(self) -> float:
        return self._value(self.finite - 1)

    @property
    def step(self) -> float:
        """The smallest positive value, of which all are whole multiples."""
        return 2.0 ** (1 - self.bias - self.mantissa)

    @property
    def magnitudes(self) -> tuple[float, ...]:
        """The finite non-negative values, by code."""
        return tuple(self._value(code) for code in range(self.finite))

    def _value(self, code: int) -> float:
        p, f = divmod(code, 2**self.mantissa)
        fraction = f / 2**self.mantissa
        return 2.0 ** (1 - self.bias) * fraction if p == 0 else 2.0 ** (p - self.bias) * (1 + fraction)


@dataclass(frozen=True, kw_only=True)
class CodeBook:
    """Any 2**bits numbers. `levels` is None when each tensor learns its own (kept in its qparams).

    levels: by code; learned ones in [-1, 1]. Their order is part of the format: stored codes of others can be read.
    """

    name: str
    bits: int
    levels: tuple[float, ...] | None

    @property
    def max(self) -> float:
        """Largest magnitude."""
        return 1.0 if self.levels is None else max(map(abs, self.levels))


Format = Integer | Float | CodeBook


def normal_float_levels(bits: int = 4) -> tuple[float, ...]:
    """NormalFloat: quantiles of N(0, 1) with an exact zero, largest 1. Source: QLoRA, appendix E."""
    half = 2 ** (bits - 1)
    # the mean of the two ends' distances to the tails, in seven digits as in the paper's code
    edge = round(((1 - 1 / (4 * half)) + (1 - 1 / (4 * half - 2))) / 2, 7)
    quantile = NormalDist().inv_cdf

    def side(count: int) -> list[float]:
        step = (edge - 0.5) / count
        return [quantile(edge - i * step) for i in range(count)]

    positive, negative = side(half), side(half - 1)
    top = positive[0]
    return tuple([-v / top for v in negative] + [0.0] + [v / top for v in reversed(positive)])


def dynamic_levels(bits: int = 8) -> tuple[float, ...]:
    """The dynamic (tree) map: decades of equally spaced fractions. Source: Dettmers 2015; bitsandbytes."""
    levels = [0.0, 1.0]
    decades = bits - 1
    for i in range(decades):
        count = 2**i
        edges = [0.1 + 0.9 * j / count for j in range(count + 1)]
        fractions = [(a + b) / 2 for a, b in pairwise(edges)]
        levels += [sign * f * 10.0 ** (i - decades + 1) for f in fractions for sign in (1, -1)]
    return tuple(sorted(levels))


def linear_levels(bits: int = 8) -> tuple[float, ...]:
    """Equally spaced in [-1, 1]; the spare code repeats the zero, in the middle.  Source: bitsandbytes."""
    q = 2 ** (bits - 1) - 1
    return tuple([i / q for i in range(-q, 1)] + [i / q for i in range(q + 1)])


# bitsandbytes' order of codes, in twelfths; bit 3 is the sign
_BNB_FP4 = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)

# without a zero: the nearest number is 1
_IQ4_NL = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)

_TABLE: tuple[Format, ...] = (
    *(Integer(bits=b) for b in range(2, 9)),
    Float(name="fp8_e4m3", exponent=4, mantissa=3, bias=7, reserved=1, dtype=torch.float8_e4m3fn),
    Float(name="fp8_e5m2", exponent=5, mantissa=2, bias=15, reserved=4, dtype=torch.float8_e5m2),
    Float(name="fp8_e4m3fnuz", exponent=4, mantissa=3, bias=8, negative_zero_is_nan=True, dtype=torch.float8_e4m3fnuz),
    Float(name="fp8_e5m2fnuz", exponent=5, mantissa=2, bias=16, negative_zero_is_nan=True, dtype=torch.float8_e5m2fnuz),
    Float(name="fp8_e3m4", exponent=3, mantissa=4, bias=4),
    Float(name="fp8_e2m5", exponent=2, mantissa=5, bias=2),
    Float(name="fp6_e3m2", exponent=3, mantissa=2, bias=3),
    Float(name="fp6_e2m3", exponent=2, mantissa=3, bias=1),
    Float(name="fp4_e2m1", exponent=2, mantissa=1, bias=1),
    Float(name="fp4_e1m2", exponent=1, mantissa=2, bias=0),
    Float(name="fp4_e3m0", exponent=3, mantissa=0, bias=3),
    CodeBook(name="nf4", bits=4, levels=normal_float_levels(4)),
    CodeBook(name="bnb_fp4", bits=4, levels=tuple(v / 12 for v in _BNB_FP4) + tuple(0.0 - v / 12 for v in _BNB_FP4)),
    CodeBook(name="dynamic8", bits=8, levels=dynamic_levels(8)),
    CodeBook(name="linear8", bits=8, levels=linear_levels(8)),
    CodeBook(name="iq4_nl", bits=4, levels=tuple(map(float, _IQ4_NL))),
    *(CodeBook(name=f"quantile{b}", bits=b, levels=None) for b in range(2, 9)),
    *(CodeBook(name=f"lloyd{b}", bits=b, levels=None) for b in range(2, 9)),
)
FORMATS: dict[str, Format] = {f.name: f for f in _TABLE}

_FREE_FLOAT = re.compile(r"e([1-7])m([0-6])")


def parse_format(name: str) -> Format:
    """The format called `name`: one of `FORMATS`, or any float as "e3m2" (no code reserved, bias 2**(e-1)).

    Raises SpecError with the nearest known names.
    """
    if name in FORMATS:
        return FORMATS[name]
    if match := _FREE_FLOAT.fullmatch(name):
        exponent, mantissa = int(match[1]), int(match[2])
        if 2 <= exponent + mantissa <= 7:
            return Float(name=name, exponent=exponent, mantissa=mantissa, bias=2 ** (exponent - 1))
    raise SpecError(
        f"unknown format {name!r}; nearest: {nearest(name, FORMATS)}; "
        "any other float of 3 to 8 bits is written by its bits, like 'e3m2'"
    )


def code_values(fmt: Format) -> Tensor:
    """The number that each code stands for.  Returns float32 [2**bits]; NaN where a code is no number.

    Integers: two's complement. Raises SpecError for a code book that is learned from each tensor.
    """
    match fmt:
        case Integer():
            codes = torch.arange(2**fmt.bits)
            return torch.where(codes < 2 ** (fmt.bits - 1), codes, codes - 2**fmt.bits).float()
        case Float():
            half = list(fmt.magnitudes) + [math.nan] * fmt.reserved
            negative = [-v for v in half]
            if fmt.negative_zero_is_nan:
                negative[0] = math.nan
            return torch.tensor(half + negative, dtype=torch.float32)
        case CodeBook(levels=None):
            raise SpecError(f"{fmt.name} is learned from each tensor: its values stand in the qparams")
        case CodeBook():
            return torch.tensor(fmt.levels, dtype=torch.float32)
