"""W4A8: y[M, N] = dequantized(codes of x)[M, K] @ dequantized(codes[N, K]).T + bias, as the table has it for M."""

from dataclasses import dataclass, replace
from functools import lru_cache

import torch
import triton
from torch import Tensor

from qcompile.backends.triton import eight_bit, int8_matmul
from qcompile.backends.triton.add_parts import add_parts
from qcompile.backends.triton.descriptors import described
from qcompile.backends.triton.eight_bit import step
from qcompile.backends.triton.groups import REGISTERS, UNITS
from qcompile.backends.triton.int4_int8_gemm import int4_int8_kernel
from qcompile.backends.triton.int4_int8_table import TABLE, AsInt8, Config, Int4Int8Tiles
from qcompile.backends.triton.int4_int8_unpack import unpack
from qcompile.backends.triton.launch import launch
from qcompile.backends.triton.table import HOPPER, fitting, on_device, processors_of
from qcompile.backends.triton.tuned import tuned_entries

# rows of tiles that walk along N together, so that they share their weights in L2
ROWS_OF_TILES = 8
# rows of x, a copy
PIECE = 64
# columns of a block of the weight
BLOCK = 128
# bytes of shared memory, less those of barriers and of what Triton keeps of its warps
SHARED = 232448 - 1024
# as TMA sees a block: words in rows of 128 bytes, scales in rows of 32
WORD_ROWS, WORD_ROW, SCALE_ROW = 32, 32, 8
# under which `tuned` keeps configurations
TUNED = "w4a8"
# what TMA asks of rows of x, in bytes
ALIGNMENT = 16
# (2**31 - 1) // (255 * 128): the largest sum of codes less their zero times int8 weights
MAX_K = 65_793


@dataclass(frozen=True, kw_only=True)
class Operands:
    """What is multiplied.

    x: int8 [M, K], of whole multiples of 16 columns; scale_x and zero float32, one a row or one for all.
    words, scales, sums, row, totals: as `int4_int8_words` packs them.  bias: [N].
    """

    x: Tensor
    scale_x: Tensor
    zero: Tensor | None
    words: Tensor
    scales: Tensor
    sums: Tensor
    bias: Tensor | None
    row: Tensor | None = None
    totals: Tensor | None = None


def why_not(N: int, K: int, capability: tuple[int, int]) -> str | None:
    """None if the kernel can multiply by a weight [N, K] on a device, else the reason."""
    if capability != (9, 0):
        return f"the W4A8 kernel is for sm_90, this is sm_{capability[0]}{capability[1]}"
    if K % ALIGNMENT:
        return f"TMA needs K to divide by {ALIGNMENT}, got K={K}"
    return None


def why_not_int8(N: int, K: int, row: Tensor | None) -> str | None:
    """None if a weight [N, K] may be multiplied as int8, else the reason."""
    if row is None:
        return "scales of groups are not integers times one number of the row, as those of 'u4row' are"
    if N % int8_matmul.N_MULTIPLE:
        return f"the int8 kernel needs N to divide by {int8_matmul.N_MULTIPLE}, got N={N}"
    if K > MAX_K:
        return f"K={K} can overflow int32 (largest K: {MAX_K})"
    return None


def int4_int8_linear(o: Operands, dtype: torch.dtype, config: Config | None = None) -> Tensor:
    """y [M, N] in dtype, bfloat16 or float16, for x of any strides.  config: to use in place of the table's."""
    (M, K), N = o.x.shape, o.sums.shape[0]
    if M == 0:
        return torch.empty(0, N, dtype=dtype, device=o.x.device)
    if not o.x.is_contiguous() or o.x.data_ptr() % ALIGNMENT:
        o = replace(o, x=o.x.clone(memory_format=torch.contiguous_format))
    with on_device(o.x.device):
        for chosen in _configs(M, N, K, o.x.device) if config is None else (config,):
            if isinstance(chosen, Int4Int8Tiles):
                return _multiply(o, dtype, chosen)
            if why_not_int8(N, K, o.row) is None:
                return _as_int8(o, dtype, chosen)
    raise ValueError(f"{config} cannot run this: {why_not_int8(N, K, o.row)}")


