"""Compile the kernels of weights in words for a device that need not be there."""

from dataclasses import dataclass
from typing import Any

import torch
from triton.compiler import ASTSource, CompiledKernel
from triton.experimental.gluon._runtime import GluonASTSource

from qcompile.backends.triton import add_parts, width_few_rows, width_many_rows, width_unpack
from qcompile.backends.triton.width_table import Config, FewRows, ManyRows
from tests.triton.compiled import NAMES, compiled, described


@dataclass(frozen=True, kw_only=True)
class Form:
    """A packed weight, as `widths` has them. groups: of a block, 0 for one scale a row."""

    width: str = "int4"
    groups: int = 1
    wide: bool = False
    zero: bool = True
    minimum: bool = False
    integers: bool = False

    @property
    def constants(self) -> dict[str, object]:
        return {"WIDTH": self.width, "GROUPS": self.groups, "WIDE": self.wide, "ZERO": self.zero}

    @property
    def kinds(self) -> dict[str, object]:
        """Of kernels that have minima and integers for scales."""
        return self.constants | {"MINIMUM": self.minimum, "INTEGERS": self.integers}


def cubin(config: Config, capability: int, dtype: torch.dtype, form: Form, **more: Any) -> bytes:
    """The binary of the configuration's kernel, as its launcher would have it compiled.  more: as of `kernel`."""
    return kernel(config, capability, dtype, form, **more).asm["cubin"]


def kernel(
    config: Config,
    capability: int,
    dtype: torch.dtype,
    form: Form,
    *,
    parts: int = 1,
    one: bool = False,
    follows: bool = False,
) -> CompiledKernel:
    """For K in that many slices; one: a single row of x; follows: behind another kernel of its x."""
    if isinstance(config, FewRows):
        return _few_rows(config, capability, NAMES[dtype], form, parts, one, follows)
    if isinstance(config, ManyRows):
        return _many_rows(config, capability, dtype, form, parts)
    pointers = {"words_ptr": "*i32", "scales_ptr": "*i32", "levels_ptr": "*i32", "y_ptr": f"*{NAMES[dtype]}"}
    constants = {**form.kinds, "BLOCKS": config.blocks}
    return _compiled(GluonASTSource, width_unpack.unpack_kernel, pointers, constants, capability, 4)


def reduce_cubin(capability: int, dtype: torch.dtype) -> bytes:
    pointers = {"parts_ptr": "*fp32", "bias_ptr": f"*{NAMES[dtype]}", "y_ptr": f"*{NAMES[dtype]}"}
    constants = {"PARTS": 4, "BIAS": True, "DEPENDENT": capability >= 90, "SIZE": add_parts.BLOCK}
    kernel = add_parts.reduce_kernel
    return _compiled(ASTSource, kernel, pointers, constants, capability, 4).asm["cubin"]


def _few_rows(
    config: FewRows, capability: int, name: str, form: Form, parts: int, one: bool, follows: bool
) -> CompiledKernel:
    x = {"x_ptr": f"*{name}"} | dict.fromkeys(("words_ptr", "scales_ptr", "levels_ptr"), "*i32")
    x |= {"bias_ptr": f"*{name}", "y_ptr": "*fp32" if parts > 1 else f"*{name}"}
    constants = {
        "ROWS_OF_X": config.rows,
        "ONE": one,
        "UNITS": config.units,
        "DEPTH": config.depth,
        "BLOCKS": config.blocks,
        **form.kinds,
        "WHOLE": parts == 1,
        "BIAS": parts == 1,
        "DEPENDENT": capability >= 90,
        "FOLLOWS": follows,
    }
    kernel = width_few_rows.few_rows_kernel
    return _compiled(GluonASTSource, kernel, x, constants, capability, config.warps)


def _many_rows(config: ManyRows, capability: int, dtype: torch.dtype, form: Form, parts: int) -> CompiledKernel:
    name = NAMES[dtype]
    pointers = {
        "x_desc": described(name, [config.rows, width_many_rows.STAGE]),
        "y_desc": described(name, [config.rows, 64 * config.units]),
    }
    pointers |= dict.fromkeys(("words_ptr", "scales_ptr", "levels_ptr"), "*i32")
    pointers |= {"bias_ptr": f"*{name}", "parts_ptr": "*fp32"}
    constants = {
        "ROWS_OF_X": config.rows,
        "UNITS": config.units,
        "STEPS": max(config.steps, form.groups),
        "STAGES": config.stages,
        "PENDING": 1 if parts == 1 else 0,
        "BLOCKS": 4,
        "PARTS": parts,
        **form.constants,
        "BIAS": parts == 1,
        "GROUP": width_many_rows.TILES_IN_GROUP,
        "DEPENDENT": True,
    }
    kernel = width_many_rows.many_rows_kernel
    return _compiled(GluonASTSource, kernel, pointers, constants, capability, config.warps)


def _compiled(
    source: type, kernel: object, given: dict, constants: dict, capability: int, warps: int
) -> CompiledKernel:
    return compiled(source, kernel, given, constants, capability, {"num_warps": warps})
