"""4-bit floats under 8-bit ones: y[M, N] = scale_x[m] * scale_w[n] * (x @ w.T), as the table has it for M."""

from dataclasses import dataclass, replace

import torch
import triton
from torch import Tensor

from qcompile.backends.triton import eight_bit, fp8_matmul
from qcompile.backends.triton.add_parts import add_parts
from qcompile.backends.triton.descriptors import described
from qcompile.backends.triton.eight_bit import step
from qcompile.backends.triton.eight_bit_table import Library
from qcompile.backends.triton.fp4_gemm import fp4_kernel
from qcompile.backends.triton.fp4_table import Config, Tiles, Unpack, choose
from qcompile.backends.triton.fp4_unpack import unpack
from qcompile.backends.triton.groups import REGISTERS, UNITS
from qcompile.backends.triton.launch import launch
from qcompile.backends.triton.pairs import MOST_ROWS
from qcompile.backends.triton.table import capability_of, on_device, processors_of

# rows of tiles that walk along N together, so that they share their weights in L2
ROWS_OF_TILES = 8
# columns of a block of the weight
BLOCK = 128
# as TMA sees a block: words in rows of 128 bytes
WORD_ROWS, WORD_ROW = 32, 32
# what TMA asks of rows of x and y, in bytes
ALIGNMENT = 16


@dataclass(frozen=True, kw_only=True)
class Operands:
    """What is multiplied.

    x: fp8_e4m3 [M, K], of whole multiples of 16 columns; scale_x float32, one a row or one for all.
    words: int32, of codes as `int4_int8_words` packs them; scale_w float32 [N, 1], of 2**(bias - 7) times the numbers;
    mantissa: bits of it in a code.  dtype: of y, bfloat16 or float16.
    octaves: None or, of a weight whose columns are lowered, as `fp4_words` packs them and words; its scales are those
    of numbers that were raised to the top of E4M3.
    pairs: None or, with octaves, fp8_e4m3 [2 * MOST_ROWS, K], those of x if it has few rows (`pairs`).
    """

    x: Tensor
    scale_x: Tensor
    words: Tensor
    scale_w: Tensor
    mantissa: int
    dtype: torch.dtype
    octaves: Tensor | None = None
    pairs: Tensor | None = None


def why_not(N: int, K: int, capability: tuple[int, int], dtype: torch.dtype, *, small: bool) -> str | None:
    """None if a weight [N, K] runs on a device, else the reason.  small: small weights matter more than speed."""
    sm = f"sm_{capability[0]}{capability[1]}"
    if capability < fp8_matmul.FIRST_CAPABILITY:
        return f"fp8 tensor cores, which multiply 4-bit floats, begin with sm_89, this is {sm}"
    if K % ALIGNMENT:
        return f"TMA needs K to divide by {ALIGNMENT}, got K={K}"
    if capability == (9, 0):
        return None
    if not small:
        return f"the kernel for 4-bit floats under 8-bit ones is for sm_90, this is {sm}: E4M3 holds the weight"
    if dtype is not torch.bfloat16 or N % fp8_matmul.MULTIPLE:
        return f"on {sm} cuBLASLt multiplies, which makes bfloat16 of N a multiple of {fp8_matmul.MULTIPLE}, got N={N}"
    return None


def fp4_linear(o: Operands, config: Config | None = None) -> Tensor:
    """y [M, N] for x of any strides.  config: to use in place of the table's."""
    (M, K), N = o.x.shape, o.scale_w.shape[0]
    if M == 0:
        return torch.empty(0, N, dtype=o.dtype, device=o.x.device)
    if o.pairs is not None:
        o = replace(o, x=o.pairs[: 2 * M], octaves=None) if M <= MOST_ROWS else replace(o, pairs=None)
    if not o.x.is_contiguous() or o.x.data_ptr() % ALIGNMENT:
        o = replace(o, x=o.x.clone(memory_format=torch.contiguous_format))
    with on_device(o.x.device):
        configs = choose(o.x.shape[0], N, K, capability_of(o.x.device)) if config is None else iter((config,))
        for chosen in configs:
            if isinstance(chosen, Tiles):
                return _multiply(o, chosen)
            if o.pairs is None and o.dtype is torch.bfloat16 and N % fp8_matmul.MULTIPLE == 0:
                return _by_library(o, chosen)
    raise ValueError(f"{config} cannot run this: cuBLASLt makes bfloat16 of N={N} a multiple of 16")


def constants(tiles: Tiles, mantissa: int, *, whole: bool, paired: bool = False) -> dict[str, int | bool]:
    """What the kernel is compiled for.  whole: y needs no parts.  paired: x has two rows for each of y."""
    return {
        "UNITS": UNITS,
        "STAGES": tiles.stages,
        "ROWS": ROWS_OF_TILES,
        "MANTISSA": mantissa,
        "PAIRED": paired,
        "WHOLE": whole,
        "REGISTERS": REGISTERS[tiles.resident].multiplying,
        "COPYING": REGISTERS[tiles.resident].copying,
    }


def _by_library(o: Operands, config: Unpack) -> Tensor:
    w = unpack(o.words, o.octaves, o.scale_w.shape[0], o.x.shape[1], o.mantissa, config.blocks)
    operands = eight_bit.Operands(x=o.x, w=w, scale_x=o.scale_x, scale_w=o.scale_w, dtype=o.dtype)
    return fp8_matmul.fp8_matmul(operands, Library())


def _multiply(o: Operands, tiles: Tiles) -> Tensor:
    """y [M, N] for M >= 1, of x [M, K] or of its pairs [2 * M, K]."""
    paired = o.pairs is not None
    M, N = o.x.shape[0] // (2 if paired else 1), o.scale_w.shape[0]
    units, B = o.words.shape[:2]
    tiles_m, tiles_n = triton.cdiv(o.x.shape[0], tiles.tokens), triton.cdiv(units, UNITS)
    programs = processors_of(o.x.device) * tiles.resident
    parts = max(1, min(tiles.slices, B, programs // (tiles_m * tiles_n)))
    blocks = triton.cdiv(B, parts)
    parts = triton.cdiv(B, blocks)
    # rows that TMA cannot write are written as the only part
    whole = parts == 1 and N * o.dtype.itemsize % ALIGNMENT == 0 and not paired
    y = torch.empty(M, N, dtype=o.dtype, device=o.x.device)
    added = not whole and (parts > 1 or not paired)
    to = torch.empty(parts, M, N, dtype=torch.float32, device=o.x.device) if added else y
    matrices = (
        described(o.x, [tiles.tokens, BLOCK]),
        described(o.words.view(-1, WORD_ROW), [WORD_ROWS, WORD_ROW]),
        described(y if whole else y.new_empty(8, 64), [tiles.tokens, 64]),
    )
    launch(
        fp4_kernel,
        (min(programs, tiles_m * tiles_n * parts), 1, 1),
        (*matrices, to, o.scale_x, o.scale_w, o.octaves, M, N, B, step(o.scale_x), tiles_m, tiles_n, parts, blocks),
        constants(tiles, o.mantissa, whole=whole, paired=paired),
        **REGISTERS[tiles.resident].options,
        launch_pdl=True,
    )
    if added:
        add_parts(to, None, y)
    return y
