"""Bits of accuracy at the best clip: the table of the numeric specification, the search, and what tensors show."""

import json
import math

import pytest
import torch
from torch import Tensor

from qcompile.clipping import levels_of
from qcompile.errors import CalibrationError, PlanError, SpecError
from qcompile.formats import Float, parse_format
from qcompile.numerics import dequantize, find_qparams, qparams_of_range, quantize
from qcompile.observers import observe
from qcompile.spec import parse_spec
from qcompile.study import (
    BOUNDS,
    DENSITIES,
    FAMILIES,
    PARTS,
    Fit,
    Study,
    Subject,
    best_formats,
    density_line,
    fit_rows,
    format_spec,
    require_studied,
    study_density,
    study_tensor,
    study_weight,
)

EIGHT, SIX, FOUR = FAMILIES[8], FAMILIES[6], FAMILIES[4]
ALL = (*EIGHT, *SIX, *FOUR)
FOUR_BITS = ("int4", "e2m1", "e3m0", "nf4", "lloyd4")
# numerics.md, section 1.6: bits of accuracy at the best clip
TABLE = {
    "uniform": {
        **dict(zip((*EIGHT, "lloyd8"), (7.99, 7.38, 6.38, 5.35, 4.36, 7.99), strict=True)),
        **dict(zip(FOUR_BITS, (3.91, 3.33, 2.65, 3.55, 4.00), strict=True)),
    },
    "normal": {
        **dict(zip((*EIGHT, "lloyd8"), (6.73, 7.09, 6.24, 5.24, 4.25, 7.28), strict=True)),
        **dict(zip(FOUR_BITS, (3.14, 3.15, 2.36, 3.33, 3.36), strict=True)),
        **{"int6": 4.93, "e2m3": 5.12, "e3m2": 4.25, "e4m1": 3.28},
    },
    "student-t 8": {
        **dict(zip((*EIGHT, "lloyd8"), (5.71, 6.38, 6.23, 5.24, 4.25, 6.94), strict=True)),
        **dict(zip(FOUR_BITS, (2.73, 2.95, 2.35, 3.04, 3.07), strict=True)),
    },
    "student-t 4": {
        **dict(zip((*EIGHT, "lloyd8"), (4.24, 4.81, 6.12, 5.24, 4.25, 6.50), strict=True)),
        **dict(zip(FOUR_BITS, (2.08, 2.38, 2.31, 2.39, 2.63), strict=True)),
    },
    "laplace": dict(zip((*EIGHT, "lloyd8"), (5.84, 6.55, 6.23, 5.24, 4.25, 6.91), strict=True)),
    "outliers": dict(zip(EIGHT, (2.68, 3.57, 6.05, 5.29, 4.28), strict=True)),
}
# the same section: the best clips, in standard deviations
CLIPS = {
    "uniform": {"int8": 1.7},
    "normal": {"int8": 3.9, "e2m5": 4.4, "e3m4": 5.1},
    "student-t 8": {"int8": 7.2, "e2m5": 8.8, "e3m4": 18},
    "student-t 4": {"int8": 17, "e2m5": 24, "e3m4": 55},
}
# dB or bits of a sum over some ten thousand random numbers
SAMPLED = 0.06


def normal(rows: int, k: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, k, generator=torch.Generator().manual_seed(seed))


def study(x: Tensor, granularity: str = "tensor", formats: tuple[str, ...] = EIGHT) -> Subject:
    return study_tensor("x", "input", observe(x, parts=PARTS), granularity, formats)


@pytest.mark.parametrize("name", TABLE)
def test_the_table_of_the_specification(name: str) -> None:
    found = study_density(name, tuple(TABLE[name]))
    assert {fit.format: fit.bits for fit in found.fits} == pytest.approx(TABLE[name], abs=0.05)


@pytest.mark.parametrize("name", CLIPS)
def test_the_best_clips_of_the_specification(name: str) -> None:
    found = study_density(name, tuple(CLIPS[name]))
    # two digits are given
    assert {fit.format: fit.clip for fit in found.fits} == pytest.approx(CLIPS[name], rel=0.04)


def test_tails_move_the_best_format_to_more_exponent_bits() -> None:
    best = {name: study_density(name, ALL).best for name in DENSITIES}
    assert best["uniform"] == {8: "int8", 6: "int6", 4: "int4"}
    assert best["normal"] == {8: "e2m5", 6: "e2m3", 4: "e2m1"}
    assert best["student-t 8"] == {8: "e2m5", 6: "e2m3", 4: "e2m1"}
    assert best["student-t 4"] == {8: "e3m4", 6: "e3m2", 4: "e2m1"}
    assert best["outliers"] == {8: "e3m4", 6: "e3m2", 4: "e3m0"}
    uniform = study_density("uniform", EIGHT)
    assert [fit.bits for fit in uniform.fits] == sorted((fit.bits for fit in uniform.fits), reverse=True)
    # an exponent bit costs a bit of accuracy once the range suffices
    gauss = study_density("normal", EIGHT)
    assert gauss.bits("e3m4") - gauss.bits("e4m3") == pytest.approx(1, abs=0.02)
    assert gauss.bits("e4m3") - gauss.bits("e5m2") == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("name", DENSITIES)
