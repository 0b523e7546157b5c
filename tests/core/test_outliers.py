"""Outliers that were planted are found, channel for channel, and nothing else is."""

import json

import pytest
import torch
from torch import Tensor

from qcompile.errors import CalibrationError
from qcompile.graph import Op
from qcompile.observers import observe
from qcompile.outliers import Activation, Group, Outliers, binned, find_outliers

LOUD = (3, 77, 200)


def crowd(rows: int, k: int, seed: int = 0, spread: float = 0.3) -> Tensor:
    """Normal values, channels of different magnitudes: e to a normal number times `spread`."""
    generator = torch.Generator().manual_seed(seed)
    magnitudes = (torch.randn(k, generator=generator) * spread).exp()
    return torch.randn(rows, k, generator=generator) * magnitudes


def group(x: Tensor, *names: str, maker: Op = Op.RMS_NORM, feeds_head: bool = False) -> Group:
    return Group(sites=names or ("site",), maker=maker, stats=observe(x), feeds_head=feeds_head)


def found_in(x: Tensor) -> Activation:
    return find_outliers([group(x)]).activations[0]


def channels(x: Tensor) -> set[int]:
    return {c.channel for c in found_in(x).outliers}


@pytest.mark.parametrize("k", [1, 2, 7, 17, 384, 1408])
@pytest.mark.parametrize("rows", [1, 2, 5, 64, 700])
def test_a_crowd_has_no_outliers(rows: int, k: int) -> None:
    for seed in range(5):
        # far from 6.0, which is a magnitude of its own
        assert channels(crowd(rows, k, seed) / 10) == set()


