"""Choices for sites that read one activation: each is taken where it gains, and only there."""

from dataclasses import replace
from math import inf

import pytest
import torch
from torch import Tensor

from qcompile.cases import Case, Choice, joined, probe_part
from qcompile.choose import (
    LEAST_RID,
    LEAST_SMOOTHING,
    POWERS,
    choose,
    input_of,
    prepared_stats,
    rivals,
)
from qcompile.noise import Treatment
from qcompile.numerics import QParams, dequantize, qparams_of_range, quantize
from qcompile.observers import observe
from qcompile.recipe import FLOAT, Rule
from qcompile.rounds import choose_weight
from qcompile.shifts import floor_shift, folds_octaves
from qcompile.smooth import AWQ, Smooth, parse_smooth
from qcompile.solvers import SOLVERS
from qcompile.spec import Spec, parse_spec

INT8, TOKEN, STATIC = parse_spec("int8/channel"), parse_spec("int8/token/asym"), parse_spec("int8/tensor/asym")
FLOATS = parse_spec("fp8_e4m3/tensor")
K, LOUD, QUIET = 64, 13, 20
PLAIN = Rule(weight=INT8, input=TOKEN)


def rows(factor: float, count: int = 400, seed: int = 0) -> Tensor:
    """Normal rows [count, K] in which one channel is `factor` times the others."""
    x = torch.randn(count, K, generator=torch.Generator().manual_seed(seed))
    x[:, LOUD] *= factor
    return x


def case(x: Tensor, rule: Rule, *weights: Tensor, channels: Tensor | None = None, free: bool = True) -> Case:
    """free: each channel may have a scale of its own."""
    held = weights or (torch.randn(48, x.shape[1], generator=torch.Generator().manual_seed(1)),)
    stats = observe(x)
    return Case(
        probe=joined([probe_part(w, stats, whole=False) for w in held]),
        stats=stats,
        columns=torch.stack([w.abs().amax(0) for w in held]).amax(0),
        rule=rule,
        channels=torch.arange(x.shape[1]) if channels is None and free else channels,
    )


def weighed(weight: Tensor, x: Tensor, rule: Rule, shift: Tensor | None) -> tuple[Spec, Tensor | None]:
    """What the weight gets under a shift of its input, which is in float."""
    found = choose_weight(
        case(x, rule, weight), probe_part(weight, observe(x), whole=False), Choice(input=rule.input, shift=shift)
    )
    return found.spec, found.lowered


def test_a_rule_that_asks_for_nothing_gets_nothing() -> None:
    choice = choose(case(rows(60.0), PLAIN))
    assert (choice.input, choice.scale, choice.strength, choice.outliers) == (TOKEN, None, None, ())


def test_smoothing_gains_where_a_channel_is_loud() -> None:
    x = rows(60.0)
    plain, smoothed = (choose(case(x, rule)) for rule in (PLAIN, replace(PLAIN, smooth=Smooth())))
    assert smoothed.scale is not None
    assert int(smoothed.scale.argmax()) == LOUD
    assert 0.3 <= smoothed.strength <= 1.0
    # 60 times the range is lost bits of all other channels: 20 log10(60) = 35 dB, of which one square root returns
    assert smoothed.snr_db > plain.snr_db + 10


def test_a_strength_found_is_as_good_as_any_given() -> None:
    x = rows(60.0)
    best = choose(case(x, replace(PLAIN, smooth=Smooth()))).snr_db
    given = [choose(case(x, replace(PLAIN, smooth=Smooth(strength=i / 10)))) for i in range(3, 11)]
    assert [one.strength for one in given] == [i / 10 for i in range(3, 11)]
    # the search tries every second strength first: a neighbour of what it left out may be better by noise
    assert best >= max(one.snr_db for one in given) - 0.5


def test_powers_of_two_are_kept() -> None:
    scale = choose(case(rows(60.0), replace(PLAIN, smooth=parse_smooth("search/pow2")))).scale
    assert bool((torch.frexp(scale).mantissa == 0.5).all())


def test_a_split_takes_the_loud_channel() -> None:
    x = rows(60.0)
    split = choose(case(x, replace(PLAIN, split=0.01)))
    assert split.outliers == (LOUD,)
    assert split.scale is None
    assert split.snr_db > choose(case(x, PLAIN)).snr_db + 10


