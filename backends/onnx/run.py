"""Runs a graph in canonical form on the CPU: the oracle quantizes and dequantizes, onnxruntime does all the rest.

The graph is cut where the oracle has to step in, and each part between is a session of its own.
"""

import ctypes
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import torch
from onnx import GraphProto, ModelProto, TensorProto, ValueInfoProto, helper
from onnx_ir.tensor_adapters import to_torch_dtype
from torch import Tensor

from qcompile.backends.onnx.edit import reads
from qcompile.backends.onnx.expand import runnable, turned_name
from qcompile.backends.onnx.ops import (
    DEQUANTIZE,
    DOMAIN,
    OUTLIERS,
    QUANTIZE,
    QUANTIZE_DYNAMIC,
    attribute,
    is_op,
)
from qcompile.backends.onnx.runtime import keep_sums_exact
from qcompile.backends.onnx.values import constant, held_tensor, is_numpys_own, onnx_dtype, tensor_of
from qcompile.errors import GraphError
from qcompile.numerics import QParams, dequantize, find_qparams, quantize
from qcompile.spec import parse_spec

# smaller constants stand in the session's model, where onnxruntime may look at their values
_SMALL = 1024
_LARGE = 2**30
_INTEGERS = ("INT8", "INT16", "INT32", "INT64", "UINT8", "UINT16", "UINT32", "UINT64")
_ORACLE = (QUANTIZE, QUANTIZE_DYNAMIC, DEQUANTIZE, OUTLIERS)
# what onnxruntime gives numpy; of all else it gives the address
_IN_NUMPY = frozenset(ir.DataType[name] for name in ("FLOAT", "DOUBLE", "FLOAT16", "BOOL", *_INTEGERS))
_Held = dict[ir.Value, Tensor]


@dataclass(frozen=True, kw_only=True)
class _Session:
    """A part of the graph: what it reads of the parts before, and what it makes for others.

    constants: the memory that its larger constants are read from.
    """

    session: ort.InferenceSession
    reads: Sequence[ir.Value]
    makes: Sequence[ir.Value]
    constants: Sequence[ort.OrtValue]


class Runner:
    """Runs a model as it is now, as often as wanted. Later edits of it are not seen."""

    def __init__(self, model: ir.Model, watch: Sequence[ir.Value] = ()) -> None:
        self._graph = model.graph
        self._inputs = list(model.graph.inputs)
        self._outputs = list(model.graph.outputs)
        self._watch = list(watch)
        wanted = {*self._outputs, *self._watch}
        self._steps = [_step(model, nodes, wanted) for nodes in _cut(model.graph)]

    def __call__(self, args: Sequence[Any]) -> tuple[Any, Mapping[ir.Value, Tensor]]:
        """The outputs, a tuple if there are several, and the watched tensors.

        args: tensors in the order of the graph's inputs.  Raises GraphError if they do not fit.
        """
        if len(args) != len(self._inputs):
            names = ", ".join(repr(v.name) for v in self._inputs)
            raise GraphError(f"the graph takes {len(self._inputs)} inputs ({names}), got {len(args)}")
        held: _Held = {}
        for value, arg in zip(self._inputs, args, strict=True):
            held[value] = _checked(value, arg)
        with torch.no_grad():
            for step in self._steps:
                step(held)
        results = tuple(_tensor(value, held) for value in self._outputs)
        seen = {value: _tensor(value, held) for value in self._watch}
        return (results[0] if len(results) == 1 else results), seen


def _checked(value: ir.Value, arg: Any) -> Tensor:
    tensor = torch.as_tensor(arg).detach().cpu()
    if value.dtype is not None and onnx_dtype(tensor.dtype) != value.dtype:
        raise GraphError(f"input {value.name!r} takes {value.dtype.name.lower()}, got {str(tensor.dtype)[6:]}")
    return tensor


