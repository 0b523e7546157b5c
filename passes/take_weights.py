"""Take the numbers of quantized weights out of a graph, to be stored: from then on it reads their shapes alone."""

from collections.abc import Collection
from dataclasses import replace

import torch

from qcompile.graph import Graph, Op, V
from qcompile.numerics import QParams
from qcompile.plan import Plan
from qcompile.sites import COMMON_OPS, constant_name, tail_owner
from qcompile.solved import Solved, require_source, solved


def take_weights(graph: Graph[V], plan: Plan, sites: Collection[str], taken: dict[str, Solved]) -> int:
    """Put what each of these sites' weights became into `taken`, by site; returns how many were put there.

    It follows `insert_qdq`. Columns of calibrated outliers are kept beside the codes. What is in `taken` before is not
    computed again; a weight that the plan stores is taken as it is stored there, and one without values is left. Raises
    PlanError if another graph took a weight of which passes had made something else.
    """
    before = len(taken)
    made: dict[V, Solved] = {}
    for value in list(graph.values()):
        owner = tail_owner(graph.name(value))
        site = graph.name(value) if owner is None else owner
        weight = graph.inputs(value)[1] if graph.op(value) in COMMON_OPS else None
        if site not in sites or weight is None:
            continue
        pair = _pair(graph, weight)
        if pair is not None:
            if site not in taken:
                # what an embedding and a linear read alike is one
                found = made.get(pair) or _solved(graph, pair, plan.decisions[site].solved)
                if found is None:
                    continue
                made[pair] = taken[site] = found
            require_source(site, _source(graph, pair), taken[site])
            _drop(graph, value)
    for value in list(graph.values()):
        owner = tail_owner(graph.name(value))
        weight = graph.inputs(value)[1] if graph.op(value) is Op.LINEAR else None
        columns = None if weight is None else graph.constant(weight)
        if owner in taken and columns is not None and not columns.is_meta:
            taken[owner] = replace(taken[owner], columns=columns.detach().cpu())
    return len(taken) - before


def _pair(graph: Graph[V], weight: V) -> V | None:
    """The dequantize of a weight, also of one whose columns are lowered behind it."""
    value = graph.inputs(weight)[0] if graph.op(weight) is Op.MUL else weight
    is_pair = value is not None and graph.op(value) is Op.DEQUANTIZE and isinstance(graph.qparams(value), QParams)
    return value if is_pair else None


def _source(graph: Graph[V], pair: V) -> str:
    return constant_name(graph, pair).removesuffix(".raised")


def _solved(graph: Graph[V], pair: V, known: Solved | None) -> Solved | None:
    if known is not None:
        return replace(known, source=_source(graph, pair))
    codes, qparams = graph.inputs(pair)[0], graph.qparams(pair)
    constant = None if codes is None else graph.inputs(codes)[0]
    weight = None if constant is None else graph.constant(constant)
    assert isinstance(qparams, QParams)
    assert weight is not None
    return None if weight.is_meta else solved(weight.detach(), qparams, source=_source(graph, pair))


def _drop(graph: Graph[V], value: V) -> None:
    """Make the op read a shape in place of its weight."""
    weight = graph.inputs(value)[1]
    assert weight is not None
    shape = [size or 0 for size in graph.shape(weight)]
    graph.set_input(value, 1, graph.add_constant(f"{graph.name(value)}.taken", torch.empty(shape, device="meta")))