@pytest.mark.parametrize("solver", ["round", "imatrix", "gptq"])
def test_awq_takes_the_power_of_least_noise_for_weights_alone(solver: str) -> None:
    rule = Rule(weight=parse_spec("int4/channel"), solver=solver, smooth=Smooth(strength=AWQ))
    found = choose(case(rows(20.0), rule))
    plain = choose(case(rows(20.0), rule, free=False))
    assert found.scale is not None
    assert found.strength in POWERS
    assert int(found.scale.argmax()) == LOUD
    assert plain.scale is None
    # a scale that knows which channels are loud leaves less to be gained
    assert found.snr_db > plain.snr_db + (2 if solver == "round" else 1)
    # all others would be given no room
    assert found.strength < 1


def test_awq_gives_one_scale_to_channels_that_must_share_it() -> None:
    rule = Rule(weight=parse_spec("int4/channel"), smooth=Smooth(strength=AWQ))
    shared = torch.arange(K) // 2
    scale = choose(case(rows(20.0), rule, channels=shared)).scale
    assert scale is not None
    assert torch.equal(scale[::2], scale[1::2])


def test_a_split_holds_no_more_than_its_share() -> None:
    x = rows(60.0)
    x[:, [2, 40]] *= 50
    chosen = choose(case(x, replace(PLAIN, split=3.5 / K))).outliers
    assert chosen == (2, LOUD, 40)


def test_choices_are_tried_with_the_importance_that_they_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []

    def solve(weight: Tensor, spec: Spec, importance: Tensor | None = None) -> QParams:
        assert importance is not None
        seen.append(importance)
        return SOLVERS["round"](weight, spec)

    monkeypatch.setitem(SOLVERS, "imatrix", solve)
    rule = replace(PLAIN, solver="imatrix", smooth=Smooth(strength=0.5), split=0.01)
    one = case(rows(60.0), rule)
    choice = choose(one)
    assert choice.scale is not None
    for outliers in ((), (LOUD,)):
        expected = prepared_stats(one.stats, replace(choice, outliers=outliers)).importance
        assert any(torch.equal(tried, expected) for tried in seen)


def test_a_split_of_all_channels_is_none() -> None:
    x = rows(60.0)[:, LOUD : LOUD + 1]
    choice = choose(case(x, replace(PLAIN, split=0.01, smooth=Smooth())))
    assert choice.outliers == ()


def test_floats_split_by_what_a_channel_carries() -> None:
    x = torch.randn(400, K, generator=torch.Generator().manual_seed(0))
    # one is rare and far, the other carries the output
    x[0, 5], x[:, 9] = 300.0, x[:, 9] * 40
    floats = Rule(weight=parse_spec("fp8_e4m3/channel"), input=parse_spec("fp8_e4m3/token"), split=0.01)
    assert choose(case(x, floats)).outliers == (9,)


def test_no_scale_where_none_may_move() -> None:
    choice = choose(case(rows(60.0), replace(PLAIN, smooth=Smooth(), split=0.01), free=False))
    assert choice.scale is None
    assert choice.strength is None
    assert choice.outliers == (LOUD,)


def test_channels_from_one_row_share_a_scale() -> None:
    tie = torch.arange(K) % 16
    scale = choose(case(rows(60.0), replace(PLAIN, smooth=Smooth()), channels=tie)).scale
    assert scale is not None
    for number in range(16):
        assert len(scale[tie == number].unique()) == 1
    assert len(scale.unique()) > 1
    assert float(scale[LOUD]) == float(scale.max())


def test_silence_is_no_reason_to_change_anything() -> None:
    choice = choose(case(torch.zeros(5, K), replace(PLAIN, smooth=Smooth(), split=0.01)))
    assert (choice.scale, choice.outliers, choice.snr_db) == (None, (), inf)


def test_sites_count_the_same_whatever_the_size_of_their_weights() -> None:
    x, generator = rows(1.0), torch.Generator().manual_seed(2)
    small, large = torch.randn(8, K, generator=generator), 1e4 * torch.randn(8, K, generator=generator)
    stats = observe(x)
    probe = joined([probe_part(w, stats, whole=False) for w in (small, large)])
    energies = (probe.output.double().square() * probe.counts[:, None]).sum(0)
    # of 8 features each, by float32 sums
    assert float(energies[:8].sum()) == pytest.approx(float(energies[8:].sum()), rel=1e-4)


