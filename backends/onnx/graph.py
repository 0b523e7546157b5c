"""A live onnx_ir graph seen through the lens. Values are its values."""

from collections.abc import Mapping, Sequence
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor

from qcompile.backends.onnx.edit import Editor, branches, reads
from qcompile.backends.onnx.moves import moved
from qcompile.backends.onnx.ops import (
    BATCH_NORM_EPSILON,
    DEQUANTIZE,
    DOMAIN,
    LINEAR,
    MODULE_PATH,
    OUTLIERS,
    QUANTIZE,
    QUANTIZE_DYNAMIC,
    attribute,
    is_op,
    spelling,
    standard,
)
from qcompile.backends.onnx.run import Runner
from qcompile.backends.onnx.values import (
    constant,
    dtype,
    held_tensor,
    is_constant,
    qualified_name,
    set_qualified_name,
    shape,
)
from qcompile.channels import Channels
from qcompile.errors import GraphError
from qcompile.formats import Integer
from qcompile.graph import Op, Shape
from qcompile.numerics import QParams, tiles
from qcompile.spec import ALL, Spec, parse_spec

# domain and op type of what can be added, and the attributes it gets
_NEW: dict[Op, tuple[str, str, dict[str, Any]]] = {
    Op.LINEAR: (DOMAIN, LINEAR, {}),
    Op.MUL: ("", "Mul", {}),
    Op.ADD: ("", "Add", {}),
    Op.SELECT: ("", "Gather", {"axis": -1}),
    Op.OUTLIERS: (DOMAIN, OUTLIERS, {}),
}


