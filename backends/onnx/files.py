"""ONNX files: opened without reading their data, and written whole or not at all."""

import logging
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError, EncodeError

from qcompile.backends.onnx.quantized import check_qparams, require_float
from qcompile.backends.onnx.validate import LIMIT, read_proto, tensors
from qcompile.errors import ModelError

_LOG = logging.getLogger(__name__)

# bytes that nodes, names and types may take beside the tensors of one file
_ROOM = 2**27
# smaller tensors stay in the model's file, where shapes and axes are looked for
_SMALL = 1024
# a line of a Python traceback, or the path of a source file
_SOURCE = re.compile(r'File "|[/\\][\w.-]+\.py\b')


def read_model(path: str | Path, *, quantized: bool = False) -> ir.Model:
    """The model of an .onnx file. Its external data stays on disk until a tensor is asked for.

    quantized: accept a model that is quantized already; the values of its scales are checked.
    Raises ModelError for anything that is no sound model, naming the place; see `validate.read_proto`.
    """
    path = Path(path)
    proto = read_proto(path)
    try:
        model = ir.from_proto(proto)
    except ir.serde.SerdeError as e:
        raise ModelError(f"{str(path)!r} is broken: {e}; export the model again") from e
    # absolute, so that the data is found when the working directory changes
    folder = path.parent.absolute()
    for tensor in _external(model):
        tensor.base_dir = folder
    if quantized:
        check_qparams(model)
    else:
        require_float(model, str(path))
    return model


def write_model(
    model: ir.Model,
    path: str | Path,
    *,
    source: str | Path | None = None,
    external: bool | None = None,
    prove: Callable[[Path], object] | None = None,
) -> None:
    """Write a model to an .onnx file: at every moment the path holds the old model or the new one, whole.

    source: the file that the model was made from, which is never overwritten, nor is its data. external: whether
    tensors go to a file of their own beside it, `<name>.data`, or `<name>.1.data` and so on while that is taken;
    None: only if the model is larger than the 2 GB that one file can hold. prove: looks at the whole file before it
    gets its name; what it raises is raised, and nothing is written.
    The model is not changed. What its exporter noted of local files (see `strip_sources`) is left out.
    Raises ModelError if the path cannot be written, or is the source; nothing is written then.
    """
    path = Path(path)
    require_place(path, model, None if source is None else Path(source))
    small = _size(model) + _ROOM <= LIMIT
    if external is False and not small:
        raise ModelError(
            f"the model's tensors take {_size(model)} bytes, more than one .onnx file can hold (2 GB): "
            "let their data be external"
        )
    data = _free_name(path) if external or not small else None
    copy = model.clone()
    strip_sources(copy)
    before = _own_data(path)
    new = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with _told(path):
            new.mkdir()
            _write(copy, new / path.name, data)
        if prove is not None:
            prove(new / path.name)
        with _told(path):
            _put(new, path, data)
    finally:
        shutil.rmtree(new, ignore_errors=True)
    for old in before:
        _remove(old)


def strip_sources(model: ir.Model) -> int:
    """Remove what exporters note of files of the machine they ran on (stack traces, docs); how many notes went."""
    count = 0
    for thing in _noted(model):
        leaks = [k for k, v in thing.metadata_props.items() if k.endswith("stack_trace") or _SOURCE.search(v)]
        for key in leaks:
            del thing.metadata_props[key]
        count += len(leaks)
        if thing.doc_string and _SOURCE.search(thing.doc_string):
            thing.doc_string = None
            count += 1
    return count


def _noted(model: ir.Model) -> Iterator[Any]:
    """Everything of a model that has metadata and a docstring."""
    yield model
    for graph in (*model.graphs(), *model.functions.values()):
        yield graph
        yield from graph.inputs
        if isinstance(graph, ir.Graph):
            yield from graph.initializers.values()
        for node in graph:
            yield node
            yield from node.outputs


def require_place(path: Path, model: ir.Model, source: Path | None) -> None:
    """Raise ModelError if a model that was made from `source` cannot be written to this path."""
    if path.is_symlink():
        raise ModelError(f"{str(path)!r} is a link to {str(path.resolve())!r}: give the file itself, or a new name")
    if path.is_dir():
        raise ModelError(f"{str(path)!r} is a folder; give the name of a file in it")
    if not path.parent.is_dir():
        raise ModelError(f"there is no folder {str(path.parent)!r}: make it first, or choose another place")
    if not path.exists():
        return
    if source is not None and source.exists() and os.path.samefile(path, source):
        raise ModelError(f"{str(path)!r} is the source model {str(source)!r}, which is kept: choose another name")
    read = [Path(tensor.path) for tensor in _external(model)]
    read += [] if source is None else _data_of(source)
    own = _data_of(path)
    for file in dict.fromkeys(read):
        if file.exists() and any(os.path.samefile(file, place) for place in (path, *own) if place.exists()):
            raise ModelError(
                f"writing {str(path)!r} would replace {str(file)!r}, the data of the source model: choose another name"
            )


