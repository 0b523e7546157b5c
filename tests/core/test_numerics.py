import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from qcompile.errors import SpecError
from qcompile.formats import FORMATS, CodeBook, Float, code_values, parse_format
from qcompile.numerics import (
    QParams,
    decode,
    dequantize,
    encode,
    exponent_bias,
    fake_quantize,
    find_qparams,
    over_dimensions,
    qparams_of_range,
    quantize,
    scale_of_bias,
    snr_db,
)
from qcompile.spec import SCALES, parse_spec

FLOATS = [f for f in FORMATS.values() if isinstance(f, Float)]
FREE = [parse_format(f"e{e}m{m}") for e in range(1, 8) for m in range(7) if 2 <= e + m <= 7]
BOOKS = [f for f in FORMATS.values() if isinstance(f, CodeBook) and f.levels is not None]
LEARNED = [f for f in FORMATS.values() if isinstance(f, CodeBook) and f.levels is None]
CODED = [*FLOATS, *FREE, *BOOKS]
SPECS = [
    *("int8/token", "int4/g16/asym/fp16", "int2/g16/bf16", "int3/channel/asym", "int8/b2x32", "int5/tensor"),
    *("fp8_e4m3/token", "fp8_e5m2/tensor", "fp8_e4m3fnuz/channel", "e3m2/g16/fp16", "fp4_e3m0/g32"),
    *("fp4_e2m1/b32/e8m0", "fp6_e2m3/b32/e8m0", "int8/b32/e8m0", "fp4_e2m1/b16/fp8_e4m3"),
    *("int4/b32/full/fp16", "int8/channel/full", "int6/b16/full/i8x16", "int3/b16/full/i6x16", "int4/g32/u6x8"),
    *("int4/g16/asym/u4row", "int3/g32/u4row"),
    *("nf4/g16", "nf4/g16/dq256", "nf4/b32/e8m0", "bnb_fp4/g16", "dynamic8/g32", "linear8/channel/bf16"),
]
# 0 has no code of its own
WITHOUT_ZERO = [
    *("int5/g16/min/fp16", "int4/b32/min/u6x8", "int2/b16/min/u4x16", "int3/g32/min/bf16", "int8/channel/min"),
    *("iq4_nl/b32/fp16", "iq4_nl/b32/i6x8"),
]


def under_float16(text: str) -> bool:
    scale = parse_spec(text).scale
    return scale == "fp16" or SCALES[scale].shared > 0


def every_finite_bf16() -> Tensor:
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).float()
    return bits[bits.isfinite()]


