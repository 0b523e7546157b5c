"""The part of a batch that a model is looked at with."""

import math
from typing import Any

import pytest
import torch

from qcompile.watch import first_rows, real_rows

IDS, MASK = torch.arange(12).view(4, 3), torch.ones(4, 3)


@pytest.mark.parametrize(
    ("batch", "expected"),
    [
        ({"ids": IDS, "mask": MASK, "use_cache": False}, {"ids": IDS[:2], "mask": MASK[:2], "use_cache": False}),
        ((IDS, MASK, None), (IDS[:2], MASK[:2], None)),
        (IDS, IDS[:2]),
    ],
)
def test_the_first_rows_of_every_tensor_are_taken(batch: Any, expected: Any) -> None:
    torch.testing.assert_close(first_rows(batch), expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    "batch",
    [{"ids": IDS, "other": IDS[:3]}, {"ids": IDS, "scale": torch.tensor(2.0)}, (IDS, torch.ones(4)), torch.ones(4), {}],
)
def test_a_batch_whose_tensors_have_no_common_rows_stays_whole(batch: Any) -> None:
    assert first_rows(batch) is batch


def test_a_batch_of_fewer_rows_stays_as_it_is() -> None:
    assert first_rows(IDS[:1]).shape == (1, 3)


@pytest.mark.parametrize("shape", [(), (3,), (0,), (2, 0), (0, 3), (2, 0, 3), (2, 4, 3)])
def test_rows_of_every_shape(shape: tuple[int, ...]) -> None:
    rows, told = real_rows(torch.ones(shape), None)
    expected = (math.prod(shape[:-1]), shape[-1] if shape else 1)
    assert (tuple(rows.shape), told) == (expected, True)