def test_no_clip_is_better_than_the_one_found(name: str) -> None:
    values, limit = density_line(DENSITIES[name]), DENSITIES[name].limit
    energy = float(values.moments(values.edges[:, -1:])[2])
    for fit in study_density(name, ALL).fits:
        spec = format_spec(fit.format, "tensor")
        clips = limit * torch.tensor([2 ** (0.25 - i / 97) for i in range(800)])
        levels = levels_of(qparams_of_range(-clips[None], clips[None], spec))
        least = float(torch.cat([values.squared_error(part) for part in levels.split(100, dim=1)], 1).min())
        assert fit.bits >= 0.5 * math.log2(energy / least) - 0.01, fit


@pytest.mark.parametrize("name", DENSITIES)
def test_nothing_beats_the_levels_of_least_error(name: str) -> None:
    found = study_density(name, (*ALL, *BOUNDS))
    for width, names in FAMILIES.items():
        # where hardly any value lies, they are found by rounds that stop near the optimum
        assert found.bits(f"lloyd{width}") >= max(found.bits(fmt) for fmt in names) - 1e-3


def test_a_float_of_one_exponent_bit_is_an_integer() -> None:
    for name in DENSITIES:
        found = study_density(name, ALL)
        assert found.bits("e1m4") == pytest.approx(found.bits("int6"), abs=1e-9)
        assert found.bits("e1m2") == pytest.approx(found.bits("int4"), abs=1e-9)


def test_the_bias_is_the_clip() -> None:
    for name in ("uniform", "student-t 4"):
        values = density_line(DENSITIES[name])
        rms = math.sqrt(float(values.moments(values.edges[:, -1:])[2]))
        for fit in study_density(name, ALL).fits:
            fmt = parse_format(fit.format)
            if not isinstance(fmt, Float):
                assert fit.bias is None
                continue
            assert fit.bias is not None
            assert fit.clip is not None
            # Kuzmin 2022: maxval = (2 - 2^-m) 2^(2^e - 1 - bias)
            largest = (2 - 2**-fmt.mantissa) * 2 ** (2**fmt.exponent - 1 - fit.bias)
            assert largest == pytest.approx(fit.clip * rms, rel=1e-6)


def test_a_sample_shows_what_its_density_is_like() -> None:
    found, expected = study(normal(400, 200), formats=ALL), study_density("normal", ALL)
    for fmt in ALL:
        assert found.bits(fmt) == pytest.approx(expected.bits(fmt), abs=SAMPLED)
    assert found.best == expected.best
    assert found.kurtosis == pytest.approx(3, abs=0.1)
    assert "normal distribution" in found.reason


@pytest.mark.parametrize("granularity", ["channel", "g64"])
@pytest.mark.parametrize("fmt", ["int8", "e2m5", "e4m3", "int4", "e2m1", "e3m0", "nf4", "int8/asym"])
def test_the_clips_of_rows_are_those_of_an_exhaustive_search(fmt: str, granularity: str) -> None:
    x = normal(8, 256) * (0.4 * normal(8, 256, 1)).exp()
    spec = format_spec(fmt, granularity)
    errors = []
    for i in range(200):
        qparams = find_qparams(x, spec, clip=2 ** (0.25 - i / 50))
        error = (dequantize(quantize(x, qparams), qparams) - x).double().square()
        errors.append(error.view(8, -1, 256 if granularity == "channel" else 64).sum(-1))
    least = float(torch.stack(errors).amin(0).sum())
    expected = 0.5 * math.log2(float(x.double().square().sum()) / least)
    found = fit_rows(x, torch.ones(8), granularity, fmt).bits
    # the grids of clips differ
    assert found == pytest.approx(expected, abs=0.04)


def test_rows_count_as_often_as_they_came() -> None:
    x = torch.cat([normal(4, 128), normal(4, 128, 1) ** 5])
    counts = torch.tensor([1.0, 3, 1, 1, 2, 1, 1, 5])
    often = fit_rows(x, counts, "token", "int6")
    assert often.bits == pytest.approx(
        fit_rows(x.repeat_interleave(counts.long(), 0), torch.ones(15), "token", "int6").bits, abs=1e-9
    )


