"""Which configuration runs which problem for each width of `widths`: measured on sm_90, safe elsewhere.

The first entry that takes a problem runs it. The library's product of 16-bit floats is among them, as `Unpack`: where
it was faster than the kernels, the weight is made floats for one call. examples/benchmarks/triton_kernels.py measures
what is chosen.
"""

from dataclasses import dataclass
from typing import Generic, TypeVar

import torch

from qcompile.backends.triton.table import HOPPER, Entry, fitting
from qcompile.backends.triton.widths import COLUMNS, ROWS, WIDTHS, Packed


@dataclass(frozen=True, kw_only=True)
class FewRows:
    """`width_few_rows`. rows: to which those of x are padded; units: of 64 rows of the weight, a tile.

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
    """`width_many_rows`. rows: of x, a tile; units: of 64 rows of the weight, a tile.

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
    """`width_unpack`, then the library's matmul of floats. blocks: of 128 columns, a program unpacks."""

    blocks: int


Config = FewRows | ManyRows | Unpack
C = TypeVar("C", bound=Config, covariant=True)


@dataclass(frozen=True, kw_only=True, eq=False)
class Member(Generic[C]):
    """A weight of N rows, one of those that multiply an x, and the configuration that runs it."""

    weight: Packed
    N: int
    config: C


# rows of y, of 16-bit floats, start at multiples of 16 bytes (CUDA driver API, cuTensorMapEncodeTiled)
TMA_MULTIPLE = 8
# from so many columns on, tiles of N are few in the models that have them, and K is cut into slices
_LONG = 8192
# weights that keep all multiprocessors of an H200 busy with tiles of one unit, or of four where x is short; and of two
_LARGE, _VERY_LARGE = (blocks * ROWS * COLUMNS for blocks in (5000, 10000))


def _few(
    rows: int,
    blocks: int,
    resident: int,
    *,
    units: int = 1,
    warps: int = 4,
    depth: int = 2,
    most: int | None = None,
    weights: int = 0,
) -> Entry[Config]:
    """most: rows of x that it is for, if not `rows`."""
    config = FewRows(rows=rows, units=units, warps=warps, depth=depth, blocks=blocks, resident=resident)
    return Entry(capabilities=HOPPER, rows=most or rows, weights=weights, config=config)


def _many(
    rows: int,
    resident: int,
    *,
    units: int = 2,
    warps: int = 4,
    steps: int = 4,
    stages: int = 4,
    slices: int = 8,
    most: int | None = None,
    columns: int = 0,
    weights: int = 0,
) -> Entry[Config]:
    """most: as of `_few`."""
    config = ManyRows(rows=rows, units=units, warps=warps, steps=steps, stages=stages, slices=slices, resident=resident)
    return Entry(capabilities=HOPPER, rows=most or rows, columns=columns, weights=weights, config=config)


