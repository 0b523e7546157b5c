"""Weights as AWQ checkpoints hold them (llm-awq's "gemm" version, AutoAWQ), without quantizing them again.

qweight int32 [K, N / 8]: codes of 4 bits along N, eight a word, of which the lowest bits hold columns 0, 2, 4, 6, 1, 3,
5, 7. qzeros int32 [G, N / 8]: zero points in the same order. scales [G, N]. w = (code - zero) * scale.
Source: AutoAWQ 0.2.9, modules/linear/gemm.py.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from qcompile.errors import UnsupportedError
from qcompile.packing import as_bytes, pack, unpack
from qcompile.readers.integers import unsigned
from qcompile.solved import Solved

BITS = 4
# the columns that a word holds, low bits first
_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def read(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> Solved:
    """What one module's tensors, by their last names, say of its weight.

    Raises UnsupportedError for other versions.
    """
    bits, version = config.get("bits", config.get("w_bit")), str(config.get("version", "gemm")).lower()
    if bits != BITS or version != "gemm":
        raise UnsupportedError(
            f"an AWQ checkpoint of version {version!r} with {bits} bits is laid out in another way than 'gemm' with "
            f"{BITS}, which is read; convert it, or quantize the float model"
        )
    codes = _in_order(tensors["qweight"]).t()  # [N, K]
    return unsigned(
        pack(codes, BITS),
        BITS,
        codes.shape[1],
        tensors["scales"].t().contiguous(),
        _in_order(tensors["qzeros"]).t().contiguous(),
    )


def _in_order(words: Tensor) -> Tensor:
    """Numbers of 4 bits [..., N] that words [..., N / 8] hold."""
    fields = unpack(as_bytes(words), BITS, 8 * words.shape[-1], signed=False)
    fields = fields.unflatten(-1, (-1, len(_ORDER)))
    return torch.empty_like(fields).index_copy_(-1, torch.tensor(_ORDER), fields).flatten(-2)
