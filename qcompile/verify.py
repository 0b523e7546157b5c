"""Whether a pass keeps its promise: the same outputs before and after, seen by running the graph."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import inf, isfinite, isnan, sqrt
from typing import Any, TypeVar

import torch
from torch import Tensor

from qcompile.graph import Graph, Op, V, graph_text

Item = TypeVar("Item")

# largest relative difference of what only rounding may change: a few hundred roundings, at random, of each dtype
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 8e-3, torch.bfloat16: 6e-2}


@dataclass(frozen=True, kw_only=True)
class Checked:
    """items: those with which the pass keeps its promise. broken: the others, with how far the outputs moved."""

    items: tuple[Any, ...]
    broken: tuple[tuple[Any, float], ...] = ()


@dataclass(frozen=True, kw_only=True, eq=False)
class Failure:
    """The smallest part of a graph that shows a broken promise.

    text: of the part, before and after the pass.  tensors: by name, what the part reads, made before and makes now.
    """

    text: str
    tensors: Mapping[str, Tensor]


def difference(before: Any, after: Any) -> float:
    """Largest relative difference ||a - b|| / ||a|| over the outputs, in units of what their dtype may differ by.

    Up to 1 is rounding; inf for other shapes, or for NaN and Inf that were not there before.
    """
    pairs = list(zip(_tensors(before), _tensors(after), strict=True))
    return max((_difference(a, b) for a, b in pairs), default=0.0)


def check(
    open_graph: Callable[[], Graph[V]],
    run_pass: Callable[[Graph[V], Sequence[Item]], int],
    items: Sequence[Item],
    args: Sequence[Any],
    reference: Any,
) -> Checked:
    """The items with which a pass leaves the outputs as they were, found by running it on fresh graphs.

    open_graph: gives the graph as it was before the pass.  args: its inputs.  reference: what it gave for them.
    Items that break the promise alone are left out one by one, in halves; those left keep it together.
    """

    def moved(chosen: Sequence[Item]) -> float:
        graph = open_graph()
        run_pass(graph, chosen)
        return difference(reference, run_graph(graph, args))

    kept, broken = list(items), []
    while kept and (distance := moved(kept)) > 1:
        suspects = kept
        while len(suspects) > 1:
            half, rest = suspects[: len(suspects) // 2], suspects[len(suspects) // 2 :]
            suspects = half if moved(half) > 1 else rest
        broken.append((suspects[0], max(moved(suspects), distance)))
        kept = [item for item in kept if item is not suspects[0]]
    return Checked(items=tuple(kept), broken=tuple(broken))


def run_graph(graph: Graph[V], args: Sequence[Any]) -> Any:
    """What the graph gives; it may write to its inputs, so it gets copies."""
    result, _ = graph.run([x.clone() if isinstance(x, Tensor) else x for x in args], [])
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
    ends = [v for v in graph.values() if graph.op(v) is Op.LINEAR and graph.name(v) in sites]
    part = _part(graph, ends)
    inputs = list(dict.fromkeys(r for v in part for r in graph.inputs(v) if r is not None and r not in part))
    _, seen = graph.run(args, [*inputs, *ends])
    tensors = {f"input.{i}": seen[v] for i, v in enumerate(inputs) if v in seen}
    tensors |= {f"constant.{graph.name(v)}": t for v in inputs if (t := graph.constant(v)) is not None}
    tensors |= {f"before.{graph.name(v)}": seen[v] for v in ends}
    changed = open_graph()
    run_pass(changed)
    after = [v for v in changed.values() if changed.op(v) is Op.LINEAR and changed.name(v) in sites]
    now_part = _part(changed, after)
    _, now = changed.run(args, after)
    tensors |= {f"after.{changed.name(v)}": now[v] for v in after}
    text = f"before the pass\n{graph_text(graph, part)}\n\nafter the pass\n{graph_text(changed, now_part)}\n"
    return Failure(text=text, tensors=tensors)


def _part(graph: Graph[V], ends: Sequence[V]) -> list[V]:
    """The ends and what they are made from, up to the first norms and linears."""
    part: dict[V, None] = {}
    waiting = list(ends)
    while waiting:
        value = waiting.pop()
        if value in part or graph.op(value) in (Op.CONSTANT, Op.INPUT):
            continue
        part[value] = None
        if value in ends or graph.op(value) not in (Op.LINEAR, Op.RMS_NORM, Op.LAYER_NORM):
            waiting += [v for v in graph.inputs(value) if v is not None]
    return list(part)


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
    return float(x.square().sum(dtype=torch.float64))
