"""A live torch.fx graph seen through the lens. Values are its nodes."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import count
from operator import getitem
from typing import Any

import torch
from torch import Tensor, fx

from qcompile.backends.fx import ops
from qcompile.backends.fx.moves import moved
from qcompile.backends.fx.targets import (
    CASTS,
    NEW_CALLS,
    epsilon_of,
    is_call,
    label,
    operands,
    set_operand,
    spelling,
    writes_to,
)
from qcompile.backends.fx.values import (
    attribute,
    constant,
    dtype,
    example,
    fake_constant,
    fake_mode,
    infer,
    is_constant,
)
from qcompile.channels import Channels
from qcompile.errors import GraphError
from qcompile.graph import Op, Shape
from qcompile.numerics import QParams
from qcompile.spec import Spec, parse_spec

# what a new node takes over from the value that it was made for, so that messages of torch can name its origin
_ORIGIN = ("nn_module_stack", "stack_trace")
# has what every module has
_EMPTY = fx.GraphModule({}, fx.Graph())


class FxGraph:
    """`qcompile.graph.Graph` on a GraphModule in canonical form; the door makes them (`open_dynamo`, `open_exported`).

    Constants are get_attr nodes with meta["qualified_name"]; ops carry their name in meta["module_path"]; values
    have an example in meta["example_value"]. A dynamic QUANTIZE makes a list [codes, scale, zero], whose getitem
    nodes are no values of their own.
    """

    def __init__(self, module: fx.GraphModule) -> None:
        self._module = module
        self._mode = fake_mode(module.graph)
        self._edited = False

    @property
    def module(self) -> fx.GraphModule:
        """The live module. It takes the graph's inputs; its constants are attributes."""
        if self._edited:
            self._module.graph.lint()
            self._module.recompile()
            self._edited = False
        return self._module

    def constants(self) -> dict[str, Tensor]:
        """The tensors that the graph reads, by attribute of the module."""
        return {str(node.target): attribute(node) for node in self._module.graph.nodes if is_constant(node)}

    def values(self) -> Sequence[fx.Node]:
        return [node for node in self._module.graph.nodes if node.op != "output" and _value(node) is node]

    def outputs(self) -> Sequence[fx.Node]:
        returned: list[fx.Node] = []
        fx.map_arg(self._module.graph.output_node().args, returned.append)
        return [_value(node) for node in returned]

    def op(self, value: fx.Node) -> Op:
        if value.op == "placeholder":
            return Op.INPUT
        if value.op == "get_attr":
            return Op.CONSTANT if is_constant(value) else Op.OTHER
        found = spelling(value)
        # sizes are added and multiplied too, but they are no tensors
        if found is None or isinstance(example(value), int | float | torch.SymInt | torch.SymFloat):
            return Op.OTHER
        return found.op

    def inputs(self, value: fx.Node) -> Sequence[fx.Node | None]:
        found = spelling(value)
        if found is None or self.op(value) is Op.OTHER:
            return list(dict.fromkeys(_value(node) for node in value.all_input_nodes))
        return [None if node is None else _value(node) for node in operands(value, found)]

    def users(self, value: fx.Node) -> Sequence[fx.Node]:
        return list(dict.fromkeys(user for user in _readers(value) if user.op != "output"))

    def shape(self, value: fx.Node) -> Shape:
        known = example(value)
        if is_call(value, ops.QUANTIZE_DYNAMIC) and known is not None:
            known = known[0]
        return tuple(_size(d) for d in known.shape) if isinstance(known, Tensor) else ()

    def name(self, value: fx.Node) -> str:
        if is_constant(value):
            return str(value.meta.get("qualified_name", value.target))
        return str(value.meta.get("module_path", ""))

    def label(self, value: fx.Node) -> str:
        return label(value)

    def constant(self, value: fx.Node) -> Tensor | None:
        return constant(value)

    def qparams(self, value: fx.Node) -> QParams | Spec:
        if is_call(value, ops.QUANTIZE_DYNAMIC):
            return parse_spec(str(value.args[1]))
        if not is_call(value, ops.QUANTIZE, ops.DEQUANTIZE):
            raise GraphError(f"{value.name} ({label(value)}) has no qparams: it neither quantizes nor dequantizes")
        scale, zero, levels = (constant(arg) if isinstance(arg, fx.Node) else None for arg in value.args[1:4])
        spec = parse_spec(str(value.args[4]))
        if scale is None:
            return spec
        kept = {key: value.meta[key] for key in ("stored", "codes", "lowered") if key in value.meta}
        return QParams(spec=spec, scale=scale, zero=zero, levels=levels, **kept)

    def moved(self, value: fx.Node, channels: Channels) -> Channels | None:
        return moved(value, channels)

    def epsilon(self, value: fx.Node) -> float:
        found = spelling(value)
        number = None if found is None else epsilon_of(value, found)
        if number is None:
            raise GraphError(f"{value.name} ({label(value)}) has no epsilon that is a number: it is no batch norm")
        return number

    def add_constant(self, name: str, tensor: Tensor, like: fx.Node | None = None) -> fx.Node:
        if like is not None:
            known = example(like)
            if not isinstance(known, Tensor):
                raise GraphError(f"the dtype of {like.name} ({label(like)}) is not known, which {name!r} should take")
            tensor = tensor.to(known.device, known.dtype)
        # called after the last part of its name, which is the same for every layer that a frame of Dynamo runs
        attribute_name = free_attribute(name.rpartition(".")[2], lambda taken: hasattr(self._module, taken))
        # how a constant was computed is of no use to it
        tensor = tensor if tensor.grad_fn is None else tensor.detach()
        self._module.register_buffer(attribute_name, tensor)
        graph = self._module.graph
        # before all that may read it, and after the inputs, whose order is the signature
        first = next(node for node in graph.nodes if node.op != "placeholder")
        with graph.inserting_before(first):
            node = graph.get_attr(attribute_name)
        node.meta = {"qualified_name": name, "example_value": fake_constant(tensor, graph)}
        self._edited = True
        return node

    def add_op(self, op: Op, inputs: Sequence[fx.Node | None], name: str = "") -> fx.Node:
        if op not in NEW_CALLS:
            raise GraphError(f"cannot add {op.value!r}; what can be added: {', '.join(o.value for o in NEW_CALLS)}")
        read = [None if value is None else self._tensor(value) for value in inputs]
        self._place_beside(_present(inputs[0]), inputs[1:])
        target, args = NEW_CALLS[op](*read)
        node = self._call(target, args, after=max(value for value in read if value is not None))
        node.meta["module_path"] = name
        return node

    def add_qdq(self, value: fx.Node, qparams: QParams | Spec) -> fx.Node:
        target = dtype(value)
        if target is None:
            raise GraphError(f"cannot quantize {value.name} ({label(value)}): its dtype is not known")
        if isinstance(qparams, Spec):
            return self._add_dynamic(value, qparams, target)
        name = self.name(value) if is_constant(value) else value.name
        found = {"scale": qparams.scale, "zero": qparams.zero, "levels": qparams.levels}
        read = [None if t is None else self.add_constant(f"{name}.{part}", t) for part, t in found.items()]
        spec = str(qparams.spec)
        codes = self._call(ops.QUANTIZE, (value, *read, spec), after=value)
        dequantized = self._call(ops.DEQUANTIZE, (codes, *read, spec, target), after=codes)
        for node in (codes, dequantized):
            node.meta |= {"stored": qparams.stored, "codes": qparams.codes, "lowered": qparams.lowered}
        return dequantized

    def set_input(self, value: fx.Node, index: int, new: fx.Node) -> None:
        inputs = self.inputs(value)
        if index >= len(inputs):
            raise GraphError(f"{value.name} ({label(value)}) has {len(inputs)} inputs, no number {index}")
        if not new < value:
            raise GraphError(f"{value.name} cannot read {new.name}, which is computed after it")
        self._edited = True
        found = spelling(value)
        if is_call(value, ops.DEQUANTIZE):
            self._set_codes(value, new)
        elif found is not None and self.op(value) is not Op.OTHER:
            set_operand(value, index, self._tensor(new), found)
        else:
            value.replace_input_with(self._tensor(_present(inputs[index])), self._tensor(new))

    def replace_uses(self, old: fx.Node, new: fx.Node) -> None:
        if is_call(old, ops.QUANTIZE_DYNAMIC) is not is_call(new, ops.QUANTIZE_DYNAMIC):
            raise GraphError(f"{old.name} and {new.name}: only a dynamic quantize can stand in for another")
        # new may be computed from old: what lies between still has to read old
        between = _ancestors(new, after=old)
        readers = [user for user in old.users if user not in between]
        if early := [user for user in readers if user < new]:
            raise GraphError(f"{early[0].name} cannot read {new.name}, which is computed after it")
        old.replace_all_uses_with(new, delete_user_cb=lambda user: user not in between)
        self._edited = True

    def prune(self) -> int:
        graph, removed = self._module.graph, 0
        for node in reversed(list(graph.nodes)):
            if node.users or not _has_no_effect(node):
                continue
            removed += _value(node) is node
            graph.erase_node(node)
        read = {str(node.target) for node in graph.nodes if node.op == "get_attr"}
        for name in [*self._module._parameters, *self._module._buffers]:
            if name not in read:
                delattr(self._module, name)
        self._edited = True
        return removed

    def run(self, args: Sequence[Any], watch: Sequence[fx.Node]) -> tuple[Any, Mapping[fx.Node, Tensor]]:
        self._module.graph.lint()
        # the nodes are read one by one: no code need be made of them
        interpreter = _Watching(self._module, watch)
        with torch.no_grad():
            return interpreter.run(*args), interpreter.seen

    def _add_dynamic(self, value: fx.Node, spec: Spec, target: torch.dtype) -> fx.Node:
        found = self._call(ops.QUANTIZE_DYNAMIC, (value, str(spec)), after=value)
        parts = self._parts(found, spec)
        last = max(part for part in parts if part is not None)
        return self._call(ops.DEQUANTIZE, (*parts, None, str(spec), target), after=last)

    def _parts(self, found: fx.Node, spec: Spec) -> list[fx.Node | None]:
        """Codes, scale and zero of a dynamic QUANTIZE, as nodes."""
        return [self._part(found, 0), self._part(found, 1), None if spec.symmetric else self._part(found, 2)]

    def _part(self, found: fx.Node, index: int) -> fx.Node:
        existing = (user for user in found.users if user.target is getitem and user.args[1] == index)
        if part := next(existing, None):
            return part
        return self._call(getitem, (found, index), after=found)

    def _tensor(self, value: fx.Node) -> fx.Node:
        """The node that makes the value's tensor."""
        return self._part(value, 0) if is_call(value, ops.QUANTIZE_DYNAMIC) else value

    def _set_codes(self, dequantize: fx.Node, codes: fx.Node) -> None:
        _, *qparams, spec, target = dequantize.args
        if is_call(codes, ops.QUANTIZE_DYNAMIC):
            spec = codes.args[1]
            dequantize.args = (*self._parts(codes, parse_spec(str(spec))), None, spec, target)
        elif is_call(codes, ops.QUANTIZE):
            dequantize.args = (codes, *codes.args[1:], target)
            dequantize.meta["stored"] = codes.meta["stored"]
        elif isinstance(self.qparams(dequantize), QParams):
            dequantize.args = (codes, *qparams, spec, target)
        else:
            raise GraphError(
                f"{dequantize.name} cannot read {codes.name}: its qparams come from the quantize that it reads now"
            )

    def _place_beside(self, value: fx.Node, constants: Sequence[fx.Node | None]) -> None:
        """Move constants to the device of `value`: who computes one from a plan knows no devices."""
        device = getattr(example(value), "device", None)
        for node in constants:
            tensor = attribute(node) if node is not None and is_constant(node) else None
            if node is None or device is None or tensor is None or tensor.is_meta or tensor.device == device:
                continue
            moved = tensor.to(device)
            setattr(self._module, str(node.target), moved)
            node.meta["example_value"] = fake_constant(moved, self._module.graph)

    def _call(self, target: Any, args: tuple[Any, ...], after: fx.Node) -> fx.Node:
        """A new call right after a node; nothing is inserted if it cannot work on these shapes."""
        known = infer(target, args, self._mode)
        graph = self._module.graph
        if after.op == "placeholder":
            after = [node for node in graph.nodes if node.op in ("placeholder", "get_attr")][-1]
        with graph.inserting_after(after):
            node = graph.call_function(target, args)
        node.meta = {key: after.meta[key] for key in _ORIGIN if key in after.meta}
        node.meta["example_value"] = known
        self._edited = True
        return node


