"""What an ONNX file must be before anything reads it: each defect is found here, and named with its place and remedy.

onnx's checker lets pass what onnxruntime refuses, and onnxruntime what fails only when it runs, so neither is enough.
"""

import os
import re
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from functools import cache
from pathlib import Path
from typing import Any

import onnx
from google.protobuf.message import DecodeError

from qcompile.errors import ModelError, nearest

# opset 28 has no QuantizeLinear in onnxruntime 1.32, and TensorRT 11 ends at 25
NEWEST_OPSET = 27
# protobuf counts in int32
LIMIT = 2**31 - 1
_EXTERNAL = onnx.TensorProto.EXTERNAL
# of types that share a byte; source: TensorProto.DataType, onnx.proto
_BITS = {"UINT4": 4, "INT4": 4, "FLOAT4E2M1": 4, "UINT2": 2, "INT2": 2, "FLOAT6E2M3": 6, "FLOAT6E3M2": 6}


def read_proto(path: Path) -> onnx.ModelProto:
    """The model of a file whose structure is sound; external data is only looked for, never read.

    Raises ModelError for a file that is no model, of an unknown version, with a broken graph or shapes that cannot
    be, or with data that is missing, of the wrong size, or outside the model's folder.
    """
    proto = _parsed(path)
    _check_versions(proto, path)
    for function in proto.functions:
        versions = _versions(function.opset_import)
        _Graphs(proto, versions).check(function, set(function.input), f"function {function.name!r}")
    _Graphs(proto, _versions(proto.opset_import)).check(proto.graph, set(), "the graph")
    for tensor in tensors(proto):
        _check_tensor(tensor, path.parent)
    _run_checker(proto, path)
    return proto


