"""Which configuration multiplies 8-bit codes: measured on sm_90, safe elsewhere.

The first entry that takes a problem runs it. What was measured stands in examples/benchmarks/eight_bit.md.
"""

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Tiles:
    """`eight_bit`. tokens, channels: of a tile of y; depth: columns a step.

    described: codes are copied by TMA, from sm_90 on.
    """

    tokens: int
    channels: int
    depth: int
    stages: int
    warps: int
    described: bool = False


@dataclass(frozen=True, kw_only=True)
class HopperTiles:
    """`hopper`. tokens: of a group of four warps, half a tile of y; channels: of a tile.

    stages: steps of 128 columns in flight.
    """

    tokens: int
    channels: int
    stages: int


Config = Tiles | HopperTiles
WITHOUT_LIMIT = 1 << 62


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A configuration. capabilities: first and last it is for; rows: of x at most; channels: least N."""

    config: Config
    capabilities: tuple[int, int] = (80, 999)
    rows: int = WITHOUT_LIMIT
    channels: int = 0


_HOPPER = (90, 90)
# with few channels there are fewer programs than multiprocessors, so each holds more of its weight in flight
FEW_ROWS = (
    Entry(
        capabilities=_HOPPER,
        rows=16,
        channels=8192,
        config=Tiles(tokens=16, channels=128, depth=128, stages=4, warps=4, described=True),
    ),
    Entry(
        capabilities=_HOPPER,
        rows=16,
        config=Tiles(tokens=16, channels=64, depth=256, stages=6, warps=4, described=True),
    ),
    Entry(
        capabilities=_HOPPER,
        rows=32,
        channels=8192,
        config=Tiles(tokens=32, channels=128, depth=128, stages=4, warps=4, described=True),
    ),
    Entry(
        capabilities=_HOPPER,
        rows=32,
        config=Tiles(tokens=32, channels=64, depth=256, stages=6, warps=4, described=True),
    ),
    Entry(
        capabilities=_HOPPER,
        rows=64,
        channels=8192,
        config=Tiles(tokens=64, channels=128, depth=128, stages=4, warps=4, described=True),
    ),
    Entry(
        capabilities=_HOPPER,
        rows=64,
        config=Tiles(tokens=64, channels=64, depth=256, stages=6, warps=4, described=True),
    ),
)
# int8 only: for fp8, cuBLASLt is as fast
MANY_ROWS = (
    Entry(capabilities=_HOPPER, rows=256, channels=8192, config=HopperTiles(tokens=64, channels=256, stages=4)),
    Entry(capabilities=_HOPPER, rows=256, config=HopperTiles(tokens=64, channels=64, stages=8)),
    Entry(capabilities=_HOPPER, rows=512, config=HopperTiles(tokens=64, channels=128, stages=6)),
    Entry(capabilities=_HOPPER, config=HopperTiles(tokens=64, channels=256, stages=4)),
)
# not measured; they fit the shared memory of every device
SAFE = (
    Entry(rows=16, config=Tiles(tokens=16, channels=64, depth=128, stages=4, warps=4)),
    Entry(rows=64, config=Tiles(tokens=64, channels=64, depth=128, stages=3, warps=4)),
    Entry(config=Tiles(tokens=128, channels=128, depth=64, stages=3, warps=8)),
)
TABLE = FEW_ROWS + MANY_ROWS + SAFE


def fitting(entries: tuple[Entry, ...], M: int, N: int, capability: int) -> Iterator[Config]:
    """The configurations for x [M, K] and a weight [N, K], the best first.  capability: 90 for 9.0."""
    for entry in entries:
        low, high = entry.capabilities
        if low <= capability <= high and entry.rows >= M and entry.channels <= N:
            yield entry.config


def is_measured(capability: int) -> bool:
    """Whether the table knows a device's fastest configurations."""
    return any(low <= capability <= high for low, high in (entry.capabilities for entry in FEW_ROWS))
