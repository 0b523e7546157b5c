"""Compile the W4A8 kernel for Hopper, which need not be there."""

from dataclasses import fields

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource

from qcompile.backends.triton import int4_int8_linear as linear
from qcompile.backends.triton.int4_int8_gemm import int4_int8_kernel
from qcompile.backends.triton.int4_int8_table import Tiles

NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16"}
# bytes that one program can have on sm_90
SHARED = 232448
GLUON_TYPES = {"bf16": gl.bfloat16, "fp16": gl.float16, "i8": gl.int8, "i32": gl.int32}


def name_of(tiles: Tiles) -> str:
    return "-".join(str(getattr(tiles, f.name)) for f in fields(tiles))


def cubin(tiles: Tiles, dtype: torch.dtype, groups: int, *, wide: bool, whole: bool, full: bool) -> bytes:
    """The binary of the configuration, which fits the shared memory of the device."""
    kernel = _compiled(tiles, dtype, groups, wide=wide, whole=whole, full=full)
    assert kernel.metadata.shared <= SHARED
    return kernel.asm["cubin"]


def _compiled(tiles: Tiles, dtype: torch.dtype, groups: int, *, wide: bool, whole: bool, full: bool) -> CompiledKernel:
    """The configuration as its launcher would have it compiled.

    whole: K is not cut.  full: with zeros and bias.
    """
    name = NAMES[dtype]
    piece, width = linear.pieces(tiles)
    rows = 8 * groups * (2 if wide else 1)
    given = {
        "x": _described("i8", [piece, linear.BLOCK]),
        "w": _described("i32", [linear.WORD_ROWS, linear.WORD_ROW]),
        "s": _described("i32", [rows, linear.SCALE_ROW]),
        "y": _described(name, [width, 64]),
        "parts_ptr": f"*{name}" if whole else "*fp32",
        "scale_x": "*fp32",
        "sums_w": "*fp32",
    }
    given |= {"zero": "*fp32", "bias": f"*{name}"} if full else {}
    constants = {} if full else {"zero": None, "bias": None}
    constants |= linear.constants(tiles, groups, wide=wide, whole=whole)
    kernel = int4_int8_kernel
    signature = {n: "constexpr" if n in constants else given.get(n, "i32") for n in kernel.arg_names}
    # what a launch finds out by itself: pointers and lengths are multiples of 16
    aligned = [n for n, kind in signature.items() if kind.startswith("*") or n == "N"]
    places = {n: (kernel.arg_names.index(n),) for n in signature}
    return triton.compile(
        GluonASTSource(
            kernel,
            signature,
            {places[n]: value for n, value in constants.items()},
            {places[n]: [["tt.divisibility", 16]] for n in aligned},
        ),
        target=GPUTarget("cuda", 90, 32),
        options={"num_warps": linear.WARPS},
    )


def _described(name: str, block: list[int]) -> str:
    layout = gl.NVMMASharedLayout.get_default_for(block, GLUON_TYPES[name])
    return f"tensordesc<{name}{block},{layout!r}>"
