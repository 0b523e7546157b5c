"""Compile the W4A16 kernels for a device that need not be there."""

from dataclasses import dataclass, fields

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource

from qcompile.backends.triton import add_parts, int4_gemm, int4_matmul, int4_unpack
from qcompile.backends.triton.int4_table import Config, FewRows, ManyRows
from qcompile.backends.triton.width_table import TABLES

NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16"}
CAPABILITIES = (80, 90, 100)


def configs(capability: int, width: str = "int4") -> list[Config]:
    """Those of the table that a device of this capability may run."""
    return [e.config for e in TABLES[width] if e.capabilities[0] <= capability <= e.capabilities[1]]


def name_of(config: Config) -> str:
    return type(config).__name__ + "-".join(str(getattr(config, f.name)) for f in fields(config))


@dataclass(frozen=True, kw_only=True)
class Form:
    """A packed weight, as `widths` has them. groups: of a block, 0 for one scale a row."""

    width: str = "int4"
    groups: int = 1
    wide: bool = False
    zero: bool = True

    @property
    def constants(self) -> dict[str, object]:
        return {"WIDTH": self.width, "GROUPS": self.groups, "WIDE": self.wide, "ZERO": self.zero}


def cubin(config: Config, capability: int, dtype: torch.dtype, form: Form, *, parts: int = 1) -> bytes:
    """The binary of the configuration's kernel, as its launcher would have it compiled for K in that many slices."""
    return kernel(config, capability, dtype, form, parts=parts).asm["cubin"]


def kernel(config: Config, capability: int, dtype: torch.dtype, form: Form, *, parts: int = 1) -> CompiledKernel:
    """What `cubin` is the binary of."""
    if isinstance(config, FewRows):
        return _few_rows(config, capability, NAMES[dtype], form, parts)
    if isinstance(config, ManyRows):
        return _many_rows(config, capability, dtype, form, parts)
    pointers = {"words_ptr": "*i32", "scales_ptr": "*i32", "levels_ptr": "*i32", "y_ptr": f"*{NAMES[dtype]}"}
    numbers = {"N": "i32", "K": "i32", "B": "i32"}
    constants = {**form.constants, "BLOCKS": config.blocks}
    return _compiled(GluonASTSource, int4_unpack.unpack_kernel, pointers | numbers, constants, capability, 4)


def reduce_cubin(capability: int, dtype: torch.dtype) -> bytes:
    pointers = {"parts_ptr": "*fp32", "bias_ptr": f"*{NAMES[dtype]}", "y_ptr": f"*{NAMES[dtype]}"}
    constants = {"PARTS": 4, "BIAS": True, "DEPENDENT": capability >= 90, "SIZE": add_parts.BLOCK}
    kernel = add_parts.reduce_kernel
    return _compiled(ASTSource, kernel, pointers | {"size": "i32", "N": "i32"}, constants, capability, 4).asm["cubin"]


def _few_rows(config: FewRows, capability: int, name: str, form: Form, parts: int) -> CompiledKernel:
    x = {"x_ptr": f"*{name}"} | dict.fromkeys(("words_ptr", "scales_ptr", "levels_ptr"), "*i32")
    x |= {"bias_ptr": f"*{name}", "y_ptr": "*fp32" if parts > 1 else f"*{name}"}
    numbers = dict.fromkeys(("M", "N", "K", "B", "tiles"), "i32")
    constants = {
        "ROWS_OF_X": config.rows,
        "UNITS": config.units,
        "DEPTH": config.depth,
        "BLOCKS": config.blocks,
        **form.constants,
        "WHOLE": parts == 1,
        "BIAS": parts == 1,
        "DEPENDENT": capability >= 90,
    }
    kernel = int4_matmul.few_rows_kernel
    return _compiled(GluonASTSource, kernel, x | numbers, constants, capability, config.warps)


def _many_rows(config: ManyRows, capability: int, dtype: torch.dtype, form: Form, parts: int) -> CompiledKernel:
    name, kind = NAMES[dtype], int4_gemm.GLUON_TYPES[dtype]
    pointers = {}
    for tensor, block in (("x_desc", [config.rows, int4_gemm.STAGE]), ("y_desc", [config.rows, 64 * config.units])):
        layout = gl.NVMMASharedLayout.get_default_for(block, kind)
        pointers[tensor] = f"tensordesc<{name}{block},{layout!r}>"
    pointers |= dict.fromkeys(("words_ptr", "scales_ptr", "levels_ptr"), "*i32")
    pointers |= {"bias_ptr": f"*{name}", "parts_ptr": "*fp32"}
    numbers = dict.fromkeys(("M", "N", "B", "tiles_n", "tiles_m"), "i32")
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
        "GROUP": int4_gemm.TILES_IN_GROUP,
        "DEPENDENT": True,
    }
    kernel = int4_gemm.many_rows_kernel
    return _compiled(GluonASTSource, kernel, pointers | numbers, constants, capability, config.warps)


def _compiled(
    source: type, kernel: object, values: dict, constants: dict, capability: int, warps: int
) -> CompiledKernel:
    signature = values | dict.fromkeys(constants, "constexpr")
    # what a launch finds out by itself: pointers and lengths are multiples of 16
    aligned = [i for i, (name, kind) in enumerate(values.items()) if kind.startswith("*") or name in ("N", "K")]
    attributes = {(i,): [["tt.divisibility", 16]] for i in aligned}
    return triton.compile(
        source(kernel, signature, constants, attributes),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": warps},
    )
