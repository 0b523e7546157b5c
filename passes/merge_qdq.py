"""Say the same thing once: merge equal quantizes and dequantizes of a value, and drop a round trip through numbers."""

from collections.abc import Mapping, Sequence

from qcompile.graph import Graph, Op, V
from qcompile.numerics import QParams
from qcompile.solved import equal_qparams


def merge_qdq(graph: Graph[V]) -> int:
    """Merge equal pairs on one value, and replace quantize(dequantize(codes)) of equal qparams by the codes.

    Returns how many quantizes and dequantizes lost their readers. A second quantize with other qparams stays, and so
    does one that finds its qparams while running: what it finds may differ from what the codes were made with.
    """
    order = {value: i for i, value in enumerate(graph.values())}
    edits = 0
    for value in order:
        if graph.op(value) is Op.DEQUANTIZE:
            edits += _drop_round_trips(graph, value)
        for op in (Op.QUANTIZE, Op.DEQUANTIZE):
            edits += _merge(graph, _readers(graph, value, op, order))
    return edits


def _drop_round_trips(graph: Graph[V], dequantized: V) -> int:
    """Make what reads quantize(dequantized) read the codes that were there before."""
    qparams = graph.qparams(dequantized)
    codes = graph.inputs(dequantized)[0]
    if codes is None or not isinstance(qparams, QParams):
        return 0
    edits = 0
    for user in list(graph.users(dequantized)):
        if graph.op(user) is Op.QUANTIZE and graph.users(user) and equal_qparams(graph.qparams(user), qparams):
            graph.replace_uses(user, codes)
            edits += 1
    return edits


def _merge(graph: Graph[V], readers: Sequence[V]) -> int:
    """Make the first of equal readers serve what reads the others."""
    kept: list[V] = []
    edits = 0
    for reader in readers:
        qparams = graph.qparams(reader)
        same = next((k for k in kept if equal_qparams(graph.qparams(k), qparams)), None)
        if same is None:
            kept.append(reader)
            continue
        graph.replace_uses(reader, same)
        edits += 1
    return edits


def _readers(graph: Graph[V], value: V, op: Op, order: Mapping[V, int]) -> Sequence[V]:
    """The ops of that kind that read `value`, in the graph's order; one that has lost its own readers is dead."""
    readers = [user for user in graph.users(value) if graph.op(user) is op]
    if len(readers) < 2:
        return readers
    returned = graph.outputs()
    return sorted((r for r in readers if graph.users(r) or r in returned), key=order.__getitem__)
