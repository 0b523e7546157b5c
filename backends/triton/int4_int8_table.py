"""Which configuration of the W4A8 kernel runs which number of rows: measured on sm_90, the only device it is for."""

from dataclasses import dataclass

from qcompile.backends.triton.table import HOPPER, Entry, fitting


@dataclass(frozen=True, kw_only=True)
class Tiles:
    """`int4_int8_gemm`. tokens: rows of x, a tile; stages: blocks of 128 columns in flight.

    width: rows of x, a product; pending: products that run while one is scaled, 0 or 1.
    slices: into which K is cut at most.
    """

    tokens: int
    stages: int
    slices: int
    width: int = 64
    pending: int = 1


_LARGE = Tiles(tokens=256, stages=4, slices=2, pending=0)
TABLE = (
    Entry(capabilities=HOPPER, rows=8, config=Tiles(tokens=8, stages=16, slices=8)),
    Entry(capabilities=HOPPER, rows=16, config=Tiles(tokens=16, stages=16, slices=8)),
    Entry(capabilities=HOPPER, rows=32, config=Tiles(tokens=32, stages=12, slices=8)),
    Entry(capabilities=HOPPER, rows=64, config=Tiles(tokens=64, stages=10, slices=8)),
    Entry(capabilities=HOPPER, rows=128, config=Tiles(tokens=128, stages=6, slices=8)),
    # few channels are few tiles, which fill more multiprocessors if they are small
    Entry(capabilities=HOPPER, rows=256, channels=8193, config=_LARGE),
    Entry(capabilities=HOPPER, rows=256, config=Tiles(tokens=128, stages=6, slices=8)),
    Entry(capabilities=HOPPER, config=_LARGE),
)


def choose(M: int, N: int, K: int) -> Tiles:
    """The configuration for x [M, K] and a weight [N, K]."""
    return next(fitting(TABLE, M, N, K, HOPPER[0]))
