"""How programs walk over items, each a tile of y on a slice of K, and around a ring of stages; for kernels of Gluon."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def place_of(item, shape, ROWS: gl.constexpr):
    """Row and column of an item's tile, and its blocks of K, first and behind the last."""
    tiles_m, tiles_n, parts, blocks, B = shape
    tile = item // parts
    band = ROWS * tiles_n
    top = tile // band * ROWS
    height = gl.minimum(tiles_m - top, ROWS)
    first = item % parts * blocks
    return top + tile % band % height, tile % band // height, first, gl.minimum(first + blocks, B)


@gluon.jit
def next_stage(index, phase, STAGES: gl.constexpr):
    """Index and phase of the stage of a ring behind this one."""
    wraps = index + 1 == STAGES
    return gl.where(wraps, 0, index + 1), gl.where(wraps, phase ^ 1, phase)
