"""Lowering on torch.fx: each quantized linear becomes one op of the kernel that runs it best."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import Node

from qcompile.backends.fx.graph import FxGraph
from qcompile.backends.fx.kernels import Kernel, Problem, choose
from qcompile.graph import Op
from qcompile.numerics import QParams
from qcompile.spec import Spec

# (site, kernel, problem, codes, qparams) -> the tensors that the kernel's op reads
PackSource = Callable[[str, Kernel, Problem, Tensor, QParams], Mapping[str, Tensor]]


@dataclass(frozen=True, kw_only=True)
class Target:
    """What the graph will run on. capability: of a CUDA device; small: small weights matter more than speed."""

    device: str
    capability: tuple[int, int] | None = None
    small: bool = False


@dataclass(frozen=True, kw_only=True)
class Lowered:
    """The kernel that runs one site, and why each one preferred to it does not."""

    site: str
    kernel: str
    refused: Mapping[str, str]


def lower(graph: FxGraph, target: Target, packs: PackSource) -> list[Lowered]:
    """Replace every linear with a quantized weight by its kernel's op; returns what runs where.

    Q/DQ that no kernel takes stays: it is plain torch, and right as it stands.
    """
    lowered = []
    for value in list(graph.values()):
        if graph.op(value) is Op.LINEAR and (found := _quantized_weight(graph, value)) is not None:
            lowered.append(_lower_linear(graph, value, found, target, packs))
    graph.prune()
    return lowered


def _quantized_weight(graph: FxGraph, linear: Node) -> tuple[Node, Tensor, QParams] | None:
    weight = graph.inputs(linear)[1]
    if weight is None or graph.op(weight) is not Op.DEQUANTIZE:
        return None
    codes = graph.inputs(weight)[0]
    qparams = graph.qparams(weight)
    if codes is None or graph.op(codes) is not Op.CONSTANT or isinstance(qparams, Spec):
        return None
    tensor = graph.constant(codes)
    assert tensor is not None
    return codes, tensor, qparams


def _lower_linear(
    graph: FxGraph,
    linear: Node,
    found: tuple[Node, Tensor, QParams],
    target: Target,
    packs: PackSource,
) -> Lowered:
    x, _, bias = graph.inputs(linear)
    assert x is not None
    constant, codes, qparams = found
    quantized = graph.op(x) is Op.DEQUANTIZE
    problem = Problem(
        N=codes.shape[0],
        K=codes.shape[1],
        weight=qparams.spec,
        input=_spec(graph, x) if quantized else None,
        dtype=_dtype(linear),
        device=target.device,
        capability=target.capability,
        small=target.small,
    )
    kernel, refused = choose(problem)
    site = graph.name(linear)
    packed = {
        name: graph.add_constant(f"{graph.name(constant)}.{kernel.name}.{name}", tensor)
        for name, tensor in packs(site, kernel, problem, codes, qparams).items()
    }
    taken = tuple(x.args[:3]) if kernel.takes_codes else (x,)
    with linear.graph.inserting_before(linear):
        new = linear.graph.call_function(kernel.op, kernel.arguments(problem, taken, packed, bias))
    new.meta = dict(linear.meta)
    graph.replace_uses(linear, new)
    return Lowered(site=site, kernel=kernel.name, refused=refused)


def _spec(graph: FxGraph, value: Node) -> Spec:
    qparams = graph.qparams(value)
    return qparams.spec if isinstance(qparams, QParams) else qparams


def _dtype(value: Node) -> torch.dtype:
    example = value.meta.get("example_value", value.meta.get("val"))
    return example.dtype if isinstance(example, Tensor) else torch.get_default_dtype()