def test_stats_follow_the_choice() -> None:
    x = rows(1.0)
    # seldom, so that the channel has the range and not the signal
    x[::100, LOUD] *= 100.0
    stats = observe(x)
    choice = choose(case(x, Rule(weight=INT8, input=STATIC, smooth=Smooth(strength=0.5), split=0.02)))
    after = prepared_stats(stats, choice)
    assert choice.outliers
    expected = stats.amax / choice.scale
    expected[list(choice.outliers)] = 0.0
    torch.testing.assert_close(after.amax, expected)
    assert prepared_stats(stats, choose(case(x, PLAIN))) is stats


def test_what_gains_nothing_is_left_out() -> None:
    x = rows(1.0)
    rule = replace(PLAIN, smooth=Smooth(), split=0.01)
    plain, chosen = choose(case(x, PLAIN)), choose(case(x, rule))
    assert chosen.snr_db >= plain.snr_db
    assert chosen.scale is None or chosen.snr_db > plain.snr_db + LEAST_SMOOTHING
    assert not chosen.outliers


def test_a_split_must_rid_the_outputs_of_noise_worth_its_matmul() -> None:
    gains = []
    for factor in (1.5, 2.0, 3.0, 10.0, 60.0):
        plain, chosen = (choose(case(rows(factor), rule)) for rule in (PLAIN, replace(PLAIN, split=0.02)))
        gains.append(10 ** (-plain.snr_db / 10) - 10 ** (-chosen.snr_db / 10))
        assert bool(chosen.outliers) == (gains[-1] != 0.0)
    # a little louder is not loud enough
    assert gains[0] == 0.0
    assert all(gain == 0.0 or gain > LEAST_RID for gain in gains)
    assert gains[-1] > LEAST_RID


@pytest.mark.parametrize("weight", ["int4/channel", "int3/g32", "int2/channel"])
def test_coarse_weights_are_no_reason_to_split_what_has_no_outliers(weight: str) -> None:
    rule = replace(PLAIN, weight=parse_spec(weight), split=0.01)
    for seed in range(3):
        x = torch.randn(300, 512, generator=torch.Generator().manual_seed(seed))
        assert choose(case(x, rule)).outliers == ()


@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_what_few_rows_promise_of_a_static_input_holds_for_others(strength: float) -> None:
    """Channels that are levelled to the largest that was seen clip the next rows, the more the fewer rows were seen."""
    uniform = torch.rand(20000, 512, generator=torch.Generator().manual_seed(0)) - 0.5
    x = torch.distributions.Laplace(0.0, 1.0).icdf(uniform + 0.5)
    made = case(x[:300], replace(PLAIN, input=STATIC, smooth=Smooth(strength=strength)))
    choice = choose(made)
    assert choice.scale is not None
    seen, weight = prepared_stats(made.stats, choice), made.probe.weight * choice.scale
    grid = qparams_of_range(seen.low.amin(), seen.high.amax(), STATIC)

    def snr_db(rows: Tensor) -> float:
        error = dequantize(quantize(rows, grid), grid) - rows
        return float(-10 * ((error @ weight.T).square().sum() / (rows @ weight.T).square().sum()).log10())

    unseen, own = snr_db(x[10000:] / choice.scale), snr_db(x[:300] / choice.scale)
    # found from some 500 events of clipping, and less the noise of the weight
    assert choice.snr_db == pytest.approx(unseen, abs=1.5)
    assert own > unseen + (6 if strength == 1.0 else 0)


E2M1, MXFP4, NVFP4 = map(parse_spec, ("fp4_e2m1/channel", "fp4_e2m1/b32/e8m0", "fp4_e2m1/b16/fp8_e4m3"))


