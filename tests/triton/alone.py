"""Rows that are no numbers, beside rows that are."""

from collections.abc import Callable

import torch
from torch import Tensor


def check_alone(linear: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """NaN and Inf in rows 1 and 2 of x [M, K] stay there, and zeros in row 0 change no other; returns what they give.

    linear: from x to [M, N], by weights of which no row is all zeros.
    """
    clean, poisoned = linear(x), x.clone()
    poisoned[0], poisoned[1, 3], poisoned[2, 5] = 0, torch.nan, torch.inf
    y = linear(poisoned)
    assert torch.equal(y[3:], clean[3:])
    assert y[1].isnan().all()
    assert not y[2].isfinite().any()
    return y[0]
