"""The door of the ONNX host: a model becomes an `OnnxGraph` in canonical form.

The model that comes in is never edited, and of external data nothing is read. In the copy, constants are initializers,
every linear is qcompile::Linear with a weight [N, K], RMSNorm, GELU and SiLU are one op each, nodes carry their module
paths, and what does nothing is gone.
"""

from copy import copy
from functools import cache
from pathlib import Path
from typing import Any

import onnx_ir as ir
from onnx_ir.passes import common

from qcompile.backends.onnx.activations import make_activations
from qcompile.backends.onnx.convolutions import drop_zero_biases
from qcompile.backends.onnx.edit import Editor
from qcompile.backends.onnx.graph import OnnxGraph
from qcompile.backends.onnx.linears import make_linears
from qcompile.backends.onnx.names import Names
from qcompile.backends.onnx.norms import make_rms_norms
from qcompile.backends.onnx.ops import attribute, is_op
from qcompile.backends.onnx.values import constant, set_qualified_name


def open_onnx(source: ir.Model | str | Path) -> OnnxGraph:
    """The graph of a model, or of the file that holds one."""
    model = ir.load(source) if isinstance(source, str | Path) else _copy(source)
    for tidy in (
        common.InlinePass(),
        common.RemoveInitializersFromInputsPass(),
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
    ):
        tidy(model)
    if any(v.shape is None or v.type is None for node in model.graph for v in node.outputs):
        common.ShapeInferencePass(check_type=False, strict_mode=False)(model)
    edit = Editor(model.graph)
    _drop_inert(edit)
    make_rms_norms(edit)
    make_activations(edit)
    make_linears(edit)
    drop_zero_biases(edit)
    OnnxGraph(model).prune()
    _name(model)
    return OnnxGraph(model)


def _copy(source: ir.Model) -> ir.Model:
    """A model whose nodes and names may be changed; it shares the memory of the constants."""
    model = source.clone()
    for value in model.graph.initializers.values():
        value.const_value = _renamable(value.const_value)
    for node in model.graph.all_nodes():
        held = attribute(node, "value") if is_op(node, "Constant") else None
        if held is not None:
            node.attributes["value"] = ir.AttrTensor("value", _renamable(held))
    return model


def _renamable(held: Any) -> Any:
    """The same tensor under a name of its own: a value that is renamed renames the tensor that it holds.

    A protobuf would hand out another copy of its bytes each time: the first one is kept, and so memory says which
    weights are one.
    """
    if isinstance(held, ir.TensorProtoTensor) and held.dtype is not ir.DataType.STRING:

        @cache
        def made() -> ir.TensorProtocol:
            return ir.Tensor(held.numpy(), dtype=held.dtype, shape=held.shape, name=held.name)

        return ir.LazyTensor(made, dtype=held.dtype, shape=held.shape, name=held.name)
    return copy(held)


def _drop_inert(edit: Editor) -> None:
    """Make what reads a node that returns its input as it is (Identity, dropout, a cast to the same type) read that."""
    returned = set(edit.graph.outputs)
    for node in list(edit.graph):
        source = node.inputs[0] if node.inputs else None
        if source is None or not _is_inert(node) or any(v.uses() for v in node.outputs[1:]):
            continue
        made = node.outputs[0]
        if made in returned:
            # an output keeps its name, so it can only pass to what is made here and goes by no name of its own
            if source.producer() is None or source in returned or node.outputs[1:]:
                continue
            returned = (returned - {made}) | {source}
            edit.exchange_names(made, source)
        made.replace_all_uses_with(source, replace_graph_outputs=True)
        edit.drop(node)


def _is_inert(node: ir.Node) -> bool:
    if is_op(node, "Cast"):
        assert node.inputs[0] is not None
        return node.inputs[0].dtype is not None and node.inputs[0].dtype == attribute(node, "to")
    if is_op(node, "Dropout"):
        training = node.inputs[2] if len(node.inputs) > 2 else None
        held = None if training is None else constant(training)
        return training is None or (held is not None and not bool(held))
    return is_op(node, "Identity")


def _name(model: ir.Model) -> None:
    """Give nodes their module paths, and their weights qualified names, in the file as far as they are free."""
    graph, edit, names = OnnxGraph(model), Editor(model.graph), Names()
    called: dict[ir.Value, str] = {}
    for value in graph.values():
        node = value.producer()
        if node is not None and value.index() == 0:
            for constant_, name in names.name_node(node, graph.op(value), graph.inputs(value)).items():
                called.setdefault(constant_, name)
    for value, name in called.items():
        # what is returned is known by its name outside
        if not value.is_graph_output():
            edit.rename(value, name)
        set_qualified_name(value, name)
