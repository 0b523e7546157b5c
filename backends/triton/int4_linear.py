"""W4A16: y[M, N] = x[M, K] @ dequantized(codes[N, K]).T + bias, by the kernel that the table names for M."""

from torch import Tensor

from qcompile.backends.triton.int4_table import Config
from qcompile.backends.triton.width_linear import width_linear
from qcompile.backends.triton.widths import Packed


def int4_linear(
    x: Tensor, words: Tensor, scales: Tensor, bias: Tensor | None, N: int, config: Config | None = None
) -> Tensor:
    """y [M, N] for x [M, K], bfloat16 or float16, and a weight as `int4_words` packs it.

    config: to use in place of the table's.
    """
    return width_linear(x, Packed(words=words, scales=scales, width="int4"), bias, N, config)
