"""Any weight spec: dense codes are unpacked and dequantized to x's dtype, then a float matmul.

packed: uint8 [N, bytes] (`qcompile.packing`), scales as `qcompile.scales` stores them. Smaller weights, and the
float matmul's speed less the cost of unpacking, which Inductor fuses into one pass over the weight. It refuses
nothing: what a better kernel refuses runs here.
"""

import torch
from torch import Tensor

from qcompile.backends.fx.kernels.problem import Kernel
from qcompile.backends.fx.registry import REGISTRY
from qcompile.numerics import QParams, dequantize
from qcompile.spec import parse_spec
from qcompile.stored import restore, store

REGISTRY.define(
    "linear_packed(Tensor x, Tensor[] packed, Tensor? bias, str spec, str[] names, int K) -> Tensor",
)


def _linear_packed(x: Tensor, packed: list[Tensor], bias: Tensor | None, spec: str, names: list[str], K: int) -> Tensor:
    weight = unpack_weight(dict(zip(names, packed, strict=True)), spec, K, x.dtype)
    return torch.nn.functional.linear(x, weight, bias)


def unpack_weight(packed: dict[str, Tensor], text: str, K: int, dtype: torch.dtype) -> Tensor:
    """The weight [N, K] that `pack` packed under the spec `text`, in `dtype`."""
    codes, qparams = restore(packed, parse_spec(text), K)
    return dequantize(codes, qparams, dtype)


REGISTRY.impl("linear_packed", _linear_packed, "CompositeImplicitAutograd")


def pack(codes: Tensor, qparams: QParams, dtype: torch.dtype) -> dict[str, Tensor]:
    """As they are stored anywhere."""
    return store(codes, qparams)


KERNEL = Kernel(
    name="packed",
    why_not=lambda p: None,
    pack=pack,
    op=torch.ops.qcompile.linear_packed.default,
    arguments=lambda p, x, packed, bias: (*x, list(packed.values()), bias, str(p.weight), list(packed), p.K),
)
