"""PyTorch models to float ONNX: dynamic in batch and length, with the model's own names, and shown to compute the same.

The exporter has traps that give wrong graphs without a word: a tensor passed for two inputs makes them one, sizes of 1
are taken for constants, and some opsets are written as others. So nothing is returned before onnxruntime has agreed
with torch on other data of other sizes.
"""

import copy
import inspect
import logging
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from qcompile.backends.onnx.agree import Axis, Example, check_agreement
from qcompile.backends.onnx.files import strip_sources, write_model
from qcompile.backends.onnx.validate import NEWEST_OPSET
from qcompile.errors import UnsupportedError
from qcompile.watch import evaluating

_LOG = logging.getLogger(__name__)

# the first with 4-bit types and blocks; RMSNorm and RotaryEmbedding as single ops come at 23, where the exporter's
# Llama fails for more than one sequence
OPSET = 21
# what the exporter's own functions are written for; below it converts, and may not arrive
_OLDEST_OPSET = 18
# of these a Hugging Face model's result keeps the first that it has: caches and hidden states are no results
_RESULTS = ("logits", "last_hidden_state")
_CONSTANTS = (bool, int, float, str, type(None))


def export_model(
    model: nn.Module | ExportedProgram,
    example: Any,
    path: str | Path | None = None,
    *,
    opset: int | None = None,
    dynamic: bool = True,
) -> ir.Model:
    """The model as float ONNX, also written to `path` unless that is None.

    example: a batch that the model takes: a dict of keyword arguments, a tuple of positional ones, or a tensor; values
    that are no tensors are fixed. An ExportedProgram takes its own where this is None. opset: 21 where None.
    dynamic: batch and length are free: the first axis of inputs that share the first input's, and the second of token
    ids and of float inputs with three axes. An axis that the model itself fixes stays fixed, with a warning. The axes
    of an ExportedProgram are as it has them.
    Inputs are named as the model's arguments; a Hugging Face result as its field, logits or last_hidden_state; other
    results "output", or "output_0" and so on. Nodes keep the path of their module in the metadata
    "pkg.torch.onnx.name_scopes".
    Raises UnsupportedError if torch cannot export the model, or if onnxruntime then disagrees with torch by more than
    rounding explains; ModelError if `path` cannot be written. Nothing is written in either case.
    """
    opset = OPSET if opset is None else opset
    if not _OLDEST_OPSET <= opset <= NEWEST_OPSET:
        raise UnsupportedError(f"opset {opset} is not among those that are written, {_OLDEST_OPSET} to {NEWEST_OPSET}")
    traced = _given(model, example) if isinstance(model, ExportedProgram) else _traced(model, example, dynamic)
    exported = _translated(traced, opset)
    _name_axes(exported, traced)
    strip_sources(exported)
    check_agreement(exported, traced.example, traced.name)
    if path is not None:
        write_model(exported, path)
    return exported


@dataclass(frozen=True, kw_only=True, eq=False)
class _Traced:
    """A model as torch.export has it, and how to run the original. name: of its class. results: names of outputs."""

    program: ExportedProgram
    name: str
    example: Example
    results: Sequence[str]


def _traced(model: nn.Module, example: Any, dynamic: bool) -> _Traced:
    name = type(model).__name__
    if odd := next((n for n, p in model.named_parameters() if p.dtype == torch.bfloat16), None):
        raise UnsupportedError(
            f"parameter {odd!r} of {name} is bfloat16, which onnxruntime's CPU cannot multiply: export model.float()"
        )
    values, by_position = _bound(model, example)
    tensors = {key: x for key, x in values.items() if isinstance(x, Tensor)}
    fixed = {key: x for key, x in values.items() if not isinstance(x, Tensor)}
    if not tensors:
        raise UnsupportedError(f"the example of {name} holds no tensor: give a batch that the model takes")
    if "use_cache" in _parameters(model):
        fixed["use_cache"] = False

    def run(*inputs: Tensor) -> dict[str, Tensor]:
        if by_position:
            return named_results(model(*inputs), name)
        return named_results(model(**dict(zip(tensors, inputs, strict=True)), **fixed), name)

    free = _free_axes(tensors) if dynamic else {}
    inputs = _grown(tensors, free)
    with evaluating(model), torch.no_grad():
        # first, so that what the model thinks of the example is its own error
        results = list(run(*inputs.values()))
        shapes = tuple({axis: Dim.AUTO for axis in free.get(key, ())} for key in inputs)
        program = _quietly(
            lambda: torch.export.export(
                _shell(model, list(tensors), run), tuple(inputs.values()), dynamic_shapes=shapes, strict=False
            ),
            f"torch.export cannot trace {name}",
        )
    axes = _axes(program)
    for key, wanted in free.items():
        for axis in wanted:
            if axes[key][axis].symbol is None:
                _LOG.warning(
                    "%s fixes axis %d of %r at %d: the ONNX model takes no other", name, axis, key, axes[key][axis].size
                )

    def reference(*inputs: Tensor) -> list[Tensor]:
        with evaluating(model), torch.no_grad():
            return list(run(*inputs).values())

    # sizes of 1 are ruled out by tracing, not by the model
    example_of = Example(inputs=inputs, axes=axes, reference=reference, takes_one=True)
    return _Traced(program=program, name=name, example=example_of, results=results)


