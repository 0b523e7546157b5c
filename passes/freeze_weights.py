"""Quantize constants once, now: what is left in the graph is a constant of codes, and its dequantize."""

from collections import Counter

from qcompile.graph import Graph, Op, V
from qcompile.numerics import QParams, quantize


def freeze_weights(graph: Graph[V]) -> int:
    """Replace each quantize of a constant by a constant of its codes. Returns how many were replaced.

    The codes of "a.weight" are called "a.weight_codes". A constant quantized in two ways gets two constants. A
    quantize that finds its qparams while running stays.
    """
    names: Counter[str] = Counter()
    edits = 0
    for value in list(graph.values()):
        if graph.op(value) is not Op.QUANTIZE:
            continue
        source = graph.inputs(value)[0]
        tensor = None if source is None else graph.constant(source)
        qparams = graph.qparams(value)
        if source is None or tensor is None or not isinstance(qparams, QParams):
            continue
        name = f"{qualified_name(graph, source)}_codes"
        names[name] += 1
        unique = name if names[name] == 1 else f"{name}_{names[name]}"
        graph.replace_uses(value, graph.add_constant(unique, quantize(tensor, qparams)))
        edits += 1
    return edits


def qualified_name(graph: Graph[V], value: V) -> str:
    """Name of the constant that `value` is, or is a view of."""
    while graph.op(value) is not Op.CONSTANT:
        source = graph.inputs(value)[0]
        assert source is not None
        value = source
    return graph.name(value)
