"""What a quantized tensor fills: codes, and what is stored beside them."""

import torch

from qcompile.numerics import QParams, find_qparams
from qcompile.packing import packed_length
from qcompile.spec import Spec, Zero


def stored_bytes(spec: Spec, rows: int, columns: int) -> int:
    """Bytes that a [rows, columns] tensor fills under `spec`: packed codes, scales, zero points, learned levels.

    Raises SpecError if the spec's tiles do not divide the shape.
    """
    qparams = find_qparams(torch.empty(rows, columns, device="meta"), spec)
    return rows * packed_length(columns, spec.format.bits) + qparams_bytes(qparams)


def qparams_bytes(qparams: QParams) -> int:
    """Bytes of what is stored beside the codes; a zero point is a code and fills one byte."""
    tensors = [*qparams.stored.values(), *([] if qparams.levels is None else [qparams.levels])]
    zeros = qparams.zero.numel() if qparams.zero is not None and qparams.spec.zero is Zero.CODE else 0
    return sum(tensor.nbytes for tensor in tensors) + zeros
