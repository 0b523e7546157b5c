"""Octaves of channels: what they must not depend on, and how far they go."""

import pytest
import torch

from qcompile.shifts import shift_of

AMAX = torch.tensor([8.0, 4.0, 3.9, 1.0, 0.01, 0.0])


def test_octaves_below_the_largest_channel() -> None:
    assert shift_of(AMAX, None, 14, 0.0).tolist() == [0, 1, 1, 3, 10, 0]
    assert shift_of(AMAX, None, 3, 0.0).tolist() == [0, 1, 1, 3, 3, 0]
    # the largest may be clipped by an octave
    assert shift_of(AMAX, None, 14, 1.0).tolist() == [0, 0, 0, 2, 9, 0]


@pytest.mark.parametrize("octaves", [-7, 5])
def test_the_unit_does_not_matter(octaves: int) -> None:
    amax = torch.rand(100) + 0.01
    assert torch.equal(shift_of(amax * 2.0**octaves, None, 14, 0.25), shift_of(amax, None, 14, 0.25))


def test_the_order_of_channels_does_not_matter() -> None:
    amax, order = torch.rand(100).square(), torch.randperm(100)
    assert torch.equal(shift_of(amax[order], None, 14, 0.5), shift_of(amax, None, 14, 0.5)[order])


def test_channels_of_one_row_share_the_least() -> None:
    channels = torch.tensor([0, 1, 0, 1, 2, 2])
    assert shift_of(AMAX, channels, 14, 0.0).tolist() == [0, 1, 0, 1, 10, 10]


def test_without_signal_nothing_is_raised() -> None:
    assert shift_of(torch.zeros(4), None, 14, 0.0).tolist() == [0, 0, 0, 0]
