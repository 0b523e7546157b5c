"""Which configuration of the W4A8 kernel runs which number of rows: measured on sm_90, the only device it is for."""

from dataclasses import dataclass

WITHOUT_LIMIT = 1 << 62


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


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A configuration. rows: of x at most; channels: N at most."""

    tiles: Tiles
    rows: int = WITHOUT_LIMIT
    channels: int = WITHOUT_LIMIT


# the first entry that takes a problem runs it
TABLE = (
    Entry(rows=8, tiles=Tiles(tokens=8, stages=16, slices=8)),
    Entry(rows=16, tiles=Tiles(tokens=16, stages=16, slices=8)),
    Entry(rows=32, tiles=Tiles(tokens=32, stages=12, slices=8)),
    Entry(rows=64, tiles=Tiles(tokens=64, stages=10, slices=8)),
    Entry(rows=128, tiles=Tiles(tokens=128, stages=6, slices=8)),
    # few channels are few tiles, which fill more multiprocessors if they are small
    Entry(rows=256, channels=8192, tiles=Tiles(tokens=128, stages=6, slices=8)),
    Entry(tiles=Tiles(tokens=256, stages=4, slices=2, pending=0)),
)


def choose(M: int, N: int) -> Tiles:
    """The configuration for x [M, K] and a weight [N, K]."""
    return next(entry.tiles for entry in TABLE if entry.rows >= M and entry.channels >= N)