@pytest.mark.parametrize("spec", [MXFP4, NVFP4])
def test_weights_in_blocks_are_divided_before_they_are_quantized(spec: Spec) -> None:
    x, weight = rows(50.0), torch.randn(48, K, generator=torch.Generator().manual_seed(1))
    weight[:, LOUD] /= 50
    rule = Rule(weight=spec, input=spec, shift=14)
    plain, shifted = (choose(case(x, r, weight)) for r in (replace(rule, shift=None), rule))
    assert shifted.snr_db > plain.snr_db + 3
    assert (shifted.shift, shifted.strength) == (None, None)
    assert shifted.scale is not None
    assert torch.equal(shifted.scale.log2(), shifted.scale.log2().round())
    assert shifted.scale[LOUD] == shifted.scale.max()
    # what is loud is as loud as all, and so are its weights
    level = rows(1.0)
    assert (
        shifted.snr_db
        > choose(case(level, rule, weight * torch.ones(K).index_fill(0, torch.tensor(LOUD), 50))).snr_db - 0.5
    )
    assert choose(case(x, rule, weight, free=False)).scale is None


@pytest.mark.parametrize("weight", [E2M1, None])
@pytest.mark.parametrize("count", [400, 2000])
def test_a_shift_leaves_room_for_rows_that_were_not_seen(weight: Spec | None, count: int) -> None:
    """Raised to where the largest that was seen meets the end of the range, every channel clips the next rows."""
    x = torch.randn(20000, 256, generator=torch.Generator().manual_seed(0)) ** 3 * torch.linspace(0, -6, 256).exp2()
    rule = Rule(weight=weight, input=parse_spec("fp8_e3m4/tensor"), observer="minmax", shift=14)
    made = case(x[:count], rule)
    found, plain = choose(made), Choice(input=rule.input)
    full = replace(plain, shift=floor_shift(made.stats.amax, None, 14))

    def snr_db(rows: Tensor, choice: Choice) -> float:
        probe = replace(made.probe, rows=rows, counts=torch.ones(len(rows), dtype=torch.float64))
        probe = probe if choice.scale is None else probe.scaled(choice.scale)
        return probe.after(Treatment(**input_of(made, choice)))

    seen, unseen = x[:count], x[10000:]
    assert snr_db(seen, full) > snr_db(seen, plain) + 0.3
    assert snr_db(unseen, full) < snr_db(unseen, plain) - 6
    assert snr_db(unseen, found) > snr_db(unseen, plain) - 2
    assert found.snr_db == pytest.approx(snr_db(unseen, found), abs=2)


@pytest.mark.parametrize("weight", [E2M1, None])
@pytest.mark.parametrize("spec", ["fp8_e5m2/token", "fp8_e4m3/token"])
@pytest.mark.parametrize("seed", range(3))
def test_a_shift_that_gains_nothing_is_not_taken(weight: Spec | None, spec: str, seed: int) -> None:
    """Powers of two change no rounding of numbers that are far from the format's ends."""
    x = rows(1.0, seed=seed) * torch.linspace(0, -4, K).exp2()
    found = choose(case(x, Rule(weight=weight, input=parse_spec(spec), shift=14)))
    assert found.shift is None
    assert found.scale is None


def test_columns_are_lowered_as_the_input_is_raised_and_as_the_weight_fits() -> None:
    x, weight = rows(50.0), torch.randn(48, K, generator=torch.Generator().manual_seed(1))
    weight[:, LOUD] /= 50
    x[:, QUIET] /= 16
    rule = Rule(weight=E2M1, input=parse_spec("fp4_e2m1/token"), solver="imatrix", shift=14)
    choice = choose(case(x, rule, weight))
    assert choice.shift is not None
    assert int(choice.shift[LOUD]) < int(choice.shift.sum() / K) - 3
    spec, lowered = weighed(weight, x, rule, choice.shift)
    assert spec == E2M1
    assert lowered is not None
    # the activations of one are as large as its weights are small; those of the other are raised alone
    assert abs(float(lowered[LOUD] - lowered.float().mean())) <= 1.5
    assert abs(float(lowered[QUIET] - lowered.float().mean()) - 4) <= 1.5
    assert 0 <= int(lowered.min()) <= int(lowered.max()) <= 14
    _, bounded = weighed(weight, x, replace(rule, shift=3), choice.shift.clamp(max=3))
    assert bounded is not None
    assert int(bounded.max()) <= 3


