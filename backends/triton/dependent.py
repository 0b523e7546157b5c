"""Kernels that start before the one before them in their stream has ended, and wait inside for what that writes.

What they read before they wait are constants: written by none of the last kernels of the stream. One that waits may let
the next start first, so that a kernel runs beside the last but one, too; it still waits for all of them, each of which
has waited for the one before it.
"""

import torch
import triton
import triton.language as tl

from qcompile.backends.triton.table import capability_of

# first compute capability that has programmatic dependent launch (PTX ISA, griddepcontrol)
DEPENDENT_CAPABILITY = 90


def is_dependent(device: torch.device) -> bool:
    """Whether kernels on the device may start so."""
    return device.type == "cuda" and capability_of(device) >= DEPENDENT_CAPABILITY


@triton.jit
def prefetch(pointer, K, BLOCK: tl.constexpr):
    """Ask for K elements to be in the L2 cache by the time that they are read."""
    if pointer is not None:
        LINE: tl.constexpr = 1024 // pointer.dtype.element_ty.primitive_bitwidth
        first = tl.minimum(tl.arange(0, BLOCK // min(BLOCK, LINE)) * LINE, K - 1)
        address = (pointer + first).to(tl.int64)
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [address], tl.int32, is_pure=False, pack=1
        )