def size_on_disk(path: str | Path) -> int:
    """Bytes of an .onnx file and of the files that hold its data."""
    path = Path(path)
    return sum(file.stat().st_size for file in (path, *_data_of(path)) if file.exists())


@contextmanager
def _told(path: Path) -> Iterator[None]:
    """What goes wrong while writing, as ModelError."""
    try:
        yield
    except OSError as e:
        raise ModelError(
            f"cannot write {str(path)!r}: {e.strerror or e}; check the folder's permissions and free space"
        ) from e
    except (EncodeError, ir.serde.SerdeError, ValueError) as e:
        raise ModelError(f"cannot write {str(path)!r}: {e}; report the model that shows this") from e


def _size(model: ir.Model) -> int:
    return sum(tensor.nbytes for tensor in _tensors(model) if tensor.dtype != ir.DataType.STRING)


def _external(model: ir.Model) -> Iterator[ir.ExternalTensor]:
    return (tensor for tensor in _tensors(model) if isinstance(tensor, ir.ExternalTensor))


def _tensors(model: ir.Model) -> Iterator[Any]:
    for graph in model.graphs():
        yield from (value.const_value for value in graph.initializers.values() if value.const_value is not None)
    for graph in (*model.graphs(), *model.functions.values()):
        for node in graph:
            for attribute in node.attributes.values():
                yield from _held(attribute)


def _held(attribute: ir.Attr) -> tuple[Any, ...]:
    """The tensors of an attribute."""
    if attribute.is_ref():
        return ()
    if attribute.type == ir.AttributeType.TENSOR:
        return (attribute.value,)
    return tuple(attribute.value) if attribute.type == ir.AttributeType.TENSORS else ()


def _free_name(path: Path) -> str:
    """A name for the model's data that no file has, so that writing it disturbs no model."""
    name, number = f"{path.name}.data", 0
    while os.path.lexists(path.with_name(name)):
        number += 1
        name = f"{path.name}.{number}.data"
    return name


def _own_data(path: Path) -> list[Path]:
    """Data files of the model at `path` that carry its name: of no use once it is replaced."""
    ours = re.compile(rf"{re.escape(path.name)}(\.\d+)?\.data")
    return [file for file in _data_of(path) if ours.fullmatch(file.name) and file.parent == path.parent]


def _data_of(path: Path) -> list[Path]:
    """The data files that the model at `path` names; none if it is no model."""
    try:
        proto = onnx.ModelProto.FromString(path.read_bytes())
    except (OSError, DecodeError):
        return []
    places = (e.value for t in tensors(proto) for e in t.external_data if e.key == "location")
    return [path.parent / place for place in dict.fromkeys(places)]


def _write(model: ir.Model, path: Path, data: str | None) -> None:
    """Write to a folder of its own.  model: a copy; its tensors are replaced by what the file holds of them."""
    for graph in (*model.graphs(), *model.functions.values()):
        for node in graph:
            for name, attribute in list(node.attributes.items()):
                if any(isinstance(tensor, ir.ExternalTensor) for tensor in _held(attribute)):
                    node.attributes[name] = _inlined(attribute)
    if data is not None:
        ir.save(model, path, format="protobuf", external_data=data, size_threshold_bytes=_SMALL)
        return
    for graph in model.graphs():
        for value in graph.initializers.values():
            if isinstance(value.const_value, ir.ExternalTensor):
                value.const_value = _in_memory(value.const_value)
    ir.save(model, path, format="protobuf")


def _inlined(attribute: ir.Attr) -> ir.Attr:
    held = [_in_memory(t) if isinstance(t, ir.ExternalTensor) else t for t in _held(attribute)]
    value = held[0] if attribute.type == ir.AttributeType.TENSOR else held
    return ir.Attr(attribute.name, attribute.type, value, doc_string=attribute.doc_string)


def _in_memory(tensor: ir.ExternalTensor) -> ir.Tensor:
    # a view of the mapped file: read when it is written, and never held whole
    return ir.Tensor(tensor.numpy(), dtype=tensor.dtype, shape=tensor.shape, name=tensor.name)


def _put(new: Path, path: Path, data: str | None) -> None:
    """Give written files their names: the data first, under a name that no model reads yet."""
    try:
        if data is not None and (new / data).exists():
            os.replace(new / data, path.with_name(data))
        os.replace(new / path.name, path)
    finally:
        if data is not None and (new / path.name).exists():
            path.with_name(data).unlink(missing_ok=True)


def _remove(old: Path) -> None:
    try:
        old.unlink(missing_ok=True)
    except OSError as e:
        _LOG.warning("%r belonged to the model that was replaced and could not be removed: %s", str(old), e)
