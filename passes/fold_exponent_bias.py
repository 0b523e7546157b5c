"""Fold powers of two per input channel into the exponents of a weight's numbers.

    x @ (w * 2**-shift).T for w of a float of few bits becomes x @ v.T for v = w * 2**-shift in E4M3

whose three bits of mantissa and four of exponent hold every such v as it is, so that an 8-bit float matmul runs it.
Source: LLM-FP4 (Liu 2023), equation 19, with E4M3 in place of a 4-bit format with a bias of its own for each column.
"""

import torch
from torch import Tensor

from qcompile.graph import Graph, Op, V
from qcompile.numerics import QParams, quantize
from qcompile.plan import Plan
from qcompile.shifts import folds_octaves, lowered
from qcompile.sites import constant_name


def fold_exponent_bias(graph: Graph[V], plan: Plan) -> int:
    """Replace each quantized weight that is multiplied column by column by a weight of E4M3 with the same values.

    Returns how many were replaced. What E4M3 does not hold to the last bit stays as it is. A weight whose columns the
    plan lowered keeps beside it how it was before.
    """
    edits = 0
    for value in list(graph.values()):
        product = graph.inputs(value)[1] if graph.op(value) is Op.LINEAR else None
        if product is None or graph.op(product) is not Op.MUL:
            continue
        dequantized, factor = graph.inputs(product)[:2]
        decision = plan.decisions.get(graph.name(value))
        shift = () if decision is None else decision.shift
        if dequantized is not None and factor is not None and _fold(graph, value, dequantized, factor, shift):
            edits += 1
    return edits


def _fold(graph: Graph[V], linear: V, dequantized: V, factor: V, shift: tuple[int, ...]) -> bool:
    """Make a linear read its weight from E4M3; False if that would change it."""
    codes = graph.inputs(dequantized)[0] if graph.op(dequantized) is Op.DEQUANTIZE else None
    source = graph.inputs(codes)[0] if codes is not None and graph.op(codes) is Op.QUANTIZE else None
    weight = None if source is None else graph.constant(source)
    columns, qparams = graph.constant(factor), graph.qparams(dequantized)
    if source is None or weight is None or columns is None or not isinstance(qparams, QParams):
        return False
    # by the format, so that a weight of which only the shape is at hand has the same answer
    most = _octaves(columns)
    if most is None or not folds_octaves(qparams.spec, most):
        return False
    values, folded = lowered(quantize(weight, qparams), qparams, columns, shift)
    name = constant_name(graph, source).removesuffix(".raised")
    held = graph.add_constant(name, values.to(weight.dtype))
    graph.set_input(linear, 1, graph.add_qdq(held, folded))
    return True


def _octaves(columns: Tensor) -> int | None:
    """By how many the lowest column was lowered; None if something else was done to one."""
    # to the last bit on every device, where log2 may round
    mantissa, exponent = torch.frexp(columns.float())
    if bool((mantissa != 0.5).any()) or bool((exponent > 1).any()):
        return None
    return 1 - int(exponent.min())
