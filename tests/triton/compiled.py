"""Compile kernels for a device that need not be there."""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon import language as gl

CAPABILITIES = (80, 90, 100)
NAMES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.int8: "i8",
    torch.float8_e4m3fn: "fp8e4nv",
}
GLUON_TYPES = {
    "bf16": gl.bfloat16,
    "fp16": gl.float16,
    "fp32": gl.float32,
    "i8": gl.int8,
    "i32": gl.int32,
    "fp8e4nv": gl.float8e4nv,
}
# what a launch finds out by itself: pointers are multiples of 16, and so are most lengths
LENGTHS = ("N", "K", "stride_x", "stride_residual")


def name_of(config: object) -> str:
    return type(config).__name__ + "-".join(str(getattr(config, f.name)) for f in fields(config))


def described(name: str, block: list[int]) -> str:
    """The type of a descriptor in Gluon."""
    layout = gl.NVMMASharedLayout.get_default_for(block, GLUON_TYPES[name])
    return f"tensordesc<{name}{block},{layout!r}>"


def compiled(
    source: Any,
    kernel: Any,
    given: Mapping[str, str],
    constants: Mapping[str, Any],
    capability: int,
    options: Mapping[str, Any],
    lengths: Sequence[str] = LENGTHS,
) -> Any:
    """The kernel as its launcher would have it compiled.

    given: types of the arguments that are neither constants nor int32.  source: of Triton or of Gluon.
    lengths: arguments that are multiples of 16.
    """
    signature = {n: "constexpr" if n in constants else given.get(n, "i32") for n in kernel.arg_names}
    aligned = [n for n, kind in signature.items() if kind.startswith("*") or n in lengths]
    places = {n: (kernel.arg_names.index(n),) for n in signature}
    return triton.compile(
        source(
            kernel,
            signature,
            {places[n]: value for n, value in constants.items()},
            {places[n]: [["tt.divisibility", 16]] for n in aligned},
        ),
        target=GPUTarget("cuda", capability, 32),
        options=dict(options),
    )
