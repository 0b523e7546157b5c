"""Compile the kernels for 4-bit floats under 8-bit ones for a device that need not be there."""

import torch
from triton.compiler import ASTSource, CompiledKernel
from triton.experimental.gluon._runtime import GluonASTSource

from qcompile.backends.triton import fp4_linear as linear
from qcompile.backends.triton.fp4_gemm import fp4_kernel
from qcompile.backends.triton.fp4_table import Config, Tiles
from qcompile.backends.triton.fp4_unpack import WARPS, unpack_kernel
from qcompile.backends.triton.groups import REGISTERS
from tests.triton.compiled import NAMES, compiled, described


def kernel(
    config: Config,
    capability: int,
    dtype: torch.dtype,
    mantissa: int,
    *,
    whole: bool = True,
    lowered: bool = False,
    paired: bool = False,
) -> CompiledKernel:
    """The configuration's kernel, as its launcher would have it compiled.

    whole: K is not cut.  lowered: columns are, of the weight; paired: of x.
    """
    if not isinstance(config, Tiles):
        constants = {"MANTISSA": mantissa, "BLOCKS": config.blocks} | ({} if lowered else {"octaves_ptr": None})
        given = {"words_ptr": "*i32", "octaves_ptr": "*i32", "y_ptr": "*i32"}
        return compiled(ASTSource, unpack_kernel, given, constants, capability, {"num_warps": WARPS})
    name = NAMES[dtype]
    given = {
        "x": described(NAMES[torch.float8_e4m3fn], [config.tokens, linear.BLOCK]),
        "w": described("i32", [linear.WORD_ROWS, linear.WORD_ROW]),
        "y": described(name, [config.tokens, 64]),
        "parts_ptr": f"*{name}" if whole else "*fp32",
        "scale_x": "*fp32",
        "scale_w": "*fp32",
        "octaves": "*i32",
    }
    constants = linear.constants(config, mantissa, whole=whole and not paired, paired=paired)
    constants |= {} if lowered else {"octaves": None}
    options = REGISTERS[config.resident].options
    return compiled(GluonASTSource, fp4_kernel, given, constants, capability, options)