def test_scales_of_rows_forgive_loud_rows_and_not_loud_columns() -> None:
    rows = normal(64, 256)
    rows[::8] *= 50
    assert study(rows, "tensor").best[8] != study(rows, "token").best[8] == "e2m5"
    columns = normal(64, 256)
    columns[:, [3, 40]] *= 50
    assert study(columns, "token").best[8] == study(columns, "tensor").best[8] == "e3m4"
    assert study(columns, "g4").bits("int8") > study(columns, "token").bits("int8") + 0.5


def test_in_short_groups_equal_steps_are_best() -> None:
    found = study(normal(64, 256), "g16")
    assert found.best[8] == "int8"
    assert found.peak < 2.5
    assert "steps of one size serve all values" in found.reason


def test_loud_channels_are_named_with_what_would_be_best_without_them() -> None:
    x = normal(300, 256)
    x[:, [9, 70]] *= torch.tensor([80.0, 50.0])
    found = study(x)
    assert found.best == {8: "e3m4"}
    assert "channel 9 reaches" in found.reason
    assert "1 more stand out; without them e2m5 would be best" in found.reason
    assert found.ratio == pytest.approx(80, rel=0.3)


def test_an_outlier_channel_that_decides_nothing_is_said_to() -> None:
    x = torch.rand(300, 256, generator=torch.Generator().manual_seed(0)) - 0.5
    x[:, 4] *= 6
    x[:, 4] = x[:, 4].sign() * 3
    found = study(x, formats=("e3m4", "e5m2"))
    assert "without it nothing would change" in found.reason


def test_a_scale_changes_nothing() -> None:
    x = normal(50, 64) ** 3
    one, other = (study(x * 2.0**power, formats=ALL) for power in (0, -40))
    assert [fit.bits for fit in one.fits] == pytest.approx([fit.bits for fit in other.fits], abs=1e-9)
    assert one.reason == other.reason


def test_what_a_format_holds_exactly_has_no_error() -> None:
    x = torch.tensor([[1.0, -2.0, 4.0, 7.0]]).repeat(3, 1)
    assert study(x, "channel", ("int4", "e3m4")).bits("int4") == math.inf
    zeros = study(torch.zeros(4, 8), "tensor", ALL)
    assert {fit.bits for fit in zeros.fits} == {math.inf}
    assert (zeros.kurtosis, zeros.peak, zeros.ratio) == (0.0, 0.0, None)
    assert study(torch.zeros(4, 8), "channel", ALL).kurtosis == 0.0


def test_the_best_is_of_what_hardware_multiplies() -> None:
    fits = [
        Fit(format=f, bits=b) for f, b in (("nf4", 3.3), ("int4", 3.1), ("e1m2", 3.1), ("lloyd4", 3.4), ("e4m3", 5))
    ]
    assert best_formats(fits) == {8: "e4m3", 4: "int4"}
    assert list(best_formats(fits)) == [8, 4]


def test_a_zero_point_serves_one_sided_values() -> None:
    found = study(normal(200, 100).relu(), formats=("int8", "int8/asym"))
    assert found.bits("int8/asym") == pytest.approx(found.bits("int8") + 1, abs=0.1)
    assert found.best == {8: "int8/asym"}


@pytest.mark.parametrize(
    ("fmt", "granularity", "words"),
    [
        ("int9", "tensor", "unknown format 'int9'"),
        ("int8", "rows", "unknown granularity"),
        ("e4m3/asym", "tensor", "no zero point"),
        ("quantile8", "tensor", "take lloyd8"),
        ("int8", "b16x16", "take tensor, channel or g<K>"),
        ("int8", "g48", "take a smaller group"),
    ],
)
def test_what_cannot_be_studied_is_refused(fmt: str, granularity: str, words: str) -> None:
    with pytest.raises(SpecError, match=words):
        study_weight("w", normal(16, 64), granularity, (fmt,))
    if granularity != "g48":
        with pytest.raises(SpecError, match=words):
            require_studied(format_spec(fmt, granularity))


def test_nan_is_refused() -> None:
    with pytest.raises(CalibrationError, match="'w' held NaN"):
        study_weight("w", torch.tensor([[1.0, torch.nan]]), "channel", EIGHT)


def test_json_brings_a_study_back() -> None:
    subjects = (study_density("laplace", ALL), study(normal(40, 32) ** 3, formats=ALL))
    found = Study(formats=ALL, subjects=subjects, command="qcompile study formats")
    assert Study.from_json(found.to_json()) == found
    assert found.of("distribution") == found.subjects[:1]
    with pytest.raises(PlanError, match="is no study"):
        Study.from_json("{}")
    with pytest.raises(PlanError, match="upgrade qcompile"):
        Study.from_json(json.dumps({**json.loads(found.to_json()), "schema": 2}))


def test_the_spec_of_a_format_may_say_more() -> None:
    assert format_spec("int4/asym/bf16", "g32") == parse_spec("int4/g32/asym/bf16")
