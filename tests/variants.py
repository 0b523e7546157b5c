"""Parameters of tests of which only some are tried every time."""

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def variants(values: Iterable[Any], *, quick: Collection[Any]) -> list[Any]:
    """All values, of which those that are not `quick` are slow tests. Tuples are several arguments."""
    found = list(values)
    unknown = [value for value in quick if value not in found]
    assert not unknown, f"{unknown} are no values of this test"
    slow = (pytest.mark.slow,)
    return [
        pytest.param(*(value if isinstance(value, tuple) else (value,)), marks=() if value in quick else slow)
        for value in found
    ]
