"""Rows of a quantized embedding: the codes and scales of the rows that are asked for, dequantized.

indices: integers [...]; packed: tensors whose first dimension is V, as `packed` packs a weight [V, D]; y [..., D].
Nothing of the other rows is read. Plain torch, of which Inductor makes one loop.
"""

import torch
from torch import Tensor

from qcompile.backends.fx.kernels import packed
from qcompile.backends.fx.kernels.problem import Kernel, Problem
from qcompile.backends.fx.registry import REGISTRY
from qcompile.formats import CodeBook
from qcompile.spec import SCALES

# kinds of scales that lie row by row
_BY_ROW = ("fp32", "fp16", "bf16", "e8m0", *(name for name, kind in SCALES.items() if kind.code_bits))

REGISTRY.define(
    "embedding_packed(Tensor indices, Tensor[] packed, str spec, str[] names, int K, ScalarType dtype) -> Tensor"
)


def _embedding_packed(
    indices: Tensor, tensors: list[Tensor], spec: str, names: list[str], K: int, dtype: torch.dtype
) -> Tensor:
    flat = indices.reshape(-1)
    rows = {name: tensor.index_select(0, flat) for name, tensor in zip(names, tensors, strict=True)}
    return packed.unpack_weight(rows, spec, K, dtype).reshape(*indices.shape, K)


REGISTRY.impl("embedding_packed", _embedding_packed, "CompositeImplicitAutograd")


def why_not(p: Problem) -> str | None:
    """None if rows can be read one by one, else the reason."""
    if p.weight.granularity.rows != 1:
        return f"rows of {p.weight} share scales"
    if p.weight.scale not in _BY_ROW:
        return f"scales of kind {p.weight.scale!r} are not kept row by row"
    if isinstance(p.weight.format, CodeBook) and p.weight.format.levels is None:
        return f"the levels of {p.weight.format.name} are those of the whole table"
    return None


KERNEL = Kernel(
    name="embedding",
    why_not=why_not,
    pack=packed.pack,
    op=torch.ops.qcompile.embedding_packed.default,
    arguments=lambda p, x, tensors, bias: (*x, list(tensors.values()), str(p.weight), list(tensors), p.K, p.dtype),
)
