"""Whether a pass keeps its promise: the same outputs before and after, seen by running the graph."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import inf, isfinite, isnan, sqrt
from typing import Any, TypeVar

import torch
from torch import Tensor

from qcompile.graph import Graph, Op, V, graph_text
from qcompile.sites import tail_name, tail_owner

Item = TypeVar("Item")

# groups of items that are told apart: each takes a few runs of the model
MOST = 8
# largest relative difference of what only rounding may change: a few hundred roundings, at random, of each dtype
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 8e-3, torch.bfloat16: 6e-2}


@dataclass(frozen=True, kw_only=True, eq=False)
class Failure:
    """The smallest part of a graph that shows a broken promise.

    text: of the part, before and after the pass.  tensors: by name, what the part reads, made before and makes now.
    error: what the pass raised, or the graph that it left; empty if that ran.
    """

    text: str
    tensors: Mapping[str, Tensor]
    error: str = ""


def difference(before: Any, after: Any) -> float:
    """Largest relative difference ||a - b|| / ||a|| over the outputs, in units of what their dtype may differ by.

    Up to 1 is rounding; inf for other shapes, or for NaN and Inf that were not there before.
    """
    pairs = list(zip(_tensors(before), _tensors(after), strict=True))
    return max((_difference(a, b) for a, b in pairs), default=0.0)


def moved(
    open_graph: Callable[[], Graph[V]], run_pass: Callable[[Graph[V]], object], args: Sequence[Any], reference: Any
) -> float:
    """How far a pass moves the outputs of a fresh graph, see `difference`; inf if it raises, or if the graph does."""
    graph = open_graph()
    try:
        run_pass(graph)
        return difference(reference, run_graph(graph, args))
    except Exception:  # of whatever kind: the graph does not give what it gave
        return inf


def check(
    open_graph: Callable[[], Graph[V]],
    run_pass: Callable[[Graph[V], Sequence[Item]], int],
    items: Sequence[Item],
    args: Sequence[Any],
    reference: Any,
) -> list[tuple[list[Item], float]]:
    """The items with which a pass changes the outputs, found by running it on fresh graphs; without them it does not.

    open_graph: gives the graph as it was before the pass.  args: its inputs.  reference: what it gave for them.
    Returns groups, each with how far the outputs moved by it alone: mostly of one item. Items that move the outputs
    only together, or after MOST groups were found, are one group.
    """

    def far(chosen: Sequence[Item]) -> float:
        return moved(open_graph, lambda graph: run_pass(graph, chosen), args, reference)

    kept = list(items)
    broken: list[tuple[list[Item], float]] = []
    while kept and (distance := far(kept)) > 1:
        guilty, distance = (kept, distance) if len(broken) == MOST else _guilty(kept, distance, far)
        broken.append((guilty, distance))
        kept = [item for item in kept if not any(item is other for other in guilty)]
    return broken


def _guilty(items: list[Item], distance: float, far: Callable[[Sequence[Item]], float]) -> tuple[list[Item], float]:
    """The fewest of these items that halving finds to move the outputs by themselves, and how far."""
    while len(items) > 1:
        middle = len(items) // 2
        halves = ((half, far(half)) for half in (items[:middle], items[middle:]))
        found = next(((half, by) for half, by in halves if by > 1), None)
        if found is None:
            break
        items, distance = found
    return items, distance


def run_graph(graph: Graph[V], args: Sequence[Any]) -> Any:
    """What the graph gives for these inputs, which stay as they are."""
    result, _ = graph.run(_copies(args), [])
    return result


def failing_part(
    open_graph: Callable[[], Graph[V]],
    run_pass: Callable[[Graph[V]], int],
    sites: Sequence[str],
    args: Sequence[Any],
) -> Failure:
    """What a pass changed around these sites, with the tensors to run it again.

    The part is the sites and what lies between them and the norms or linears before them.
    """
    graph = open_graph()
    ends = _ends(graph, sites)
    part = _part(graph, ends, sites)
    reads = list(dict.fromkeys(r for v in part for r in graph.inputs(v) if r is not None and r not in part))
    constants = {v: tensor for v in reads if (tensor := graph.constant(v)) is not None}
    inputs = [v for v in reads if v not in constants]
    _, seen = graph.run(_copies(args), [*inputs, *ends])
    tensors = {f"input.{i}": seen[v] for i, v in enumerate(inputs) if v in seen}
    tensors |= {f"constant.{graph.name(v)}": tensor for v, tensor in constants.items()}
    tensors |= {f"before.{_site_of(graph, v)}": seen[v] for v in ends}
    changed, now_text, error = open_graph(), "", ""
    try:
        run_pass(changed)
        after = _ends(changed, sites)
        now_text = graph_text(changed, _part(changed, after, sites))
        _, now = changed.run(_copies(args), after)
        tensors |= {f"after.{_site_of(changed, v)}": now[v] for v in after}
    except Exception as e:  # of whatever kind: that it broke is what is told
        error = f"{type(e).__name__}: {e}"
        now_text = f"{now_text}\n{error}".lstrip()
    text = f"before the pass\n{graph_text(graph, part)}\n\nafter the pass\n{now_text}\n"
    return Failure(text=text, tensors=tensors, error=error)


def _ends(graph: Graph[V], sites: Sequence[str]) -> list[V]:
    """What the sites make: their linears, or the sums of those and of the thin linears beside them."""
    return [
        next((user for user in graph.users(v) if _is_sum(graph, user, v)), v)
        for v in graph.values()
        if graph.op(v) is Op.LINEAR and graph.name(v) in sites
    ]


def _is_sum(graph: Graph[V], value: V, linear: V) -> bool:
    tail = tail_name(graph.name(linear))
    return graph.op(value) is Op.ADD and any(v is not None and graph.name(v) == tail for v in graph.inputs(value))


def _site_of(graph: Graph[V], end: V) -> str:
    if graph.op(end) is Op.LINEAR:
        return graph.name(end)
    return next(graph.name(v) for v in graph.inputs(end) if v is not None and tail_owner(graph.name(v)) is None)


def _part(graph: Graph[V], ends: Sequence[V], sites: Sequence[str]) -> list[V]:
    """The ends and what they are made from, up to the first norms and linears of other sites."""
    part: dict[V, None] = {}
    waiting = list(ends)
    while waiting:
        value = waiting.pop()
        if value in part or graph.op(value) in (Op.CONSTANT, Op.INPUT):
            continue
        part[value] = None
        name = graph.name(value)
        mine = graph.op(value) is Op.LINEAR and (name in sites or tail_owner(name) in sites)
        if mine or graph.op(value) not in (Op.LINEAR, Op.RMS_NORM, Op.LAYER_NORM):
            waiting += [v for v in graph.inputs(value) if v is not None]
    return list(part)


def _copies(args: Sequence[Any]) -> list[Any]:
    """The graph may write to its inputs."""
    return [x.clone() if isinstance(x, Tensor) else x for x in args]


def _tensors(result: Any) -> Iterator[Tensor]:
    if isinstance(result, Tensor):
        yield result
    elif isinstance(result, Mapping):
        yield from _tensors(list(result.values()))
    elif isinstance(result, list | tuple):
        for one in result:
            yield from _tensors(one)


def _difference(before: Tensor, after: Tensor) -> float:
    if before.shape != after.shape or before.dtype != after.dtype:
        return inf
    if not before.is_floating_point():
        return 0.0 if torch.equal(before, after) else inf
    apart, scale = _energy(before - after), _energy(before)
    if not (isfinite(apart) and isfinite(scale)):
        # an Inf or NaN that was there before may stay; one that is new is what moved to infinity
        moved = torch.where(before == after, 0.0, before.double() - after.double())
        apart = _energy(torch.where(before.isnan() & after.isnan(), 0.0, moved))
        scale = _energy(torch.where(before.isfinite(), before.double(), 0.0))
    distance = sqrt(apart / scale) if scale > 0 else sqrt(apart)
    return (inf if isnan(distance) else distance) / TOLERANCES.get(before.dtype, 1e-5)


def _energy(x: Tensor) -> float:
    # squares of half floats would vanish or overflow
    return float(torch.linalg.vector_norm(x, dtype=torch.float64)) ** 2
