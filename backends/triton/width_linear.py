"""y[M, N] = x[M, K] @ dequantized(codes[N, K]).T + bias for 16-bit x, by the kernel that the table names for M."""

from functools import lru_cache

import torch
from torch import Tensor

from qcompile.backends.triton.table import capability_of, on_device
from qcompile.backends.triton.tuned import tuned_entries
from qcompile.backends.triton.width_few_rows import few_rows
from qcompile.backends.triton.width_many_rows import many_rows
from qcompile.backends.triton.width_table import Config, FewRows, ManyRows, choose, rounds_twice, tuned_name
from qcompile.backends.triton.width_unpack import unpack
from qcompile.backends.triton.widths import Packed

# what TMA and copies of 16 bytes ask of x
ALIGNMENT = 16


def width_linear(x: Tensor, weight: Packed, bias: Tensor | None, N: int, config: Config | None = None) -> Tensor:
    """y [M, N] for x [M, K], bfloat16 or float16, and a weight as `widths` packs it.

    config: to use in place of the table's.
    """
    M, K = x.shape
    if M == 0:
        return x.new_empty(0, N)
    if not x.is_contiguous() or x.data_ptr() % ALIGNMENT:
        x = x.clone(memory_format=torch.contiguous_format)
    with on_device(x.device):
        if config is None:
            config = _config(weight.width, M, N, K, x.device, not rounds_twice(weight, x.dtype))
        if isinstance(config, FewRows):
            return few_rows(x, weight, bias, N, config)
        if isinstance(config, ManyRows):
            return many_rows(x, weight, bias, N, config)
        return torch.nn.functional.linear(x, unpack(weight, N, K, x.dtype, config), bias)


@lru_cache(maxsize=4096)
def _config(width: str, M: int, N: int, K: int, device: torch.device, exact: bool) -> Config:
    first = tuned_entries(tuned_name(width), N, K, device)
    return choose(width, M, N, K, capability_of(device), exact=exact, first=first)
