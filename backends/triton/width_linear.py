"""y[M, N] = x[M, K] @ dequantized(codes[N, K]).T + bias for 16-bit x, by the kernel that the table names for M.

Weights of several kinds under one x write to columns of one y.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import cast

import torch
from torch import Tensor

from qcompile.backends.triton.table import capability_of, on_device
from qcompile.backends.triton.tuned import tuned_entries
from qcompile.backends.triton.width_few_rows import few_rows
from qcompile.backends.triton.width_many_rows import many_rows
from qcompile.backends.triton.width_table import (
    Config,
    FewRows,
    ManyRows,
    Member,
    Unpack,
    choose,
    rounds_twice,
    tuned_name,
)
from qcompile.backends.triton.width_unpack import unpack
from qcompile.backends.triton.widths import Packed

# what TMA and copies of 16 bytes ask of x
ALIGNMENT = 16


def width_linear(x: Tensor, weight: Packed, bias: Tensor | None, N: int, config: Config | None = None) -> Tensor:
    """y [M, N] for x [M, K], bfloat16 or float16, and a weight as `widths` packs it.

    config: to use in place of the table's.
    """
    with on_device(x.device):
        return _multiply(x, [weight], bias, [N], config)


def width_linears(x: Tensor, weights: Sequence[Packed], rows: Sequence[int]) -> Tensor:
    """y [M, sum of all N] for x [M, K] as of `width_linear`, weights [N, K] one below the other, and N of each.

    Of several weights, N divides by 8.
    """
    with on_device(x.device):
        return _multiply(x, weights, None, rows, None)


def _multiply(
    x: Tensor, weights: Sequence[Packed], bias: Tensor | None, rows: Sequence[int], config: Config | None
) -> Tensor:
    M, N = x.shape[0], sum(rows)
    y = x.new_empty(M, N)
    if M == 0:
        return y
    if not x.is_contiguous() or x.data_ptr() % ALIGNMENT:
        x = x.clone(memory_format=torch.contiguous_format)
    members = [
        Member(weight=weight, N=n, config=_config(weight, M, n, N, x) if config is None else config)
        for weight, n in zip(weights, rows, strict=True)
    ]
    # these run side by side, or are one matmul; all others one after the other
    together = any(all(isinstance(member.config, kind) for member in members) for kind in (FewRows, Unpack))
    if together:
        _run(x, members, bias, y)
    else:
        for member, columns in zip(members, y.split(list(rows), dim=1), strict=True):
            _run(x, [member], bias, columns)
    return y


def _run(x: Tensor, members: Sequence[Member[Config]], bias: Tensor | None, y: Tensor) -> None:
    """Write to y what members have that are all run by one kernel, which is alone if it takes one at a time."""
    match members[0].config:
        case FewRows():
            few_rows(x, cast(Sequence[Member[FewRows]], members), bias, y)
        case ManyRows():
            many_rows(x, cast(Member[ManyRows], members[0]), bias, y)
        case Unpack():
            _unpacked(x, cast(Sequence[Member[Unpack]], members), bias, y)


def _unpacked(x: Tensor, members: Sequence[Member[Unpack]], bias: Tensor | None, y: Tensor) -> None:
    weight = x.new_empty(y.shape[1], x.shape[1])
    for member, part in zip(members, weight.split([member.N for member in members]), strict=True):
        unpack(member.weight, part, member.config)
    if bias is None:
        torch.mm(x, weight.T, out=y)
    else:
        torch.addmm(bias, x, weight.T, out=y)


def _config(weight: Packed, M: int, N: int, total: int, x: Tensor) -> Config:
    return _known_config(weight.width, M, N, total, x.shape[1], x.device, not rounds_twice(weight, x.dtype))


@lru_cache(maxsize=4096)
def _known_config(width: str, M: int, N: int, total: int, K: int, device: torch.device, exact: bool) -> Config:
    tuned = (tuned_entries(tuned_name(width), rows, K, device) for rows in (total, N))
    first = next(filter(None, tuned), ())
    return choose(width, M, N, K, capability_of(device), exact=exact, first=first, total=total)
