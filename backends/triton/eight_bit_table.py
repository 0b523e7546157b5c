"""Which configuration multiplies 8-bit codes: measured on sm_90, safe elsewhere.

The first entry that takes a problem runs it. What was measured stands in examples/benchmarks/eight_bit.md.

The product of 16-bit floats is no candidate for single numbers of rows: it needs the weight as floats, which beside the
codes take three times their memory, and which to make for one call moves five times their bytes. A shape where tuning
finds it faster for any number of rows is refused as a whole on devices that these tables were not measured on.
"""

from dataclasses import dataclass

from qcompile.backends.triton.table import HOPPER, Entry

# columns of which a 16-bit tail of x has a multiple: the copy engine takes rows of multiples of 16 bytes
TAIL_MULTIPLE = 8


def tail_width(outliers: int) -> int:
    """Columns of a tail of so many channels."""
    return outliers + -outliers % TAIL_MULTIPLE


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
class RingTiles:
    """`eight_bit_ring`. tokens, channels: of a tile of y; stages: steps of 128 columns in flight.

    resident: programs that share a multiprocessor.
    """

    tokens: int
    channels: int
    stages: int
    resident: int


@dataclass(frozen=True, kw_only=True)
class HopperTiles:
    """`hopper`. tokens: of a group of four warps, half a tile of y; channels: of a tile.

    stages: steps of 128 columns in flight.
    """

    tokens: int
    channels: int
    stages: int


@dataclass(frozen=True, kw_only=True)
class Library:
    """`torch._scaled_mm` (cuBLASLt), of fp8."""


Config = Tiles | RingTiles | HopperTiles | Library
# few channels: there are fewer programs than multiprocessors, so each holds more of its weight in flight
_FEW = Tiles(tokens=16, channels=64, depth=256, stages=6, warps=4, described=True)
# an H200 was measured with each (examples/benchmarks/results/ring_h200.json)
RINGS: tuple[Entry[Config], ...] = (
    Entry(capabilities=HOPPER, rows=8, channels=8192, config=RingTiles(tokens=8, channels=128, stages=6, resident=2)),
    Entry(capabilities=HOPPER, rows=16, channels=8192, config=RingTiles(tokens=16, channels=128, stages=4, resident=2)),
    # long rows: programs have many steps, and gain nothing by a start that is sooner
    Entry(capabilities=HOPPER, rows=16, columns=8192, config=_FEW),
    Entry(capabilities=HOPPER, rows=8, config=RingTiles(tokens=8, channels=64, stages=16, resident=1)),
    Entry(capabilities=HOPPER, rows=16, config=RingTiles(tokens=16, channels=64, stages=14, resident=1)),
    Entry(capabilities=HOPPER, rows=32, channels=8192, config=RingTiles(tokens=32, channels=128, stages=4, resident=2)),
    Entry(capabilities=HOPPER, rows=32, config=RingTiles(tokens=32, channels=64, stages=12, resident=1)),
    Entry(capabilities=HOPPER, rows=64, channels=8192, config=RingTiles(tokens=64, channels=128, stages=4, resident=2)),
    Entry(capabilities=HOPPER, rows=64, config=RingTiles(tokens=64, channels=64, stages=12, resident=1)),
)
# what the ring refuses
FEW_ROWS: tuple[Entry[Config], ...] = (
    Entry(
        capabilities=HOPPER,
        rows=16,
        channels=8192,
        config=Tiles(tokens=16, channels=128, depth=128, stages=4, warps=4, described=True),
    ),
    Entry(capabilities=HOPPER, rows=16, config=_FEW),
    Entry(
        capabilities=HOPPER,
        rows=32,
        channels=8192,
        config=Tiles(tokens=32, channels=128, depth=128, stages=4, warps=4, described=True),
    ),
    Entry(
        capabilities=HOPPER,
        rows=32,
        config=Tiles(tokens=32, channels=64, depth=256, stages=6, warps=4, described=True),
    ),
    Entry(
        capabilities=HOPPER,
        rows=64,
        channels=8192,
        config=Tiles(tokens=64, channels=128, depth=128, stages=4, warps=4, described=True),
    ),
    Entry(
        capabilities=HOPPER,
        rows=64,
        config=Tiles(tokens=64, channels=64, depth=256, stages=6, warps=4, described=True),
    ),
)
MANY_ROWS: tuple[Entry[Config], ...] = (
    Entry(capabilities=HOPPER, rows=256, channels=8192, config=HopperTiles(tokens=64, channels=256, stages=4)),
    Entry(capabilities=HOPPER, rows=256, config=HopperTiles(tokens=64, channels=64, stages=8)),
    Entry(capabilities=HOPPER, rows=512, config=HopperTiles(tokens=64, channels=128, stages=6)),
    Entry(capabilities=HOPPER, config=HopperTiles(tokens=64, channels=256, stages=4)),
)
# not measured; they fit the shared memory of every device
SAFE: tuple[Entry[Config], ...] = (
    Entry(rows=16, config=Tiles(tokens=16, channels=64, depth=128, stages=4, warps=4)),
    Entry(rows=64, config=Tiles(tokens=64, channels=64, depth=128, stages=3, warps=4)),
    Entry(config=Tiles(tokens=128, channels=128, depth=64, stages=3, warps=8)),
)
INT8 = RINGS + FEW_ROWS + MANY_ROWS + SAFE
# more rows: cuBLASLt is as fast as a kernel would be, and takes bfloat16 results of whole vectors only
FP8 = RINGS + FEW_ROWS + SAFE[:2] + (Entry(config=Library()),) + SAFE[2:]