class _Watching(fx.Interpreter):
    """Runs a module and keeps what some of its nodes make."""

    def __init__(self, module: fx.GraphModule, watch: Sequence[fx.Node]) -> None:
        super().__init__(module)
        self._watch = frozenset(watch)
        self.seen: dict[fx.Node, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n in self._watch:
            seen = result[0] if is_call(n, ops.QUANTIZE_DYNAMIC) else result
            self.seen[n] = seen.clone() if any(writes_to(user, n) for user in n.users) else seen
        return result


def free_attribute(name: str, is_taken: Callable[[str], bool]) -> str:
    """An attribute of a GraphModule that is not taken yet, after a name without dots."""
    plain = name if name.isidentifier() else "constant"
    candidates = (plain if i == 0 else f"{plain}_{i}" for i in count())
    return next(c for c in candidates if not is_taken(c) and not hasattr(_EMPTY, c))


def _value(node: fx.Node) -> fx.Node:
    """The value that a node belongs to: parts of a dynamic QUANTIZE are no values of their own."""
    part_of = node.args[0] if node.target is getitem else node
    return part_of if isinstance(part_of, fx.Node) and is_call(part_of, ops.QUANTIZE_DYNAMIC) else node


def _readers(value: fx.Node) -> Iterator[fx.Node]:
    for user in value.users:
        if _value(user) is value and user is not value:
            yield from user.users
        else:
            yield user


def _size(dimension: int | torch.SymInt) -> int | None:
    return dimension if isinstance(dimension, int) else dimension.node.maybe_as_int()


def _present(value: fx.Node | None) -> fx.Node:
    assert value is not None
    return value


def _ancestors(node: fx.Node, after: fx.Node) -> set[fx.Node]:
    """`node` and all that it is computed from, as far as it stands after that other node."""
    found: set[fx.Node] = set()
    waiting = [node]
    while waiting:
        current = waiting.pop()
        if current in found or not after < current:
            continue
        found.add(current)
        waiting += current.all_input_nodes
    return found


def _has_no_effect(node: fx.Node) -> bool:
    known = spelling(node) is not None or node.target is getitem or is_call(node, *CASTS)
    return node.op == "get_attr" or known