def _tensor(value: ir.Value, held: _Held) -> Tensor:
    if value in held:
        return held[value]
    found = constant(value)
    if found is None:
        raise GraphError(f"{value.name} was not computed: it is no value of this graph, or nothing makes it")
    return found


def _cut(graph: ir.Graph) -> list[list[ir.Node]]:
    """The nodes in parts that can run one after the other; the oracle's stand alone in theirs."""
    stages: dict[ir.Node, int] = {}
    for node in graph:
        before = max((stages[p] for p in _producers(node, graph)), default=0)
        is_oracles = is_op(node, *_ORACLE, domain=DOMAIN)
        # odd stages are the oracle's
        stages[node] = before if before % 2 == is_oracles else before + 1
    parts: dict[int, list[ir.Node]] = {}
    for node, stage in stages.items():
        parts.setdefault(stage, []).append(node)
    return [parts[stage] for stage in sorted(parts)]


def _producers(node: ir.Node, graph: ir.Graph) -> Iterator[ir.Node]:
    for value in reads(node):
        producer = value.producer()
        if producer is not None and producer.graph is graph:
            yield producer


def _step(model: ir.Model, nodes: Sequence[ir.Node], wanted: set[ir.Value]) -> Callable[[_Held], None]:
    if is_op(nodes[0], *_ORACLE, domain=DOMAIN):

        def compute(held: _Held) -> None:
            for node in nodes:
                _ask_oracle(node, held)

        return compute
    part = _session(model, nodes, wanted)
    return lambda held: _run(part, held)


def _ask_oracle(node: ir.Node, held: _Held) -> None:
    x, *rest = (None if v is None else _tensor(v, held) for v in node.inputs)
    assert x is not None
    if node.op_type == OUTLIERS:
        assert rest[0] is not None
        reached = (x.abs() >= rest[0]).reshape(-1, x.shape[-1]).any(0)
        held[node.outputs[0]] = torch.where(reached, x, torch.zeros((), dtype=x.dtype))
        return
    spec = parse_spec(attribute(node, "spec"))
    if node.op_type == QUANTIZE_DYNAMIC:
        qparams = find_qparams(x, spec)
        found = (quantize(x, qparams), qparams.scale, qparams.zero)
        held |= {value: t for value, t in zip(node.outputs, found, strict=True) if t is not None}
        return
    scale, zero, levels = (*rest, None, None)[:3]
    assert scale is not None
    qparams = QParams(spec=spec, scale=scale, zero=zero, levels=levels)
    if node.op_type == QUANTIZE:
        held[node.outputs[0]] = quantize(x, qparams)
    else:
        held[node.outputs[0]] = dequantize(x, qparams, to_torch_dtype(ir.DataType(attribute(node, "dtype"))))


def _session(model: ir.Model, nodes: Sequence[ir.Node], wanted: set[ir.Value]) -> _Session:
    inside = {value for node in nodes for value in node.outputs}
    read = [v for v in dict.fromkeys(v for node in nodes for v in reads(node)) if v not in inside]
    constants = [v for v in read if v.is_initializer()]
    outer = [v for v in read if not v.is_initializer()]
    here = set(nodes)
    makes = [v for v in inside if v in wanted or any(use.node not in here for use in v.uses())]
    makes = [v for node in nodes for v in node.outputs if v in set(makes)]
    opset = model.graph.opset_imports.get("", model.graph.opset_imports.get("ai.onnx", 1))
    options = ort.SessionOptions()
    options.log_severity_level = 3
    keep_sums_exact(options)
    graph = GraphProto(name="part")
    graph.node.extend(proto for node in nodes for proto in runnable(node, opset))
    graph.input.extend(_info(v) for v in outer)
    graph.output.extend(_info(v) for v in makes)
    outside: dict[str, ort.OrtValue] = {}
    for value in constants:
        turned = {turned_name(use.node) if use.idx == 1 else None for use in value.uses() if use.node in here}
        for name in turned or {None}:
            _add_constant(graph, value, name, outside)
    if sum(value.tensor_size_in_bytes() for value in outside.values()) > _LARGE:
        # it would copy every weight into an order that is faster to read
        options.add_session_config_entry("session.disable_prepacking", "1")
    if outside:
        options.add_external_initializers(list(outside), list(outside.values()))
    proto = ModelProto(ir_version=min(model.ir_version, 11), graph=graph)
    proto.opset_import.extend(
        helper.make_opsetid(domain, version)
        for domain, version in model.graph.opset_imports.items()
        if domain != DOMAIN
    )
    try:
        session = ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    except Exception as e:
        raise GraphError(f"onnxruntime cannot run this graph: {e}") from e
    return _Session(session=session, reads=outer, makes=makes, constants=list(outside.values()))


