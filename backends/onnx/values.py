"""What is known of a value before its graph runs: its tensor if it is a constant, its dtype and its sizes."""

import warnings
from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir.tensor_adapters import TorchTensor, from_torch_dtype, to_torch_dtype
from torch import Tensor

from qcompile.backends.onnx.ops import VECTOR_OPS, VIEWS, attribute, is_op
from qcompile.errors import GraphError
from qcompile.graph import Shape

_QUALIFIED = "qualified_name"
# what onnxscript and torch's exporter write on a constant: what it was made of, and that it is a tensor of the model
FOLDED_FROM = "pkg.onnxscript.optimizer.folded_from"
KIND = "pkg.torch.export.graph_signature.InputSpec.kind"


def tensor_of(held: ir.TensorProtocol) -> Tensor:
    """The same numbers for torch; a view of them if they need no unpacking.

    Raises GraphError for strings, and for types that torch does not have.
    """
    if isinstance(held, ir.LazyTensor):
        held = held.raw()
    if isinstance(held, TorchTensor):
        raw: Tensor = held.raw
        return raw
    wanted = _torch_dtype(held.dtype)
    if wanted is None:
        raise GraphError(f"the constant {held.name!r} is of type {held.dtype.name}, which torch does not have")
    array = np.asarray(held.numpy())
    if not is_numpys_own(array):
        # its bits can cross, but not the type
        return _as_torch(array.view(np.uint8 if array.itemsize == 1 else np.int16)).view(wanted)
    return _as_torch(array)


def is_numpys_own(array: np.ndarray) -> bool:
    """False for the types that ml_dtypes adds."""
    return str(array.dtype.type.__module__) == "numpy"


def _torch_dtype(kind: ir.DataType | None) -> torch.dtype | None:
    if kind is None or kind is ir.DataType.STRING or kind.bitwidth < 8:
        return None
    try:
        found: torch.dtype = to_torch_dtype(kind)
    except (ValueError, TypeError):
        return None
    return found


def _as_torch(array: np.ndarray) -> Tensor:
    # of a negative stride torch cannot make a view
    if any(stride < 0 for stride in array.strides):
        array = np.ascontiguousarray(array)
    with warnings.catch_warnings():
        # a file is mapped read-only, and nobody writes to a constant
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(array)


def held_tensor(tensor: Tensor, name: str) -> ir.TensorProtocol:
    """The tensor as an initializer holds it; nothing is copied if it lies on the CPU."""
    return TorchTensor((tensor if tensor.grad_fn is None else tensor.detach()).cpu(), name=name)


def lazy_tensor(
    source: ir.TensorProtocol,
    change: Callable[[Tensor], Tensor],
    shape: Sequence[int],
    dtype: ir.DataType | None = None,
) -> ir.LazyTensor:
    """`change` of the tensor, which is computed when somebody asks for it and not kept."""

    def made() -> ir.TensorProtocol:
        return held_tensor(change(tensor_of(source)), source.name or "")

    return ir.LazyTensor(made, dtype=dtype or source.dtype, shape=ir.Shape(shape))


def is_constant(value: ir.Value) -> bool:
    """True for an initializer; a graph input of that name is the door's to remove."""
    return value.is_initializer() and value.const_value is not None


def qualified_name(value: ir.Value) -> str:
    """What a constant is called in its model; names in a file are unique, and so may differ."""
    return str(value.meta.get(_QUALIFIED, value.name))


def set_qualified_name(value: ir.Value, name: str) -> None:
    """Call a constant so, whatever its name in the file is."""
    value.meta[_QUALIFIED] = name


def dtype(value: ir.Value) -> torch.dtype | None:
    """Of the tensor; None if unknown, or if torch has no such type."""
    return _torch_dtype(value.dtype)


def is_float(value: ir.Value) -> bool:
    found = dtype(value)
    return found is not None and found.is_floating_point


def onnx_dtype(wanted: torch.dtype) -> ir.DataType:
    found: ir.DataType = from_torch_dtype(wanted)
    return found


def shape(value: ir.Value) -> Shape:
    """Dimensions, None where one is dynamic; () if the rank is not known."""
    if value.shape is None:
        return ()
    return tuple(d if isinstance(d, int) else None for d in value.shape)


def constant(value: ir.Value) -> Tensor | None:
    """The tensor that `value` always is: a constant, or a view of one; for vectors also a cast, sum or product."""
    if is_constant(value):
        assert value.const_value is not None
        return _read(value)
    node = value.producer()
    if node is None or not _reads_constants(value):
        return None
    read = [None if v is None else constant(v) for v in node.inputs]
    held = [tensor for tensor in read if tensor is not None]
    if len(held) < len(read):
        return None
    if is_op(node, *VIEWS):
        return _viewed(node, held)
    return _computed(node, held) if all(tensor.dim() <= 1 for tensor in held) else None


def _reads_constants(value: ir.Value) -> bool:
    """Whether views and vector ops make a value of nothing but constants.

    Residual sums of a whole model are such ops, too, and end soon at something that is none.
    """
    waiting: list[ir.Value | None] = [value]
    seen: set[ir.Value] = set()
    while waiting:
        current = waiting.pop()
        if current is None or (not is_constant(current) and not is_op(current.producer(), *VIEWS, *VECTOR_OPS)):
            return False
        if current in seen or is_constant(current):
            continue
        seen.add(current)
        producer = current.producer()
        assert producer is not None
        waiting += producer.inputs
    return True


def _read(value: ir.Value) -> Tensor | None:
    assert value.const_value is not None
    if _torch_dtype(value.const_value.dtype) is None:
        return None
    try:
        return tensor_of(value.const_value)
    except (OSError, ValueError) as e:
        raise GraphError(
            f"the constant {qualified_name(value)!r} cannot be read: {e}. Its external data is missing or cut off: "
            "copy the data file beside the model again"
        ) from e


def _computed(node: ir.Node, held: Sequence[Tensor]) -> Tensor:
    if node.op_type == "Cast":
        return held[0].to(to_torch_dtype(ir.DataType(attribute(node, "to", 1))))
    return held[0] + held[1] if node.op_type == "Add" else held[0] * held[1]


def _viewed(node: ir.Node, held: Sequence[Tensor]) -> Tensor | None:
    x = held[0]
    if node.op_type == "Transpose":
        return x.permute(attribute(node, "perm", tuple(reversed(range(x.dim())))))
    if node.op_type == "Identity":
        return x
    sizes = None if node.outputs[0].shape is None else shape(node.outputs[0])
    if sizes is None or any(d is None for d in sizes):
        return None
    return x.reshape([d for d in sizes if d is not None])