def test_octaves_that_clip_nothing_are_tried() -> None:
    generator = torch.Generator().manual_seed(0)
    # on the grid of 7 magnitudes: whole, at half its step, and of its lower half and one more
    x = torch.cat([torch.randint(-most, most + 1, (400, 8), generator=generator) for most in (7, 7, 4)], 1).float()
    x[0] = torch.tensor([7.0, 7.0, 4.0]).repeat_interleave(8)
    x[:, 8:16] /= 2
    e1m2 = parse_spec("fp4_e1m2/tensor")
    rule = Rule(weight=parse_spec("fp4_e1m2/channel"), input=e1m2, observer="minmax", shift=14)
    choice = choose(case(x, rule, torch.randn(48, 24, generator=generator)))
    assert choice.shift is not None
    assert torch.equal(choice.shift, floor_shift(x.abs().amax(0), None, 14))
    # the nearest octaves clip the last channels, and half an octave less rounds those before
    assert choice.snr_db == inf


def test_columns_stay_where_nothing_is_gained() -> None:
    weight = torch.randn(48, K, generator=torch.Generator().manual_seed(1))
    rule = Rule(weight=E2M1, solver="imatrix", shift=14)
    assert weighed(weight, rows(1.0), rule, None) == (E2M1, None)
    spec, lowered = weighed(weight, rows(1.0), replace(rule, weight=NVFP4), None)
    assert (spec, lowered) == (NVFP4, None)


@pytest.mark.parametrize(("fmt", "most"), [("fp4_e2m1", 14), ("fp4_e3m0", 11), ("fp6_e2m3", 11), ("fp8_e3m4", 0)])
def test_a_weight_is_lowered_as_far_as_e4m3_holds_its_numbers(fmt: str, most: int) -> None:
    shift = torch.linspace(14, 0, K).round().long()
    weight = torch.randn(48, K, generator=torch.Generator().manual_seed(1))
    rule = Rule(weight=parse_spec(f"{fmt}/channel"), input=TOKEN, solver="imatrix", shift=14)
    spec, lowered = weighed(weight, rows(1.0), rule, shift)
    assert (0 if lowered is None else int(lowered.max())) == most
    assert most == 0 or folds_octaves(spec, most)


def test_weights_take_the_float_that_fits_them() -> None:
    powers = torch.randint(-3, 4, (48, K), generator=torch.Generator().manual_seed(1)).float().exp2()
    rule = Rule(weight=E2M1, input=parse_spec("fp4_e2m1/token"), format=FLOAT)
    assert weighed(powers, rows(1.0), rule, None)[0] == parse_spec("fp4_e3m0/channel")


@pytest.mark.parametrize(
    ("first", "others"),
    [
        ("e2m0", ["e1m1"]),
        ("fp4_e2m1", ["fp4_e1m2", "fp4_e3m0"]),
        ("e2m2", ["e1m3", "e3m1", "e4m0"]),
        ("fp6_e3m2", ["e1m4", "fp6_e2m3", "e4m1", "e5m0"]),
        ("e3m3", ["e1m5", "e2m4", "e4m2", "e5m1"]),
        # what units are made for, not what merely reserves fewer codes, and nothing twice
        ("fp8_e4m3", ["e1m6", "fp8_e2m5", "fp8_e3m4", "fp8_e5m2"]),
        ("e4m3", ["e1m6", "fp8_e2m5", "fp8_e3m4", "fp8_e5m2"]),
        ("int4", []),
    ],
)
def test_every_split_of_the_bits_is_tried(first: str, others: list[str]) -> None:
    assert [spec.format.name for spec in rivals(parse_spec(f"{first}/channel"))] == [first, *others]


@pytest.mark.parametrize("fmt", ["e3m3", "e2m2", "fp6_e3m2"])
def test_floats_of_any_width_are_chosen_among(fmt: str) -> None:
    flat = torch.rand(48, K, generator=torch.Generator().manual_seed(1)) - 0.5
    rule = Rule(weight=parse_spec(f"{fmt}/channel"), input=parse_spec(f"{fmt}/tensor"), format=FLOAT, solver="mse")
    bits = rule.weight.format.bits if rule.weight is not None else 0
    assert weighed(flat, rows(1.0), rule, None)[0] == parse_spec(f"e1m{bits - 2}/channel")
    given = choose(case(rows(1.0), rule, flat)).input
    assert given is not None
    assert given.format.name in (f"e2m{bits - 3}", f"fp6_e2m{bits - 3}", f"e1m{bits - 2}")
