"""Compile the W4A16 kernels for a device that need not be there."""

import torch
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource

from qcompile.backends.triton import add_parts, int4_gemm, int4_matmul, int4_unpack
from qcompile.backends.triton.int4_table import Config, FewRows, ManyRows
from tests.triton.compiled import NAMES, compiled, described


def cubin(config: Config, capability: int, dtype: torch.dtype, groups: int, *, wide: bool, parts: int = 1) -> bytes:
    """The binary of the configuration's kernel, as its launcher would have it compiled for K in that many slices."""
    if isinstance(config, FewRows):
        return _few_rows(config, capability, NAMES[dtype], groups, wide, parts)
    if isinstance(config, ManyRows):
        return _many_rows(config, capability, dtype, groups, parts)
    pointers = {"words_ptr": "*i32", "scales_ptr": "*i32", "y_ptr": f"*{NAMES[dtype]}"}
    constants = {"GROUPS": groups, "WIDE": wide, "BLOCKS": config.blocks}
    return _compiled(GluonASTSource, int4_unpack.unpack_kernel, pointers, constants, capability, 4)


def reduce_cubin(capability: int, dtype: torch.dtype) -> bytes:
    pointers = {"parts_ptr": "*fp32", "bias_ptr": f"*{NAMES[dtype]}", "y_ptr": f"*{NAMES[dtype]}"}
    constants = {"PARTS": 4, "BIAS": True, "DEPENDENT": capability >= 90, "SIZE": add_parts.BLOCK}
    return _compiled(ASTSource, add_parts.reduce_kernel, pointers, constants, capability, 4)


def _few_rows(config: FewRows, capability: int, name: str, groups: int, wide: bool, parts: int) -> bytes:
    x = {"x_ptr": f"*{name}", "words_ptr": "*i32", "scales_ptr": "*i32", "bias_ptr": f"*{name}"}
    x |= {"y_ptr": "*fp32" if parts > 1 else f"*{name}"}
    constants = {
        "ROWS_OF_X": config.rows,
        "UNITS": config.units,
        "DEPTH": config.depth,
        "BLOCKS": config.blocks,
        "GROUPS": groups,
        "WIDE": wide,
        "WHOLE": parts == 1,
        "BIAS": parts == 1,
        "DEPENDENT": capability >= 90,
    }
    return _compiled(GluonASTSource, int4_matmul.few_rows_kernel, x, constants, capability, config.warps)


def _many_rows(config: ManyRows, capability: int, dtype: torch.dtype, groups: int, parts: int) -> bytes:
    name = NAMES[dtype]
    pointers = {
        "x_desc": described(name, [config.rows, int4_gemm.STAGE]),
        "y_desc": described(name, [config.rows, 64 * config.units]),
        "words_ptr": "*i32",
        "scales_ptr": "*i32",
        "bias_ptr": f"*{name}",
        "parts_ptr": "*fp32",
    }
    constants = {
        "ROWS_OF_X": config.rows,
        "UNITS": config.units,
        "STEPS": max(config.steps, groups),
        "STAGES": config.stages,
        "PENDING": 1 if parts == 1 else 0,
        "BLOCKS": 4,
        "PARTS": parts,
        "GROUPS": groups,
        "BIAS": parts == 1,
        "GROUP": int4_gemm.TILES_IN_GROUP,
        "DEPENDENT": True,
    }
    return _compiled(GluonASTSource, int4_gemm.many_rows_kernel, pointers, constants, capability, config.warps)


def _compiled(source: type, kernel: object, given: dict, constants: dict, capability: int, warps: int) -> bytes:
    return compiled(source, kernel, given, constants, capability, {"num_warps": warps}).asm["cubin"]