class OnnxGraph:
    """`qcompile.graph.Graph` on a model in canonical form; the door makes them (`open_onnx`).

    Constants are initializers; nodes carry their name in their metadata. A QUANTIZE that finds its qparams while
    running has three outputs, of which the codes alone are a value.
    """

    def __init__(self, model: ir.Model) -> None:
        self._model = model
        self._edit = Editor(model.graph)

    @property
    def model(self) -> ir.Model:
        """The live model, in canonical form."""
        return self._model

    def values(self) -> Sequence[ir.Value]:
        graph = self._model.graph
        made = [value for node in graph for value in node.outputs if _is_value(node, value)]
        return [*graph.inputs, *graph.initializers.values(), *made]

    def outputs(self) -> Sequence[ir.Value]:
        return [_value(value) for value in self._model.graph.outputs]

    def op(self, value: ir.Value) -> Op:
        if value.is_graph_input():
            return Op.INPUT
        if value.is_initializer():
            return Op.CONSTANT
        found = spelling(value)
        return Op.OTHER if found is None else found.op

    def inputs(self, value: ir.Value) -> Sequence[ir.Value | None]:
        node = value.producer()
        if node is None:
            return []
        found = spelling(value)
        if found is None:
            return list(dict.fromkeys(_value(v) for v in reads(node)))
        read = [node.inputs[i] if i < len(node.inputs) else None for i in found.operands]
        return [None if v is None else _value(v) for v in read]

    def users(self, value: ir.Value) -> Sequence[ir.Value]:
        found: dict[ir.Value, None] = {}
        for part in _parts(value):
            for user in part.uses():
                node = self._outermost(user.node)
                found |= {v: None for v in node.outputs if _is_value(node, v)}
        return list(found)

    def shape(self, value: ir.Value) -> Shape:
        return shape(value)

    def name(self, value: ir.Value) -> str:
        if is_constant(value):
            return qualified_name(value)
        node = value.producer()
        return "" if node is None else node.metadata_props.get(MODULE_PATH, "")

    def label(self, value: ir.Value) -> str:
        node = value.producer()
        if node is None:
            return self.op(value).value
        domain = standard(node.domain)
        return f"{domain}.{node.op_type}" if domain else node.op_type

    def constant(self, value: ir.Value) -> Tensor | None:
        return constant(value)

    def moved(self, value: ir.Value, channels: Channels) -> Channels | None:
        return moved(value, channels)

    def qparams(self, value: ir.Value) -> QParams | Spec:
        node = value.producer()
        if node is None or not is_op(node, QUANTIZE, QUANTIZE_DYNAMIC, DEQUANTIZE, domain=DOMAIN):
            raise GraphError(f"{value.name} ({self.label(value)}) has no qparams: it neither quantizes nor dequantizes")
        spec = parse_spec(attribute(node, "spec"))
        if node.op_type == QUANTIZE_DYNAMIC:
            return spec
        scale, zero, levels = (None if v is None else constant(v) for v in (*node.inputs, None, None, None)[1:4])
        if scale is None:
            return spec
        stored, chosen = node.meta.get("stored", {}), node.meta.get("codes")
        return QParams(spec=spec, scale=scale, zero=zero, levels=levels, stored=stored, codes=chosen)

    def epsilon(self, value: ir.Value) -> float:
        node = value.producer()
        if node is None or self.op(value) is not Op.BATCH_NORM:
            raise GraphError(f"{value.name} ({self.label(value)}) has no epsilon: it is no batch norm")
        return float(attribute(node, "epsilon", BATCH_NORM_EPSILON))

    def add_constant(self, name: str, tensor: Tensor, like: ir.Value | None = None) -> ir.Value:
        if like is not None:
            known = dtype(like)
            if known is None:
                raise GraphError(
                    f"the dtype of {like.name} ({self.label(like)}) is not known, which {name!r} should take"
                )
            tensor = tensor.to(known)
        value = self._edit.constant(name, held_tensor(tensor, name))
        set_qualified_name(value, name)
        return value

    def add_op(self, op: Op, inputs: Sequence[ir.Value | None], name: str = "") -> ir.Value:
        if op not in _NEW:
            raise GraphError(f"cannot add {op.value!r}; what can be added: {', '.join(o.value for o in _NEW)}")
        domain, op_type, attributes = _NEW[op]
        x = inputs[0]
        assert x is not None
        made = _new_shape(op, inputs)
        read = list(inputs)
        while read[-1] is None:
            read.pop()
        node = self._edit.node(op_type, read, attributes, name=name or f"{x.name}_{op.value}", domain=domain)
        node.metadata_props[MODULE_PATH] = name
        self._insert(node, after=[v for v in inputs if v is not None])
        return _known(node.outputs[0], made, x.type)

    def add_qdq(self, value: ir.Value, qparams: QParams | Spec) -> ir.Value:
        if dtype(value) is None:
            raise GraphError(f"cannot quantize {value.name} ({self.label(value)}): its dtype is not known")
        spec = qparams if isinstance(qparams, Spec) else qparams.spec
        if value.shape is not None:
            # raises if the tiles do not fit; a dynamic size may be anything
            tiles(torch.empty([1 if d is None else d for d in shape(value)], device="meta"), spec.granularity)
        elif spec.granularity.columns != ALL:
            raise GraphError(
                f"cannot quantize {value.name} ({self.label(value)}) under {spec}: its rank is not known, which groups "
                "need; infer the model's shapes, or take one scale a token"
            )
        codes_type = ir.TensorType(ir.DataType.INT8 if _is_signed(spec) else ir.DataType.UINT8)
        name, made = qualified_name(value), value.shape
        if isinstance(qparams, Spec):
            quantize = self._edit.node(QUANTIZE_DYNAMIC, [value], {"spec": str(spec)}, name=f"{name}.codes", outputs=3)
            for part in quantize.outputs[1:]:
                part.type = ir.TensorType(ir.DataType.FLOAT)
            read = _found_parts(quantize, spec)
        else:
            found = {"scale": qparams.scale, "zero": qparams.zero, "levels": qparams.levels}
            read = [None if t is None else self.add_constant(f"{name}.{part}", t) for part, t in found.items()]
            quantize = self._edit.node(QUANTIZE, [value, *read], {"spec": str(spec)}, name=f"{name}.codes")
        attributes = {"spec": str(spec), "dtype": int(value.dtype or 0)}
        codes = _known(quantize.outputs[0], made, codes_type)
        dequantize = self._edit.node(DEQUANTIZE, [codes, *read], attributes, name=f"{name}.dequantized")
        for node in (quantize, dequantize):
            node.meta["stored"] = {} if isinstance(qparams, Spec) else qparams.stored
            node.meta["codes"] = None if isinstance(qparams, Spec) else qparams.codes
        self._insert(quantize, after=[value])
        self._model.graph.insert_after(quantize, dequantize)
        return _known(dequantize.outputs[0], made, value.type)

    def set_input(self, value: ir.Value, index: int, new: ir.Value) -> None:
        inputs, node, found = self.inputs(value), value.producer(), spelling(value)
        if node is None or index >= len(inputs):
            raise GraphError(f"{value.name} ({self.label(value)}) has {len(inputs)} inputs, no number {index}")
        if not self._is_before(new, node):
            raise GraphError(f"{value.name} cannot read {new.name}, which is computed after it")
        if is_op(node, DEQUANTIZE, domain=DOMAIN):
            self._set_codes(node, new)
        elif found is not None:
            position = found.operands[index]
            node.resize_inputs(max(position + 1, len(node.inputs)))
            node.replace_input_with(position, new)
        else:
            old = inputs[index]
            assert old is not None
            self._replace_in(old, new, [node])

    def replace_uses(self, old: ir.Value, new: ir.Value) -> None:
        if is_op(old.producer(), QUANTIZE_DYNAMIC, domain=DOMAIN) is not is_op(
            new.producer(), QUANTIZE_DYNAMIC, domain=DOMAIN
        ):
            raise GraphError(f"{old.name} and {new.name}: only a dynamic quantize can stand in for another")
        # new may be computed from old: what lies between still has to read old
        between = _ancestors(new)
        nodes = dict.fromkeys(self._outermost(use.node) for part in _parts(old) for use in part.uses())
        readers = [node for node in nodes if node not in between]
        if early := [node for node in readers if not self._is_before(new, node)]:
            raise GraphError(f"{early[0].outputs[0].name} cannot read {new.name}, which is computed after it")
        codes = [node for node in readers if is_op(node, DEQUANTIZE, domain=DOMAIN) and node.inputs[0] is old]
        for node in codes:
            self._set_codes(node, new)
        self._replace_in(old, new, [node for node in readers if node not in codes])
        if old.is_graph_output():
            self._return(old, new)

    def prune(self) -> int:
        graph, removed = self._model.graph, 0
        for node in reversed(list(graph)):
            if any(v.uses() or v.is_graph_output() for v in node.outputs):
                continue
            removed += sum(_is_value(node, v) for v in node.outputs)
            graph.remove(node, safe=True)
        for name, value in list(graph.initializers.items()):
            if not value.uses() and not value.is_graph_output():
                del graph.initializers[name]
                removed += 1
        return removed

    def run(self, args: Sequence[Any], watch: Sequence[ir.Value]) -> tuple[Any, Mapping[ir.Value, Tensor]]:
        return Runner(self._model, watch)(args)

    def _outermost(self, node: ir.Node) -> ir.Node:
        """The node of this graph inside whose branches `node` stands, or itself."""
        if node.graph is self._model.graph:
            return node
        for outer in self._model.graph:
            if any(node in inner.all_nodes() for inner in branches(outer)):
                return outer
        raise GraphError(f"{node.name} ({node.op_type}) belongs to no part of this graph")

    def _is_before(self, value: ir.Value, node: ir.Node) -> bool:
        """True if the value is known when the node runs."""
        producer = value.producer()
        if producer is None:
            return True
        return next(n for n in self._model.graph if n is node or n is producer) is producer is not node

    def _insert(self, node: ir.Node, after: Sequence[ir.Value]) -> None:
        """Put a node right after the last that makes any of these values."""
        graph = self._model.graph
        producers = {v.producer() for v in after} - {None}
        last = next((n for n in reversed(graph) if n in producers), None) if producers else None
        if last is not None:
            graph.insert_after(last, node)
        elif len(graph):
            graph.insert_before(graph[0], node)
        else:
            graph.append(node)

    def _set_codes(self, dequantize: ir.Node, codes: ir.Value) -> None:
        producer = codes.producer()
        if is_op(producer, QUANTIZE_DYNAMIC, domain=DOMAIN):
            assert producer is not None
            read = [codes, *_found_parts(producer, parse_spec(attribute(producer, "spec")))]
        elif is_op(producer, QUANTIZE, domain=DOMAIN):
            assert producer is not None
            read = [codes, *producer.inputs[1:]]
        elif isinstance(self.qparams(dequantize.outputs[0]), QParams):
            read = [codes, *dequantize.inputs[1:]]
        else:
            raise GraphError(
                f"{dequantize.outputs[0].name} cannot read {codes.name}: "
                "its qparams come from the quantize that it reads now"
            )
        if producer is not None and is_op(producer, QUANTIZE, QUANTIZE_DYNAMIC, domain=DOMAIN):
            dequantize.attributes["spec"] = producer.attributes["spec"]
            dequantize.meta["stored"] = producer.meta.get("stored", {})
        dequantize.resize_inputs(len(read))
        for index, value in enumerate(read):
            dequantize.replace_input_with(index, value)

    def _replace_in(self, old: ir.Value, new: ir.Value, nodes: Sequence[ir.Node]) -> None:
        for before, after in zip(_parts(old), _parts(new), strict=False):
            for use in before.uses():
                if self._outermost(use.node) in nodes:
                    use.node.replace_input_with(use.idx, after)

    def _return(self, old: ir.Value, new: ir.Value) -> None:
        """Return `new` in place of `old`, under the same name: it is the model's interface."""
        graph = self._model.graph
        if new.producer() is None or new.is_graph_output():
            node = self._edit.node("Identity", [new], name=f"{new.name}_returned", domain="")
            graph.append(node)
            new = _known(node.outputs[0], new.shape, new.type)
        self._edit.exchange_names(old, new)
        for index, value in enumerate(graph.outputs):
            if value is old:
                graph.outputs[index] = new


