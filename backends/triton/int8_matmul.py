"""W8A8 on integer tensor cores, for any number of rows, by the kernel that the table names.

    y = ((x - zero) @ w.T) * (scale_x * scale_w) + x_tail @ w_tail + bias + residual

The sum is exact in int32 for K up to 66311. With a tail it is LLM.int8 with calibrated channels (Dettmers 2022): what
the int8 codes leave out is multiplied in 16 bits, by the same kernel.
"""

from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor

from qcompile.backends.triton import eight_bit, eight_bit_ring, hopper
from qcompile.backends.triton.eight_bit import Operands
from qcompile.backends.triton.eight_bit_table import INT8, Config, HopperTiles, RingTiles, Tiles
from qcompile.backends.triton.table import capability_of, fitting, is_measured, on_device
from qcompile.backends.triton.tuned import is_worth, tuned_entries

# what TMA asks of K, and of N where y has elements of 16 bits
K_MULTIPLE, N_MULTIPLE = 16, 8


def why_not(N: int, K: int, capability: tuple[int, int]) -> str | None:
    """None if this is the fastest int8 matmul known for a weight [N, K] on a device, else the reason."""
    major, minor = capability
    if not is_measured(10 * major + minor) and not is_worth("int8", N, K):
        return f"the int8 kernels were measured on sm_90, this is sm_{major}{minor}: `qcompile tune` measures them here"
    if K % K_MULTIPLE or N % N_MULTIPLE:
        return f"TMA needs K to divide by {K_MULTIPLE} and N by {N_MULTIPLE}, got N={N}, K={K}"
    return None


def int8_matmul(o: Operands, config: Config | None = None) -> Tensor:
    """y [M, N] in o.dtype, for any shapes and strides.  config: to use in place of the table's."""
    o = _by_rows(o)
    M, (N, K) = o.x.shape[0], o.w.shape
    with on_device(o.x.device):
        for chosen in _configs(M, N, K, o.x.device) if config is None else (config,):
            if isinstance(chosen, Tiles):
                return eight_bit.matmul(o, chosen)
            if isinstance(chosen, RingTiles) and eight_bit_ring.why_not(o) is None:
                return eight_bit_ring.matmul(o, chosen)
            if isinstance(chosen, HopperTiles) and hopper.why_not(o) is None:
                return hopper.matmul(o, chosen)
    reason = eight_bit_ring.why_not(o) if isinstance(config, RingTiles) else hopper.why_not(o)
    raise ValueError(f"{config} cannot run this: {reason}")


@lru_cache(maxsize=4096)
def _configs(M: int, N: int, K: int, device: torch.device) -> tuple[Config, ...]:
    return tuple(fitting(tuned_entries("int8", N, K, device) + INT8, M, N, K, capability_of(device)))


def _by_rows(o: Operands) -> Operands:
    """The operands, the last dimension of what belongs to rows contiguous."""
    if all(t is None or t.stride(-1) == 1 for t in (o.x, o.residual, o.x_tail)):
        return o
    residual, x_tail = (None if t is None else t.contiguous() for t in (o.residual, o.x_tail))
    return replace(o, x=o.x.contiguous(), residual=residual, x_tail=x_tail)
