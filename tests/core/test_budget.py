"""Options of slots under a budget: beside all combinations, and at the ends."""

from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcompile.budget import Option, least_cost, least_error, parse_budget
from qcompile.errors import RecipeError

OPTIONS = st.builds(Option, cost=st.integers(1, 12).map(float), error=st.integers(0, 40).map(float))
SLOTS = st.lists(st.lists(OPTIONS, min_size=1, max_size=4), min_size=1, max_size=4)


def sums(slots: list[list[Option]], taken: list[int]) -> tuple[float, float]:
    chosen = [options[i] for options, i in zip(slots, taken, strict=True)]
    return sum(o.cost for o in chosen), sum(o.error for o in chosen)


def everything(slots: list[list[Option]]) -> list[tuple[float, float]]:
    return [sums(slots, list(taken)) for taken in product(*(range(len(options)) for options in slots))]


@given(slots=SLOTS, most=st.integers(1, 50))
def test_least_error_keeps_to_the_budget_and_is_within_a_step_of_the_best(slots: list[list[Option]], most: int) -> None:
    taken = least_error(slots, most)
    possible = [error for cost, error in everything(slots) if cost <= most]
    assert (taken is None) == (not possible)
    if taken is not None:
        cost, error = sums(slots, taken)
        step = max(max(o.error for o in options) - min(o.error for o in options) for options in slots)
        assert cost <= most
        assert min(possible) <= error <= min(possible) + step


@given(slots=SLOTS, most=st.integers(0, 100))
def test_least_cost_errs_no_more_than_asked(slots: list[list[Option]], most: int) -> None:
    taken = least_cost(slots, most)
    possible = [cost for cost, error in everything(slots) if error <= most]
    assert (taken is None) == (not possible)
    if taken is not None:
        cost, error = sums(slots, taken)
        step = max(max(o.cost for o in options) - min(o.cost for o in options) for options in slots)
        assert error <= most
        assert min(possible) <= cost <= min(possible) + step


@given(slots=SLOTS)
def test_more_to_spend_never_errs_more_along_the_hull(slots: list[list[Option]]) -> None:
    ends = [min(sum(o.cost for o in each), 60) for each in slots]
    found = [least_error(slots, float(most)) for most in (sum(ends), 2 * sum(ends))]
    assert found[1] is not None
    if found[0] is not None:
        assert sums(slots, found[1])[1] <= sums(slots, found[0])[1]


def test_a_budget_that_is_one_options_cost_for_all_gives_no_more_error_than_that_option() -> None:
    slots = [
        [Option(cost=2.0, error=16.0 * k), Option(cost=4.0, error=k), Option(cost=8.0, error=k / 256)] for k in (1, 4)
    ]
    taken = least_error(slots, 8.0)
    assert taken is not None
    assert sums(slots, taken)[1] <= 5


@pytest.mark.parametrize("text", ["4.25 bits", "30 dB"])
def test_a_budget_is_read_as_it_is_written(text: str) -> None:
    assert str(parse_budget(text)) == text


@pytest.mark.parametrize("text", ["4.25", "bits", "-1 bits", "nan dB", "inf bits", "4 bytes", ""])
def test_what_is_no_budget_is_refused(text: str) -> None:
    with pytest.raises(RecipeError, match=r"4\.25 bits"):
        parse_budget(text)