@pytest.mark.parametrize("factor", [20.0, 60.0, 1e4])
@pytest.mark.parametrize("unit", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loud_channels_are_found_and_no_others_in_any_unit(factor: float, unit: float, dtype: torch.dtype) -> None:
    x = crowd(500, 301) * unit
    x[:, list(LOUD)] *= factor
    assert channels(x.to(dtype)) == set(LOUD)


def test_outliers_are_measured() -> None:
    x = torch.ones(100, 64)
    x[::2] *= -1
    x[:, 5] *= 32
    x[:90, 5] /= 8
    activation = found_in(x)
    (loud,) = activation.outliers
    assert (loud.channel, loud.amax, loud.ratio) == (5, 32.0, 32.0)
    # ten rows of 32, ninety of 4
    rms = ((10 * 32**2 + 90 * 4**2) / 100) ** 0.5
    assert loud.peak_factor == pytest.approx(32 / rms)
    assert loud.rms_ratio == pytest.approx(rms)
    assert loud.kurtosis == pytest.approx((10 * 32**4 + 90 * 4**4) / 100 / rms**4)
    assert loud.exceeding == 0.1
    assert loud.share == 1.0
    assert loud.gain_db == activation.gain_db == pytest.approx(20 * torch.tensor(32.0).log10().item())
    assert (activation.tokens, activation.channels, activation.amax, activation.median) == (100, 64, 32.0, 1.0)


def test_the_second_of_two_loud_channels_limits_the_gain_of_the_first() -> None:
    x = torch.ones(10, 32)
    x[:, 4], x[:, 9] = 100.0, 50.0
    activation = found_in(x)
    assert [c.channel for c in activation.outliers] == [4, 9]
    assert activation.outliers[0].gain_db == pytest.approx(6.02, abs=0.01)
    assert activation.outliers[1].gain_db == 0.0
    assert activation.gain_db == pytest.approx(40.0)


def test_a_channel_that_is_loud_all_the_time_is_found_above_a_crowd_that_peaks() -> None:
    generator = torch.Generator().manual_seed(1)
    # everyone peaks at 20 times its usual magnitude in one token of a hundred
    x = torch.randn(2000, 256, generator=generator) * (1 + 20 * (torch.rand(2000, 256, generator=generator) < 0.01))
    # and so does not reach far above the others: it is simply never quiet
    x[:, 40] = 60 * torch.randn(2000, generator=generator)
    assert channels(x) == {40}


def test_dead_channels_are_no_crowd() -> None:
    x = crowd(200, 128)
    x[:, ::2] = 0
    x[:, 7] *= 50
    assert channels(x) == {7}
    assert channels(torch.zeros(8, 16)) == set()


def test_a_huge_token_is_massive_and_no_outlier_channel() -> None:
    x = crowd(1000, 128)
    x[17] *= 1e5
    activation = found_in(x)
    assert activation.outliers == ()
    assert activation.massive is not None
    assert activation.massive.tokens == 1
    assert activation.massive.share == 1e-3
    assert activation.massive.ratio > 1e4
    assert activation.massive.channels[0] == int(x[17].abs().argmax())


def test_a_first_token_that_is_huge_in_one_channel_is_massive_too() -> None:
    x = crowd(2048, 128)
    x[::256, 31] = 1e4
    activation = found_in(x)
    assert activation.massive is not None
    assert activation.massive.channels == (31,)
    assert activation.massive.tokens == 8
    assert activation.outliers == ()


def test_an_outlier_channel_is_seen_behind_massive_tokens() -> None:
    x = crowd(2000, 128)
    x[:, 9] *= 30
    x[3] *= 1e6
    activation = found_in(x)
    assert activation.massive is not None
    assert [c.channel for c in activation.outliers] == [9]
    assert 10 < activation.outliers[0].ratio < 90


def test_a_channel_that_is_huge_in_every_token_is_not_massive() -> None:
    x = crowd(300, 64)
    x[:, 5] *= 1e5
    activation = found_in(x)
    assert activation.massive is None
    assert [c.channel for c in activation.outliers] == [5]


def hidden(loud: dict[int, float], share: float, seed: int = 0) -> Tensor:
    """Quiet activations [1000, 64] in which each channel of `loud` has that magnitude in a share of the tokens."""
    x = crowd(1000, 64, seed).clamp(-3, 3)
    for channel, magnitude in loud.items():
        x[: int(1000 * share), channel] = magnitude
    return x


def test_emergent_features_follow_their_definition() -> None:
    # a quarter of eight layers is two: 8 is there in two, 9 in one, 10 in all but in too few tokens
    loud = [{8: 6.0, 9: 7.0}, {8: 9.0}, *[{}] * 6]
    layers = [_with(hidden(magnitudes, 0.06, seed=i), 10, 0.059) for i, magnitudes in enumerate(loud)]
    (feature,) = find_outliers([group(x, f"l{i}") for i, x in enumerate(layers)]).emergent
    assert (feature.channel, feature.layers, feature.of, feature.amax) == (8, 2, 8, 9.0)
    assert feature.positions == pytest.approx(0.06)


def _with(x: Tensor, channel: int, share: float) -> Tensor:
    x[: int(1000 * share), channel] = 50.0
    return x


def test_features_emerge_among_hidden_layers_only() -> None:
    x = hidden({8: 20.0}, 0.5)
    after_product = [group(x, f"down{i}", maker=Op.MUL) for i in range(4)]
    head = group(x, "head", feeds_head=True)
    quiet = group(hidden({}, 0.5), "up")
    assert find_outliers([*after_product, head, quiet]).emergent == ()
    assert [e.channel for e in find_outliers([*after_product, head, quiet, group(x, "q", "k")]).emergent] == [8]


def test_channels_by_site_and_across_layers() -> None:
    first, second = crowd(100, 64), crowd(100, 64, seed=1)
    first[:, [3, 9]] *= torch.tensor([200.0, 40.0])
    second[:, 3] *= 40
    found = find_outliers([group(first, "q", "k"), group(second, "o")])
    assert set(found.channels("k")) == {3, 9}
    assert found.channels("o") == (3,)
    assert found.channels("nobody") == ()
    assert [(key, len(places)) for key, places in found.by_channel().items()] == [((64, 3), 2), ((64, 9), 1)]


def test_the_table_is_json_and_reads_back() -> None:
    x = hidden({8: 60.0}, 0.5)
    x[11] *= 1e6
    found = find_outliers([group(x, "q", "k"), group(crowd(10, 7), "o", maker=Op.ATTENTION)])
    assert found.emergent
    assert found.activations[0].massive
    assert Outliers.from_table(json.loads(json.dumps(found.to_table()))) == found


def test_an_activation_with_nan_is_refused_by_name() -> None:
    x = crowd(4, 8)
    x[1, 2] = torch.nan
    with pytest.raises(CalibrationError, match=r"'layers\.0\.q' held NaN or Inf"):
        find_outliers([group(x, "layers.0.q")])


def test_no_groups_no_outliers() -> None:
    assert find_outliers([]) == Outliers()


@pytest.mark.parametrize(("k", "bins", "lengths"), [(5, 8, [1] * 5), (10, 4, [3, 3, 3, 1]), (512, 512, [1] * 512)])
def test_bins_hold_the_largest_of_equal_runs(k: int, bins: int, lengths: list[int]) -> None:
    x = torch.rand(k, generator=torch.Generator().manual_seed(0))
    assert binned(x, bins).tolist() == [float(part.max()) for part in x.split(lengths)]
