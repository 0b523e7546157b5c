"""Module paths of nodes and qualified names of weights, recovered from what exporters leave in a file."""

import ast
import re
from collections.abc import Sequence
from itertools import chain, count

import onnx_ir as ir

from qcompile.backends.onnx.ops import MODULE_PATH, is_op
from qcompile.backends.onnx.values import FOLDED_FROM, KIND, is_constant, qualified_name
from qcompile.graph import Op
from qcompile.sites import op_path

# the modules that ran a node, outermost first, and last the call in torch's graph
_SCOPES = "pkg.torch.onnx.name_scopes"
_CLASSES = "pkg.torch.onnx.class_hierarchy"
# what torch's exporter says of nodes that no module ran
_NO_MODULE = "_empty_nn_module_stack_from_metadata_hook"
# names that exporters make up: val_3, onnx::MatMul_12, 417, /layer/Constant_output_0
_MADE_UP = re.compile(r".*::.*|val_\d+|\d+|/.*")
# "/encoder/layer.0/output/dense/MatMul_1", as the TorchScript exporter calls nodes
_PATH = re.compile(r"/(.+)/[^/]+")
# kinds of op that go by the path of their weight, which is input number 1
NAMED_BY_WEIGHT = (Op.LINEAR, Op.CONV, Op.EMBEDDING, Op.RMS_NORM, Op.LAYER_NORM, Op.BATCH_NORM)


def running_module(node: ir.Node) -> str | None:
    """Path of the innermost module that ran the node; None if the file does not say."""
    spelled = node.metadata_props.get(_SCOPES)
    scopes = None if spelled is None else _literal(spelled)
    if isinstance(scopes, list) and len(scopes) > 1:
        return "" if scopes[-2] == _NO_MODULE else str(scopes[-2])
    match = _PATH.fullmatch(node.name or "")
    return None if match is None else match[1].replace("/", ".")


def known_name(value: ir.Value) -> str | None:
    """Qualified name of a constant in the model that was exported; None if only the exporter named it."""
    if folded := value.metadata_props.get(FOLDED_FROM):
        found = _literal(folded)
        sources = found if isinstance(found, list) else []
        name = str(sources[0]) if sources else ""
        # a parameter of the model itself has no dot
        is_tensor = "." in name or (name != "" and len(sources) == 1)
    else:
        name = qualified_name(value)
        is_tensor = KIND in value.metadata_props or "." in name
    return name if is_tensor and not _MADE_UP.fullmatch(name) else None


def _literal(text: str) -> object:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return None


class Names:
    """Gives nodes their paths, and constants their names. Different weights get different paths."""

    def __init__(self) -> None:
        self._owners: dict[str, ir.Value] = {}

    def name_node(self, node: ir.Node, op: Op, operands: Sequence[ir.Value | None]) -> dict[ir.Value, str]:
        """Write the path of a node of that kind, which reads these; returns what its constants are called."""
        running = running_module(node)
        weight = operands[1] if op in NAMED_BY_WEIGHT else None
        if weight is None or not is_constant(weight):
            node.metadata_props[MODULE_PATH] = running or ""
            return {}
        bias = next(iter(operands[2:3]), None)
        path = self._path(node, op, running, weight, bias)
        node.metadata_props[MODULE_PATH] = path
        parts = {"weight": weight} | ({} if bias is None or not is_constant(bias) else {"bias": bias})
        names = {part: known_name(value) for part, value in parts.items()}
        if op is Op.EMBEDDING and running and _runs_embedding(node):
            # of the names of a tied weight the exporter keeps the last, and torch goes by the first
            names["weight"] = f"{running}.weight"
        return {value: names[part] or ".".join(filter(None, (path, part))) for part, value in parts.items()}

    def _path(self, node: ir.Node, op: Op, running: str | None, weight: ir.Value, bias: ir.Value | None) -> str:
        known = known_name(weight)
        if known is not None:
            # the exporter names a convolution after the batch norm that it folded into it
            path = op_path("" if op is Op.CONV else running or "", known)
            borrowed = op is Op.LINEAR and path == known.removesuffix(".weight") != (running or "")
            # a module that borrows several weights runs each of them under its own name
            return self._own((known if borrowed and _is_table(weight) else path, op_path("", known)), weight)
        return self._own((_owner_of(bias, running) or running or node.name or node.op_type,), weight)

    def _own(self, paths: Sequence[str], weight: ir.Value) -> str:
        """The first of these paths that is no other weight's, or the first of all with a number."""
        numbered = (f"{paths[0]}_{number}" for number in count(2))
        return next(path for path in chain(paths, numbered) if self._owners.setdefault(path, weight) is weight)


def _runs_embedding(node: ir.Node) -> bool:
    classes = _literal(node.metadata_props.get(_CLASSES, ""))
    return isinstance(classes, list) and len(classes) > 1 and str(classes[-2]).endswith(".Embedding")


def _owner_of(bias: ir.Value | None, running: str | None) -> str | None:
    """The module that owns a bias, if it is the running one or inside it."""
    name = known_name(bias) if bias is not None and is_constant(bias) else None
    owner, _, leaf = (name or "").rpartition(".")
    inside = not running or owner == running or owner.startswith(f"{running}.")
    return owner if leaf == "bias" and owner and inside else None


def _is_table(weight: ir.Value) -> bool:
    return any(is_op(node, "Gather") and index == 0 for node, index in weight.uses())
