"""Advice names the cause that was planted, and its predictions come true."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor

from qcompile.advice import Advice, Case, Kind, Remedy, advise, extra_bytes, measured, smoothing, title
from qcompile.graph import Op
from qcompile.noise import Treatment, probe
from qcompile.observers import Part, observe
from qcompile.outliers import Group, find_outliers
from qcompile.ranges import parse_observer
from qcompile.spec import parse_spec

STATIC, TOKEN = parse_spec("int8/tensor/asym"), parse_spec("int8/token/asym")


def case(
    x: Tensor,
    weight: Tensor,
    *,
    weight_spec: str | None = "int8/channel",
    dynamic: bool = False,
    smoothable: bool = False,
) -> Case:
    stats = observe(x, parts=Part.TENSOR | Part.CHANNELS)
    observer = partial(parse_observer("mse"), spec=STATIC)
    return Case(
        sites=("layers.5.mlp.down_proj",),
        weights=(weight,),
        stats=stats,
        treatment=Treatment(
            weight=None if weight_spec is None else parse_spec(weight_spec),
            input=TOKEN if dynamic else observer(stats),
        ),
        activation=find_outliers([Group(sites=("s",), maker=Op.MUL, stats=stats)]).activations[0],
        static=None if dynamic else observer,
        channels=torch.arange(weight.shape[1]) if smoothable else None,
    )


@pytest.fixture
def x() -> Tensor:
    return torch.randn(600, 128, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def weight() -> Tensor:
    return torch.randn(40, 128, generator=torch.Generator().manual_seed(1))


def of_kind(advice: list[Advice], kind: Kind) -> Advice:
    return next(a for a in advice if a.remedy.kind is kind)


def test_an_outlier_channel_is_blamed_and_split_off(x: Tensor, weight: Tensor) -> None:
    x[:, 77] *= 60
    loud = case(x, weight / torch.where(torch.arange(128) == 77, 60, 1))
    advice = advise([loud])
    split = of_kind(advice, Kind.SPLIT)
    assert split.remedy.channels == (77,)
    assert split.text.startswith("layers.5.mlp.down_proj: channel 77, ")
    assert "split off channel 77 (+" in split.text
    assert split.bytes == 40 * 2
    assert split.predicted_db > 20
    # a prediction is what the same measurement gives when the advice was followed
    followed = (
        replace(loud.treatment, channels=(77,), input=loud.static(loud.stats.without(torch.tensor([77]))))
        if loud.static
        else loud.treatment
    )
    after = probe(loud.weight(), loud.stats).after(followed)
    assert after == pytest.approx(split.before_db + split.predicted_db)


def test_smoothing_is_advised_only_where_it_can_be_folded(x: Tensor, weight: Tensor) -> None:
    x[:, 3] *= 30
    assert of_kind(advise([case(x, weight, smoothable=True)]), Kind.SMOOTH).predicted_db > 3
    assert all(a.remedy.kind is not Kind.SMOOTH for a in advise([case(x, weight)]))


def test_tokens_of_unequal_size_want_a_scale_each(x: Tensor, weight: Tensor) -> None:
    x[::10] *= 50
    best = advise([case(x, weight)])[0]
    assert best.remedy == Remedy(kind=Kind.DYNAMIC, spec="int8/token/asym")
    assert best.bytes == 0
    assert best.action == "give every token its own scale (int8/token/asym)"


def test_a_poor_weight_gets_more_bits(x: Tensor, weight: Tensor) -> None:
    poor = case(x, weight, weight_spec="int4/channel", dynamic=True)
    best = advise([poor])[0]
    assert best.remedy.kind is Kind.WEIGHT
    assert "its weight causes 9" in best.cause or "its weight causes 100%" in best.cause
    assert best.bytes == extra_bytes(poor, best.remedy) > 0


def test_leaving_in_16_bit_is_the_last_resort(x: Tensor, weight: Tensor) -> None:
    # eight bits on both sides and nothing that stands out: only 16 bit would gain much
    advice = advise([case(x, weight, dynamic=True)])
    assert advice[0].remedy.kind is Kind.FLOAT
    x[::10] *= 50
    assert all(a.remedy.kind is not Kind.FLOAT for a in advise([case(x, weight)]))


def test_the_noisiest_case_comes_first(x: Tensor, weight: Tensor) -> None:
    loud = x.clone()
    loud[:, 9] *= 200
    quiet, noisy = case(x, weight), replace(case(loud, weight / 10), sites=("noisy",))
    noisy.weights[0][:, 9] = 0
    advice = advise([quiet, noisy])
    assert advice[0].sites == ("noisy",)
    assert {a.sites for a in advise([quiet, noisy], most=1)} == {("noisy",)}


def test_a_site_without_noise_or_signal_needs_no_advice(x: Tensor, weight: Tensor) -> None:
    assert advise([case(torch.zeros_like(x), weight)]) == []
    assert advise([]) == []


def test_only_so_many_are_tried(x: Tensor, weight: Tensor) -> None:
    x[::10] *= 50
    x[:, 4] *= 40
    advice = advise([case(x, weight, smoothable=True)])
    assert len(advice) >= 3
    gains = {a.remedy: None if a.remedy.kind is Kind.DYNAMIC else 1.5 for a in advice}
    tried = measured(advice, lambda a: gains[a.remedy], tries=1)
    assert [a.measured_db for a in tried].count(1.5) == 1
    assert [replace(a, measured_db=None) for a in tried] == advice


def test_smoothing_meets_its_formula() -> None:
    amax, weight = torch.tensor([4.0, 1.0, 0.0]), torch.tensor([[1.0, -1.0, 5.0], [0.5, 0.25, 5.0]])
    # (4 / 1)**0.5 = 2 and 1; the silent channel stays
    apart = torch.arange(3)
    torch.testing.assert_close(smoothing(amax, weight, apart, 0.5), torch.tensor([2.0, 1.0, 1.0]))
    torch.testing.assert_close(smoothing(torch.zeros(3), weight, apart, 0.5), torch.ones(3))
    # one scale for the first two, by the largest of each side
    torch.testing.assert_close(smoothing(amax, weight, torch.tensor([0, 0, 2]), 0.5), torch.tensor([2.0, 2.0, 1.0]))


@pytest.mark.parametrize(
    ("sites", "expected"),
    [
        (("a.b.q",), "a.b.q"),
        (("a.b.q", "a.b.k", "a.b.v"), "a.b.q, k, v"),
        (("q", "k"), "q, k"),
        (("a.x.q", "a.y.q"), "a.x.q, y.q"),
        (("a.b", "a.b"), "a.b, b"),
    ],
)
def test_titles_say_shared_parts_once(sites: tuple[str, ...], expected: str) -> None:
    assert title(sites) == expected
