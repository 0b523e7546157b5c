"""Code books of 256 numbers: y[M, N] = x[M, K] @ (levels[codes[N, K]] * scale[N, G]).T + bias, x of 16 bits.

codes: uint8 [N, K].  levels: float32 [256].  scale: float32 [N, G], one for each group of K / G columns.
Numbers are looked up in memory, where 1 KB stays in the cache next to the multiprocessor; a weight is rounded once, to
the dtype of x. A program makes a tile of y over the whole of K, so the result is deterministic.
"""

import triton
import triton.language as tl
from torch import Tensor

from qcompile.backends.triton.launch import launch
from qcompile.backends.triton.table import on_device

# rows and columns of a tile of y; few rows of x are padded to what tensor cores take
ROWS, COLUMNS = 16, 32
# columns of a weight that are multiplied at once
STEPS = (128, 64, 32)
WARPS = 4


@triton.jit
def book_kernel(
    x_ptr,
    codes_ptr,
    levels_ptr,
    scale_ptr,
    bias_ptr,
    y_ptr,
    M,
    N,
    K,
    G,
    GROUP,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
    BIAS: tl.constexpr,
):
    """Tile program_id(0) of N, and tile program_id(1) of M.  GROUP: columns of one scale, a multiple of STEP, or K."""
    n = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    m = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    row = n.to(tl.int64)[:, None] * K
    acc = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in range(0, K, STEP):
        k = first + tl.arange(0, STEP)
        inside = (n[:, None] < N) & (k[None, :] < K)
        x = tl.load(
            x_ptr + m.to(tl.int64)[:, None] * K + k[None, :], mask=(m[:, None] < M) & (k[None, :] < K), other=0.0
        )
        codes = tl.load(codes_ptr + row + k[None, :], mask=inside, other=0)
        scale = tl.load(scale_ptr + n.to(tl.int64) * G + first // GROUP, mask=n < N, other=0.0)
        weight = tl.load(levels_ptr + codes.to(tl.int32)) * scale[:, None]
        acc = tl.dot(x, tl.trans(weight.to(x.dtype)), acc)
    if BIAS:
        acc += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    to = m.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(y_ptr + to, acc.to(y_ptr.dtype.element_ty), mask=(m[:, None] < M) & (n[None, :] < N))


def book_matmul(x: Tensor, codes: Tensor, levels: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """y [M, N] for x [M, K], bfloat16 or float16, and a weight as the module states."""
    (M, K), (N, G) = x.shape, scale.shape
    y = x.new_empty(M, N)
    if M == 0:
        return y
    group = K // G
    step = next(step for step in STEPS if G == 1 or group % step == 0)
    with on_device(x.device):
        launch(
            book_kernel,
            (triton.cdiv(N, COLUMNS), triton.cdiv(M, ROWS), 1),
            (x.contiguous(), codes, levels, scale, x if bias is None else bias, y, M, N, K, G, group),
            {"ROWS": ROWS, "COLUMNS": COLUMNS, "STEP": step, "BIAS": bias is not None},
            num_warps=WARPS,
        )
    return y
