"""W8A8 on integer units: y = float((codes - zero) @ weight.T) * (scale * weight_scale) + bias.

codes int8 (or uint8, with zero) [..., K], scale and zero float32 [..., 1] or []; weight int8 [N, K], weight_scale
float32 [N, 1], weight_sum int32 [N]. Integers of 8 bits and fewer. `zero` is taken out after the matmul:
(codes - zero) @ weight.T = codes @ weight.T - zero * weight_sum, exact in int32.

Only the matmul is opaque: the quantization before and the epilogue after are plain torch, which Inductor fuses
with their neighbours; it must not see `_int_mm`, because on the CPU its freezing pass rewrites that into a far
slower kernel.
"""

from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor

from qcompile.backends.devices import this_device
from qcompile.backends.fx.kernels.kept import kept
from qcompile.backends.fx.kernels.problem import Kernel, Problem
from qcompile.backends.fx.registry import REGISTRY
from qcompile.formats import Integer
from qcompile.numerics import QParams
from qcompile.spec import ALL, Spec

# (2**31 - 1) // (255 * 127): the largest sum of codes without their zero times weights
MAX_K = 66_311
# of a CPU without integer units: rows from which making floats of a weight pays, and 2**24 // (128 * 128), the most
# products that a sum in float32 takes
FLOAT_M, FLOAT_K = 4, 1024
# between uint8 codes and the int8 that the matmul takes
OFFSET = 128
# what cuBLAS asks of an int8 matmul
CUDA_MULTIPLE = 8
CUDA_MIN_M = 17
# codes that are summed at a time: torch makes int32 of them first, and between packs that stay no allocator gives the
# memory of a whole weight back
_SUMMED = 2**15

REGISTRY.define("int_mm(Tensor codes, Tensor weight) -> Tensor")
REGISTRY.define(
    "linear_int8(Tensor codes, Tensor scale, Tensor? zero, Tensor weight, Tensor weight_scale, Tensor weight_sum,"
    " Tensor? bias, ScalarType dtype) -> Tensor"
)


def _int_mm(codes: Tensor, weight: Tensor) -> Tensor:
    """codes int8 [M, K], weight int8 [N, K] -> int32 [M, N], exact."""
    few = codes.shape[0] < FLOAT_M
    return torch._int_mm(codes, weight.t()) if few or has_integer_units() else float_mm(codes, weight)


@cache
def has_integer_units() -> bool:
    """Whether this CPU multiplies int8; where it does not, torch multiplies number by number."""
    return "int8" in this_device("cpu").multiplies


def float_mm(codes: Tensor, weight: Tensor) -> Tensor:
    """As `_int_mm`, by float32 matmuls: each has so few columns that all sums are integers that float32 holds."""
    total = torch.zeros(codes.shape[0], weight.shape[0], dtype=torch.int32)
    with torch.autocast("cpu", enabled=False):
        for x, w in zip(codes.split(FLOAT_K, 1), weight.split(FLOAT_K, 1), strict=True):
            total += (x.float() @ w.float().t()).to(torch.int32)
    return total


def _int_mm_cuda(codes: Tensor, weight: Tensor) -> Tensor:
    M = codes.shape[0]
    if M < CUDA_MIN_M:
        codes = torch.nn.functional.pad(codes, (0, 0, 0, CUDA_MIN_M - M))
    return torch._int_mm(codes, weight.t())[:M].contiguous()


def _int_mm_meta(codes: Tensor, weight: Tensor) -> Tensor:
    return codes.new_empty((codes.shape[0], weight.shape[0]), dtype=torch.int32)


def _linear_int8(
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    weight: Tensor,
    weight_scale: Tensor,
    weight_sum: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    if codes.device.type == "cpu" and scale.dim() > 0:
        # Inductor's C++ would divide anew for every few columns of y
        scale, zero = kept(scale), None if zero is None else kept(zero)
    if zero is not None:
        # through float32, because Inductor's C++ does not vectorize the way through int16
        codes = (codes.float() - OFFSET).to(torch.int8)
    product = torch.ops.qcompile.int_mm(codes.reshape(-1, codes.shape[-1]), weight)
    product = product.reshape(*codes.shape[:-1], weight.shape[0]) if codes.dim() != 2 else product
    if zero is not None:
        product = product - (zero.to(torch.int32) - OFFSET) * weight_sum
    y = product.float() * (scale * weight_scale.squeeze(-1))
    return (y if bias is None else y + bias).to(dtype)


REGISTRY.impl("int_mm", _int_mm, "CPU")
REGISTRY.impl("int_mm", _int_mm_cuda, "CUDA")
REGISTRY.impl("int_mm", _int_mm_meta, "Meta")
REGISTRY.impl("linear_int8", _linear_int8, "CompositeImplicitAutograd")


def _is_plain_integer(spec: Spec) -> bool:
    return isinstance(spec.format, Integer) and spec.granularity.columns == ALL


def why_not(p: Problem) -> str | None:
    """None if integer units can run `p`, else the reason."""
    if p.input is None:
        return "the input is not quantized"
    if not (_is_plain_integer(p.weight) and p.weight.symmetric):
        return f"weight {p.weight} is not symmetric integers with one scale a channel"
    if not _is_plain_integer(p.input):
        return f"input {p.input} is not integers with one scale a token or tensor"
    if p.K > MAX_K:
        return f"K={p.K} can overflow int32 (largest K: {MAX_K})"
    if p.device == "cuda" and (p.K % CUDA_MULTIPLE or p.N % CUDA_MULTIPLE):
        return f"cuBLAS needs N and K to divide by {CUDA_MULTIPLE}, got N={p.N}, K={p.K}"
    if p.device not in ("cpu", "cuda"):
        return f"no integer matmul for device {p.device!r}"
    return None


def pack(codes: Tensor, qparams: QParams, dtype: torch.dtype) -> dict[str, Tensor]:
    """The codes as they are, one scale a channel, and the sum of each channel's codes."""
    scale = qparams.scale.expand(codes.shape[0], 1) if qparams.scale.dim() == 0 else qparams.scale
    parts = codes.split(max(1, _SUMMED // codes.shape[1]))
    total = torch.cat([part.sum(1, dtype=torch.int32) for part in parts])
    return {"weight": codes.contiguous(), "scale": scale.contiguous(), "sum": total}


def _arguments(p: Problem, x: tuple[Any, ...], packed: Mapping[str, Any], bias: Any) -> tuple[Any, ...]:
    return (*x, packed["weight"], packed["scale"], packed["sum"], bias, p.dtype)


KERNEL = Kernel(
    name="int8",
    why_not=why_not,
    pack=pack,
    op=torch.ops.qcompile.linear_int8.default,
    arguments=_arguments,
    takes_codes=True,
    # narrow matmuls leave multiprocessors idle
    joins=lambda p: p.device == "cuda",
)
