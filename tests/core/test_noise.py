"""The noise of a site: against the same sums written out, and with causes that were planted."""

from dataclasses import replace
from math import inf, log10

import pytest
import torch
from torch import Tensor

from qcompile.noise import FEATURES, Probe, Treatment, measure_noise, probe, shares_rows
from qcompile.numerics import dequantize, fake_quantize, find_qparams, quantize, rounded
from qcompile.observers import observe
from qcompile.spec import parse_spec

INT8, TENSOR, TOKEN = parse_spec("int8/channel"), parse_spec("int8/tensor"), parse_spec("int8/token/asym")


def some_probe(rows: int = 33, n: int = 20, k: int = 48, seed: int = 0) -> Probe:
    generator = torch.Generator().manual_seed(seed)
    return Probe(
        weight=torch.randn(n, k, generator=generator),
        rows=torch.randn(rows, k, generator=generator),
        counts=torch.ones(rows, dtype=torch.float64),
    )


def db(reference: Tensor, found: Tensor) -> float:
    return 10 * log10(float(reference.double().square().sum() / (found - reference).double().square().sum()))


def test_noise_is_that_of_the_oracle() -> None:
    seen = some_probe()
    x, w = seen.rows, seen.weight
    xq, wq = fake_quantize(x, TOKEN), fake_quantize(w, INT8)
    noise = measure_noise(seen, Treatment(weight=INT8, input=TOKEN))
    # sums in another order
    assert noise.snr_db == pytest.approx(db(x @ w.T, xq @ wq.T), abs=1e-3)
    assert noise.weight_db == pytest.approx(db(x @ w.T, x @ wq.T), abs=1e-3)
    assert noise.input_db == pytest.approx(db(x @ w.T, xq @ w.T), abs=1e-3)
    # the zero point is rounded, so that one end of the range may lie half a step beyond the grid
    assert noise.clipping == pytest.approx(0, abs=0.05)
    assert measure_noise(seen, Treatment(input=parse_spec("int8/token"))).clipping == pytest.approx(0, abs=1e-6)


def test_a_float_site_has_no_noise() -> None:
    noise = measure_noise(some_probe(), Treatment())
    assert (noise.snr_db, noise.weight_db, noise.input_db, noise.channels) == (inf, None, None, ())


def test_silence_has_no_ratio() -> None:
    seen = some_probe()
    silent = Probe(weight=seen.weight, rows=torch.zeros_like(seen.rows), counts=seen.counts)
    assert measure_noise(silent, Treatment(weight=INT8, input=TENSOR)).snr_db == inf


def test_counts_stand_for_repeated_rows() -> None:
    seen = some_probe(rows=3)
    counted = Probe(weight=seen.weight, rows=seen.rows, counts=torch.tensor([1.0, 4.0, 2.0], dtype=torch.float64))
    repeated = Probe(
        weight=seen.weight,
        rows=seen.rows[[0, 1, 1, 1, 1, 2, 2]],
        counts=torch.ones(7, dtype=torch.float64),
    )
    treatment = Treatment(weight=INT8, input=TOKEN)
    # products of other shapes are summed in another order
    assert measure_noise(counted, treatment).snr_db == pytest.approx(
        measure_noise(repeated, treatment).snr_db, abs=1e-3
    )
    assert abs(seen.after(treatment) - counted.after(treatment)) > 0.01


def test_clipping_and_rounding_are_told_apart() -> None:
    seen = some_probe(rows=200)
    narrow = find_qparams(torch.tensor([1.0]), TENSOR)
    noise = measure_noise(seen, Treatment(input=narrow))
    assert noise.clipping > 0.99
    wide = find_qparams(torch.tensor([100.0]), TENSOR)
    assert measure_noise(seen, Treatment(input=wide)).clipping == 0.0
    # values on the grid, but for the one beyond it
    on_grid = Probe(weight=seen.weight, rows=torch.full((1, 48), 1.0), counts=torch.ones(1, dtype=torch.float64))
    on_grid.rows[0, 5] = 3.0
    noise = measure_noise(on_grid, Treatment(input=narrow))
    assert noise.clipping == pytest.approx(1.0)
    assert noise.channels[0] == (5, pytest.approx(1.0))


