"""Which configuration of the kernels for 4-bit weights runs which problem: measured on sm_90, safe elsewhere.

The first entry that takes a problem runs it. examples/benchmarks/triton_kernels.py measures what it chooses.
"""

from dataclasses import dataclass

from qcompile.backends.triton.int4_words import COLUMNS, ROWS
from qcompile.backends.triton.table import HOPPER, Entry, fitting


@dataclass(frozen=True, kw_only=True)
class FewRows:
    """`int4_matmul`. rows: to which those of x are padded; units: of 64 rows of the weight, a tile.

    depth: blocks of 128 columns in flight; blocks: of a slice of K, a multiple of depth; resident: programs that a
    multiprocessor holds at once.
    """

    rows: int
    units: int
    warps: int
    depth: int
    blocks: int
    resident: int


@dataclass(frozen=True, kw_only=True)
class ManyRows:
    """`int4_gemm`. rows: of x, a tile; units: of 64 rows of the weight, a tile.

    steps: products that a block of 128 columns takes, 2 or 4; stages: of 64 columns of x in flight; slices: into
    which K is cut at most; resident: programs that a multiprocessor holds at once.
    """

    rows: int
    units: int
    warps: int
    steps: int
    stages: int
    slices: int
    resident: int


@dataclass(frozen=True, kw_only=True)
class Unpack:
    """`int4_unpack`, then the library's matmul of floats. blocks: of 128 columns, a program unpacks."""

    blocks: int


# rows of y, of 16-bit floats, start at multiples of 16 bytes (CUDA driver API, cuTensorMapEncodeTiled)
TMA_MULTIPLE = 8
Config = FewRows | ManyRows | Unpack
# from so many columns on, tiles of N are few in the models that have them, and K is cut into slices
_LONG = 8192
# weights that keep all multiprocessors of an H200 busy with tiles of four units
_LARGE = 5000 * ROWS * COLUMNS
TABLE: tuple[Entry[Config], ...] = (
    Entry(
        capabilities=HOPPER,
        rows=8,
        weights=_LARGE,
        config=FewRows(rows=8, units=1, warps=4, depth=2, blocks=8, resident=7),
    ),
    Entry(
        capabilities=HOPPER,
        rows=8,
        config=FewRows(rows=8, units=1, warps=4, depth=2, blocks=4, resident=7),
    ),
    Entry(
        capabilities=HOPPER,
        rows=16,
        weights=_LARGE,
        config=FewRows(rows=16, units=4, warps=4, depth=2, blocks=8, resident=2),
    ),
    Entry(
        capabilities=HOPPER,
        rows=16,
        config=FewRows(rows=16, units=1, warps=4, depth=2, blocks=4, resident=5),
    ),
    Entry(
        capabilities=HOPPER,
        rows=32,
        columns=_LONG,
        config=ManyRows(rows=32, units=2, warps=4, steps=4, stages=4, slices=8, resident=3),
    ),
    Entry(
        capabilities=HOPPER,
        rows=32,
        config=ManyRows(rows=32, units=2, warps=4, steps=2, stages=8, slices=8, resident=3),
    ),
    Entry(
        capabilities=HOPPER,
        rows=64,
        config=ManyRows(rows=64, units=2, warps=4, steps=4, stages=4, slices=8, resident=2),
    ),
    Entry(
        capabilities=HOPPER,
        rows=128,
        config=ManyRows(rows=128, units=2, warps=4, steps=4, stages=4, slices=8, resident=2),
    ),
    Entry(
        capabilities=HOPPER,
        rows=256,
        config=ManyRows(rows=256, units=2, warps=8, steps=4, stages=4, slices=8, resident=1),
    ),
    Entry(
        capabilities=HOPPER,
        rows=2048,
        config=ManyRows(rows=256, units=2, warps=8, steps=4, stages=4, slices=2, resident=1),
    ),
    Entry(rows=8, config=FewRows(rows=8, units=1, warps=4, depth=2, blocks=8, resident=4)),
    Entry(rows=16, config=FewRows(rows=16, units=1, warps=4, depth=2, blocks=8, resident=4)),
    Entry(rows=32, config=FewRows(rows=32, units=1, warps=4, depth=2, blocks=4, resident=2)),
    Entry(config=Unpack(blocks=4)),
)


def choose(
    M: int, N: int, K: int, capability: int, *, wide: bool, entries: tuple[Entry[Config], ...] = TABLE
) -> Config:
    """The configuration for x [M, K] and a weight [N, K].  capability: 90 for 9.0.  wide: scales are float32."""
    return next(config for config in fitting(entries, M, N, K, capability) if can_run(config, M, N, wide=wide))


def can_run(config: Config, M: int, N: int, *, wide: bool) -> bool:
    """Whether the configuration can multiply x of M rows and a weight of N: tiles hold whole units of the weight.

    wgmma is for scales that are bfloat16.
    """
    if isinstance(config, Unpack):
        return True
    if -(-N // ROWS) % config.units or (isinstance(config, FewRows) and config.rows < M):
        return False
    return isinstance(config, FewRows) or (not wide and N % TMA_MULTIPLE == 0)
