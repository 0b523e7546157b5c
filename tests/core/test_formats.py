import math

import pytest
import torch

from qcompile.errors import SpecError
from qcompile.formats import (
    FORMATS,
    CodeBook,
    Float,
    Integer,
    code_values,
    dynamic_levels,
    linear_levels,
    normal_float_levels,
    parse_format,
)

# QLoRA, appendix E
NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
FIXED = [f for f in FORMATS.values() if not (isinstance(f, CodeBook) and f.levels is None)]


# numerics.md 1.2; OCP 8-bit Floating Point Specification v1.0, table 1
@pytest.mark.parametrize(
    ("name", "largest", "smallest_normal", "smallest", "code_of_largest"),
    [
        ("fp8_e4m3", 448, 2**-6, 2**-9, 0x7E),
        ("fp8_e5m2", 57344, 2**-14, 2**-16, 0x7B),
        ("fp8_e4m3fnuz", 240, 2**-7, 2**-10, 0x7F),
        ("fp8_e5m2fnuz", 57344, 2**-15, 2**-17, 0x7F),
        ("fp8_e3m4", 15.5, 2**-3, 2**-7, 0x7F),
        ("fp8_e2m5", 3.9375, 2**-1, 2**-6, 0x7F),
        ("fp6_e3m2", 28, 0.25, 0.0625, 0x1F),
        ("fp6_e2m3", 7.5, 1, 0.125, 0x1F),
        ("fp4_e2m1", 6, 1, 0.5, 0x7),
        ("fp4_e3m0", 16, 0.25, 0.25, 0x7),
    ],
)
def test_float_landmarks(name, largest, smallest_normal, smallest, code_of_largest):
    fmt = parse_format(name)
    assert isinstance(fmt, Float)
    values = code_values(fmt)
    assert fmt.max == largest == values[code_of_largest]
    assert fmt.magnitudes[1] == smallest == values[1]
    assert values[2**fmt.mantissa] == smallest_normal
    assert len(fmt.magnitudes) == fmt.finite == code_of_largest + 1


@pytest.mark.parametrize("fmt", [f for f in FIXED if isinstance(f, Float) and f.dtype], ids=lambda f: f.name)
def test_every_code_has_the_value_of_torchs_dtype(fmt):
    values, expected = code_values(fmt), torch.arange(256, dtype=torch.uint8).view(fmt.dtype).float()
    # Inf is no number either
    expected = torch.where(expected.isinf(), torch.nan, expected)
    assert torch.equal(values.nan_to_num(nan=-1e9), expected.nan_to_num(nan=-1e9))
    reserved = {"fp8_e4m3": 2, "fp8_e5m2": 8, "fp8_e4m3fnuz": 1, "fp8_e5m2fnuz": 1}
    assert int(values.isnan().sum()) == reserved[fmt.name]


def test_fnuz_codes_are_half_of_the_fn_values():
    ours, ocp = code_values(parse_format("fp8_e4m3fnuz")), code_values(parse_format("fp8_e4m3"))
    both = ~(ours.isnan() | ocp.isnan())
    assert int(both.sum()) == 256 - 3
    assert torch.equal(ours[both], ocp[both] / 2)


@pytest.mark.parametrize("fmt", FIXED, ids=lambda f: f.name)
def test_values_are_as_many_as_codes_and_reach_max(fmt):
    values = code_values(fmt)
    assert values.shape == (2**fmt.bits,)
    assert values.dtype == torch.float32
    finite = values[~values.isnan()]
    # the most negative integer is left out of the symmetric range
    largest = finite.max() if isinstance(fmt, Integer) else finite.abs().max()
    assert largest == fmt.max
    # ggml's book has 1 in its place
    assert (finite == 0).any() or fmt.name == "iq4_nl"