def _add_constant(graph: GraphProto, value: ir.Value, turned: str | None, outside: dict[str, ort.OrtValue]) -> None:
    """Add a constant as it is, or turned, under that name."""
    held = value.const_value
    assert held is not None
    if turned is not None:
        held = held_tensor(tensor_of(held).t(), turned)
    name = str(value.name) if turned is None else turned
    proto = TensorProto(name=name, data_type=int(held.dtype), dims=[int(d) for d in held.shape])
    if held.dtype is ir.DataType.STRING:
        proto.string_data.extend(held.numpy().flatten().tolist())
    elif held.size <= _SMALL or held.dtype.bitwidth < 8:
        proto.raw_data = held.tobytes()
    else:
        proto.data_location = TensorProto.EXTERNAL
        # never opened: onnxruntime is given the memory instead
        proto.external_data.add(key="location", value="given")
        outside[name] = _ort_value(np.ascontiguousarray(held.numpy()), held.dtype)
    graph.initializer.append(proto)


def _ort_value(array: np.ndarray, kind: ir.DataType) -> ort.OrtValue:
    if is_numpys_own(array):
        return ort.OrtValue.ortvalue_from_numpy(array)
    return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(array.view(f"u{array.itemsize}"), int(kind))


def _info(value: ir.Value) -> ValueInfoProto:
    if value.dtype is None:
        raise GraphError(f"the type of {value.name} is not known, and so it cannot pass from one part to another")
    return helper.make_tensor_value_info(value.name, int(value.dtype), None)


def _run(part: _Session, held: _Held) -> None:
    feeds = {str(v.name): _to_ort(held[v], v) for v in part.reads}
    names = [str(v.name) for v in part.makes]
    try:
        results = part.session.run_with_ort_values(names, feeds)
    except Exception as e:
        raise GraphError(f"onnxruntime failed: {e}") from e
    held |= {value: _from_ort(result) for value, result in zip(part.makes, results, strict=True)}


def _to_ort(tensor: Tensor, value: ir.Value) -> ort.OrtValue:
    tensor = tensor.contiguous()
    kind = onnx_dtype(tensor.dtype)
    if tensor.dtype.is_floating_point and tensor.dtype not in (torch.float16, torch.float32, torch.float64):
        bits = tensor.view(torch.uint8 if tensor.element_size() == 1 else torch.int16).numpy()
        return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(bits.view(f"u{bits.itemsize}"), int(kind))
    return ort.OrtValue.ortvalue_from_numpy(tensor.numpy())


def _from_ort(value: ort.OrtValue) -> Tensor:
    kind = ir.DataType(value.element_type())
    if kind in _IN_NUMPY:
        return torch.from_numpy(value.numpy())
    memory = bytearray(ctypes.string_at(value.data_ptr(), value.tensor_size_in_bytes()))
    # an empty buffer cannot be read from
    flat = (
        torch.frombuffer(memory, dtype=to_torch_dtype(kind)) if memory else torch.empty(0, dtype=to_torch_dtype(kind))
    )
    return flat.reshape(value.shape())