def _is_value(node: ir.Node, value: ir.Value) -> bool:
    if is_op(node, QUANTIZE_DYNAMIC, domain=DOMAIN):
        return value.index() == 0
    return value.index() == 0 or bool(value.uses()) or value.is_graph_output()


def _value(value: ir.Value) -> ir.Value:
    """The value that one belongs to: scale and zero of a dynamic QUANTIZE are no values of their own."""
    node = value.producer()
    return node.outputs[0] if node is not None and is_op(node, QUANTIZE_DYNAMIC, domain=DOMAIN) else value


def _parts(value: ir.Value) -> Sequence[ir.Value]:
    node = value.producer()
    return node.outputs if node is not None and is_op(node, QUANTIZE_DYNAMIC, domain=DOMAIN) else [value]


def _found_parts(quantize: ir.Node, spec: Spec) -> list[ir.Value | None]:
    """Scale and zero of a dynamic QUANTIZE, as a DEQUANTIZE reads them."""
    return [quantize.outputs[1], *([] if spec.symmetric else [quantize.outputs[2]])]


def _ancestors(value: ir.Value) -> set[ir.Node]:
    """The nodes that `value` is computed by."""
    found: set[ir.Node] = set()
    waiting = [value.producer()]
    while waiting:
        node = waiting.pop()
        if node is None or node in found:
            continue
        found.add(node)
        waiting += [v.producer() for v in reads(node)]
    return found


