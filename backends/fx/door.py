"""The door of the FX host: a graph from torch.compile or torch.export becomes an `FxGraph` in canonical form.

The graph that comes in is never edited. In the copy, weights are attributes of the module, calls that hide linears are
the ops that they are made of, every linear is aten.linear with a weight [N, K], RMSNorm written by hand is one op, and
what does nothing is gone.
"""

from collections.abc import Mapping, Sequence
from copy import copy
from operator import attrgetter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch.export import ExportedProgram

from qcompile.backends.fx.dynamo import spelled
from qcompile.backends.fx.graph import FxGraph, free_attribute
from qcompile.backends.fx.inline import inline_calls
from qcompile.backends.fx.linears import fold_biases, make_linears
from qcompile.backends.fx.names import Frame, frame_of, in_model, module_path, root_variable
from qcompile.backends.fx.norms import make_rms_norms
from qcompile.backends.fx.targets import CASTS, DROPOUT, argument, aten, is_call, operands, spelling
from qcompile.backends.fx.values import example, fake_constant, named_source
from qcompile.backends.fx.writes import pin_inputs
from qcompile.graph import Op
from qcompile.sites import op_path

# ops whose input number 1 is the weight that gives them their name
_NAMED_BY_WEIGHT = (Op.LINEAR, Op.CONV, Op.EMBEDDING, Op.RMS_NORM, Op.LAYER_NORM, Op.BATCH_NORM)
# they checked or logged something while the model was traced, and make nothing
_TRACES = (aten._assert_tensor_metadata.default, torch._C._log_api_usage_once)
_RELUS_IN_PLACE = (torch.relu_, F.relu_, "relu_", aten.relu_.default)

Constant = tuple[str, Tensor]


def open_dynamo(gm: fx.GraphModule, constants: Mapping[str, Constant]) -> FxGraph:
    """The graph that torch.compile hands to a backend.

    constants: the placeholders that are weights, by name: qualified name and tensor, which may be on the meta
    device if its values are gone. The other placeholders stay the inputs, in their order.
    """
    known = {node: constants[node.name] for node in gm.graph.nodes if node.name in constants}
    known |= {node: (str(node.target), tensor) for node, tensor in _attributes(gm)}
    return _canonical(_copy(gm, known), _frames([(spelled(node), name) for node, (name, _) in known.items()]))


def open_exported(program: ExportedProgram) -> FxGraph:
    """The graph of an exported program; its module is called like the model that was exported."""
    gm = program.module(check_guards=False)
    assert isinstance(gm, fx.GraphModule)
    # a tensor of several names goes by the first of them
    names = {id(tensor): name for name, tensor in (*gm.named_parameters(), *gm.named_buffers())}
    known = {node: (names.get(id(tensor), str(node.target)), tensor) for node, tensor in _attributes(gm)}
    return _canonical(_copy(gm, known), {"": ("", "")})


def _frames(tensors: Sequence[tuple[str, str]]) -> dict[str, Frame]:
    """For each variable that holds a module, how paths in it relate to qualified names; "" stands for any other.

    tensors: as Dynamo spells them, and their qualified names.
    """
    paths = [(root_variable(where), (module_path(where), name)) for where, name in tensors if module_path(where)]
    frames = {root: frame_of(path for other, path in paths if other == root) for root, _ in paths}
    return frames | {"": frame_of(path for _, path in paths)}


def _attributes(gm: fx.GraphModule) -> list[tuple[fx.Node, Tensor]]:
    read = ((node, attrgetter(str(node.target))(gm)) for node in gm.graph.nodes if node.op == "get_attr")
    return [(node, tensor) for node, tensor in read if isinstance(tensor, Tensor)]


def _copy(gm: fx.GraphModule, constants: Mapping[fx.Node, Constant]) -> fx.GraphModule:
    """A new module in which the nodes in `constants` are attributes, a tensor of several nodes only one."""
    graph = fx.Graph()
    graph.set_codegen(copy(gm.graph._codegen))
    root: dict[str, Any] = {
        str(node.target): attrgetter(str(node.target))(gm)
        for node in gm.graph.nodes
        if node.op in ("get_attr", "call_module") and node not in constants
    }
    copies: dict[fx.Node, fx.Node] = {}
    owners: dict[int, fx.Node] = {}
    # inputs first, then constants: what is added later finds its place between them and the ops
    for node in sorted(gm.graph.nodes, key=lambda node: _rank(node, constants)):
        if node not in constants:
            copies[node] = _copy_node(graph, node, copies)
            continue
        name, tensor = constants[node]
        if id(tensor) not in owners and node.users:
            # called after the frame's own name, which is the same for every layer that the frame runs
            attribute = free_attribute(node.name, root.__contains__)
            root[attribute] = tensor
            owners[id(tensor)] = graph.create_node("get_attr", attribute, name=node.name)
            owners[id(tensor)].meta = {**node.meta, "qualified_name": name}
        if node.users:
            copies[node] = owners[id(tensor)]
    module = fx.GraphModule(root, graph)
    module.meta = dict(gm.meta)
    _complete_examples(graph, {copies[node]: constants[node][1] for node in copies if node in constants})
    return module


