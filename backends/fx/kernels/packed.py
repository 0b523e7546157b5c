"""Any weight spec: dense codes are unpacked and dequantized to x's dtype, then a float matmul.

packed: uint8 [N, bytes] (`qcompile.packing`), scales as `qcompile.scales` stores them. Smaller weights, and the
float matmul's speed less the cost of unpacking, which Inductor fuses into one pass over the weight. It refuses
nothing: what a better kernel refuses runs here.
"""

import torch
from torch import Tensor

from qcompile.backends.fx.kernels.problem import Kernel
from qcompile.backends.fx.registry import REGISTRY
from qcompile.formats import Integer
from qcompile.numerics import QParams, dequantize
from qcompile.packing import pack as pack_codes
from qcompile.packing import unpack
from qcompile.scales import stored_minimum, stored_scale
from qcompile.spec import Zero, parse_spec

REGISTRY.define(
    "linear_packed(Tensor x, Tensor[] packed, Tensor? bias, str spec, str[] names, int K) -> Tensor",
)


def _linear_packed(x: Tensor, packed: list[Tensor], bias: Tensor | None, spec: str, names: list[str], K: int) -> Tensor:
    weight = unpack_weight(dict(zip(names, packed, strict=True)), spec, K, x.dtype)
    return torch.nn.functional.linear(x, weight, bias)


def unpack_weight(packed: dict[str, Tensor], text: str, K: int, dtype: torch.dtype) -> Tensor:
    """The weight [N, K] that `pack` packed under the spec `text`, in `dtype`."""
    spec = parse_spec(text)
    signed = isinstance(spec.format, Integer) and spec.symmetric
    codes = unpack(packed["weight"], spec.format.bits, K, signed)
    stored = {k.removeprefix("scale_"): v for k, v in packed.items() if k.startswith("scale_")}
    groups = K // (spec.granularity.columns or K)
    scale = stored_scale(stored, spec.scale, groups)
    zero = packed["zero"].float() if "zero" in packed else None
    if spec.zero is Zero.MINIMUM:
        zero = stored_minimum(stored, spec.scale, groups)
    qparams = QParams(spec=spec, scale=scale, zero=zero, levels=packed.get("levels"))
    return dequantize(codes, qparams, dtype)


REGISTRY.impl("linear_packed", _linear_packed, "CompositeImplicitAutograd")


def pack(codes: Tensor, qparams: QParams, dtype: torch.dtype) -> dict[str, Tensor]:
    """Dense codes; scales and minima as they are stored; zero points as bytes; learned levels."""
    packed = {"weight": pack_codes(codes, qparams.spec.format.bits)}
    packed |= {f"scale_{name}": tensor.contiguous() for name, tensor in qparams.stored.items()}
    packed |= (
        {"zero": qparams.zero.to(torch.uint8)} if qparams.zero is not None and qparams.spec.zero is Zero.CODE else {}
    )
    return packed | ({} if qparams.levels is None else {"levels": qparams.levels})


KERNEL = Kernel(
    name="packed",
    why_not=lambda p: None,
    pack=pack,
    op=torch.ops.qcompile.linear_packed.default,
    arguments=lambda p, x, packed, bias: (*x, list(packed.values()), bias, str(p.weight), list(packed), p.K),
)
