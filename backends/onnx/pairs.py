"""Quantizations of activations around convolutions, as each target wants them, before anything is written.

A pair is qcompile::Quantize and the qcompile::Dequantize of its codes, under one calibrated scale.
"""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import onnx_ir as ir

from qcompile.backends.onnx.edit import Editor
from qcompile.backends.onnx.operands import input_of, is_ours, required, spec_of
from qcompile.backends.onnx.ops import is_op
from qcompile.backends.onnx.storage import is_whole
from qcompile.backends.onnx.writer import array_of
from qcompile.formats import Integer
from qcompile.spec import Zero

# the codes of 0 of a symmetric pair, and of one that holds no negative number
_MIDDLE, _LEAST = 128.0, 0.0


def is_byte_pair(quantize: ir.Node | None) -> bool:
    """Whether a node quantizes to 8-bit integers under one calibrated scale."""
    if quantize is None or not is_ours(quantize, "Quantize"):
        return False
    fmt, zero = spec_of(quantize).format, _zero(quantize)
    one = array_of(required(quantize, 1)).size == 1 and is_whole(zero)
    return isinstance(fmt, Integer) and fmt.bits == 8 and one


def make_unsigned(model: ir.Model) -> None:
    """Bring pairs around convolutions to u8, and let them clip what a ReLU before them does.

    A symmetric code moves by 128, and by nothing where a ReLU leaves no negative number: the same numbers, and beyond
    the range more of them.  onnxruntime's CPU fuses unsigned codes, and no ReLU between a convolution and its codes.
    """
    edit = Editor(model.graph)
    pairs = [node for node in _quantizes(model) if is_byte_pair(node) and _is_around(node)]
    for quantize in pairs:
        if spec_of(quantize).symmetric:
            _set_unsigned(edit, quantize)
    for relu in {required(node, 0).producer(): None for node in pairs}:
        if relu is None or not is_op(relu, "Relu") or relu.outputs[0].is_graph_output():
            continue
        readers = [use.node for use in relu.outputs[0].uses()]
        if all(node in pairs and _center(node) == 0 for node in readers):
            for node in readers:
                node.replace_input_with(0, required(relu, 0))
            edit.drop(relu)


def drop_pairs(model: ir.Model) -> None:
    """Make convolutions, and what reads their results, read activations as they are."""
    for quantize in _quantizes(model):
        if _is_around(quantize):
            _bypass(quantize)


def free_results(model: ir.Model) -> None:
    """Leave pairs where a convolution or linear reads, and on what is added to a convolution's result.

    A sum is computed with the convolution that makes one of its addends, if that one is not quantized and the other
    is.  Source: TensorRT documentation, "Working with Quantized Types", Q/DQ placement on residual additions.
    """
    freed = {node for node in model.graph if is_op(node, "Add") and _free_one(node)}
    for quantize in _quantizes(model):
        readers = _readers(quantize)
        if _is_around(quantize) and not any(_is_weighted(node) or node in freed for node in readers):
            _bypass(quantize)


def _free_one(total: ir.Node) -> bool:
    """Make a sum read the result of one convolution as it is; False if it adds none that nothing else reads."""
    for index, value in enumerate(total.inputs):
        given = None if value is None else input_of(value)
        if given is None or not given.static or len(given.x.uses()) != 1 or len(given.dequantized.uses()) != 1:
            continue
        if is_op(given.x.producer(), "Conv"):
            total.replace_input_with(index, given.x)
            return True
    return False


def _quantizes(model: ir.Model) -> list[ir.Node]:
    return [node for node in model.graph if is_ours(node, "Quantize") and required(node, 0).const_value is None]


def _readers(quantize: ir.Node) -> list[ir.Node]:
    """What reads the numbers of a pair."""
    return [use.node for pair in _dequantizes(quantize) for use in pair.outputs[0].uses()]


def _dequantizes(quantize: ir.Node) -> Iterator[ir.Node]:
    return (use.node for use in quantize.outputs[0].uses() if is_ours(use.node, "Dequantize"))


def _is_weighted(node: ir.Node) -> bool:
    return is_op(node, "Conv") or is_ours(node, "Linear")


def _is_around(quantize: ir.Node) -> bool:
    """Whether a convolution reads the pair, or makes what it quantizes."""
    maker = required(quantize, 0).producer()
    if maker is not None and is_op(maker, "Relu"):
        maker = required(maker, 0).producer()
    return is_op(maker, "Conv") or any(is_op(node, "Conv") for node in _readers(quantize))


def _bypass(quantize: ir.Node) -> None:
    for pair in list(_dequantizes(quantize)):
        ir.convenience.replace_all_uses_with(pair.outputs[0], required(quantize, 0))


def _zero(quantize: ir.Node) -> np.ndarray | None:
    zero = quantize.inputs[2] if len(quantize.inputs) > 2 else None
    return None if zero is None else array_of(zero)


def _center(quantize: ir.Node) -> float:
    zero = _zero(quantize)
    return 0.0 if zero is None else float(zero.reshape(()))


def _set_unsigned(edit: Editor, quantize: ir.Node) -> None:
    x = required(quantize, 0)
    center = _LEAST if is_op(x.producer(), "Relu") else _MIDDLE
    zero = edit.constant(f"{x.name}_zero", ir.Tensor(np.array(center, np.float32)))
    spec = str(replace(spec_of(quantize), zero=Zero.CODE))
    for node in (quantize, *_dequantizes(quantize)):
        node.resize_inputs(max(3, len(node.inputs)))
        node.replace_input_with(2, zero)
        node.attributes["spec"] = ir.AttrString("spec", spec)
    quantize.outputs[0].dtype = ir.DataType.UINT8