def _known(value: ir.Value, made: ir.Shape | None, kind: Any) -> ir.Value:
    value.shape, value.type = made, kind
    return value


def _is_signed(spec: Spec) -> bool:
    return spec.symmetric and isinstance(spec.format, Integer)


def _new_shape(op: Op, inputs: Sequence[ir.Value | None]) -> ir.Shape | None:
    """Of a new op.  Raises GraphError if it cannot work on these shapes."""
    x, other = [v.shape if v is not None else None for v in inputs[:2]]
    if x is None or other is None:
        return None
    if op is Op.OUTLIERS:
        return x
    if op is Op.SELECT:
        return ir.Shape([*x[:-1], *other])
    if op is Op.LINEAR:
        if isinstance(x[-1], int) and x[-1] != other[-1]:
            raise GraphError(f"a linear with a weight {list(other)} cannot read {list(x)}: the last sizes differ")
        return ir.Shape([*x[:-1], other[0]])
    return _broadcast(x, other)


def _broadcast(x: ir.Shape, other: ir.Shape) -> ir.Shape:
    rank = max(len(x), len(other))
    a, b = ([*[1] * (rank - len(s)), *s] for s in (x, other))
    for d, e in zip(a, b, strict=True):
        if isinstance(d, int) and isinstance(e, int) and d != e and 1 not in (d, e):
            raise GraphError(f"shapes {list(x)} and {list(other)} do not go together")
    return ir.Shape([e if d == 1 else d for d, e in zip(a, b, strict=True)])
