"""The weight that the W4A8 kernel reads: nibbles in the order of 8-bit tensor cores, a scale a group, a sum a row.

    y[m, n] = scale_x[m] * (sum over groups g of scale[n, g] * dot(x[m], code[n] - zero[n, g]) - zero_x[m] * sums[n])

words: int32 [N / 64, K / 128, 1024], as in `widths`, but of a row that lane 4 * i + j holds, word s has the codes

    code[row, 32 * s + 16 * h + 4 * j + b]  in bits 8 * b + 4 * h ...,  s and b in 0..3, h in {0, 1},

so that four codes are the bytes of one register after a shift and a mask, and 8 such registers are the first operand of
m16n8k32 and of wgmma as they stand. It is the order of `widths` for other columns: a permutation of the 128.

scales: as in `widths`, with zero points, and one for each group of a block.
sums: float32 [N], of scale[n, g] * (code[n, k] - zero[n, g]) over k.
row, totals: of scales that are integers times one number of the row, that number, float32 [N, 1], and int32 [N], of
integer[n, g] * (code[n, k] - zero[n, g]) over k. Each of these terms is an int8.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from qcompile.backends.triton.width_packs import of_each_row
from qcompile.backends.triton.widths import (
    COLUMNS,
    WIDTHS,
    group_of_spans,
    is_narrow,
    pack_codes,
    pack_scales,
    span_of,
    unpack_codes,
)
from qcompile.numerics import QParams
from qcompile.spec import SCALES

_ORDER = WIDTHS["int4"]


def pack_weight(codes: Tensor, qparams: QParams, dtype: torch.dtype) -> dict[str, Tensor]:
    """Words, scales, sums and what a kind of scale has of rows; groups of more columns than a block are several.

    codes [N, K], 4-bit integers of a spec that `width_packs.no_groups` lets pass.  dtype: of y.
    """
    qparams = of_each_row(qparams, len(codes))
    stored, zero = codes, qparams.zero
    if zero is None:
        stored, zero = codes.view(torch.uint8) + _ORDER.center, torch.full_like(qparams.scale, _ORDER.center)
    columns = qparams.spec.granularity.columns
    group = group_of_spans(columns, codes.shape[1], qparams.scale.shape[1]).to(codes.device)
    scales = pack_scales(qparams.scale[:, group], zero[:, group], narrow=is_narrow(qparams, dtype))
    integers = _span_sums(codes, qparams)
    group = group[: integers.shape[1]]
    packed = {"words": pack_words(stored), "scales": scales, "sums": _sums(integers, qparams.scale[:, group])}
    if not SCALES[qparams.spec.scale].row_bits:
        return packed
    row = qparams.stored["outer"].float()
    totals = (integers.double() * (qparams.scale / row)[:, group]).sum(1)
    return packed | {"row": row, "totals": totals.to(torch.int32)}


def _span_sums(codes: Tensor, qparams: QParams) -> Tensor:
    """Of code - zero over the columns of each span, float32 [N, spans], without those past the end of K."""
    N, K = codes.shape
    columns = qparams.spec.granularity.columns
    span = span_of(columns)
    integers = codes.float()
    if qparams.zero is not None:
        integers = integers - qparams.zero.repeat_interleave(columns or K, 1)[:, :K]
    return pad(integers, (0, -K % span)).view(N, -1, span).sum(2)


def _sums(integers: Tensor, scale: Tensor) -> Tensor:
    """Of each row of the dequantized weight, added as the kernel adds its products where it does not cut K.

    So a row of zeros in x, whose codes are all -128, gives 0.  integers, scale: [N, spans].
    """
    total = torch.zeros(len(integers), device=integers.device)
    for part, factor in zip(integers.unbind(1), scale.unbind(1), strict=True):
        # the product is exact in float64: one rounding, as of a fused multiply-add
        total = (total.double() + part.double() * factor.double()).float()
    return total


def pack_words(codes: Tensor) -> Tensor:
    """Codes 0..15, uint8 [N, K], as words, int32 [ceil(N / 64), ceil(K / 128), 1024]."""
    N, K = codes.shape
    full = pad(codes, (0, -K % COLUMNS))
    # the bits of a column, highest first: c d p0 j e p1 here, d p1 p0 c j e there
    fields = full.view(N, -1, 2, 2, 2, 4, 2, 2).permute(0, 1, 3, 7, 4, 2, 5, 6)
    return pack_codes(fields.reshape(full.shape), _ORDER)


def unpack_words(words: Tensor, N: int, K: int) -> Tensor:
    """The codes that `pack_words` packed, uint8 [N, K]."""
    columns = words.shape[1] * COLUMNS
    fields = unpack_codes(words, _ORDER, N, columns).view(N, -1, 2, 2, 2, 2, 4, 2)
    return fields.permute(0, 1, 5, 2, 4, 6, 7, 3).reshape(N, columns)[:, :K].contiguous()