def _rank(node: fx.Node, constants: Mapping[fx.Node, Constant]) -> int:
    if node in constants:
        return 1
    return 0 if node.op == "placeholder" else 2


def _copy_node(graph: fx.Graph, node: fx.Node, copies: Mapping[fx.Node, fx.Node]) -> fx.Node:
    new = graph.node_copy(node, lambda read: copies[read])
    if "val" in new.meta:
        new.meta.setdefault("example_value", new.meta["val"])
    if hasattr(node, "_dynamo_source"):
        # AOT asks each input where it came from
        new._dynamo_source = node._dynamo_source
    return new


def _complete_examples(graph: fx.Graph, constants: Mapping[fx.Node, Tensor]) -> None:
    for node, tensor in constants.items():
        if example(node) is None:
            node.meta["example_value"] = node.meta.get("val", fake_constant(tensor, graph))


def _canonical(module: fx.GraphModule, frames: Mapping[str, Frame]) -> FxGraph:
    graph = module.graph
    inline_calls(graph)
    _drop_inert(graph)
    make_linears(graph)
    fold_biases(graph)
    _write_elsewhere(graph)
    make_rms_norms(graph)
    pin_inputs(graph)
    for node in graph.nodes:
        if node.op not in ("placeholder", "get_attr", "output"):
            node.meta["module_path"] = _name(node, frames)
    opened = FxGraph(module)
    opened.prune()
    return opened


def _name(node: fx.Node, frames: Mapping[str, Frame]) -> str:
    modules = list((node.meta.get("nn_module_stack") or {}).values())
    where = modules[-1][0] if modules else ""
    running = in_model(module_path(where), frames.get(root_variable(where), frames[""]))
    found = spelling(node)
    weight = operands(node, found)[1] if found is not None and found.op in _NAMED_BY_WEIGHT else None
    source = None if weight is None else named_source(weight)
    if source is None:
        return op_path(running, None)
    weight_name = str(source.meta["qualified_name"])
    name = op_path(running, weight_name)
    # the module that owns a table is the embedding's name, and a linear of another module takes the weight's
    owner = weight_name.removesuffix(".weight")
    borrowed = found is not None and found.op is Op.LINEAR and name == owner != running
    return weight_name if borrowed and any(_is_embedding(user) for user in source.users) else name


def _is_embedding(node: fx.Node) -> bool:
    found = spelling(node)
    return found is not None and found.op is Op.EMBEDDING


def _drop_inert(graph: fx.Graph) -> None:
    """Remove what returns its input as it is (a cast to the same dtype, dropout at inference), and traces."""
    for node in list(graph.nodes):
        if is_call(node, *_TRACES) and not node.users:
            graph.erase_node(node)
        elif (same := _unchanged(node)) is not None:
            node.replace_all_uses_with(same)
            graph.erase_node(node)


def _write_elsewhere(graph: fx.Graph) -> None:
    """Make ReLUs in place ordinary ones, where nobody else reads the linear whose result they write to."""
    for node in list(graph.nodes):
        flagged = is_call(node, F.relu) and True in (*node.args, node.kwargs.get("inplace"))
        source = node.all_input_nodes[0] if flagged or is_call(node, *_RELUS_IN_PLACE) else None
        if source is None or not is_call(source, aten.linear.default) or len(source.users) > 1:
            continue
        with graph.inserting_before(node):
            new = graph.call_function(F.relu, (source,))
        new.meta = dict(node.meta)
        node.replace_all_uses_with(new)
        graph.erase_node(node)


def _unchanged(node: fx.Node) -> fx.Node | None:
    """The input that the call returns as it is."""
    dropout = spelling(node, DROPOUT)
    if dropout is not None:
        rate, training = argument(node, 1, dropout), argument(node, 2, dropout)
        return operands(node, dropout)[0] if training is False or rate == 0 else None
    copies = is_call(node, aten._to_copy.default) or node.kwargs.get("copy") or "memory_format" in node.kwargs
    if not is_call(node, *CASTS) or copies or True in node.args:
        return None
    before, after = example(node.all_input_nodes[0]), example(node)
    if not isinstance(before, Tensor) or not isinstance(after, Tensor):
        return None
    same = before.dtype == after.dtype and before.device == after.device
    return node.all_input_nodes[0] if same else None
