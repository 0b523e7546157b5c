"""Adding standard nodes and constants to a canonical graph, next to the node that they stand for."""

from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from qcompile.errors import GraphError, UnsupportedError

DOMAIN = "qcompile"
MODULE_PATH = "qcompile.module_path"

# opset that brought a type into DequantizeLinear and Cast (ONNX changelog); 21 brought blocks, and what all files need
BASE_OPSET = 21
TYPE_OPSET = {
    ir.DataType.FLOAT4E2M1: 23,
    ir.DataType.FLOAT8E8M0: 24,
    ir.DataType.UINT2: 25,
    ir.DataType.INT2: 25,
}


class Writer:
    """Adds to one model. New nodes stand right before `anchor` and carry its module path.

    opset: the lowest that what was written needs.  lacks: types that the target cannot hold.
    notes: where what was written deviates from the plan.  held: constants that the anchor stores, by itself or beside
    earlier ones, save plain numbers; whoever sets the anchor empties it.
    """

    def __init__(self, model: ir.Model, target: str, lacks: frozenset[ir.DataType] = frozenset()) -> None:
        self.model = model
        self.target = target
        self.lacks = lacks
        self.opset = BASE_OPSET
        self.notes: list[str] = []
        self.anchor: ir.Node | None = None
        self.held: dict[ir.Value, None] = {}
        self._made: dict[Hashable, tuple[Sequence[ir.Value], dict[ir.Value, None]]] = {}
        self._names: Counter[str] = Counter()
        self._taken = {value.name for node in model.graph.all_nodes() for value in node.outputs}
        self._taken |= {
            value.name for graph in model.graphs() for value in [*graph.inputs, *graph.initializers.values()]
        }
        self._node_names = {node.name for node in model.graph.all_nodes()}

    @property
    def site(self) -> str:
        """Module path of the anchor, else its own name."""
        assert self.anchor is not None
        return site_name(self.anchor)

    def op(
        self,
        kind: str,
        *inputs: ir.Value | None,
        domain: str = "",
        makes: ir.DataType | None = None,
        **attributes: Any,
    ) -> ir.Value:
        """The output of a new node.  makes: its dtype, where somebody asks for it."""
        value = self.ops(kind, inputs, 1, domain, **attributes)[0]
        if makes is not None:
            value.dtype = makes
        return value

    def ops(
        self, kind: str, inputs: Sequence[ir.Value | None], outputs: int, domain: str = "", **attributes: Any
    ) -> Sequence[ir.Value]:
        """All outputs of a new node that has several."""
        assert self.anchor is not None
        assert self.anchor.graph is not None
        name = self._node_name(f"{self.site}/{kind}")
        node = ir.node(kind, inputs, attributes, domain=domain, num_outputs=outputs, name=name)
        # the exporter's own notes are long, and would stand on every node
        if MODULE_PATH in self.anchor.metadata_props:
            node.metadata_props[MODULE_PATH] = self.anchor.metadata_props[MODULE_PATH]
        for i, value in enumerate(node.outputs):
            value.name = self.fresh(f"{name}_out{i or ''}")
        self.anchor.graph.insert_before(self.anchor, node)
        return node.outputs

    def cast(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        """`value` as dtype; itself if it is known to be."""
        if value.dtype == dtype:
            return value
        self.require(dtype)
        cast = self.op("Cast", value, to=dtype)
        cast.dtype, cast.shape = dtype, value.shape
        return cast

    def constant(self, name: str, tensor: ir.TensorProtocol) -> ir.Value:
        """A new initializer; the name gets a number if it is taken."""
        value = self._initializer(name, tensor)
        self.held[value] = None
        return value

    def number(self, value: float | Sequence[int], dtype: ir.DataType = ir.DataType.FLOAT) -> ir.Value:
        """An initializer for a number or a short list, one for all equal ones."""
        array = np.asarray(value, dtype.numpy())
        text = "_".join(str(v) for v in array.ravel()[:4])
        return self.once(
            ("number", array.tobytes(), array.shape, dtype),
            lambda: self._initializer(f"{dtype.name.lower()}_{text}", ir.Tensor(array, dtype)),
        )

    def _initializer(self, name: str, tensor: ir.TensorProtocol) -> ir.Value:
        self.require(tensor.dtype)
        name = self.fresh(name)
        tensor.name = name
        value = ir.Value(name=name, shape=ir.Shape(tensor.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
        self.model.graph.register_initializer(value)
        return value

    def once(self, key: Hashable, make: Callable[[], ir.Value]) -> ir.Value:
        """What `make` returns, made once for all equal keys."""
        return self.many(key, lambda: [make()])[0]

    def many(self, key: Hashable, make: Callable[[], Sequence[ir.Value]]) -> Sequence[ir.Value]:
        """As `once`, for several values."""
        if key not in self._made:
            before, self.held = self.held, {}
            self._made[key] = (make(), self.held)
            self.held = before
        values, held = self._made[key]
        self.held |= held
        return values

    def require(self, dtype: ir.DataType) -> None:
        """Make the file's opset one that knows dtype."""
        self.opset = max(self.opset, TYPE_OPSET.get(dtype, BASE_OPSET))

    def fresh(self, name: str) -> str:
        """`name`, with a number behind it if it is taken; taken from now on."""
        unique = name
        while unique in self._taken:
            self._names[name] += 1
            unique = f"{name}_{self._names[name]}"
        self._taken.add(unique)
        return unique

    def _node_name(self, name: str) -> str:
        unique = name
        while unique in self._node_names:
            self._names[f"node {name}"] += 1
            unique = f"{name}_{self._names[f'node {name}']}"
        self._node_names.add(unique)
        return unique

    def unsupported(self, what: str, remedy: str) -> UnsupportedError:
        """The error that names the anchor's site, the target, what it cannot do and what to use."""
        return UnsupportedError(f"{self.site!r} cannot be written for target {self.target!r}: {what}; {remedy}")

    def note(self, text: str) -> None:
        """Keep a deviation of the anchor's site for the report, once."""
        line = f"{self.site}: {text}"
        if line not in self.notes:
            self.notes.append(line)


def site_name(node: ir.Node) -> str:
    """Module path of a node, else its name, else that of its first output."""
    return node.metadata_props.get(MODULE_PATH) or node.name or node.outputs[0].name or node.op_type


def replace(old: ir.Value, new: ir.Value, *, same_type: bool = True) -> None:
    """Make all that reads `old` read `new`, which takes over its name.

    same_type: and type and shape, too; codes of the canonical form are bytes, which a file may store as they mean.
    """
    name = old.name
    old.name = f"{name}_before"
    new.name = name
    if same_type:
        new.type, new.shape = old.type, old.shape
    ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)


def array_of(value: ir.Value) -> np.ndarray[Any, Any]:
    """The numbers of a constant.  Raises GraphError if they are not known before the graph runs."""
    if value.const_value is None:
        raise GraphError(f"value {value.name!r} must be a constant of the file, but is computed while running")
    return value.const_value.numpy()
