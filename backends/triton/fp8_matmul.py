"""W8A8 on fp8 tensor cores: y = (x @ w.T) * (scale_x * scale_w) + bias + residual.

x fp8_e4m3 [M, K], w fp8_e4m3 [N, K]. Few rows run through `eight_bit_ring` or `eight_bit`; from some number of rows on
cuBLASLt (`torch._scaled_mm`) is faster, and the table names it.
"""

from functools import lru_cache

import torch
from torch import Tensor

from qcompile.backends.triton import eight_bit, eight_bit_ring
from qcompile.backends.triton.eight_bit import Operands
from qcompile.backends.triton.eight_bit_table import FP8, Config, Library, RingTiles, Tiles
from qcompile.backends.triton.table import capability_of, fitting, is_measured, on_device
from qcompile.backends.triton.tuned import is_worth, tuned_entries

FIRST_CAPABILITY = (8, 9)
# cuBLASLt: leading dimensions of fp8 operands are multiples of 16 bytes
MULTIPLE = 16


def why_not(N: int, K: int, capability: tuple[int, int]) -> str | None:
    """None if this is the fastest fp8 matmul known for a weight [N, K] on a device, else the reason."""
    major, minor = capability
    if capability < FIRST_CAPABILITY:
        return f"fp8 tensor cores begin with sm_89, this is sm_{major}{minor}"
    if not is_measured(10 * major + minor) and not is_worth("fp8", N, K):
        return f"the fp8 kernel was measured on sm_90, this is sm_{major}{minor}: `qcompile tune` measures it here"
    return None


def fp8_matmul(o: Operands, config: Config | None = None) -> Tensor:
    """y [M, N] in o.dtype.  config: to use in place of the table's."""
    M, (N, K) = o.x.shape[0], o.w.shape
    with on_device(o.x.device):
        for chosen in _configs(M, N, K, o.x.device) if config is None else (config,):
            if isinstance(chosen, Tiles):
                return eight_bit.matmul(o, chosen)
            if isinstance(chosen, RingTiles) and eight_bit_ring.why_not(o) is None:
                return eight_bit_ring.matmul(o, chosen)
            if isinstance(chosen, Library) and _library_takes(o):
                return _library(o)
    library = f"cuBLASLt makes bfloat16 of N={N} and K={K} multiples of {MULTIPLE}"
    reason = eight_bit_ring.why_not(o) if isinstance(config, RingTiles) else library
    raise ValueError(f"{config} cannot run this: {reason}")


@lru_cache(maxsize=4096)
def _configs(M: int, N: int, K: int, device: torch.device) -> tuple[Config, ...]:
    return tuple(fitting(tuned_entries("fp8", N, K, device) + FP8, M, N, K, capability_of(device)))


def _library_takes(o: Operands) -> bool:
    N, K = o.w.shape
    plain = o.bias is None and o.residual is None and o.x_tail is None
    return plain and o.dtype is torch.bfloat16 and N % MULTIPLE == 0 and K % MULTIPLE == 0


def _library(o: Operands) -> Tensor:
    rows = o.scale_x.expand(o.x.shape[0], 1).contiguous()
    return torch._scaled_mm(o.x, o.w.t(), rows, o.scale_w.view(1, -1), out_dtype=torch.bfloat16, use_fast_accum=True)
