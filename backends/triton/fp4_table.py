"""Which configuration multiplies 4-bit floats by 8-bit ones for which number of rows.

The first entry that takes a problem runs it. Tiles are those of `int4_int8_table`, whose kernel moves the same bytes;
examples/benchmarks/triton_kernels.py measures what is chosen here.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from qcompile.backends.triton.table import HOPPER, Entry, fitting


@dataclass(frozen=True, kw_only=True)
class Tiles:
    """`fp4_gemm`. tokens: rows of x, a tile; stages: blocks of 128 columns in flight.

    slices: into which K is cut at most.  resident: programs of a multiprocessor.
    """

    tokens: int
    stages: int
    slices: int
    resident: int = 1


@dataclass(frozen=True, kw_only=True)
class Unpack:
    """`fp4_unpack` makes the weight E4M3, then `torch._scaled_mm` (cuBLASLt). blocks: of 128 columns, a program."""

    blocks: int


Config = Tiles | Unpack
TABLE: tuple[Entry[Config], ...] = (
    Entry(capabilities=HOPPER, rows=8, config=Tiles(tokens=8, stages=4, slices=8, resident=2)),
    Entry(capabilities=HOPPER, rows=16, config=Tiles(tokens=16, stages=4, slices=8, resident=2)),
    Entry(capabilities=HOPPER, rows=32, config=Tiles(tokens=32, stages=4, slices=8, resident=2)),
    Entry(capabilities=HOPPER, rows=64, config=Tiles(tokens=64, stages=4, slices=8, resident=2)),
    Entry(capabilities=HOPPER, rows=128, config=Tiles(tokens=128, stages=6, slices=8)),
    # few channels are few tiles, which fill more multiprocessors if they are small
    Entry(capabilities=HOPPER, rows=256, channels=8193, config=Tiles(tokens=256, stages=4, slices=2)),
    Entry(capabilities=HOPPER, rows=256, config=Tiles(tokens=128, stages=6, slices=8)),
    Entry(capabilities=HOPPER, rows=1024, config=Tiles(tokens=256, stages=4, slices=2)),
    Entry(config=Unpack(blocks=4)),
    Entry(capabilities=HOPPER, config=Tiles(tokens=256, stages=4, slices=2)),
)


def choose(M: int, N: int, K: int, capability: int) -> Iterator[Config]:
    """The configurations for x [M, K] and a weight [N, K], the best first.  capability: 90 for 9.0."""
    return fitting(TABLE, M, N, K, capability)
