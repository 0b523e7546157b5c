"""Tables of configurations: the first entry that takes a problem names the one that runs it."""

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Generic, TypeVar

import torch

WITHOUT_LIMIT = 1 << 62
# compute capabilities, first and last, of devices on which tables were measured
HOPPER = (90, 90)
EVERY = (80, 999)

C = TypeVar("C")


@dataclass(frozen=True, kw_only=True)
class Entry(Generic[C]):
    """A configuration for y[M, N] = x[M, K] @ w[N, K].T, and the problems and devices that it is for.

    capabilities: first and last, 90 for 9.0; rows: M at most; channels, columns, weights: N, K, N * K at least.
    """

    config: C
    capabilities: tuple[int, int] = EVERY
    rows: int = WITHOUT_LIMIT
    channels: int = 0
    columns: int = 0
    weights: int = 0

    def on(self, capability: int) -> bool:
        low, high = self.capabilities
        return low <= capability <= high

    def takes(self, M: int, N: int, K: int) -> bool:
        return self.rows >= M and self.channels <= N and self.columns <= K and self.weights <= N * K


def fitting(entries: Iterable[Entry[C]], M: int, N: int, K: int, capability: int) -> Iterator[C]:
    """The configurations for x [M, K] and a weight [N, K], the best first.  capability: 90 for 9.0."""
    return (e.config for e in entries if e.on(capability) and e.takes(M, N, K))


def configs_of(entries: Iterable[Entry[C]], capability: int) -> list[C]:
    """Those that a device of this capability may run, each once."""
    return list(dict.fromkeys(e.config for e in entries if e.on(capability)))


def is_measured(capability: int) -> bool:
    """Whether the tables know a device's fastest configurations."""
    return HOPPER[0] <= capability <= HOPPER[1]


@cache
def capability_of(device: torch.device) -> int:
    """90 for compute capability 9.0."""
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@cache
def processors_of(device: torch.device) -> int:
    """How many multiprocessors the device has."""
    return torch.cuda.get_device_properties(device).multi_processor_count


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """A context in which launches go to the device: entering torch's takes longer than asking which one is current."""
    # the interpreter takes tensors of the CPU
    if device.type != "cuda":
        return nullcontext()
    return nullcontext() if device.index == torch.cuda.current_device() else torch.cuda.device(device)