@lru_cache(maxsize=4096)
def _configs(M: int, N: int, K: int, device: torch.device) -> tuple[Config, ...]:
    return tuple(fitting(tuned_entries(TUNED, N, K, device) + TABLE, M, N, K, HOPPER[0]))


def _as_int8(o: Operands, dtype: torch.dtype, config: AsInt8) -> Tensor:
    assert o.row is not None
    operands = eight_bit.Operands(
        x=o.x,
        w=unpack(o.words, o.scales, o.row, o.x.shape[1], config.blocks),
        scale_x=o.scale_x,
        scale_w=o.row,
        dtype=dtype,
        zero=o.zero,
        sum_w=o.totals,
        bias=o.bias,
        is_made=True,
    )
    return int8_matmul.int8_matmul(operands)


def pieces(tiles: Int4Int8Tiles) -> tuple[int, int]:
    """Rows of x of a copy, and of a product."""
    return min(tiles.tokens, PIECE), min(tiles.tokens, tiles.width)


def constants(tiles: Int4Int8Tiles, groups: int, *, wide: bool, whole: bool) -> dict[str, int | bool]:
    """What the kernel is compiled for.

    groups: of a block of columns.  wide: scales are float32.  whole: y needs no parts.
    """
    piece, width = pieces(tiles)
    scales = SCALE_ROW * 4 * 8 * groups * (2 if wide else 1)
    stage = tiles.tokens * BLOCK + UNITS * (WORD_ROWS * WORD_ROW * 4 + scales)
    results = UNITS * 2 * 64 * (width if whole else 8) * 2
    return {
        "UNITS": UNITS,
        "PIECES": tiles.tokens // piece,
        "WIDTH": width,
        "STAGES": min(tiles.stages, (SHARED // tiles.resident - results) // stage),
        "ROWS": ROWS_OF_TILES,
        "GROUPS": groups,
        "WIDE": wide,
        "WHOLE": whole,
        "PENDING": tiles.pending,
        "REGISTERS": REGISTERS[tiles.resident].multiplying,
        "COPYING": REGISTERS[tiles.resident].copying,
    }


def _multiply(o: Operands, dtype: torch.dtype, tiles: Int4Int8Tiles) -> Tensor:
    """y [M, N] in dtype, bfloat16 or float16, for M >= 1."""
    M, N = o.x.shape[0], o.sums.shape[0]
    units, B = o.words.shape[:2]
    groups, planes = o.scales.shape[1] // B, o.scales.dim() - 2
    tiles_m, tiles_n = triton.cdiv(M, tiles.tokens), triton.cdiv(units, UNITS)
    programs = processors_of(o.x.device) * tiles.resident
    parts = max(1, min(tiles.slices, B, programs // (tiles_m * tiles_n)))
    blocks = triton.cdiv(B, parts)
    parts = triton.cdiv(B, blocks)
    # rows that TMA cannot write are written as the only part
    whole = parts == 1 and N * dtype.itemsize % 16 == 0
    y = o.x.new_empty(M, N, dtype=dtype)
    to = y if whole else o.x.new_empty(parts, M, N, dtype=torch.float32)
    piece, width = pieces(tiles)
    matrices = (
        described(o.x, [piece, BLOCK]),
        described(o.words.view(-1, WORD_ROW), [WORD_ROWS, WORD_ROW]),
        described(o.scales.view(-1, SCALE_ROW), [8 * groups * planes, SCALE_ROW]),
        described(y if whole else y.new_empty(8, 64), [width, 64]),
    )
    steps = (step(o.scale_x), 0 if o.zero is None else step(o.zero))
    launch(
        int4_int8_kernel,
        (min(programs, tiles_m * tiles_n * parts), 1, 1),
        (*matrices, to, o.scale_x, o.zero, o.sums, o.bias, M, N, B, *steps, tiles_m, tiles_n, parts, blocks),
        constants(tiles, groups, wide=planes == 2, whole=whole),
        **REGISTERS[tiles.resident].options,
        launch_pdl=True,
    )
    if not whole:
        add_parts(to, o.bias, y)
    return y
