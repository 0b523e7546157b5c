"""Compile the W4A8 kernel for Hopper, which need not be there."""

import torch
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource

from qcompile.backends.triton import int4_int8_linear as linear
from qcompile.backends.triton.groups import REGISTERS
from qcompile.backends.triton.int4_int8_gemm import int4_int8_kernel
from qcompile.backends.triton.int4_int8_table import AsInt8, Int4Int8Tiles
from qcompile.backends.triton.int4_int8_unpack import WARPS, unpack_kernel
from tests.triton.compiled import NAMES, compiled, described

# bytes that one program can have on sm_90
SHARED = 232448


def cubin(tiles: Int4Int8Tiles, dtype: torch.dtype, groups: int, *, wide: bool, whole: bool, full: bool) -> bytes:
    """The binary of the configuration, which fits the shared memory of the device.

    whole: K is not cut.  full: with zeros and bias.
    """
    name = NAMES[dtype]
    piece, width = linear.pieces(tiles)
    rows = 8 * groups * (2 if wide else 1)
    given = {
        "x": described("i8", [piece, linear.BLOCK]),
        "w": described("i32", [linear.WORD_ROWS, linear.WORD_ROW]),
        "s": described("i32", [rows, linear.SCALE_ROW]),
        "y": described(name, [width, 64]),
        "parts_ptr": f"*{name}" if whole else "*fp32",
        "scale_x": "*fp32",
        "sums_w": "*fp32",
    }
    given |= {"zero": "*fp32", "bias": f"*{name}"} if full else {}
    constants = {} if full else {"zero": None, "bias": None}
    constants |= linear.constants(tiles, groups, wide=wide, whole=whole)
    kernel = compiled(GluonASTSource, int4_int8_kernel, given, constants, 90, REGISTERS[tiles.resident].options)
    assert kernel.metadata.shared <= SHARED
    return kernel.asm["cubin"]


def unpack_cubin(config: AsInt8, groups: int, *, wide: bool) -> bytes:
    """The binary that makes a weight int8."""
    constants = {"GROUPS": groups, "WIDE": wide, "BLOCKS": config.blocks}
    given = {"words_ptr": "*i32", "scales_ptr": "*i32", "row_ptr": "*fp32", "y_ptr": "*i32"}
    return compiled(ASTSource, unpack_kernel, given, constants, 90, {"num_warps": WARPS}).asm["cubin"]
