"""Fold a batch norm into the convolution or linear whose result it alone reads."""

import torch
from torch import Tensor

from qcompile.graph import Graph, Op, V
from qcompile.sites import constant_name

# dimensions with the channels that a batch norm counts, which is its second: of a linear only those of a matrix are
_CHANNELS_FIRST = {Op.CONV: None, Op.LINEAR: 2}


def fold_batch_norm(graph: Graph[V]) -> int:
    """Scale the weights and biases before batch norms, and remove the norms. Returns how many were removed.

    The constants are new ones under the names of the old, which others may read. A norm stays that has no such op
    before it, or shares its result with others or with the graph's outputs, or whose numbers are not known, or with
    which a weight would not be finite in its dtype.
    """
    edits = 0
    for value in list(graph.values()):
        if graph.op(value) is Op.BATCH_NORM and _fold(graph, value):
            edits += 1
    return edits


def _fold(graph: Graph[V], norm: V) -> bool:
    x, *read = graph.inputs(norm)
    if x is None or not _is_foldable(graph, x, norm):
        return False
    given = [None if v is None else graph.constant(v) for v in read]
    source, weight, bias = (*graph.inputs(x), None, None)[:3]
    held = None if weight is None else graph.constant(weight)
    offset = None if bias is None else graph.constant(bias)
    mean, variance = given[2:]
    # of scale and shift, a model may have none: a norm without them is read as one by ones and zeros
    unknown = any(v is not None and tensor is None for v, tensor in zip(read, given, strict=True))
    if source is None or weight is None or held is None or mean is None or variance is None or unknown:
        return False
    if bias is not None and offset is None:
        return False
    factor, shift = folded(given[0], given[1], mean, variance, graph.epsilon(norm))
    name = constant_name(graph, weight)
    scaled = held.double() * factor.reshape(-1, *[1] * (held.dim() - 1))
    moved = shift if offset is None else shift + offset.double() * factor
    if not all(bool(torch.isfinite(tensor.to(held.dtype)).all()) for tensor in (scaled, moved)):
        return False
    bias_name = f"{name.removesuffix('.weight')}.bias" if bias is None else constant_name(graph, bias)
    graph.set_input(x, 1, graph.add_constant(name, scaled, like=weight))
    graph.set_input(x, 2, graph.add_constant(bias_name, moved, like=weight if bias is None else bias))
    graph.replace_uses(norm, x)
    return True


def _is_foldable(graph: Graph[V], x: V, norm: V) -> bool:
    """Whether x is made by an op that takes the factors of its channels, for the norm alone."""
    op = graph.op(x)
    if op not in _CHANNELS_FIRST or list(graph.users(x)) != [norm] or x in graph.outputs():
        return False
    # a norm that reads x as a statistic too is no user of its own
    rank = _CHANNELS_FIRST[op]
    return list(graph.inputs(norm)).count(x) == 1 and (rank is None or len(graph.shape(x)) == rank)


def folded(
    scale: Tensor | None, shift: Tensor | None, mean: Tensor, variance: Tensor, epsilon: float
) -> tuple[Tensor, Tensor]:
    """What a batch norm multiplies each channel by, and then adds to it, float64 [N].

    scale, shift, mean, variance: [N].  Source: Ioffe and Szegedy 2015 (Batch Normalization), section 3.1.
    """
    factor = torch.rsqrt(variance.double() + epsilon)
    factor = factor if scale is None else factor * scale.double()
    moved = -mean.double() * factor
    return factor, moved if shift is None else moved + shift.double()
