"""Small edits of a live onnx_ir graph: new constants and nodes under names that are free."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import count
from typing import Any

import onnx_ir as ir

from qcompile.backends.onnx.ops import DOMAIN, VERSION


class Editor:
    """Adds to a graph, and knows the names in it; a removed value's name stays taken."""

    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph
        names = [v.name for v in (*graph.inputs, *graph.initializers.values())]
        self._names = {name for name in names if name}
        for node in graph.all_nodes():
            self._names.update(v.name for v in node.outputs if v.name)
        for inner in graph.subgraphs():
            self._names.update(v.name for v in (*inner.inputs, *inner.initializers.values()) if v.name)

    def free_name(self, wanted: str) -> str:
        """`wanted`, or that and a number if it is taken; it is taken then."""
        candidates = (wanted if i == 0 else f"{wanted}_{i}" for i in count())
        name = next(c for c in candidates if c and c not in self._names)
        self._names.add(name)
        return name

    def rename(self, value: ir.Value, wanted: str) -> None:
        """Call a value so, or nearly so."""
        if value.name != wanted:
            value.name = self.free_name(wanted)

    def exchange_names(self, a: ir.Value, b: ir.Value) -> None:
        """Each gets the other's name."""
        first, second = a.name, b.name
        a.name = self.free_name(f"{first}_exchanged")
        b.name, a.name = first, second

    def constant(self, name: str, held: ir.TensorProtocol, metadata: Mapping[str, str] | None = None) -> ir.Value:
        """A new initializer called so, or nearly so."""
        value = ir.Value(
            name=self.free_name(name),
            shape=ir.Shape(list(held.shape)),
            type=ir.TensorType(held.dtype),
            const_value=held,
            metadata_props=dict(metadata or {}),
        )
        self.graph.register_initializer(value)
        return value

    def node(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        attributes: Mapping[str, Any] | None = None,
        *,
        name: str,
        outputs: int = 1,
        domain: str = DOMAIN,
    ) -> ir.Node:
        """A node that stands nowhere yet; its first output is called `name`, or nearly so."""
        if domain == DOMAIN:
            self.graph.opset_imports.setdefault(DOMAIN, VERSION)
        free = [self.free_name(name if i == 0 else f"{name}_{i}") for i in range(outputs)]
        made = [ir.Value(name=n) for n in free]
        found = ir.convenience.convert_attributes(dict(attributes or {}))
        return ir.Node(domain, op_type, inputs, found, outputs=made, name=f"{free[0]}_node")

    def replace(self, old: ir.Value, new: ir.Node) -> None:
        """Put a node of one output where `old` is made, under its name, and drop what made it if nothing reads it."""
        before = old.producer()
        assert before is not None
        value = new.outputs[0]
        value.shape, value.type = old.shape, old.type
        new.metadata_props.update(before.metadata_props)
        self.graph.insert_after(before, new)
        self.exchange_names(old, value)
        new.name = before.name or value.name
        old.replace_all_uses_with(value, replace_graph_outputs=True)
        self.drop(before)

    def drop(self, node: ir.Node) -> None:
        """Remove a node that nothing reads, and what only it read."""
        waiting = [node]
        while waiting:
            current = waiting.pop()
            if current.graph is None or any(v.uses() or v.is_graph_output() for v in current.outputs):
                continue
            read = [v.producer() for v in current.inputs if v is not None]
            self.graph.remove(current, safe=True)
            waiting += [producer for producer in read if producer is not None]


def sole_user(value: ir.Value) -> ir.Node | None:
    """The node that reads `value`, if it is one, reads it once, and the graph does not return it."""
    uses = value.uses()
    return next(iter(uses)).node if len(uses) == 1 and not value.is_graph_output() else None


def branches(node: ir.Node) -> Iterator[ir.Graph]:
    """The graphs inside a node, of If, Loop and Scan."""
    for found in node.attributes.values():
        if found.type is ir.AttributeType.GRAPH:
            yield found.value
        elif found.type is ir.AttributeType.GRAPHS:
            yield from found.value


def reads(node: ir.Node) -> Iterator[ir.Value]:
    """What a node reads, and what its branches read of the graph that it stands in."""
    yield from (v for v in node.inputs if v is not None)
    for branch in branches(node):
        for inner in branch.all_nodes():
            yield from (v for v in inner.inputs if v is not None and v.graph is node.graph)
        yield from (v for v in branch.outputs if v.graph is node.graph)
