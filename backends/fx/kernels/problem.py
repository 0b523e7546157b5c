"""What a quantized linear asks of a kernel, and what a kernel is."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qcompile.numerics import Lowered, QParams
from qcompile.spec import Spec


@dataclass(frozen=True, kw_only=True)
class Problem:
    """y[..., N] = x[..., K] @ weight[N, K].T + bias, y in `dtype`.

    capability: of a CUDA device, (9, 0) for H100 and H200; None elsewhere.
    small: small weights matter more than speed.  lowered: of which numbers of fewer bits the weight's are made.
    """

    N: int
    K: int
    weight: Spec
    input: Spec | None
    dtype: torch.dtype
    device: str
    capability: tuple[int, int] | None = None
    small: bool = False
    lowered: Lowered | None = None


@dataclass(frozen=True, kw_only=True)
class Several:
    """One op for problems that read one input and differ, whose results are columns of its own: those of the first
    problem before those of the second.
    """

    op: Any
    # (problems, input, packed of each) -> the op's arguments, as `Kernel.arguments` makes them
    arguments: Callable[[Sequence[Problem], tuple[Any, ...], Sequence[Mapping[str, Any]]], tuple[Any, ...]]
    # whether this may be one of the problems
    takes: Callable[[Problem], bool]


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """One way to run some problems, as one op of the lowered graph."""

    name: str
    # None if it can run the problem and is worth it, else the reason, for the report
    why_not: Callable[[Problem], str | None]
    # (codes [N, K], their qparams, dtype of y) -> the tensors that the op reads in place of the weight
    pack: Callable[[Tensor, QParams, torch.dtype], dict[str, Tensor]]
    op: Any
    # (problem, input, packed, bias) -> the op's arguments, all of them values of the graph;
    # input: (codes, scale, zero or None) if takes_codes, else (x,), dequantized where the input was quantized
    arguments: Callable[[Problem, tuple[Any, ...], Mapping[str, Any], Any], tuple[Any, ...]]
    takes_codes: bool = False
    # the only type of device for which it is a candidate; None: any
    device: str | None = None
    # (problem, the op's arguments, outlier channels of x, their weight as `tail` packs it) -> the arguments of the op
    # that adds their product too; None if it does not
    with_tail: Callable[[Problem, tuple[Any, ...], Any, Any], tuple[Any, ...] | None] | None = None
    # whether a problem may run as one with others that read its input, their packs one behind the other along the first
    # dimension, which is that of N; None if none does
    joins: Callable[[Problem], bool] | None = None
    # None where each problem that differs from others is an op of its own
    several: Several | None = None