def tensors(proto: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """Every tensor that a model holds: initializers and attributes, in subgraphs and functions too."""
    for graph in (proto.graph, *proto.functions):
        yield from _tensors(graph)


def place(node: onnx.NodeProto) -> str:
    """How a message calls a node: by its name, or by what it makes if it has none."""
    return f"node {node.name!r} ({node.op_type})" if node.name else f"the {node.op_type} that makes {node.output[0]!r}"


def _parsed(path: Path) -> onnx.ModelProto:
    try:
        size = path.stat().st_size
        if path.is_dir():
            raise ModelError(f"{str(path)!r} is a folder; give the .onnx file in it")
        if size == 0:
            raise ModelError(f"{str(path)!r} is empty: export or copy the model again")
        if size > LIMIT:
            raise ModelError(
                f"{str(path)!r} has {size} bytes, more than the 2 GB that protobuf can hold: "
                "export it with external data"
            )
        proto = onnx.ModelProto.FromString(path.read_bytes())
    except OSError as e:
        raise ModelError(f"cannot read {str(path)!r}: {e.strerror or e}; check the path and its permissions") from e
    except DecodeError as e:
        raise ModelError(
            f"{str(path)!r} is no ONNX model, or is cut off after {size} bytes ({e}): export or copy it again"
        ) from e
    if not proto.HasField("graph"):
        raise ModelError(f"{str(path)!r} holds no graph, so it is no ONNX model or is cut off: export or copy it again")
    return proto


def _check_versions(proto: onnx.ModelProto, path: Path) -> None:
    if not 3 <= proto.ir_version <= onnx.IR_VERSION:
        raise ModelError(
            f"{str(path)!r} has IR version {proto.ir_version}; known are 3 to {onnx.IR_VERSION} (onnx "
            f"{onnx.__version__}): export it with another version, or install a newer onnx"
        )
    versions = _versions(proto.opset_import)
    newest = {"": min(NEWEST_OPSET, onnx.defs.onnx_opset_version()), **_newest_of_others()}
    if "" not in versions and not proto.functions and any(not _domain(n.domain) for n in proto.graph.node):
        raise ModelError(f"{str(path)!r} does not say its opset (no opset_import of ai.onnx): export or copy it again")
    for domain, version in versions.items():
        known = newest.get(domain)
        if known is not None and not 1 <= version <= known:
            raise ModelError(
                f"{str(path)!r} is of opset {version} of {domain or 'ai.onnx'!r}; known are 1 to {known}: "
                "export it at opset 21, or convert it with onnx.version_converter"
            )


@cache
def _newest_of_others() -> Mapping[str, int]:
    newest: dict[str, int] = {}
    for schema in onnx.defs.get_all_schemas_with_history():
        if schema.domain:
            newest[schema.domain] = max(schema.since_version, newest.get(schema.domain, 1))
    # of onnxruntime: it has had no second version
    return {**newest, "com.microsoft": 1}


@cache
def _standard_ops() -> Mapping[str, Set[str]]:
    return _by_domain(onnx.defs.get_all_schemas())


@cache
def _runtime_ops() -> Mapping[str, Set[str]]:
    # those that onnxruntime has beyond the standard
    from onnxruntime.capi.onnxruntime_pybind11_state import get_all_operator_schema

    return _by_domain(get_all_operator_schema())


def _by_domain(schemas: Iterable[Any]) -> Mapping[str, Set[str]]:
    ops: dict[str, set[str]] = {}
    for schema in schemas:
        ops.setdefault(schema.domain, set()).add(schema.name)
    return ops


def _versions(imports: Sequence[onnx.OperatorSetIdProto]) -> dict[str, int]:
    return {_domain(entry.domain): entry.version for entry in imports}


def _domain(domain: str) -> str:
    # the standard's two spellings of its default domain
    return "" if domain == "ai.onnx" else domain


class _Graphs:
    """Checks the names and ops of one body, main graph or function, and of the graphs within it."""

    def __init__(self, proto: onnx.ModelProto, versions: Mapping[str, int]) -> None:
        self._functions = {(_domain(f.domain), f.name) for f in proto.functions}
        self._versions = versions

    def check(self, graph: Any, outer: Set[str], where: str) -> None:
        """graph: GraphProto or FunctionProto. outer: names that it may read of those around it."""
        known = set(outer)
        given = [_name(x) for x in graph.input]
        inner = [t.name for t in getattr(graph, "initializer", ())]
        inner += [t.values.name for t in getattr(graph, "sparse_initializer", ())]
        for names, what in ((given, "input"), (inner, "initializer")):
            if twice := _first_repeated(names):
                raise ModelError(f"{what} {twice!r} stands twice in {where}: rename one of the two")
        made = {*given, *inner}
        known |= made
        makers = {name: node for node in reversed(graph.node) for name in node.output if name}
        for node in graph.node:
            self._check_op(node)
            self._check_inputs(node, known, makers)
            outputs = [name for name in node.output if name]
            # a name of the graph around it may be made anew within a subgraph
            if twice := next((name for name in outputs if name in made), None) or _first_repeated(outputs):
                raise ModelError(
                    f"{place(node)} makes {twice!r}, a name that {where} has already: every value is made once, "
                    "so rename one of the two"
                )
            made.update(outputs)
            known.update(outputs)
        for name in map(_name, graph.output):
            if name not in known:
                raise ModelError(
                    f"output {name!r} of {where} is made by no node; nearest names: {nearest(name, known)}: "
                    "export the model again"
                )

    def _check_inputs(self, node: onnx.NodeProto, known: Set[str], makers: Mapping[str, onnx.NodeProto]) -> None:
        if unknown := next((name for name in node.input if name and name not in known), None):
            raise ModelError(_unknown_input(unknown, node, makers, known))
        for attribute in node.attribute:
            for body in (attribute.g,) if attribute.HasField("g") else attribute.graphs:
                self.check(body, known, f"the graph {attribute.name!r} of {place(node)}")

    def _check_op(self, node: onnx.NodeProto) -> None:
        domain, op = _domain(node.domain), node.op_type
        if (domain, op) in self._functions:
            return
        version = self._versions.get(domain)
        if version is None:
            raise ModelError(
                f"{place(node)} is of domain {domain!r}, which the model does not import; imported are "
                f"{sorted(self._versions)}: export it again without custom ops"
            )
        ops = _standard_ops().get(domain)
        if ops is not None and not onnx.defs.has(op, version, domain):
            since = f"it exists only after opset {version}" if op in ops else f"nearest names: {nearest(op, ops)}"
            raise ModelError(
                f"{place(node)} is no op of {domain or 'ai.onnx'!r} at opset {version}; {since}: "
                "export the model again at opset 21 or at a newer one"
            )
        ops = ops or _runtime_ops().get(domain)
        if ops is None:
            raise ModelError(
                f"{place(node)} is of the unknown domain {domain!r}; known are "
                f"{sorted({*_standard_ops(), *_runtime_ops()})}: export the model without custom ops"
            )
        if op not in ops:
            raise ModelError(
                f"{place(node)} is no op of {domain!r}; nearest names: {nearest(op, ops)}: "
                "export the model without custom ops"
            )


def _name(value: Any) -> str:
    # a function's inputs and outputs are bare names
    return value if isinstance(value, str) else value.name


def _first_repeated(names: Sequence[str]) -> str | None:
    seen: set[str] = set()
    return next((name for name in names if name in seen or seen.add(name)), None)  # type: ignore[func-returns-value]


def _unknown_input(name: str, node: onnx.NodeProto, makers: Mapping[str, onnx.NodeProto], known: Set[str]) -> str:
    if name in makers:
        return (
            f"{place(node)} reads {name!r} before {place(makers[name])} makes it: nodes must be topologically sorted; "
            "sort them, or export the model again"
        )
    return (
        f"{place(node)} reads {name!r}, which is no input, initializer or result of any node; nearest names: "
        f"{nearest(name, known)}: export the model again"
    )


def _tensors(graph: Any) -> Iterator[onnx.TensorProto]:
    yield from getattr(graph, "initializer", ())
    for sparse in getattr(graph, "sparse_initializer", ()):
        yield from (sparse.values, sparse.indices)
    for node in graph.node:
        for attribute in node.attribute:
            yield from (attribute.t,) if attribute.HasField("t") else attribute.tensors
            for body in (attribute.g,) if attribute.HasField("g") else attribute.graphs:
                yield from _tensors(body)


def _check_tensor(tensor: onnx.TensorProto, folder: Path) -> None:
    where = f"tensor {tensor.name!r} {list(tensor.dims)}"
    try:
        kind = onnx.TensorProto.DataType.Name(tensor.data_type)
    except ValueError as e:
        raise ModelError(f"{where} is of the unknown data type {tensor.data_type}: install a newer onnx") from e
    if kind == "UNDEFINED" or any(d < 0 for d in tensor.dims):
        raise ModelError(f"{where} is of type {kind} or has a negative size: export the model again")
    if kind == "STRING":
        return
    expected = _bytes(tensor, kind)
    if tensor.data_location == _EXTERNAL:
        _check_external(tensor, where, expected, folder)
    elif tensor.HasField("raw_data") and len(tensor.raw_data) != expected:
        raise ModelError(
            f"{where} of {kind} holds {len(tensor.raw_data)} bytes of raw data where its shape needs {expected}: "
            "export or copy the model again"
        )


def _bytes(tensor: onnx.TensorProto, kind: str) -> int:
    count = 1
    for size in tensor.dims:
        count *= size
    bits = _BITS.get(kind) or onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize * 8
    return -(-count * bits // 8)


def _check_external(tensor: onnx.TensorProto, where: str, expected: int, folder: Path) -> None:
    entries = {entry.key: entry.value for entry in tensor.external_data}
    location = entries.get("location", "")
    file = _data_file(location, where, folder)
    try:
        offset, length = int(entries.get("offset") or 0), int(entries.get("length") or expected)
    except ValueError as e:
        raise ModelError(f"{where} has an offset or length in {location!r} that is no number: export again") from e
    if offset < 0 or length != expected:
        raise ModelError(
            f"{where} lies at byte {offset} of {location!r} with {length} bytes where its shape needs {expected}: "
            "export the model again"
        )
    if offset + length > (size := file.stat().st_size):
        raise ModelError(
            f"{where} ends at byte {offset + length} of {location!r}, which has only {size} bytes and is cut off or "
            "belongs to another model: copy or export it again"
        )


def _data_file(location: str, where: str, folder: Path) -> Path:
    file = folder / location
    inside = os.path.normpath(location)
    if not location or os.path.isabs(location) or inside == ".." or inside.startswith(f"..{os.sep}"):
        raise ModelError(
            f"the data of {where} is said to lie at {location!r}, outside the model's folder, which could be any file "
            "of this machine: put the data beside the model and export it again"
        )
    if not os.path.lexists(file):
        raise ModelError(
            f"the data of {where} is missing: no file {location!r} in {str(folder)!r}; copy it there, beside the model"
        )
    # onnx and onnx_ir refuse both kinds of links, so that a file cannot pass for another
    real = Path(os.path.realpath(file))
    linked = file.is_symlink() or Path(os.path.realpath(folder)) not in real.parents or not real.is_file()
    if linked or not stat.S_ISREG(real.stat().st_mode) or real.stat().st_nlink > 1:
        raise ModelError(
            f"the data of {where} lies in {location!r}, which is a link or no file: copy the model and its data, not "
            "links to them, into a folder (`cp -L`; `hf download --local-dir`)"
        )
    return file


def _run_checker(proto: onnx.ModelProto, path: Path) -> None:
    try:
        # the path, so that models of any size are checked
        onnx.checker.check_model(os.fspath(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as e:
        text = re.sub(r"\s*\n+\s*", " ", str(e)).strip()
        raise ModelError(f"{str(path)!r} is broken: {text}{_shapes(proto, text)}; export the model again") from e


def _shapes(proto: onnx.ModelProto, text: str) -> str:
    """The shapes, as far as they are declared, of what the node named in onnx's message reads."""
    found = re.search(r"(?:node name|Name): ([^\s):]+)", text)
    node = next((n for n in proto.graph.node if found and n.name == found[1]), None)
    if node is None:
        return ""
    shapes = {t.name: list(t.dims) for t in proto.graph.initializer}
    for value in (*proto.graph.input, *proto.graph.value_info):
        dims = value.type.tensor_type.shape.dim
        shapes.setdefault(value.name, [d.dim_param or d.dim_value for d in dims])
    read = (f"{name!r} {shapes.get(name, '')}".strip() for name in node.input)
    return f" ({place(node)} reads {', '.join(read)})"
