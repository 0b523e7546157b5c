"""The kernels of the FX host, in order of preference: the first that does not refuse runs a problem."""

from qcompile.backends.fx.kernels import (
    book_triton,
    dense,
    fp4,
    fp4_lowered,
    fp8,
    fp8_triton,
    int4_int8,
    int8,
    int8_triton,
    lifted,
    narrow,
    packed,
    weight_lowered,
    weight_triton,
)
from qcompile.backends.fx.kernels.problem import Kernel, Problem

__all__ = ["KERNELS", "Kernel", "Problem", "choose"]

KERNELS: tuple[Kernel, ...] = (
    int8_triton.KERNEL,
    int8.KERNEL,
    fp4.KERNEL,
    fp4_lowered.KERNEL,
    fp8_triton.KERNEL,
    fp8.KERNEL,
    lifted.KERNEL,
    int4_int8.KERNEL,
    weight_lowered.KERNEL,
    weight_triton.KERNEL,
    book_triton.KERNEL,
    narrow.KERNEL,
    dense.KERNEL,
    packed.KERNEL,
)


def choose(problem: Problem) -> tuple[Kernel, dict[str, str]]:
    """The kernel for a problem, and why each one preferred to it refused."""
    refused: dict[str, str] = {}
    for kernel in KERNELS:
        if kernel.device not in (None, problem.device):
            continue
        reason = kernel.why_not(problem)
        if reason is None:
            return kernel, refused
        refused[kernel.name] = reason
    raise AssertionError("the last kernel refuses nothing")