def data(seed: int, exponent: int = 0, rows: int = 4, columns: int = 64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    heavy = torch.randn(rows, columns, generator=generator) ** 3
    return heavy * 2.0**exponent


def nearest_code(x: Tensor, fmt: Float | CodeBook) -> Tensor:
    """By search among all numbers in float64: the nearest, ties to the even code, or as a code book's rule says."""
    levels = fmt.magnitudes if isinstance(fmt, Float) else fmt.levels
    assert levels is not None
    first = {level: code for code, level in reversed(list(enumerate(levels)))}
    ordered = torch.tensor(sorted(first), dtype=torch.float64)
    wanted = x.double().abs() if isinstance(fmt, Float) else x.double()
    wanted = wanted.clamp(ordered[0], ordered[-1])
    above = torch.searchsorted(ordered, wanted).clamp(1)
    down, up = wanted - ordered[above - 1], ordered[above] - wanted
    goes_up = up < down
    if isinstance(fmt, Float):
        # without mantissa bits the midpoint 1.5 * 2**k is rounded up, and half of the smallest number down
        even_is_above = above % 2 == 0 if fmt.mantissa else above > 1
        goes_up |= (up == down) & even_is_above
    index = torch.where(goes_up, above, above - 1)
    codes = torch.tensor([first[level] for level in sorted(first)])[index]
    return codes + (torch.signbit(x) * 2 ** (fmt.bits - 1) if isinstance(fmt, Float) else 0)


def kuzmin(x: Tensor, exponent: int, mantissa: int, bias: Tensor) -> Tensor:
    """The reference rule for a real-valued exponent bias, in float64 (Kuzmin 2022)."""
    largest = (2 - 2.0**-mantissa) * torch.exp2(2**exponent - 1 - bias)
    clipped = x.double().clamp(-largest, largest)
    p = (clipped.abs().log2() + bias).floor().clamp(min=1)
    step = torch.exp2(p - mantissa - bias)
    return step * (clipped / step).round()


@pytest.mark.parametrize("fmt", CODED, ids=lambda f: f.name)
def test_every_code_survives_decode_and_encode(fmt):
    codes = torch.arange(2**fmt.bits, dtype=torch.uint8)
    values = decode(codes, fmt)
    number = ~code_values(fmt).isnan()
    assert torch.equal(values[number], code_values(fmt)[number])
    assert not values[~number].isfinite().any()
    again = encode(values[number], fmt)
    assert torch.equal(decode(again, fmt), values[number])
    if isinstance(fmt, Float):
        assert torch.equal(again, codes[number])


@pytest.mark.parametrize("fmt", CODED, ids=lambda f: f.name)
def test_every_bf16_number_rounds_to_the_nearest(fmt):
    x = every_finite_bf16()
    assert x.numel() == 65280
    rounded, expected = decode(encode(x, fmt), fmt), code_values(fmt)[nearest_code(x, fmt)]
    # the code of -0 is NaN in FNUZ, which has only one zero
    same = rounded == expected.nan_to_num(nan=0.0)
    if isinstance(fmt, CodeBook):
        # a threshold and its two levels are rounded to float32: near it, either way is right
        wide = x.double()
        same |= ((wide - rounded).abs() - (wide - expected).abs()).abs() <= 2.0**-22 * wide.abs()
    assert same.all()


@pytest.mark.parametrize("fmt", [*FLOATS, *FREE], ids=lambda f: f.name)
def test_midpoints_go_to_the_even_significand(fmt):
    values = torch.tensor(fmt.magnitudes, dtype=torch.float64)
    middle = ((values[1:] + values[:-1]) / 2).float()
    x = torch.cat([middle, middle.nextafter(torch.tensor(0.0)), middle.nextafter(torch.tensor(math.inf))])
    assert torch.equal(encode(x, fmt).long(), nearest_code(x, fmt))
    codes = encode(middle, fmt).long()
    assert (codes % 2 == 0).all() if fmt.mantissa else codes.tolist() == [0, *range(2, fmt.finite)]


@pytest.mark.parametrize("fmt", [f for f in FLOATS if f.dtype], ids=lambda f: f.name)
def test_floats_with_a_dtype_equal_torchs_cast(fmt):
    x = every_finite_bf16()
    inside = x[x.abs() <= fmt.max]
    assert torch.equal(decode(encode(inside, fmt), fmt), inside.to(fmt.dtype).float())
    plain = Float(name="plain", exponent=fmt.exponent, mantissa=fmt.mantissa, bias=fmt.bias, reserved=fmt.reserved)
    # the arithmetic of formats without a dtype is the same function
    assert torch.equal(decode(encode(x, plain), plain), decode(encode(x, fmt), fmt))


@pytest.mark.parametrize("bits", range(2, 9))
def test_integers_equal_round_and_clamp(bits):
    x = every_finite_bf16()
    largest = 2 ** (bits - 1) - 1
    qparams = QParams(spec=parse_spec(f"int{bits}/tensor"), scale=torch.tensor(1.0))
    codes = quantize(x, qparams)
    assert codes.dtype == torch.int8
    assert torch.equal(codes.float(), x.round().clamp(-largest, largest))
    shifted = QParams(spec=parse_spec(f"int{bits}/tensor/asym"), scale=torch.tensor(1.0), zero=torch.tensor(2.0))
    codes = quantize(x, shifted)
    assert codes.dtype == torch.uint8
    assert torch.equal(dequantize(codes, shifted), x.round().clamp(-2, 2**bits - 3))


@pytest.mark.parametrize("fmt", CODED, ids=lambda f: f.name)
def test_what_is_out_of_range_takes_the_largest_value_and_nan_is_no_small_number(fmt):
    values = decode(encode(torch.tensor([math.inf, -math.inf, 1e38, -1e38]), fmt), fmt)
    lowest, highest = (min(fmt.levels), max(fmt.levels)) if isinstance(fmt, CodeBook) else (-fmt.max, fmt.max)
    assert torch.equal(values, torch.tensor([highest, lowest] * 2))
    value = decode(encode(torch.tensor([math.nan]), fmt), fmt).item()
    assert math.isnan(value) or abs(value) == fmt.max or value == highest


@pytest.mark.parametrize("fmt", FREE, ids=lambda f: f.name)
def test_a_real_exponent_bias_is_a_scale(fmt):
    x = data(seed=0, rows=64) * fmt.max
    for largest in (0.37 * fmt.max, fmt.max, 2.9 * fmt.max):
        scale = torch.tensor(largest / fmt.max)
        bias = exponent_bias(scale, fmt)
        e, m = fmt.exponent, fmt.mantissa
        formula = 2**e - math.log2(largest) + math.log2(2 - 2**-m) - 1
        assert float(bias) == pytest.approx(formula, abs=1e-6)
        qparams = QParams(spec=parse_spec(f"{fmt.name}/tensor"), scale=scale)
        rounded = dequantize(quantize(x, qparams), qparams)
        torch.testing.assert_close(rounded.double(), kuzmin(x, e, m, bias), rtol=1e-6, atol=0)


@given(st.floats(2.0**-126, 2.0**126, width=32), st.sampled_from(FLOATS))
def test_scale_and_exponent_bias_are_one_to_one(scale, fmt):
    scale = torch.tensor(scale)
    assert torch.equal(scale_of_bias(exponent_bias(scale, fmt), fmt), scale)
    assert torch.equal(exponent_bias(torch.tensor(1.0), fmt), torch.tensor(float(fmt.bias), dtype=torch.float64))


@given(st.sampled_from(SPECS), st.integers(0, 99), st.integers(-40, 40))
def test_rounding_again_changes_nothing(text, seed, exponent):
    x = data(seed, exponent)
    qparams = find_qparams(x, parse_spec(text))
    once = dequantize(quantize(x, qparams), qparams)
    assert torch.equal(dequantize(quantize(once, qparams), qparams), once)


@given(
    st.sampled_from(["int4/tensor", "int4/tensor/asym", "fp8_e4m3/tensor", "e3m0/tensor", "nf4/tensor"]), st.integers()
)
def test_rounding_is_monotone(text, seed):
    x = data(seed % 2**31).flatten().sort().values
    assert (fake_quantize(x, parse_spec(text)).diff() >= 0).all()


@given(st.integers(2, 8), st.booleans(), st.integers(0, 99), st.integers(-40, 40))
def test_integers_err_by_half_a_step_at_most_and_have_few_values(bits, symmetric, seed, exponent):
    x = data(seed, exponent)
    spec = parse_spec(f"int{bits}/channel" + ("" if symmetric else "/asym"))
    qparams = find_qparams(x, spec)
    rounded = dequantize(quantize(x, qparams), qparams)
    # the division and the product round once each
    slack = 2.0**-22 * x.abs().amax(1, keepdim=True)
    assert ((x - rounded).abs() <= qparams.scale / 2 + slack).all()
    assert all(len(row.unique()) <= 2**bits - symmetric for row in rounded)


@given(st.sampled_from(SPECS), st.integers(0, 99))
def test_zero_is_exact_and_a_zero_tensor_stays_zero(text, seed):
    spec = parse_spec(text)
    x = data(seed)
    x[:, ::3] = 0
    x[:2, :32] = 0
    rounded = fake_quantize(x, spec)
    assert not rounded[x == 0].any()
    assert not fake_quantize(torch.zeros(4, 64), spec).any()
    qparams = find_qparams(torch.zeros(4, 64), spec)
    assert (qparams.scale > 0).all()
    assert qparams.scale.isfinite().all()


@given(
    st.sampled_from([s for s in SPECS if s[:3] in ("int", "fp8", "fp4", "fp6", "e3m") and "asym" not in s]),
    st.integers(),
)
def test_symmetric_formats_are_odd(text, seed):
    x = data(seed % 2**31)
    assert torch.equal(fake_quantize(-x, parse_spec(text)), -fake_quantize(x, parse_spec(text)))


# float16 has too few exponents to follow
@given(st.sampled_from([s for s in SPECS if not under_float16(s)]), st.integers(0, 99), st.integers(-40, 40))
def test_powers_of_two_pass_through(text, seed, exponent):
    x, spec = data(seed), parse_spec(text)
    assert torch.equal(fake_quantize(x * 2.0**exponent, spec), fake_quantize(x, spec) * 2.0**exponent)


@given(st.sampled_from(SPECS), st.integers(0, 99), st.sampled_from([1e-44, 1e-38, 1e-30, 1e30, 1e38]))
def test_tiny_and_huge_values_stay_finite(text, seed, size):
    x = data(seed)
    x = x / x.abs().max() * size
    rounded = fake_quantize(x, parse_spec(text))
    assert rounded.isfinite().all()
    assert ((rounded - x).abs() <= x.abs().max() * 1.01).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("text", SPECS + WITHOUT_ZERO)
def test_nan_and_inf_poison_their_tile(text, bad):
    x, spec = data(seed=1), parse_spec(text)
    x[1, 5] = bad
    rounded = fake_quantize(x, spec)
    columns = min(spec.granularity.columns or 64, 64)
    assert not rounded[1, :columns].isfinite().any()
    # these two keep scales together with those of other tiles
    if spec.scale not in ("fp8_e4m3", "dq256") and spec.granularity.name != "tensor":
        assert rounded[2:].isfinite().all()


@pytest.mark.parametrize("fmt", LEARNED, ids=lambda f: f.name)
def test_learned_code_books_round_to_the_nearest_level(fmt):
    x = data(seed=0, rows=8)
    qparams = find_qparams(x, parse_spec(f"{fmt.name}/g16"))
    assert qparams.levels is not None
    rounded = dequantize(quantize(x, qparams), qparams).reshape(8, 4, 16)
    scaled = x.reshape(8, 4, 16) / qparams.scale[..., None]
    nearest = (scaled[..., None] - qparams.levels).abs().amin(-1)
    torch.testing.assert_close((rounded / qparams.scale[..., None] - scaled).abs(), nearest, atol=1e-6, rtol=0)
    assert int(quantize(x, qparams).max()) < 2**fmt.bits


@pytest.mark.parametrize(
    ("text", "shape", "scale"),
    [
        ("int8/tensor", (2, 3, 8), ()),
        ("int8/token", (2, 3, 8), (2, 3, 1)),
        ("int8/channel", (8,), (1,)),
        ("int4/g4/asym", (2, 3, 8), (2, 3, 2)),
        ("fp8_e4m3/b2x4", (6, 8), (3, 2)),
    ],
)
def test_shapes_of_qparams_and_codes(text, shape, scale):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    qparams = find_qparams(x, parse_spec(text))
    assert qparams.scale.shape == scale
    assert qparams.zero is None or qparams.zero.shape == scale
    assert quantize(x, qparams).shape == shape
    assert fake_quantize(x.bfloat16(), parse_spec(text)).dtype == torch.bfloat16


def test_blocks_of_rows_are_the_groups_of_a_permuted_tensor():
    x = data(seed=0, rows=6, columns=8)
    blocks = x.reshape(3, 2, 2, 4).permute(0, 2, 1, 3).reshape(6, 8)
    expected = fake_quantize(blocks, parse_spec("int4/channel")).reshape(3, 2, 2, 4).permute(0, 2, 1, 3).reshape(6, 8)
    assert torch.equal(fake_quantize(x, parse_spec("int4/b2x4")), expected)


def test_clip_multiplies_the_range_of_each_tile():
    x = data(seed=0)
    half = find_qparams(x, parse_spec("int8/channel"), clip=0.5)
    whole = find_qparams(x, parse_spec("int8/channel"))
    assert torch.equal(half.scale, whole.scale / 2)
    clip = torch.tensor([[1.0], [0.5], [0.25], [2.0]])
    for text in ("int8/channel", "int8/channel/asym", "e2m1/channel/e8m0"):
        whole, each = (find_qparams(x, parse_spec(text), clip=c) for c in (1.0, clip))
        assert torch.equal(each.scale, whole.scale * clip)


def test_clip_in_one_tile_leaves_the_others_under_nvfp4():
    x, spec = data(seed=0), parse_spec("fp4_e2m1/b16/fp8_e4m3")
    clip = torch.ones(4, 4)
    clip[int(x.abs().amax(1).argmax())] = 0.5
    same = clip == 1
    assert torch.equal(find_qparams(x, spec, clip=clip).scale[same], find_qparams(x, spec).scale[same])


def test_a_range_gives_the_qparams_of_the_data_that_span_it():
    x = data(seed=0)
    for text in ("int8/channel", "int4/channel/asym", "fp8_e4m3/channel"):
        found, given = (
            find_qparams(x, parse_spec(text)),
            qparams_of_range(x.amin(1, keepdim=True), x.amax(1, keepdim=True), parse_spec(text)),
        )
        assert torch.equal(found.scale, given.scale)
        assert (found.zero is None) == (given.zero is None)


def test_asymmetric_range_holds_zero_although_the_data_do_not():
    x = torch.linspace(5, 6, 64).reshape(1, 64)
    qparams = find_qparams(x, parse_spec("int8/channel/asym"))
    assert float(qparams.zero) == 0
    assert float(qparams.scale) == pytest.approx(6 / 255)


def test_snr():
    x = torch.tensor([3.0, 4.0])
    assert snr_db(x, x) == math.inf
    assert snr_db(x, x + 0.5) == pytest.approx(10 * math.log10(25 / 0.5))
    assert math.isnan(snr_db(torch.full((2,), torch.nan), torch.ones(2)))


def test_a_group_that_does_not_divide_is_refused():
    with pytest.raises(SpecError, match=r"'g24' needs \[..., K\] that divides by 1 x 24, got shape \[4, 64\]"):
        fake_quantize(data(seed=0), parse_spec("int4/g24"))


@pytest.mark.parametrize("text", SPECS)
def test_a_compiler_traces_the_oracle_whole_for_any_number_of_rows(text):
    spec = parse_spec(text)
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: fake_quantize(x, spec), fullgraph=True, backend="aot_eager")
    for rows in (4, 6):
        x = data(seed=rows, rows=rows)
        torch._dynamo.mark_dynamic(x, 0)
        assert torch.equal(compiled(x), fake_quantize(x, spec))


