import pytest
import torch

from qcompile.errors import SpecError
from qcompile.formats import Integer, parse_format
from qcompile.numerics import tiles
from qcompile.spec import ALL, Granularity, Spec, Zero, by_channel, parse_granularity, parse_spec, with_format


@pytest.mark.parametrize(
    "text",
    [
        *("int8/token", "int4/g128/asym/bf16", "fp4_e2m1/b32/e8m0", "fp4_e2m1/b16/fp8_e4m3", "nf4/g64/dq256"),
        *("int4/b32/full/fp16", "int4/b32/min/u6x8", "int6/b16/full/i8x16", "iq4_nl/b32/fp16"),
        *("int4/g128/asym/u4row", "int3/g64/u4row"),
        *("int8/tensor/asym", "fp8_e4m3/b128x128", "lloyd4/channel/fp16", "e3m2/g32"),
    ],
)
def test_text_and_spec_are_one_to_one(text):
    assert str(parse_spec(text)) == text
    assert parse_spec(str(parse_spec(text))) == parse_spec(text)


def test_parts_may_stand_in_any_order_after_the_granularity():
    assert str(parse_spec("int4/g128/bf16/asym")) == "int4/g128/asym/bf16"
    assert parse_spec("int8/token/fp32") == parse_spec("int8/token")


def test_granularities():
    assert parse_granularity("tensor") == Granularity(name="tensor", rows=ALL, columns=ALL)
    assert (parse_granularity("channel").rows, parse_granularity("token").columns) == (1, ALL)
    assert parse_granularity("b128x64") == Granularity(name="b128x64", rows=128, columns=64)
    assert parse_granularity("g32").columns == parse_granularity("b32").columns == 32


@pytest.mark.parametrize("name", ["", "row", "g0", "g-1", "b0x8", "b8x0", "g1.5", "g32x32"])
def test_unknown_granularity_lists_the_known(name):
    with pytest.raises(SpecError, match=f"unknown granularity '{name}'; known: tensor, channel, token"):
        parse_granularity(name)


def test_spec_without_granularity_says_what_is_missing():
    with pytest.raises(SpecError, match=r"'int8' does not say who shares a scale; write for example 'int8/channel'"):
        parse_spec("int8")


@pytest.mark.parametrize("text", ["int8/token/asym/asym", "int8/token/bf16/fp16", "int8/token/asym/bf16/fp16"])
def test_too_many_parts(text):
    with pytest.raises(SpecError, match=r"has too many parts; the form is format/granularity\[/zero\]\[/scale\]"):
        parse_spec(text)


def test_unknown_scale_names_the_nearest():
    with pytest.raises(SpecError, match="unknown scale 'e8m1'; nearest: 'e8m0'"):
        parse_spec("int8/token/e8m1")


@pytest.mark.parametrize("name", ["fp8_e4m3", "nf4", "e2m1", "lloyd4"])
def test_only_integers_have_a_zero_point(name):
    with pytest.raises(SpecError, match=f"'asym' belongs to integers only: {name} has no zero point"):
        parse_spec(f"{name}/channel/asym")


def test_a_power_of_two_scale_has_no_zero_point():
    with pytest.raises(SpecError, match="leave out 'asym'"):
        parse_spec("int8/b32/asym/e8m0")


def test_unknown_format_in_a_spec():
    with pytest.raises(SpecError, match="unknown format 'int9'"):
        parse_spec("int9/channel")


@pytest.mark.parametrize(
    ("granularity", "shape"),
    [("g128", [4, 130]), ("b3x2", [4, 4]), ("b2x3", [4, 4]), ("b2x2", [2, 4, 4]), ("g4", [])],
)
def test_a_tile_that_does_not_divide_names_the_shape(granularity, shape):
    with pytest.raises(SpecError, match="take a smaller group") as raised:
        tiles(torch.empty(shape), parse_granularity(granularity))
    assert granularity in str(raised.value)
    assert f"shape {shape}" in str(raised.value)


