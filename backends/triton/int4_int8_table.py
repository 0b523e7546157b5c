"""Which configuration of the W4A8 kernel runs which number of rows: measured on sm_90, the only device it is for.

The first entry that takes a problem, and can run the weight, runs it. The product of 16-bit floats is no candidate, as
in `eight_bit_table`: it needs the weight as floats. From how many rows on the weight becomes int8 is predicted
(examples/benchmarks/w4a8.md).
"""

from dataclasses import dataclass

from qcompile.backends.triton.table import HOPPER, Entry


@dataclass(frozen=True, kw_only=True)
class Int4Int8Tiles:
    """`int4_int8_gemm`. tokens: rows of x, a tile; stages: blocks of 128 columns in flight.

    width: rows of x, a product; pending: products that run while one is scaled, 0 or 1.
    slices: into which K is cut at most.  resident: programs of a multiprocessor.
    """

    tokens: int
    stages: int
    slices: int
    width: int = 64
    pending: int = 1
    resident: int = 1


@dataclass(frozen=True, kw_only=True)
class AsInt8:
    """`int4_int8_unpack` makes the weight int8, then `int8_matmul`; of scales that are integers of a row.

    blocks: of 128 columns, a program.
    """

    blocks: int


Config = Int4Int8Tiles | AsInt8
_LARGE = Int4Int8Tiles(tokens=256, stages=4, slices=2, pending=0)
TABLE: tuple[Entry[Config], ...] = (
    Entry(capabilities=HOPPER, rows=8, config=Int4Int8Tiles(tokens=8, stages=4, slices=8, resident=2)),
    Entry(capabilities=HOPPER, rows=16, config=Int4Int8Tiles(tokens=16, stages=4, slices=8, resident=2)),
    Entry(capabilities=HOPPER, rows=32, config=Int4Int8Tiles(tokens=32, stages=4, slices=8, resident=2)),
    Entry(capabilities=HOPPER, rows=64, config=Int4Int8Tiles(tokens=64, stages=4, slices=8, resident=2)),
    Entry(capabilities=HOPPER, rows=128, config=Int4Int8Tiles(tokens=128, stages=6, slices=8)),
    # few channels are few tiles, which fill more multiprocessors if they are small
    Entry(capabilities=HOPPER, rows=256, channels=8193, config=_LARGE),
    Entry(capabilities=HOPPER, rows=256, config=Int4Int8Tiles(tokens=128, stages=6, slices=8)),
    Entry(capabilities=HOPPER, rows=768, config=_LARGE),
    Entry(capabilities=HOPPER, config=AsInt8(blocks=4)),
    Entry(capabilities=HOPPER, config=_LARGE),
)
