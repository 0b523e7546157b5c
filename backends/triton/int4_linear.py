"""W4A16: y[M, N] = x[M, K] @ dequantized(codes[N, K]).T + bias, by the kernel that the table names for M."""

import torch
from torch import Tensor

from qcompile.backends.triton.int4_gemm import many_rows
from qcompile.backends.triton.int4_matmul import few_rows
from qcompile.backends.triton.int4_table import Config, FewRows, ManyRows, choose
from qcompile.backends.triton.int4_unpack import unpack

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
    with torch.cuda.device(x.device):
        if config is None:
            major, minor = torch.cuda.get_device_capability()
            config = choose(M, N, K, 10 * major + minor, wide=scales.dim() == 4)
        if isinstance(config, FewRows):
            return few_rows(x, words, scales, bias, N, config)
        if isinstance(config, ManyRows):
            return many_rows(x, words, scales, bias, N, config)
        return torch.nn.functional.linear(x, unpack(words, scales, N, K, x.dtype, config), bias)
