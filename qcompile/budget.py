"""Budgets: which option each of many takes, so that all together cost little and err little.

One of the options of each slot is taken; costs and errors add up. Along the lower convex hull of a slot's options, each
step buys error for cost at a falling rate, so that the best rate of all slots is bought first, as long as it fits
(Lagrange's method, its multiplier being the rate); what is left goes to single steps off the hull.
Source: Shoham and Gersho 1988 (Efficient bit allocation for an arbitrary set of quantizers).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from qcompile.errors import RecipeError

BITS, DECIBELS = "bits", "dB"


@dataclass(frozen=True, kw_only=True)
class Budget:
    """How much the weights of some sites may cost or err.  Written "4.25 bits" or "30 dB"; see `parse_budget`.

    unit: BITS, at most so many bits a weight on average, with scales and zero points; or DECIBELS, the noise of the
        model's outputs foreseen to be so far below the signal, in as few bits as do it.
    """

    amount: float
    unit: str = BITS

    def __str__(self) -> str:
        return f"{self.amount:g} {self.unit}"


def parse_budget(text: str) -> Budget:
    """The Budget written as `text`.  Raises RecipeError that says what can be written."""
    amount, _, unit = text.partition(" ")
    try:
        number = float(amount)
    except ValueError:
        number = 0.0
    if unit not in (BITS, DECIBELS) or not 0 < number < float("inf"):
        raise RecipeError(
            f"takes a budget as '4.25 {BITS}' (a weight) or '30 {DECIBELS}' (of the outputs), got {text!r}"
        )
    return Budget(amount=number, unit=unit)


@dataclass(frozen=True, kw_only=True)
class Option:
    """What a slot may take.  cost, error: at least 0, of any unit that adds up over slots."""

    cost: float
    error: float


@dataclass(frozen=True, kw_only=True)
class _Step:
    """Of a slot, from one option of its hull to the next dearer one; rate: error saved for each unit of cost."""

    slot: int
    option: int
    cost: float
    error: float

    @property
    def rate(self) -> float:
        return self.error / self.cost


def least_error(slots: Sequence[Sequence[Option]], most: float) -> list[int] | None:
    """The option of each slot for which the sum of errors is low and that of costs at most `most`; None if none is.

    Exact at the costs where a step of the hull ends; between them, off by less than one step.
    """
    hulls = [_hull(options) for options in slots]
    taken = [hull[0] for hull in hulls]
    spent = sum(slots[i][option].cost for i, option in enumerate(taken))
    if spent > most:
        return None
    for step in _steps(slots, hulls):
        if spent + step.cost <= most:
            taken[step.slot] = step.option
            spent += step.cost
        else:
            break
    return _repaired(slots, taken, lambda cost, _: cost <= most, lambda option: option.error)


def least_cost(slots: Sequence[Sequence[Option]], most: float) -> list[int] | None:
    """The option of each slot for which the sum of costs is low and that of errors at most `most`; None if none is."""
    hulls = [_hull(options) for options in slots]
    taken = [hull[0] for hull in hulls]
    error = sum(slots[i][option].error for i, option in enumerate(taken))
    for step in _steps(slots, hulls):
        if error <= most:
            break
        taken[step.slot] = step.option
        error -= step.error
    # as floats add up
    if sum(slots[i][option].error for i, option in enumerate(taken)) > most:
        return None
    return _repaired(slots, taken, lambda _, error: error <= most, lambda option: option.cost)


def _hull(options: Sequence[Option]) -> list[int]:
    """Indices of the lower convex hull, from the cheapest option to the one of least error."""
    found: list[int] = []
    for i in sorted(range(len(options)), key=lambda i: (options[i].cost, options[i].error)):
        if found and options[i].error >= options[found[-1]].error:
            continue
        while len(found) > 1 and _bends_up(options[found[-2]], options[found[-1]], options[i]):
            found.pop()
        found.append(i)
    return found


def _bends_up(a: Option, b: Option, c: Option) -> bool:
    """Whether b lies on or above the line from a to c."""
    return (a.error - b.error) * (c.cost - a.cost) <= (a.error - c.error) * (b.cost - a.cost)


def _steps(slots: Sequence[Sequence[Option]], hulls: Sequence[Sequence[int]]) -> list[_Step]:
    """All steps of all hulls, those that save most for their cost first: of one slot they stay in order."""
    return sorted((step for i, hull in enumerate(hulls) for step in _of(i, slots[i], hull)), key=lambda s: -s.rate)


def _of(slot: int, options: Sequence[Option], hull: Sequence[int]) -> Iterator[_Step]:
    for before, after in pairwise(hull):
        a, b = options[before], options[after]
        yield _Step(slot=slot, option=after, cost=b.cost - a.cost, error=a.error - b.error)


def _repaired(
    slots: Sequence[Sequence[Option]],
    taken: list[int],
    fits: Callable[[float, float], bool],
    lost: Callable[[Option], float],
) -> list[int]:
    """`taken` after changes of single slots, the one that loses least first, until none is left that fits and gains."""
    while True:
        cost = sum(slots[i][option].cost for i, option in enumerate(taken))
        error = sum(slots[i][option].error for i, option in enumerate(taken))
        changes = [
            (lost(other) - lost(options[taken[i]]), i, o)
            for i, options in enumerate(slots)
            for o, other in enumerate(options)
            if lost(other) < lost(options[taken[i]])
            and fits(cost + other.cost - options[taken[i]].cost, error + other.error - options[taken[i]].error)
        ]
        if not changes:
            return taken
        _, slot, option = min(changes)
        taken[slot] = option
