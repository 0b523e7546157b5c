"""Weights as GPTQ checkpoints hold them (AutoGPTQ, GPTQModel, optimum), without quantizing them again.

qweight int32 [K * bits / 32, N]: codes of 2, 3, 4 or 8 bits along K, a stream of low bits first in every column, which
is what `qcompile.packing` makes of a row. qzeros int32 [G, N * bits / 32]: zero points along N, packed alike; in the
first format, "gptq", less 1 (and 2**bits - 1 for 0), in "gptq_v2" as they are. scales [G, N]. g_idx int32 [K]: the
group of each column; it is no staircase where columns were quantized in the order of their inputs (act-order without
static groups): then the columns are sorted by group, and the input is read in that order.
Source: GPTQModel 7.7, nn_modules/qlinear and utils/model_dequant.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from qcompile.packing import as_bytes, pack, unpack
from qcompile.readers.integers import evened, unsigned, widths_of
from qcompile.solved import Solved


def read(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> Solved:
    """What one module's tensors, by their last names, say of its weight."""
    bits = int(config["bits"])
    columns = as_bytes(tensors["qweight"].t())  # [N, K * bits / 8]
    length = columns.shape[1] * 8 // bits
    scale = tensors["scales"].t().contiguous()  # [N, G]
    held = as_bytes(tensors["qzeros"])
    zeros = unpack(held, bits, held.shape[1] * 8 // bits, signed=False)[:, : len(scale)].t()
    if config.get("checkpoint_format", "gptq") != "gptq_v2":
        zeros = (zeros + 1) & (2**bits - 1)
    groups = tensors.get("g_idx")
    order = None if groups is None or bool((groups.diff() >= 0).all()) else groups.argsort(stable=True)
    if groups is None:
        widths = widths_of(length, int(config.get("group_size", -1)))
    else:
        widths = [count for count in groups.bincount().tolist() if count]
    scale, zeros = evened(widths, scale), evened(widths, zeros)
    if order is not None:
        columns = pack(unpack(columns, bits, length, signed=False).index_select(1, order), bits)
    return unsigned(columns, bits, length, scale, zeros.contiguous(), order=order)
