"""Wall time of competing functions, measured in turns so that a machine's moods hit all of them alike."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median

import torch


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Milliseconds of one call: every measured round, in order."""

    rounds: tuple[float, ...]

    @property
    def median(self) -> float:
        return median(self.rounds)

    @property
    def lowest(self) -> float:
        return min(self.rounds)


def time_in_turns(
    candidates: Mapping[str, Callable[[], object]], *, rounds: int = 20, warmup: int = 3
) -> dict[str, Timing]:
    """One call of each candidate per round, `rounds` times, after `warmup` calls of each.

    Waits for the CUDA device, if there is one, before each clock reading.
    """
    for call in candidates.values():
        for _ in range(warmup):
            call()
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, call in candidates.items():
            times[name].append(_milliseconds(call))
    return {name: Timing(rounds=tuple(values)) for name, values in times.items()}


def _milliseconds(call: Callable[[], object]) -> float:
    _wait()
    start = time.perf_counter()
    call()
    _wait()
    return (time.perf_counter() - start) * 1e3


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