def _given(program: ExportedProgram, example: Any) -> _Traced:
    args, kwargs = program.example_inputs or ((), {})
    if isinstance(example, Mapping):
        args, kwargs = (), dict(example)
    elif example is not None:
        args, kwargs = (example,) if isinstance(example, Tensor) else tuple(example), {}
    names = [str(name) for name in program.graph_signature.user_inputs]
    values = [*args, *kwargs.values()]
    if len(values) != len(names) or not all(isinstance(x, Tensor) for x in values):
        raise UnsupportedError(
            f"the program takes {len(names)} tensors ({', '.join(names)}), got an example of {len(values)}: "
            "give one tensor for each"
        )
    inputs = dict(zip(kwargs or names, (x.clone() for x in values), strict=True))
    inputs = {name: inputs[name] for name in names} if kwargs else inputs
    module = program.module()

    def run(*inputs: Tensor) -> dict[str, Tensor]:
        by_name = dict(zip(names, inputs, strict=True))
        with torch.no_grad():
            return named_results(module(*inputs) if not kwargs else module(**by_name), "the program")

    results = list(run(*inputs.values()))
    found = Example(
        inputs=inputs, axes=_axes(program), reference=lambda *inputs: list(run(*inputs).values()), takes_one=False
    )
    return _Traced(program=program, name="the program", example=found, results=results)


def _bound(model: nn.Module, example: Any) -> tuple[dict[str, Any], bool]:
    """The example's values by the names of the model's arguments, and whether it takes them only by position."""
    name = type(model).__name__
    if isinstance(example, Mapping):
        values, by_position = dict(example), False
    elif isinstance(example, Tensor | tuple | list):
        given = (example,) if isinstance(example, Tensor) else tuple(example)
        bound = inspect.signature(model.forward).bind(*given).arguments
        kinds = {parameter.kind for key, parameter in _parameters(model).items() if key in bound}
        by_position = bool(kinds & {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.POSITIONAL_ONLY})
        values = {f"input_{i}": x for i, x in enumerate(given)} if by_position else dict(bound)
    else:
        raise UnsupportedError(
            f"the example of {name} is {type(example).__name__}, not a dict of keyword arguments, a tuple of "
            "positional ones, or a tensor"
        )
    allowed = (Tensor,) if by_position else (Tensor, *_CONSTANTS)
    if odd := next((key for key, x in values.items() if not isinstance(x, allowed)), None):
        raise UnsupportedError(
            f"{odd!r} in the example of {name} is {type(values[odd]).__name__}: an ONNX model takes tensors; "
            "wrap the model so that it does"
        )
    return values, by_position


def _parameters(model: nn.Module) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(model.forward).parameters


def named_results(result: Any, name: str) -> dict[str, Tensor]:
    """What a model gave, by name: of a Hugging Face result the field that counts, else every tensor.

    Raises UnsupportedError if there is none.
    """
    if isinstance(result, Tensor):
        return {"output": result}
    if isinstance(result, Mapping):
        kept = next((key for key in _RESULTS if isinstance(result.get(key), Tensor)), None)
        named = {str(k): x for k, x in result.items() if isinstance(x, Tensor) and kept in (None, k)}
    else:
        several = result if isinstance(result, tuple | list) else ()
        named = {f"output_{i}": x for i, x in enumerate(several) if isinstance(x, Tensor)}
    if not named:
        raise UnsupportedError(
            f"{name} gives {type(result).__name__} without tensors at its top: wrap it so that it returns tensors"
        )
    return named


def _free_axes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """The axes that are batch or length, by input: those of one size with the first input's."""
    batch = next((x.shape[0] for x in tensors.values() if x.dim()), None)
    sequences = {k: x for k, x in tensors.items() if x.dim() == (3 if x.is_floating_point() else 2)}
    length = next((x.shape[1] for x in sequences.values() if x.shape[0] == batch), None)
    return {
        key: tuple(
            axis
            for axis in range(min(x.dim(), 2))
            if (x.shape[0] == batch if axis == 0 else key in sequences and x.shape[1] == length)
        )
        for key, x in tensors.items()
    }