@pytest.mark.parametrize("text", SPECS)
def test_shapes_without_values_leave_no_trace(text):
    spec = parse_spec(text)
    with FakeTensorMode():
        fake = fake_quantize(torch.empty(4, 64), spec)
    assert fake.shape == (4, 64)
    assert find_qparams(torch.empty(4, 64, device="meta"), spec).scale.is_meta
    # a tensor kept from the fake run would break this one
    assert type(fake_quantize(data(seed=0), spec)) is Tensor


@pytest.mark.slow
# torch's own code, when Inductor is imported
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("text", ["int4/g16/asym/fp16", "e3m2/g16/bf16", "fp4_e2m1/b32/e8m0", "fp4_e2m1/b16/fp8_e4m3"])
def test_inductor_computes_the_same_bits(text):
    spec, x = parse_spec(text), data(seed=0)
    torch._dynamo.reset()
    assert torch.equal(torch.compile(lambda x: fake_quantize(x, spec), fullgraph=True)(x), fake_quantize(x, spec))


@pytest.mark.parametrize("spec", ["int8/channel", "int8/channel/asym", "int8/tensor", "fp8_e4m3/channel"])
def test_a_weight_of_more_dimensions_has_the_codes_of_its_rows(spec):
    torch.manual_seed(0)
    weight = torch.randn(5, 3, 2, 4)
    qparams = find_qparams(weight.flatten(1), parse_spec(spec))
    spread = over_dimensions(qparams, weight.dim())
    codes = quantize(weight, spread)
    assert torch.equal(codes.flatten(1), quantize(weight.flatten(1), qparams))
    assert torch.equal(dequantize(codes, spread).flatten(1), dequantize(codes.flatten(1), qparams))


def test_a_compiler_has_no_extremes_to_round() -> None:
    """Extremes in bfloat16 it may keep as float32 in one kernel, and round for another."""
    traced = make_fx(lambda x: find_qparams(x, parse_spec("int8/token/asym")).scale)(torch.randn(3, 8).bfloat16())
    extremes = (torch.ops.aten.amin.default, torch.ops.aten.amax.default)
    found = [node.args[0].meta["val"].dtype for node in traced.graph.nodes if node.target in extremes]
    assert found == [torch.float32, torch.float32]