@pytest.mark.parametrize("bits", range(2, 9))
def test_code_range(bits):
    fmt, whole = Integer(bits=bits), parse_granularity("tensor")
    assert Spec(format=fmt, granularity=whole).code_range == (-fmt.max, fmt.max)
    for zero in (Zero.CODE, Zero.MINIMUM):
        assert Spec(format=fmt, granularity=whole, zero=zero).code_range == (0, 2**bits - 1)
    assert Spec(format=fmt, granularity=whole, zero=Zero.FULL).code_range == (-fmt.max - 1, fmt.max)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("int4/b32/full/u6x8", "'full' needs scales with a sign, got 'u6x8'; take fp32, fp16, bf16, i6x16"),
        ("int4/b32/full/dq256", "'full' needs scales with a sign"),
        ("int4/b32/min/dq256", "'min' needs scales that can be 0, got 'dq256'"),
        (
            "int4/channel/min/u6x8",
            "scales 'u6x8' belong to groups of a row, got 'channel'; write for example 'int4/g32",
        ),
        ("int4/channel/u4row", "scales 'u4row' belong to groups of a row, got 'channel'"),
        ("int8/g128/u4row", "int8 of integers of up to 4 bits, got 'int8'; take 'bf16'"),
        ("nf4/g64/u4row", "got 'nf4'"),
        ("int4/g128/min/u4row", "'min' needs scales that can be 0, got 'u4row'"),
        ("nf4/g32/min", "'min' belongs to integers only"),
        ("int4/b32/min/e8m0", "leave out 'min'"),
    ],
)
def test_zeros_and_scales_that_do_not_go_together(text, why):
    with pytest.raises(SpecError, match=why):
        parse_spec(text)


@pytest.mark.parametrize(
    ("text", "fmt", "made"),
    [
        ("int4/g64/asym/bf16", "nf4", "nf4/g64/bf16"),
        ("int4/g64/asym/u4row", "int3", "int3/g64/asym/u4row"),
        ("int4/g64/asym/u4row", "int5", "int5/g64/asym/bf16"),
        ("int4/g64/asym/u4row", "fp4_e2m1", "fp4_e2m1/g64/bf16"),
    ],
)
def test_another_format_takes_what_it_has_no_room_for_off(text, fmt, made):
    assert str(with_format(parse_spec(text), parse_format(fmt))) == made


def test_one_scale_a_channel_is_no_integer_of_several():
    for scale, kept in (("bf16", "/bf16"), ("u4row", ""), ("u6x8", "")):
        assert str(by_channel(parse_spec(f"int4/g32/{scale}"))) == f"int4/channel{kept}"


@pytest.mark.parametrize(
    ("text", "bits"),
    [
        ("int8/channel", 8 + 32 / 512),
        ("int4/g128/bf16", 4.125),
        ("int4/g128/asym/fp16", 4 + (16 + 8) / 128),
        ("fp4_e2m1/b32/e8m0", 4.25),
        ("fp4_e2m1/b16/fp8_e4m3", 4.5),
        ("nf4/g64/dq256", 4 + 0.126953125),
        ("fp8_e4m3/b128x128", 8 + 32 / 128**2),
        ("int8/tensor", 8 + 32 / (256 * 512)),
        # numerics.md 8
        *(("int4/b32/full/fp16", 4.5), ("int4/b32/min/fp16", 5), ("int5/b32/min/fp16", 6), ("int8/b32/fp16", 8.5)),
        *(("int2/b16/min/u4x16", 2.625), ("int3/b16/full/i6x16", 3.4375), ("int4/b32/min/u6x8", 4.5)),
        *(("int5/b32/min/u6x8", 5.5), ("int6/b16/full/i8x16", 6.5625), ("iq4_nl/b32/i6x8", 4.25)),
        ("int4/g128/asym/u4row", 4 + (4 + 8) / 128 + 16 / 512),
    ],
)
def test_bits_per_element(text, bits):
    assert parse_spec(text).bits_per_element(256, 512) == pytest.approx(bits)
