"""Launching `rows_kernel`: rows as codes and scales, after the norm or activation before them."""

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from qcompile.backends.triton.before_rows import BEFORE
from qcompile.backends.triton.dependent import is_dependent
from qcompile.backends.triton.eight_bit_table import TAIL_MULTIPLE, tail_width
from qcompile.backends.triton.launch import launch
from qcompile.backends.triton.pairs import MOST_ROWS
from qcompile.backends.triton.rows_kernel import quantize_rows_kernel
from qcompile.backends.triton.table import on_device, processors_of
from qcompile.formats import Float, Integer
from qcompile.spec import ALL, Spec

# of a program with registers for constants of channels, beside the row
MOST_WARPS = 16
# longest row whose elements fit the registers of 32 warps beside what is computed of them
MAX_K = 32768
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# compute capability of the devices on which it was measured, and the first that has the cast to e4m3
MEASURED, FIRST_FP8 = (9, 0), (8, 9)


@dataclass(frozen=True, kw_only=True)
class Rows:
    """codes int8, uint8 or fp8_e4m3 [..., K]; scale and zero float32 [..., 1]; total: x + second, in x's dtype.

    tail: outlier channels in x's dtype, zeros behind them up to the next multiple of TAIL_MULTIPLE.
    pairs: uint8 [2 * MOST_ROWS, K], those of the rows if they are few; else nothing is written there.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    total: Tensor | None
    tail: Tensor | None
    pairs: Tensor | None


def why_not(spec: Spec, dtype: torch.dtype, K: int, capability: tuple[int, int]) -> str | None:
    """None if this is the fastest way known to quantize rows of K elements of `dtype`, else the reason."""
    if spec.granularity.rows != 1 or spec.granularity.columns != ALL or spec.scale != "fp32":
        return f"{spec} is not one float32 scale a row"
    whole = isinstance(spec.format, Integer) or spec.format.name == "fp8_e4m3"
    if not whole and not (isinstance(spec.format, Float) and spec.format.bits < 8):
        return f"{spec} is neither integers nor floats that E4M3 holds"
    if dtype not in DTYPES:
        return f"rows of {dtype} are not supported"
    if K > MAX_K:
        return f"a row of {K} elements does not fit into registers (most: {MAX_K})"
    if isinstance(spec.format, Float) and capability < FIRST_FP8:
        return f"casts to fp8 begin with sm_89, this is sm_{capability[0]}{capability[1]}"
    if capability != MEASURED:
        return f"the kernel was measured on sm_90, this is sm_{capability[0]}{capability[1]}"
    return None


def warps_for(K: int) -> int:
    """Warps of a program: 32 elements a thread, so that two programs of 16 warps share a multiprocessor."""
    return max(1, min(32, triton.next_power_of_2(K) // 1024))


def block_for(K: int) -> int:
    """Elements of a program: of a short row two for each thread of a warp, which are rounded together."""
    return max(64, triton.next_power_of_2(K))


def tail_block_for(outliers: int) -> int:
    """Columns of the tail that a program makes."""
    return max(TAIL_MULTIPLE, triton.next_power_of_2(outliers))


def quantize_rows(
    x: Tensor,
    spec: Spec,
    *,
    before: str = "nothing",
    second: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    shift: Tensor | None = None,
    keep: Tensor | None = None,
    channels: Tensor | None = None,
    eps: float = 0.0,
    offset: int = 0,
    raised: int = 0,
    keep_total: bool = False,
) -> Rows:
    """x [..., K], and second of its shape: added before a norm, or multiplied with after an activation.

    weight, bias: of a norm, [K]; weight without a norm: what channels are multiplied with at the end, in x's dtype.
    offset: 0, or 128 for codes with a zero as int8, less 128.
    shift, raised: octaves of numbers of fewer bits in E4M3, int8 [K], and of all; of E4M3 itself shift makes pairs.
    keep_total: return the sum, too.
    keep: ones, and zeros for what is left out of the codes, [K] in x's dtype.  channels: of the tail, integers [T].
    """
    *batch, K = x.shape
    rows, other = _rows(x), None if second is None else _rows(second)
    M = rows.shape[0]
    integer = isinstance(spec.format, Integer)
    narrow = spec.format if isinstance(spec.format, Float) and spec.format.bits < 8 else None
    dtype = torch.int8 if integer and (spec.symmetric or offset) else torch.float8_e4m3fn if narrow else torch.uint8
    codes = torch.empty((*batch, K), dtype=dtype, device=x.device)
    scale = torch.empty((*batch, 1), dtype=torch.float32, device=x.device)
    zero = None if spec.symmetric else torch.empty_like(scale)
    total = torch.empty((*batch, K), dtype=x.dtype, device=x.device) if keep_total else None
    outliers = 0 if channels is None else channels.shape[0]
    width = tail_width(outliers)
    tail = None if channels is None else x.new_empty((*batch, width))
    pairs = codes.new_empty(2 * MOST_ROWS, K) if shift is not None and narrow is None else None
    result = Rows(codes=codes, scale=scale, zero=zero, total=total, tail=tail, pairs=pairs)
    if M == 0:
        return result
    dependent = is_dependent(x.device)
    given = (rows, other, *(None if t is None else t.contiguous() for t in (weight, bias)), shift, keep, channels)
    few = pairs if M <= MOST_ROWS else None
    made = (codes.view(torch.uint8) if narrow else codes, scale, zero, total, tail, few)
    strides = (rows.stride(0), 0 if other is None else other.stride(0), width)
    # without constants of channels it would be a second binary, which does the same
    holds = not (shift is None and keep is None) and warps_for(K) <= MOST_WARPS
    with on_device(x.device):
        launch(
            quantize_rows_kernel,
            (M, 1, 1),
            (*given, *made, K, outliers, *strides, eps),
            {
                "BEFORE": BEFORE.index(before),
                "MOST": float(spec.code_range[1] if integer else spec.format.max),
                "INTEGER": integer,
                "OFFSET": float(offset),
                "MANTISSA": narrow.mantissa if narrow else -1,
                "LOWEST": 1 - narrow.bias if narrow else 0,
                "RAISED": raised,
                # the interpreter knows no assembly, and its fused multiply-add is not fused
                "INLINE": x.is_cuda,
                "DEPENDENT": dependent,
                "EARLY": dependent and holds and processors_of(x.device) >= M,
                "BLOCK": block_for(K),
                "TAIL": tail_block_for(outliers),
            },
            num_warps=warps_for(K),
            # each operation rounds by itself, as it does in the oracle
            enable_fp_fusion=False,
            **({"launch_pdl": True} if dependent else {}),
        )
    return result


def _rows(x: Tensor) -> Tensor:
    """x as [M, K], whose elements of a row lie one behind the other; a copy only where they do not."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(-1) == 1 else rows.contiguous()