@pytest.mark.parametrize("spec", ["int8/tensor/asym", "fp8_e4m3/tensor", "int4/tensor"])
def test_the_two_parts_of_clipping_and_rounding_make_the_whole(spec: str) -> None:
    seen = some_probe(rows=100)
    qparams = find_qparams(torch.tensor([-1.5, 1.0]), parse_spec(spec))
    xq = dequantize(quantize(seen.rows, qparams), qparams)
    clamped = seen.rows.clamp(float(xq.min()), float(xq.max()))
    whole, part = (xq - seen.rows) @ seen.weight.T, (clamped - seen.rows) @ seen.weight.T
    expected = float((part * whole).double().sum() / whole.double().square().sum())
    assert measure_noise(seen, Treatment(input=qparams)).clipping == pytest.approx(expected, rel=1e-4)


def test_the_channel_whose_error_is_multiplied_most_carries_the_noise() -> None:
    seen = some_probe(rows=500, k=32)
    seen.weight[:, 7] *= 30
    noise = measure_noise(seen, Treatment(input=TENSOR))
    channel, share = noise.channels[0]
    own = (fake_quantize(seen.rows, TENSOR) - seen.rows).square().sum(0) * seen.weight.square().sum(0)
    assert channel == 7
    assert share == pytest.approx(float(own[7] / own.sum()), rel=1e-4)
    # errors of channels are independent: cross terms vanish in the mean
    assert noise.crossed == pytest.approx(1.0, abs=0.1)


def test_split_channels_bypass_both_sides() -> None:
    seen = some_probe()
    seen.rows[:, 9] *= 100
    seen.weight[:, 4] *= 100
    treatment = Treatment(weight=INT8, input=TOKEN, channels=(9, 4))
    rest = [k for k in range(48) if k not in (4, 9)]
    x, w = seen.rows[:, rest], seen.weight[:, rest]
    # zeros belong to every asymmetric range
    expected = fake_quantize(x, TOKEN) @ fake_quantize(w, INT8).T + seen.rows[:, [9, 4]] @ seen.weight[:, [9, 4]].T
    assert seen.after(treatment) == pytest.approx(db(seen.rows @ seen.weight.T, expected), abs=0.01)
    assert seen.after(treatment) > seen.after(Treatment(weight=INT8, input=TOKEN)) + 20
    assert seen.after(Treatment(weight=INT8, input=TOKEN, channels=tuple(range(48)))) > 120


def test_scaling_keeps_the_output() -> None:
    seen = some_probe()
    scale = torch.rand(48, generator=torch.Generator().manual_seed(1)) + 0.5
    torch.testing.assert_close(seen.scaled(scale).output, seen.output)


def test_a_large_weight_is_looked_at_in_part_unless_its_rows_share_scales() -> None:
    weight, stats = torch.randn(3 * FEATURES + 1, 8), observe(torch.randn(300, 8))
    assert probe(weight, stats).weight.shape[0] <= FEATURES
    assert probe(weight, stats, whole=True).weight.shape == weight.shape
    assert probe(weight.half(), stats).weight.dtype == torch.float32
    shared = {
        spec: shares_rows(parse_spec(spec)) for spec in ("int8/channel", "int4/g32", "int8/b32x32", "int8/tensor")
    }
    assert list(shared.values()) == [False, False, True, True]
    assert not shares_rows(None)


@pytest.mark.parametrize(
    "spec", ["int8/tensor", "int8/token/asym", "int4/g32", "int4/g32/min", "int8/b16x16", "fp8_e4m3/tensor", "nf4/g32"]
)
def test_rounding_in_fewer_steps_gives_the_oracles_numbers(spec: str) -> None:
    x = 3 * torch.randn(32, 64, generator=torch.Generator().manual_seed(1)) + 0.5
    before = x.clone()
    # under half of the range, much is clipped
    qparams = find_qparams(x, parse_spec(spec), clip=0.5)
    assert torch.equal(rounded(x, qparams), dequantize(quantize(x, qparams), qparams))
    assert torch.equal(x, before)


def test_each_scale_gives_its_own_probe_and_a_changed_probe_none_of_the_old() -> None:
    seen = some_probe()
    one, two = torch.full((48,), 2.0), torch.full((48,), 4.0)
    assert seen.scaled(one) is seen.scaled(one)
    assert torch.equal(seen.scaled(two).rows, seen.rows / 4)
    other = replace(seen, rows=2 * seen.rows)
    assert torch.equal(other.scaled(two).rows, seen.rows / 2)
