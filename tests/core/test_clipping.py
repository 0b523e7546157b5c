"""Where to clip: the least error by exhaustive search, and the least divergence by its definition."""

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from qcompile.clipping import KL_START, divergence_cells, least_divergence, least_error, levels_of
from qcompile.distribution import Distribution
from qcompile.formats import FORMATS
from qcompile.histogram import FINE, count
from qcompile.numerics import decode, dequantize, find_qparams, qparams_of_range, quantize
from qcompile.spec import parse_spec

SPECS = (
    "int8/tensor",
    "int4/tensor",
    "int2/tensor",
    "int8/tensor/asym",
    "int4/tensor/asym/bf16",
    "fp8_e4m3/tensor",
    "fp8_e5m2/tensor",
    "fp8_e4m3fnuz/tensor",
    "fp6_e2m3/tensor",
    "fp4_e2m1/tensor/e8m0",
    "fp4_e3m0/tensor",
    "nf4/tensor",
    "dynamic8/tensor",
    "linear8/tensor",
    "int4/tensor/fp8_e4m3",
)


def values(name: str, n: int = 40000) -> Tensor:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(n, generator=g)
    return {
        "normal": x,
        "heavy": x * torch.exp(torch.randn(n, generator=g)),
        "one side": x.relu() * 3,
        "skewed": torch.nn.functional.gelu(2 * x),
        "below zero": -x.abs() - 0.2,
        "spike": torch.cat([x, torch.tensor([60.0])]),
    }[name]


def distribution(x: Tensor) -> Distribution:
    return count(x[:, None], FINE, amax=x.abs().amax()).together(x.amin(), x.amax())


def error(x: Tensor, low: Tensor, high: Tensor, spec: str) -> float:
    qparams = qparams_of_range(low, high, parse_spec(spec))
    return float((dequantize(quantize(x, qparams), qparams) - x).double().square().sum())


@pytest.mark.parametrize("spec", SPECS)
def test_levels_are_what_all_codes_stand_for(spec: str) -> None:
    qparams = find_qparams(torch.linspace(-1.3, 2.9, 50), parse_spec(spec))
    fmt = qparams.spec.format
    if spec.startswith("int"):
        first, last = qparams.spec.code_range
        held = dequantize(torch.arange(first, last + 1), qparams)
    else:
        codes = torch.arange(2**fmt.bits, dtype=torch.uint8)
        held = decode(codes, fmt, None) * qparams.scale  # type: ignore[arg-type]
    expected = held[torch.isfinite(held)].double().unique()
    # the oracle's product is rounded to float32
    torch.testing.assert_close(levels_of(qparams), expected, rtol=2**-23, atol=0)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("name", ["normal", "heavy", "one side", "skewed", "below zero", "spike"])
def test_the_least_error_is_that_of_an_exhaustive_search(name: str, spec: str) -> None:
    x = values(name)
    low, high = x.amin(), x.amax()
    found = least_error(distribution(x), low[None], high[None], parse_spec(spec))
    ratios = [2 ** (0.3 - i / 20) for i in range(140)]
    least = min(error(x, low * r, high * r, spec) for r in ratios)
    # both ends on their own can only be better; bins of a thousandth, sampled rounding errors, and the last step
    assert error(x, found[0][0], found[1][0], spec) <= least * 1.02


@pytest.mark.parametrize("power", [-30, -3, 5, 30])
@pytest.mark.parametrize("spec", ["int8/tensor", "int4/tensor/asym", "fp8_e4m3/tensor", "nf4/tensor"])
def test_scaling_values_scales_the_clip(spec: str, power: int) -> None:
    x = values("heavy")
    factor = 2.0**power
    plain = least_error(distribution(x), x.amin()[None], x.amax()[None], parse_spec(spec))
    scaled = least_error(
        distribution(x * factor), (x * factor).amin()[None], (x * factor).amax()[None], parse_spec(spec)
    )
    assert torch.equal(scaled[0], plain[0] * factor)
    assert torch.equal(scaled[1], plain[1] * factor)


def test_lines_are_searched_each_on_its_own() -> None:
    lines = [values(name) for name in ("normal", "skewed", "one side")]
    low, high = (torch.stack([f(x) for x in lines]) for f in (torch.amin, torch.amax))
    alone = [distribution(x) for x in lines]
    together = Distribution(edges=torch.cat([d.edges for d in alone]), mass=torch.cat([d.mass for d in alone]))
    found = least_error(together, low, high, parse_spec("int8/tensor"))
    for i, one in enumerate(alone):
        single = least_error(one, low[i : i + 1], high[i : i + 1], parse_spec("int8/tensor"))
        assert (float(found[0][i]), float(found[1][i])) == (float(single[0]), float(single[1]))


def divergence(counts: list[float], clip: int, cells: list[float]) -> float:
    """By its definition, bin by bin; `cells` are the numbers of bins at which cells end."""
    h = [counts[1], *counts[1:]]
    reference = h[:clip]
    reference[-1] += sum(h[clip:])
    candidate = [0.0] * clip
    for start, end in pairwise(cells):
        inside = [j for j in range(clip) if start <= j < end and h[j] > 0]
        for j in inside:
            candidate[j] = sum(h[i] for i in inside) / len(inside)
    total, spread = sum(reference), sum(candidate)
    if any(p > 0 and q == 0 for p, q in zip(reference, candidate, strict=True)):
        return math.inf
    pairs = [(p / total, q / spread) for p, q in zip(reference, candidate, strict=True) if p > 0]
    return sum(p * math.log(p / q) for p, q in pairs)


@pytest.mark.parametrize("levels", [8, 100, 128])
@pytest.mark.parametrize("seed", range(4))
def test_the_least_divergence_is_that_of_its_definition(seed: int, levels: int) -> None:
    g = torch.Generator().manual_seed(seed)
    n = 300
    counts = torch.poisson(torch.rand(n, generator=g) * 40 * torch.exp(-torch.arange(n) / 40.0), generator=g).double()
    counts[-1] = 1.0
    before = counts.clone()
    kept = least_divergence(counts, divergence_cells(FORMATS["int8"], levels))
    assert torch.equal(counts, before)
    found = {
        clip: divergence(counts.tolist(), clip, [-(-g * clip // levels) for g in range(levels + 1)])
        for clip in range(KL_START, n + 1)
    }
    least = min(found.values())
    assert kept == max(clip for clip, d in found.items() if d <= least + 1e-12)


def test_the_divergence_of_a_float_goes_by_the_cells_of_its_grid() -> None:
    cells = divergence_cells(FORMATS["fp4_e2m1"], 8)
    # magnitudes 0, 0.5, 1, 1.5, 2, 3, 4, 6
    assert (cells * 6).tolist() == pytest.approx([0, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5, 6])


def test_no_clip_is_chosen_that_loses_mass_altogether() -> None:
    # all mass above an empty stretch: each clip below puts it where the candidate has none
    counts = torch.zeros(400, dtype=torch.float64)
    counts[390:] = 5.0
    assert least_divergence(counts, divergence_cells(FORMATS["int8"], 128)) >= 391
    assert least_divergence(torch.zeros(400, dtype=torch.float64), divergence_cells(FORMATS["int8"], 128)) == 400
