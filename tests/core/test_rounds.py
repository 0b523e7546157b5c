"""Rounds of choices: each side is given the other as it is quantized, and ranges go by the outputs' error."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from qcompile import choose, rounds
from qcompile.cases import Case, Choice, joined, probe_part
from qcompile.choose import CLIPS, input_of
from qcompile.graph import Op
from qcompile.noise import Probe, Treatment
from qcompile.numerics import fake_quantize
from qcompile.observers import Part, observe
from qcompile.plan import Preparation, make_plan
from qcompile.ranges import parse_observer
from qcompile.recipe import FLOAT, Recipe, Rule
from qcompile.rounds import settle
from qcompile.sites import Site
from qcompile.spec import parse_spec

K = 64
E2M1, STATIC = parse_spec("fp4_e2m1/channel"), parse_spec("fp4_e2m1/tensor")
FREE = Rule(weight=E2M1, input=STATIC, solver="imatrix", format=FLOAT, shift=14)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def case(x: Tensor, rule: Rule, *weights: Tensor) -> tuple[Case, list[Probe]]:
    stats = observe(x, parts=Part.CHANNELS)
    probes = [probe_part(weight, stats, whole=False) for weight in weights]
    columns = torch.stack([weight.abs().amax(0) for weight in weights]).amax(0)
    return Case(probe=joined(probes), stats=stats, columns=columns, rule=rule), probes


def uneven(seed: int = 0) -> Tensor:
    return normal(400, K, seed=seed) * normal(K, seed=seed + 1).mul(1.5).exp()


def test_each_side_is_chosen_with_the_other_as_it_is_quantized(monkeypatch: pytest.MonkeyPatch) -> None:
    tried, (both, probes) = [], case(uneven(), FREE, normal(48, K, seed=5), normal(40, K, seed=6))

    def watched(given: Case) -> Choice:
        tried.append((given.probe.numbers, choose.choose(given)))
        return tried[-1][1]

    monkeypatch.setattr(rounds, "ROUNDS", 3)
    monkeypatch.setattr(rounds, "choose", watched)
    choice, weighed = settle(both, probes)
    assert 2 <= len(tried) <= 3
    assert tried[0][0] is None
    # the weights of all sites, as they are joined
    numbers = tried[-1][0]
    assert numbers is not None
    assert numbers.shape == both.probe.weight.shape
    assert 0 < float((numbers - both.probe.weight).norm() / both.probe.weight.norm()) < 0.2
    for one, probe in zip(weighed, probes, strict=True):
        treatment = Treatment(
            weight=one.spec, solver="imatrix", importance=both.stats.importance, **input_of(both, choice)
        )
        octaves = torch.zeros(K) if one.lowered is None else one.lowered
        raised = octaves if choice.shift is None else octaves - choice.shift
        expected = probe.after(replace(treatment, raised=raised.float().exp2()))
        assert replace(probe, numbers=one.numbers).after(replace(treatment, weight=None)) == pytest.approx(expected)


def test_rounds_end_when_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, (both, probes) = [], case(uneven(), FREE, normal(48, K, seed=5))
    first = choose.choose(both)
    monkeypatch.setattr(rounds, "ROUNDS", 3)
    monkeypatch.setattr(rounds, "choose", lambda given: calls.append(given) or first)
    settle(both, probes)
    assert len(calls) == 2
    # and at the last one, if all change something
    calls.clear()
    turns = [replace(first, clip=clip) for clip in CLIPS[:8]]
    monkeypatch.setattr(rounds, "choose", lambda given: calls.append(given) or turns[len(calls)])
    choice, _ = settle(both, probes)
    assert (len(calls), choice.clip) == (3, CLIPS[3])


@pytest.mark.parametrize("rule", [replace(FREE, input=None), replace(FREE, weight=parse_spec("fp4_e2m1/b32/e8m0"))])
def test_where_sides_do_not_wait_for_each_other_one_round_is_all(rule: Rule, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(rounds, "ROUNDS", 3)
    monkeypatch.setattr(rounds, "choose", lambda given: calls.append(given) or choose.choose(given))
    _, weighed = settle(*case(uneven(), rule, normal(48, K, seed=5)))
    assert (len(calls), len(weighed)) == (1, 1)


def test_a_rule_that_leaves_no_choice_gets_none() -> None:
    choice, weighed = settle(*case(uneven(), replace(FREE, format=None, shift=None), normal(48, K, seed=5)))
    assert (choice.shift, choice.clip, weighed) == (None, 0.0, ())


def test_known_numbers_stand_for_the_weight() -> None:
    probe = case(normal(100, K), FREE, normal(48, K, seed=5))[1][0]
    numbers = fake_quantize(probe.weight, E2M1)
    held = replace(probe, numbers=numbers)
    token = parse_spec("int8/token")
    assert held.after(Treatment(input=token)) == probe.after(Treatment(input=token, weight=E2M1))
    scale = normal(K, seed=7).exp2().log2().round().exp2()
    assert held.scaled(scale).after(Treatment()) == pytest.approx(held.after(Treatment()), abs=1e-3)
    # a treatment of its own goes before
    assert held.after(Treatment(weight=parse_spec("int8/channel"))) > held.after(Treatment()) + 10


def test_a_range_is_clipped_where_the_outputs_gain(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = normal(400, K), normal(48, K, seed=5)
    # what reaches far hardly matters to what is made of it
    x[:, :4] *= 6
    weight[:, :4] /= 1000
    rule = replace(FREE, shift=None, format=FLOAT)
    clipped = choose.choose(case(x, rule, weight)[0])
    monkeypatch.setattr(choose, "CLIPS", ())
    whole = choose.choose(case(x, rule, weight)[0])
    assert (whole.clip, clipped.clip) == (0.0, -1.0)
    assert clipped.snr_db > whole.snr_db + 1


def test_a_range_that_fits_stays() -> None:
    grid = torch.tensor(STATIC.format.magnitudes)  # type: ignore[union-attr]
    codes = torch.randint(0, 8, (400, K), generator=torch.Generator().manual_seed(0))
    found = choose.choose(case(grid[codes], replace(FREE, observer="minmax"), normal(48, K, seed=5))[0])
    assert (found.input, found.clip) == (STATIC, 0.0)


@pytest.mark.parametrize("octaves", [-0.5, 0.0, 0.25])
def test_the_plan_holds_the_range_that_was_chosen(octaves: float) -> None:
    site = Site(name="fc", op=Op.LINEAR, weight=normal(48, K, seed=5))
    stats = observe(uneven(), parts=Part.CHANNELS)
    recipe = Recipe(name="mine", rules=(replace(FREE, solver="mse"),))
    plan = make_plan([site], recipe, {"fc": stats}, prepared=Preparation(clips={"fc": octaves}))
    found, base = plan.decisions["fc"].input_qparams, parse_observer("mse")(stats, STATIC)
    assert found is not None
    assert torch.equal(found.scale, base.scale * 2.0**octaves)
    assert torch.equal(found.stored["scale"], found.scale)
