"""Outlier channels that are zeroed before a quantization and selected beside it, as `split_outliers` leaves a graph."""

from dataclasses import dataclass

from torch import fx

from qcompile.backends.fx.graph import FxGraph
from qcompile.backends.fx.targets import aten, is_call
from qcompile.backends.fx.values import dtype, is_constant
from qcompile.graph import Op


@dataclass(frozen=True, kw_only=True, eq=False)
class Masked:
    """value = x * `keep`, which is 0 for the channels that `selected` takes of x, in their order, and else 1."""

    x: fx.Node
    keep: fx.Node
    value: fx.Node
    selected: fx.Node
    channels: tuple[int, ...]


def find_masked(graph: FxGraph, value: fx.Node) -> Masked | None:
    """How `value` was masked; None if it was not, or if nothing selects just those channels."""
    if graph.op(value) is not Op.MUL:
        return None
    x, keep = graph.inputs(value)[:2]
    if x is None or keep is None or not is_constant(keep) or graph.shape(x) != graph.shape(value):
        return None
    zeroed = _zeroed(graph, keep, graph.shape(x)[-1])
    if not zeroed or not dtype(x) == dtype(keep) == dtype(value):
        return None
    for reader in graph.users(x):
        channels = _selected(graph, reader, x)
        if channels is not None and tuple(sorted(channels)) == zeroed:
            return Masked(x=x, keep=keep, value=value, selected=reader, channels=channels)
    return None


def _zeroed(graph: FxGraph, keep: fx.Node, K: int | None) -> tuple[int, ...] | None:
    """Which channels a vector [K] of ones and zeros multiplies by zero; None if it is no such vector."""
    mask = graph.constant(keep)
    if mask is None or mask.is_meta or mask.shape != (K,) or not ((mask == 0) | (mask == 1)).all():
        return None
    return tuple((mask == 0).nonzero().flatten().tolist())


def _selected(graph: FxGraph, value: fx.Node, x: fx.Node) -> tuple[int, ...] | None:
    """The channels of x that `value` is; None if it is another thing."""
    if is_call(value, aten.slice.Tensor) and value.args[:2] == (x, -1) and len(value.args) == 4:
        first, end = value.args[2:]
        return tuple(range(first, end)) if isinstance(first, int) and isinstance(end, int) else None
    if graph.op(value) is not Op.SELECT or graph.inputs(value)[0] is not x:
        return None
    channels = graph.inputs(value)[1]
    index = None if channels is None else graph.constant(channels)
    return None if index is None or index.is_meta else tuple(index.tolist())
