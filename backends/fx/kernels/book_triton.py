"""Tables of 32 to 256 numbers under 16-bit inputs, on NVIDIA GPUs, where memory matters more than speed.

Code books, and floats whose bits no faster kernel makes a 16-bit float of: those of 6 and 7 bits of exponent, and of 5
where float16 lacks the largest. A table ends in zeros that no code stands for.

x: [..., K] bfloat16 or float16; codes, levels and scales as `qcompile.backends.triton.book_matmul` reads them. One
opaque op: a few rows of x are multiplied as the weight is read, more by the library once it is floats.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from qcompile.backends.fx.kernels.problem import Kernel, Problem
from qcompile.backends.fx.registry import REGISTRY
from qcompile.backends.triton.ready import missing
from qcompile.formats import Integer, code_values
from qcompile.numerics import QParams
from qcompile.spec import ALL

LEVELS = 256
# codes are bytes: those of up to 4 bits are smaller as `packed` holds them
FEWEST_BITS = 5
FIRST_CAPABILITY = (8, 0)
# what the kernel's steps divide
GROUP = 32
# of rows: beyond, reading a weight anew for each tile of them costs more than writing its floats once
MOST_ROWS = 64

_ARGUMENTS = "Tensor x, Tensor codes, Tensor levels, Tensor scale, Tensor? bias"
REGISTRY.define(f"book_mm({_ARGUMENTS}) -> Tensor")
REGISTRY.define(f"linear_book({_ARGUMENTS}) -> Tensor")


def _book_mm(x: Tensor, codes: Tensor, levels: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    from qcompile.backends.triton.book_matmul import book_matmul

    if x.shape[0] <= MOST_ROWS:
        return book_matmul(x, codes, levels, scale, bias)
    floats = levels[codes.int()].unflatten(1, (scale.shape[1], -1)) * scale[..., None]
    return torch.nn.functional.linear(x, floats.flatten(1).to(x.dtype), bias)


def _linear_book(x: Tensor, codes: Tensor, levels: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    bias = None if bias is None else bias.expand(len(codes)).contiguous()
    y = torch.ops.qcompile.book_mm(x.reshape(-1, x.shape[-1]), codes, levels, scale, bias)
    return y.reshape(*x.shape[:-1], len(codes))


REGISTRY.impl("book_mm", _book_mm, "CUDA")
REGISTRY.impl("book_mm", lambda x, codes, *rest: x.new_empty(x.shape[0], codes.shape[0]), "Meta")
REGISTRY.impl("linear_book", _linear_book, "CompositeImplicitAutograd")


def why_not(p: Problem) -> str | None:
    """None if the kernel can run `p` and is worth it, else the reason."""
    fmt, granularity = p.weight.format, p.weight.granularity
    if isinstance(fmt, Integer) or fmt.bits < FEWEST_BITS or granularity.rows != 1:
        return f"weight {p.weight} is not a table of {2**FEWEST_BITS} to {LEVELS} numbers, by channel or group"
    if granularity.columns != ALL and granularity.columns % GROUP:
        return f"groups are multiples of {GROUP} columns, got {granularity.columns}"
    if p.dtype not in (torch.bfloat16, torch.float16):
        return f"the input is {str(p.dtype).removeprefix('torch.')}, and tensor cores take bfloat16 and float16"
    if p.capability is None or p.capability < FIRST_CAPABILITY:
        return f"the kernel begins with sm_80, this is sm_{''.join(map(str, p.capability or ()))}"
    if not p.small:
        return (
            f"looking numbers of {fmt.name} up takes longer than a float matmul: free_weights=True asks for small "
            "weights instead, and is not set"
        )
    return missing("book_matmul")


def pack(codes: Tensor, qparams: QParams, dtype: torch.dtype) -> dict[str, Tensor]:
    """Codes as they are, the numbers of the table, and one scale a group."""
    levels = code_values(qparams.spec.format).to(codes.device) if qparams.levels is None else qparams.levels
    levels = pad(levels.float(), (0, LEVELS - len(levels)))
    return {"codes": codes.contiguous(), "levels": levels, "scale": qparams.scale.contiguous()}


def _arguments(p: Problem, x: tuple[Any, ...], packed: Mapping[str, Any], bias: Any) -> tuple[Any, ...]:
    return (*x, packed["codes"], packed["levels"], packed["scale"], bias)


KERNEL = Kernel(
    name="book-triton",
    why_not=why_not,
    pack=pack,
    op=torch.ops.qcompile.linear_book.default,
    arguments=_arguments,
    device="cuda",
)
