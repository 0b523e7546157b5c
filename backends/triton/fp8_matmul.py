"""W8A8 on fp8 tensor cores for few rows: y = (x @ w.T) * (scale_x * scale_w) + bias + residual, through `eight_bit`.

x fp8_e4m3 [M, K], w fp8_e4m3 [N, K]. From some number of rows on cuBLASLt (`torch._scaled_mm`) is faster.
"""

import torch
from torch import Tensor

from qcompile.backends.triton import eight_bit
from qcompile.backends.triton.eight_bit import Operands
from qcompile.backends.triton.eight_bit_table import FEW_ROWS, SAFE, Tiles, fitting, is_measured

FIRST_CAPABILITY = (8, 9)
# measured on one H200: up to here it is faster than cuBLASLt
MOST_ROWS = 64


def why_not(capability: tuple[int, int]) -> str | None:
    """None if this is the fastest fp8 matmul known for few rows on a device, else the reason."""
    major, minor = capability
    if capability < FIRST_CAPABILITY:
        return f"fp8 tensor cores begin with sm_89, this is sm_{major}{minor}"
    if not is_measured(10 * major + minor):
        return f"the fp8 kernel was measured on sm_90, this is sm_{major}{minor}"
    return None


def fp8_matmul(o: Operands, config: Tiles | None = None) -> Tensor:
    """y [M, N] in o.dtype.  config: to use in place of the table's."""
    with torch.cuda.device(o.x.device):
        major, minor = torch.cuda.get_device_capability()
        chosen = config or next(fitting(FEW_ROWS + SAFE, o.x.shape[0], o.w.shape[0], 10 * major + minor))
        assert isinstance(chosen, Tiles)
        return eight_bit.matmul(o, chosen)
