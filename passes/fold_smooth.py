"""Move per-channel factors of activations into weights: x / scale before linears whose columns are times scale."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import torch
from torch import Tensor

from qcompile.channels import tied
from qcompile.edges import find_edges, readings
from qcompile.folds import FOLDED, Fold, fitting_scale, require_finite, rescaled
from qcompile.graph import Graph, Op, V
from qcompile.sites import constant_name, digest

K = TypeVar("K")


@dataclass(frozen=True, kw_only=True)
class _Work(Generic[V]):
    """What all folds together do to each op: columns times, rows divided by, and what is multiplied while running.

    left: (activation, linear that reads it) -> scale, where 1 / scale stays in the graph.
    """

    columns: dict[V, Tensor] = field(default_factory=dict)
    rows: dict[V, Tensor] = field(default_factory=dict)
    left: dict[tuple[V, V], Tensor] = field(default_factory=dict)


def fold_smooth(graph: Graph[V], folds: Sequence[Fold]) -> int:
    """Apply each fold to its sites in this graph. Returns how many norms and linears changed, plus multiplications.

    What makes the activation takes 1 / scale if that is legal here (see qcompile.edges) and the fold names all that
    read it; otherwise one multiplication stays in front of them. Weights are computed from the originals and rounded
    once, whatever the order of the folds; constants that others share are copied.
    Raises GraphError for a scale that does not fit, or a weight that overflows.
    """
    work = _work(graph, folds)
    changed = [*dict.fromkeys([*work.columns, *work.rows])]
    for value in changed:
        _rescale(graph, value, work.columns.get(value), work.rows.get(value))
    for name, value, users, scale in (places := _places(graph, work)):
        factor = _inverse(graph, f"{name}.inverse_scale", scale, value)
        product = graph.add_op(Op.MUL, [value, factor], graph.name(value))
        for user in users:
            graph.set_input(user, 0, product)
    return len(changed) + len(places)


def count_multiplications(graph: Graph[V], folds: Sequence[Fold]) -> int:
    """How many multiplications `fold_smooth` would leave in the graph; 0 where norms and linears take everything."""
    return len(_places(graph, _work(graph, folds)))


def _work(graph: Graph[V], folds: Sequence[Fold]) -> _Work[V]:
    work: _Work[V] = _Work()
    # edges are looked for along whole residual streams
    edges = find_edges(graph) if folds else []
    for fold in folds:
        for edge in edges:
            mine = tuple(found.value for found in edge.consumers if found.site.name in fold.sites)
            if not mine:
                continue
            scale = fitting_scale(fold, edge.consumers[0].site.weight.shape[1])
            for value in mine:
                _times(work.columns, value, scale)
            is_legal = len(mine) == len(edge.consumers) and torch.equal(scale, tied(scale, edge.channels))
            if edge.producer is None or not is_legal:
                for value in mine:
                    _times(work.left, (edge.value, value), scale)
                continue
            width = graph.shape(edge.producer)[-1]
            assert width is not None
            _times(work.rows, edge.producer, scale.new_ones(width).scatter(0, edge.channels, scale))
    return work


def _times(factors: dict[K, Tensor], key: K, scale: Tensor) -> None:
    factors[key] = factors[key] * scale if key in factors else scale


def _rescale(graph: Graph[V], value: V, columns: Tensor | None, rows: Tensor | None) -> None:
    """Give a norm or linear constants of its own, with columns multiplied and rows divided."""
    x, weight, *bias = graph.inputs(value)[:3]
    if weight is None and rows is not None:
        assert x is not None
        graph.set_input(value, 1, _inverse(graph, f"{graph.name(value)}.weight", rows, x))
    factors = [x for scale in (columns, rows) for x in ([0.0] if scale is None else scale.tolist())]
    for index, read in enumerate((weight, *bias), start=1):
        tensor = None if read is None else graph.constant(read)
        if read is None or tensor is None or (rows is None and tensor.dim() == 1):
            continue
        name = f"{constant_name(graph, read)}{FOLDED}{digest(factors)}"
        graph.set_input(value, index, graph.add_constant(name, rescaled(name, tensor.detach(), columns, rows)))


def _inverse(graph: Graph[V], name: str, scale: Tensor, like: V) -> V:
    """A constant of 1 / scale, to be used beside `like`."""
    constant = graph.add_constant(name, 1 / scale, like=like)
    made = graph.constant(constant)
    assert made is not None
    require_finite(name, made, 1 / scale)
    return constant


def _places(graph: Graph[V], work: _Work[V]) -> list[tuple[str, V, list[V], Tensor]]:
    """Where multiplications stay: a site they serve, the value, which of its users read the product, and the scale."""
    groups: list[tuple[V, list[V], Tensor]] = []
    for (value, site), scale in work.left.items():
        same = next((sites for v, sites, s in groups if v == value and torch.equal(s, scale)), None)
        if same is None:
            groups.append((value, [site], scale))
        else:
            same.append(site)
    return [
        (graph.name(sites[0]), place, users, scale)
        for value, sites, scale in groups
        for place, users in readings(graph, value, sites)
    ]
