"""Batches as an ONNX model takes them, checked first: onnxruntime runs some that make no sense."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
from torch import Tensor

from qcompile.backends.onnx.values import is_constant
from qcompile.errors import CalibrationError, nearest

Array = np.ndarray[Any, Any]

# before, every initializer had to be an input too, and none of those can be fed (ONNX, IR.md, "Graphs")
_FIRST_IR_WITH_DEFAULTS = 4


def inputs_of(model: ir.Model) -> dict[str, ir.Value]:
    """The inputs that can be fed, by name; one that is an initializer too has a default."""
    has_defaults = model.ir_version >= _FIRST_IR_WITH_DEFAULTS
    return {str(value.name): value for value in model.graph.inputs if has_defaults or not value.is_initializer()}


def to_feed(batch: Mapping[str, Any], inputs: Mapping[str, ir.Value], index: int) -> dict[str, Array]:
    """The arrays of a batch.  inputs: of the model, by name. index: of the batch, for messages.

    An input with a default need not be given.

    Raises CalibrationError for an input that is missing or unknown, of another type or rank, or of sizes that
    contradict the model or each other.
    """
    if not isinstance(batch, Mapping):
        raise CalibrationError(f"batch {index} is {type(batch).__name__}, not a dict of the inputs {list(inputs)}")
    if unknown := next((name for name in batch if name not in inputs), None):
        raise CalibrationError(
            f"batch {index} has {unknown!r}, which is no input of the model; nearest names: "
            f"{nearest(str(unknown), inputs)}: leave it out or rename it"
        )
    if missing := next((name for name, value in inputs.items() if name not in batch and not is_constant(value)), None):
        value = inputs[missing]
        raise CalibrationError(
            f"batch {index} lacks the input {missing!r} ({_kind(value)} {_shape(value)}): add it; it has {list(batch)}"
        )
    feed = {name: _array(x, name, index) for name, x in batch.items()}
    for name, x in feed.items():
        _check(x, inputs[name], f"{name!r} {list(x.shape)} of batch {index}")
    _check_sizes(feed, inputs, index)
    return feed


def sizes_of(feed: Mapping[str, Array], inputs: Mapping[str, ir.Value]) -> dict[str, int]:
    """The sizes that a batch gives to the symbols in the shapes of inputs."""
    return {symbol: size for _, symbol, size in _symbols(feed, inputs)}


def _array(x: Any, name: str, index: int) -> Array:
    if not isinstance(x, Tensor | np.ndarray):
        raise CalibrationError(f"{name!r} of batch {index} is {type(x).__name__}: give a torch tensor or a numpy array")
    try:
        # unlike ascontiguousarray, it leaves a scalar its rank
        return np.asarray(x.detach().cpu().numpy() if isinstance(x, Tensor) else x, order="C")
    except TypeError as e:
        raise CalibrationError(f"{name!r} of batch {index} cannot become a numpy array ({e}): convert it first") from e


def _check(x: Array, value: ir.Value, where: str) -> None:
    if value.dtype is not None and x.dtype != value.dtype.numpy():
        raise CalibrationError(f"{where} is of {x.dtype} where the model takes {value.dtype.numpy()}: convert it")
    if value.shape is None:
        return
    fits = x.ndim == len(value.shape)
    if not fits or any(isinstance(n, int) and n != size for n, size in zip(value.shape, x.shape, strict=True)):
        raise CalibrationError(f"{where} does not fit the model's {_shape(value)}: change the batch's shape")


def _check_sizes(feed: Mapping[str, Array], inputs: Mapping[str, ir.Value], index: int) -> None:
    first: dict[str, tuple[str, int]] = {}
    for name, symbol, size in _symbols(feed, inputs):
        other, known = first.setdefault(symbol, (name, size))
        if known != size:
            raise CalibrationError(
                f"batch {index} has {symbol!r} of {known} in {other!r} {list(feed[other].shape)} and of {size} in "
                f"{name!r} {list(feed[name].shape)}: give both the same size"
            )
    tokens, mask = feed.get("input_ids"), feed.get("attention_mask")
    # with a cache, the mask also covers what came before
    cached = any(name.startswith("past") for name in inputs)
    if tokens is None or mask is None or mask.ndim != 2 or cached or mask.shape == tokens.shape:
        return
    raise CalibrationError(
        f"batch {index} has an attention_mask {list(mask.shape)} for input_ids {list(tokens.shape)}: "
        "give both one shape"
    )


def _symbols(feed: Mapping[str, Array], inputs: Mapping[str, ir.Value]) -> list[tuple[str, str, int]]:
    """Input, symbol and size, of every axis that a symbol stands for."""
    return [
        (name, str(symbol.value), size)
        for name, x in feed.items()
        for symbol, size in zip(inputs[name].shape or (), x.shape, strict=False)
        if isinstance(symbol, ir.SymbolicDim) and symbol.value is not None
    ]


def _kind(value: ir.Value) -> str:
    return "of unknown type" if value.dtype is None else str(value.dtype.numpy())


def _shape(value: ir.Value) -> str:
    sizes = () if value.shape is None else value.shape
    return f"[{', '.join(str(s if isinstance(s, int) else s.value or '?') for s in sizes)}]"