@pytest.mark.parametrize("fmt", [f for f in FIXED if isinstance(f, Float)], ids=lambda f: f.name)
def test_floats_are_odd_and_ascending(fmt):
    positive, negative = code_values(fmt).chunk(2)
    finite = fmt.finite
    assert (positive[:finite].diff() > 0).all()
    assert torch.equal(positive[1:finite], -negative[1:finite])
    unreserved = 2 ** (fmt.bits - 1)
    assert len(set(code_values(fmt)[~code_values(fmt).isnan()].tolist())) == 2 * finite - 1
    assert finite == unreserved - fmt.reserved


def test_integers_are_twos_complement():
    assert code_values(Integer(bits=2)).tolist() == [0, 1, -2, -1]
    assert torch.equal(code_values(Integer(bits=8)), torch.arange(256).to(torch.uint8).view(torch.int8).float())


def test_e1m2_is_the_int4_grid():
    step = parse_format("fp4_e1m2").magnitudes[1]
    assert [v / step for v in parse_format("fp4_e1m2").magnitudes] == list(range(8))


@pytest.mark.parametrize(("name", "ratio"), [("e2m1", 12), ("e1m2", 7), ("e3m0", 64), ("e3m4", 1984), ("e2m5", 252)])
def test_dynamic_range_of_floats_without_reserved_codes(name, ratio):
    fmt = parse_format(name)
    assert fmt.max / fmt.magnitudes[1] == ratio
    bits, mantissa = fmt.exponent, fmt.mantissa
    assert ratio == (2 - 2**-mantissa) * 2 ** (2**bits - 1) / 2 ** (1 - mantissa)


def test_every_free_float_parses_and_no_other():
    names = {f"e{e}m{m}" for e in range(9) for m in range(9)}
    for name in sorted(names):
        exponent, mantissa = int(name[1]), int(name[3])
        if exponent >= 1 and 2 <= exponent + mantissa <= 7:
            fmt = parse_format(name)
            assert (fmt.bits, fmt.bias, fmt.reserved) == (1 + exponent + mantissa, 2 ** (exponent - 1), 0)
            assert math.isfinite(fmt.max)
        else:
            with pytest.raises(SpecError, match="unknown format"):
                parse_format(name)


def test_nf4_reproduces_the_published_constants():
    assert normal_float_levels(4) == pytest.approx(NF4, abs=1.2e-7)
    assert normal_float_levels(4)[7] == 0.0


def test_bnb_fp4_codes_run_as_in_bitsandbytes():
    expected = [0, 0.0052083333, 0.66666667, 1, 0.33333333, 0.5, 0.16666667, 0.25]
    values = code_values(parse_format("bnb_fp4")).tolist()
    assert values[:8] == pytest.approx(expected)
    assert values[8:] == pytest.approx([-v for v in expected])


def test_dynamic_map_facts():
    levels = dynamic_levels(8)
    assert len(set(levels)) == 256
    assert (sum(v < 0 for v in levels), sum(v > 0 for v in levels)) == (127, 128)
    assert levels[0] == pytest.approx(-0.99297, abs=1e-5)
    assert levels[-1] == 1.0
    assert min(abs(v) for v in levels if v) == pytest.approx(5.5e-7)


def test_linear_map_repeats_its_zero():
    levels = linear_levels(8)
    assert len(levels) == 256
    assert levels[127] == levels[128] == 0.0
    equal = torch.linspace(-1, 1, 255).tolist()
    assert levels == pytest.approx([*equal[:127], 0, *equal[127:]], abs=1e-6)


@pytest.mark.parametrize(("name", "wanted"), [("fp8_e4m4", "'fp8_e4m3'"), ("itn4", "'int4'"), ("nf5", "'nf4'")])
def test_unknown_format_names_the_nearest(name, wanted):
    with pytest.raises(SpecError, match=f"unknown format '{name}'; nearest: .*{wanted}.*like 'e3m2'"):
        parse_format(name)


def test_learned_code_book_has_no_values_of_its_own():
    with pytest.raises(SpecError, match="lloyd4 is learned from each tensor"):
        code_values(parse_format("lloyd4"))