_WIDEST: tuple[Entry[Config], ...] = (
    _many(128, 2),
    _many(256, 1, warps=8, most=512),
    Entry(capabilities=HOPPER, config=Unpack(blocks=2)),
)
_BOOK_ELSEWHERE: tuple[Entry[Config], ...] = (
    Entry(rows=8, config=FewRows(rows=8, units=1, warps=4, depth=2, blocks=8, resident=4)),
    Entry(rows=16, config=FewRows(rows=16, units=1, warps=4, depth=2, blocks=4, resident=4)),
    Entry(rows=32, config=FewRows(rows=32, units=1, warps=4, depth=2, blocks=2, resident=2)),
    Entry(config=Unpack(blocks=4)),
)
_ELSEWHERE: tuple[Entry[Config], ...] = (
    Entry(rows=8, config=FewRows(rows=8, units=1, warps=4, depth=2, blocks=8, resident=4)),
    Entry(rows=16, config=FewRows(rows=16, units=1, warps=4, depth=2, blocks=8, resident=4)),
    Entry(rows=32, config=FewRows(rows=32, units=1, warps=4, depth=2, blocks=4, resident=2)),
    Entry(config=Unpack(blocks=4)),
)
_NARROW: tuple[Entry[Config], ...] = (_many(32, 3, steps=2, stages=8), _many(64, 2, steps=2), *_WIDEST, *_ELSEWHERE)
_INT8: tuple[Entry[Config], ...] = (
    _few(8, 8, 8, depth=1, weights=_LARGE),
    _few(8, 4, 7),
    _many(16, 5, units=1, steps=2, stages=8, weights=_LARGE),
    _few(16, 4, 6, depth=1),
    _many(32, 5, units=1, steps=2, stages=8),
    _many(64, 4, units=1, steps=2, weights=_VERY_LARGE),
    _many(64, 4, units=1),
    *_WIDEST,
    *_ELSEWHERE,
)
_FIVE_OR_SIX: tuple[Entry[Config], ...] = (
    _few(8, 4, 7),
    _few(16, 4, 5),
    _many(32, 3, steps=2, stages=8),
    _many(64, 2),
    *_WIDEST,
    *_ELSEWHERE,
)
TABLES: dict[str, tuple[Entry[Config], ...]] = {
    "int4": (
        _few(8, 8, 7, weights=_LARGE),
        _few(8, 4, 7),
        _few(16, 8, 2, units=4, weights=_LARGE),
        _few(16, 4, 5),
        _many(32, 3, columns=_LONG),
        _many(32, 3, steps=2, stages=8),
        _many(64, 2),
        _many(128, 2),
        _many(256, 1, warps=8),
        _many(256, 1, warps=8, slices=2, most=2048),
        *_ELSEWHERE,
    ),
    "int8": _INT8,
    "int6": (_few(8, 8, 7, depth=1, weights=_LARGE), *_FIVE_OR_SIX),
    "int5": (_few(8, 8, 7, weights=_LARGE), *_FIVE_OR_SIX),
    # Its table of 32 KB counts against what a kernel may have without asking. Triton asks where its own part of shared
    # memory is more than 48 KB alone, so that part is up to 16 KB, or more than 48.
    "book": (
        _few(8, 4, 3, units=2, warps=8, weights=_VERY_LARGE),
        _few(8, 8, 4, weights=_LARGE),
        _few(8, 4, 4),
        _many(16, 4, weights=_VERY_LARGE),
        _few(16, 4, 2, units=4, warps=8),
        _few(16, 4, 4),
        _many(64, 2, stages=8),
        _many(128, 2, stages=3),
        *_WIDEST[1:],
        *_BOOK_ELSEWHERE,
    ),
    "int3": (
        _few(8, 8, 7, most=1, weights=_LARGE),
        _few(8, 4, 7),
        _few(16, 8, 2, units=4, weights=_LARGE),
        _few(16, 4, 5),
        *_NARROW,
    ),
    # at most an instruction a number more than bytes that are integers
    **{width.name: _INT8 for width in WIDTHS.values() if width.mantissa is not None},
    "int2": (
        _few(8, 8, 8, most=1, weights=_LARGE),
        _few(8, 4, 7, depth=4),
        _few(16, 8, 2, units=4, weights=_LARGE),
        _few(16, 4, 5),
        _many(32, 3),
        *_NARROW,
    ),
}


def tuned_name(width: str) -> str:
    """Under which `tuned` keeps configurations for a width: all whose codes are bytes under one."""
    return f"{'int8' if WIDTHS[width].bits == 8 else width}-weight"


def choose(
    width: str,
    M: int,
    N: int,
    K: int,
    capability: int,
    *,
    exact: bool,
    first: tuple[Entry[Config], ...] = (),
    total: int | None = None,
) -> Config:
    """The configuration for x [M, K] and a weight [N, K].

    capability: 90 for 9.0.  first: entries that come before the table's.
    exact: numbers of x's dtype can hold what many rows multiply, see `rounds_twice`.
    total: rows of all weights that multiply x at once, which keep the device as busy as one of so many.
    """
    found = fitting(first + TABLES[width], M, total or N, K, capability)
    return next(config for config in found if can_run(config, M, N, exact=exact))


def can_run(config: Config, M: int, N: int, *, exact: bool) -> bool:
    """Whether the configuration can multiply x of M rows and a weight of N: tiles hold whole units of the weight."""
    if isinstance(config, Unpack):
        return True
    if -(-N // ROWS) % config.units:
        return False
    if isinstance(config, FewRows):
        return config.rows >= M and config.blocks % config.depth == 0
    return exact and N % TMA_MULTIPLE == 0


def rounds_twice(weight: Packed, dtype: torch.dtype) -> bool:
    """Whether scales of groups are not numbers of `dtype`, nor sums of two."""
    if weight.integers or weight.minimum:
        return True
    return weight.wide and weight.groups > 0 and (dtype is not torch.bfloat16 or weight.width == "int4")
