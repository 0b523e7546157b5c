"""W8A8 on integer tensor cores, for any number of rows, by the kernel that the table names: `eight_bit` or `hopper`.

    y = ((x - zero) @ w.T) * (scale_x * scale_w) + x_tail @ w_tail + bias + residual

The sum is exact in int32 for K up to 66311. With a tail it is LLM.int8 with calibrated channels (Dettmers 2022): what
the int8 codes leave out is multiplied in 16 bits, by the same kernel.
"""

from dataclasses import replace

import torch
from torch import Tensor

from qcompile.backends.triton import eight_bit, hopper
from qcompile.backends.triton.eight_bit import Operands
from qcompile.backends.triton.eight_bit_table import TABLE, Config, Tiles, fitting, is_measured

# what TMA asks of K, and of N where y has elements of 16 bits
K_MULTIPLE, N_MULTIPLE = 16, 8


def why_not(N: int, K: int, capability: tuple[int, int]) -> str | None:
    """None if this is the fastest int8 matmul known for a weight [N, K] on a device, else the reason."""
    major, minor = capability
    if not is_measured(10 * major + minor):
        return f"the int8 kernels were measured on sm_90, this is sm_{major}{minor}"
    if K % K_MULTIPLE or N % N_MULTIPLE:
        return f"TMA needs K to divide by {K_MULTIPLE} and N by {N_MULTIPLE}, got N={N}, K={K}"
    return None


def int8_matmul(o: Operands, config: Config | None = None) -> Tensor:
    """y [M, N] in o.dtype, for any shapes and strides.  config: to use in place of the table's."""
    o = replace(o, x=_by_rows(o.x), residual=o.residual if o.residual is None else _by_rows(o.residual))
    o = replace(o, x_tail=o.x_tail if o.x_tail is None else _by_rows(o.x_tail))
    with torch.cuda.device(o.x.device):
        major, minor = torch.cuda.get_device_capability()
        configs = fitting(TABLE, o.x.shape[0], o.w.shape[0], 10 * major + minor)
        for chosen in configs if config is None else (config,):
            if isinstance(chosen, Tiles):
                return eight_bit.matmul(o, chosen)
            if hopper.why_not(o) is None:
                return hopper.matmul(o, chosen)
    raise ValueError(f"{config} cannot run this: {hopper.why_not(o)}")


def _by_rows(matrix: Tensor) -> Tensor:
    return matrix if matrix.stride(-1) == 1 else matrix.contiguous()