def _grown(tensors: Mapping[str, Tensor], free: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """The tensors, each with memory of its own, with free axes of at least 2 and of different sizes."""
    sizes = {axis: next((tensors[k].shape[axis] for k, axes in free.items() if axis in axes), 0) for axis in (0, 1)}
    length = max(sizes[1], 2)
    batch = max(sizes[0], 2)
    # larger than the length: a model may know no more places, but takes any number of sequences
    new = {0: batch + (batch == length), 1: length}
    grown = {}
    for key, x in tensors.items():
        for axis in free.get(key, ()):
            x = x.index_select(axis, torch.arange(new[axis], device=x.device) % x.shape[axis])
        grown[key] = x.detach().clone()
    return grown


def _shell(model: nn.Module, names: Sequence[str], run: Callable[..., dict[str, Tensor]]) -> nn.Module:
    """The model with another signature: its modules keep their paths, and the model itself is not touched."""
    shell = copy.copy(model)

    def forward(*inputs: Tensor) -> tuple[Tensor, ...]:
        return tuple(run(*inputs).values())

    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    forward.__signature__ = inspect.Signature([inspect.Parameter(name, kind) for name in names])  # type: ignore[attr-defined]
    shell.forward = forward
    return shell


def _axes(program: ExportedProgram) -> dict[str, tuple[Axis, ...]]:
    """The axes of each input, as tracing left them."""
    nodes = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
    found = {}
    for name in program.graph_signature.user_inputs:
        shape = nodes[str(name)].meta["val"].shape
        found[str(name)] = tuple(_axis(size, program) for size in shape)
    return found


def _axis(size: Any, program: ExportedProgram) -> Axis:
    # tracing may leave a constant in a symbol's clothes
    if isinstance(size, int) or size.node.expr.is_number:
        return Axis(size=int(size), symbol=None)
    bounds = program.range_constraints.get(size.node.expr)
    low, high = (2, None) if bounds is None else (bounds.lower, bounds.upper)
    most = int(high) if high is not None and high.is_finite and high < 2**31 else None
    return Axis(size=int(size.node.hint), symbol=str(size), least=int(low), most=most)


def _translated(traced: _Traced, opset: int) -> ir.Model:
    program = _quietly(
        lambda: torch.onnx.export(
            traced.program,
            dynamo=True,
            opset_version=opset,
            input_names=list(traced.example.inputs),
            output_names=list(traced.results),
            verbose=False,
        ),
        f"torch.onnx cannot export {traced.name} at opset {opset}",
    )
    model = program.model
    if (got := model.opset_imports.get("")) != opset:
        raise UnsupportedError(
            f"torch.onnx wrote {traced.name} at opset {got} where {opset} was asked for: ask for another opset, "
            f"such as {OPSET}"
        )
    return model


def _quietly(make: Callable[[], Any], failed: str) -> Any:
    with warnings.catch_warnings():
        # remarks of the exporter on itself; whether its work is right is looked at afterwards
        warnings.simplefilter("ignore")
        try:
            return make()
        except Exception as e:
            first = next(iter(str(e).strip().splitlines()), type(e).__name__)
            raise UnsupportedError(
                f"{failed}: {first}; see the cause above, and wrap or change the part of the model that it names"
            ) from e


def _name_axes(model: ir.Model, traced: _Traced) -> None:
    """Call the free axes "batch" and "sequence" everywhere."""
    names: dict[str, str] = {}
    for axes in traced.example.axes.values():
        for axis, name in zip(axes, ("batch", "sequence"), strict=False):
            if axis.symbol is not None:
                names.setdefault(axis.symbol, name)
    pattern = re.compile(r"\b\w+\b")
    for graph in model.graphs():
        made = (value for node in graph for value in node.outputs)
        for value in {*graph.inputs, *graph.outputs, *made}:
            if value.shape is not None:
                value.shape = ir.Shape([_renamed(size, pattern, names) for size in value.shape])


def _renamed(size: Any, pattern: re.Pattern[str], names: Mapping[str, str]) -> int | str | None:
    text = size if isinstance(size, int) else size.value
    if not isinstance(text, str):
        return text
    # a size that tracing found to be fixed is still written as a symbol
    return int(text) if text.isdecimal() else pattern.sub(lambda found: names.get(found[0], found[0]), text)
