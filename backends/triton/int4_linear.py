"""W4A16: y[M, N] = x[M, K] @ dequantized(codes[N, K]).T + bias, by the kernel that the table names for M."""

from functools import lru_cache

import torch
from torch import Tensor

from qcompile.backends.triton.int4_gemm import many_rows
from qcompile.backends.triton.int4_matmul import few_rows
from qcompile.backends.triton.int4_table import TABLE, Config, FewRows, ManyRows, choose
from qcompile.backends.triton.int4_unpack import unpack
from qcompile.backends.triton.table import capability_of, on_device
from qcompile.backends.triton.tuned import tuned_entries

# what TMA and copies of 16 bytes ask of x
ALIGNMENT = 16


def int4_linear(
    x: Tensor, words: Tensor, scales: Tensor, bias: Tensor | None, N: int, config: Config | None = None
) -> Tensor:
    """y [M, N] for x [M, K], bfloat16 or float16, and a weight as `int4_words` packs it.

    config: to use in place of the table's.
    """
    M, K = x.shape
    if M == 0:
        return x.new_empty(0, N)
    if not x.is_contiguous() or x.data_ptr() % ALIGNMENT:
        x = x.clone(memory_format=torch.contiguous_format)
    with on_device(x.device):
        if config is None:
            config = _config(M, N, K, x.device, scales.dim() == 4)
        if isinstance(config, FewRows):
            return few_rows(x, words, scales, bias, N, config)
        if isinstance(config, ManyRows):
            return many_rows(x, words, scales, bias, N, config)
        return torch.nn.functional.linear(x, unpack(words, scales, N, K, x.dtype, config), bias)


@lru_cache(maxsize=4096)
def _config(M: int, N: int, K: int, device: torch.device, wide: bool) -> Config:
    entries = tuned_entries("int4", N, K, device) + TABLE
    return choose(M, N, K, capability_of(device), wide=wide, entries=entries)
