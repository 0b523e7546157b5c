"""FUSE: a quantization that finds its scales while running becomes one op, with the norm or activation before it.

A factor of each channel that no fold could move elsewhere (`fold_smooth`) is multiplied with there, too.
Outlier channels that are kept out of it (`split_outliers`) leave the same op: nothing else masks or gathers them.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from operator import getitem
from typing import Any

import torch
from torch import fx

from qcompile.backends.fx import ops
from qcompile.backends.fx.graph import FxGraph
from qcompile.backends.fx.kernels.int8 import OFFSET
from qcompile.backends.fx.kernels.narrow_floats import is_narrow
from qcompile.backends.fx.masked import Masked, find_masked
from qcompile.backends.fx.rows import QUANTIZE_ROWS, why_not
from qcompile.backends.fx.targets import aten, is_call
from qcompile.backends.fx.values import attribute, dtype, example, fake_mode, infer, is_constant
from qcompile.backends.fx.writes import is_written
from qcompile.backends.triton.eight_bit_table import tail_width
from qcompile.backends.triton.fp4_words import unpacked_octaves
from qcompile.backends.triton.pairs import APART
from qcompile.graph import Op
from qcompile.spec import Spec

_GELU = {"none": "gelu", "tanh": "gelu_tanh"}
# torch.nn.functional.layer_norm's own
_LAYER_NORM_EPS = 1e-5
# matmuls that take floats of fewer bits as E4M3, too: where their arguments name the format, and octaves of channels
_TAKES_NARROW: dict[object, tuple[int, int | None]] = {
    torch.ops.qcompile.linear_fp8.default: (8, None),
    torch.ops.qcompile.linear_fp8_triton.default: (5, None),
    torch.ops.qcompile.linear_fp4.default: (7, 4),
    torch.ops.qcompile.linear_fp4_lowered.default: (7, None),
}
# the matmul that takes pairs of rows beside codes of E4M3: where its arguments hold octaves of channels, and pairs
_TAKES_PAIRS, _OCTAVES, _PAIRS = torch.ops.qcompile.linear_fp4_lowered.default, 4, 9
# matmuls that take integers with a zero as int8, less OFFSET, too
_TAKES_OFFSET = (torch.ops.qcompile.linear_int8_triton.default, torch.ops.qcompile.linear_int4_int8.default)
# matmuls that take outlier channels with zeros behind them, too
_TAKES_WIDE = (torch.ops.qcompile.linear_int8_triton.default,)
# made by kernels that are not Inductor's, or before the graph runs; those of linears that are quantized end in sums and
# casts of Inductor's
_IN_MEMORY = (Op.INPUT, Op.ATTENTION, Op.LINEAR)


@dataclass(frozen=True, kw_only=True)
class _Before:
    """What is made of x before it is quantized.

    second: added to x before a norm, or multiplied with the activation of x.  total: their sum, if others read it.
    weight: of a norm; else what channels are multiplied with at the end.
    gone: the values that the op makes in its registers, or does not make at all.
    """

    kind: str
    x: fx.Node
    gone: tuple[fx.Node, ...]
    second: fx.Node | None = None
    weight: fx.Node | None = None
    bias: fx.Node | None = None
    eps: float = 0.0
    total: fx.Node | None = None


def fuse(graph: FxGraph, capability: tuple[int, int]) -> int:
    """Replace quantizations after norms, activations and what stands in memory, on CUDA; returns how many."""
    edits = 0
    for value in list(graph.values()):
        if is_call(value, ops.QUANTIZE_DYNAMIC):
            edits += _fuse(graph, value, capability)
    graph.prune()
    return edits


def _fuse(graph: FxGraph, quantize: fx.Node, capability: tuple[int, int]) -> bool:
    value, spec = graph.inputs(quantize)[0], graph.qparams(quantize)
    assert value is not None
    assert isinstance(spec, Spec)
    kind, K = dtype(value), graph.shape(value)[-1]
    if kind is None or K is None or why_not(spec, kind, K, capability) is not None:
        return False
    if is_narrow(spec.format) and not _take_narrow(graph, _readers(quantize)):
        return False
    masked = find_masked(graph, value) if _is_alone(graph, value, (quantize,)) else None
    made, readers = (value, [quantize]) if masked is None else (masked.x, [masked.value, masked.selected])
    before = _norm(graph, made, readers) or _activation(graph, made, readers) or _whole(graph, made)
    before = before or _scaled(graph, made, readers)
    if before is None:
        return False
    read = (*before.gone, before.x, before.second, before.weight, *([] if masked is None else readers))
    if any(is_written(node) for node in read if node is not None):
        return False
    _replace(graph, quantize, before, spec, masked)
    return True


def _replace(graph: FxGraph, quantize: fx.Node, before: _Before, spec: Spec, masked: Masked | None) -> None:
    offset = 0 if spec.symmetric or not _takes_offset(quantize) else OFFSET
    read = (before.x, before.second, before.weight, before.bias)
    paired, lowered = _paired(graph, quantize) if spec.format.name == "fp8_e4m3" else ([], None)
    shift = _narrowed(_readers(quantize)) if is_narrow(spec.format) else lowered
    more: tuple[Any, ...] = () if shift is None else (shift,)
    if masked is not None:
        more = (shift, masked.keep, _channels(graph, masked))
    arguments = (*read, before.kind, before.eps, str(spec), offset, before.total is not None, *more)
    old = [node for node in (before.total, None if masked is None else masked.selected) if node is not None]
    # who reads the sum, or the outliers, must find them there
    with quantize.graph.inserting_before(min((quantize, *(user for node in old for user in node.users)))):
        new = quantize.graph.call_function(QUANTIZE_ROWS, arguments)
        new.meta = dict(quantize.meta)
        new.meta["example_value"] = infer(QUANTIZE_ROWS, arguments, fake_mode(quantize.graph))
        first = 2 if spec.symmetric else 3
        parts = [_part(new, i, like=node) for i, node in enumerate(old, first)]
        if masked is not None:
            parts[-1] = _narrowest(parts[-1], masked)
        for reader in paired:
            reader.update_arg(_PAIRS, _part(new, first + len(old)))
    quantize.replace_all_uses_with(new)
    for node, part in zip(old, parts, strict=True):
        node.replace_all_uses_with(part)
    if masked is not None:
        # columns of a view are no op that `prune` knows
        quantize.graph.erase_node(masked.selected)


def _paired(graph: FxGraph, quantize: fx.Node) -> tuple[list[fx.Node], fx.Node | None]:
    """What reads the codes, and is given pairs of their rows, with the constant by which these are lowered.

    That is all that lowers columns as the first one does that pairs hold; None without any.
    """
    held = {reader: _held(graph, reader) for reader in _readers(quantize) if is_call(reader, _TAKES_PAIRS)}
    shift, first = next(((shift, reader) for reader, shift in held.items() if shift is not None), (None, None))
    if shift is None or first is None:
        return [], None
    octaves = first.args[_OCTAVES]
    assert isinstance(octaves, fx.Node)
    constant = graph.add_constant(f"{graph.name(octaves)}.shift", shift)
    return [reader for reader, own in held.items() if _is_equal(own, shift)], constant


def _held(graph: FxGraph, reader: fx.Node) -> torch.Tensor | None:
    """By how many octaves a reader of pairs lowers columns, int8 [1, K]; None if pairs do not hold as many."""
    codes, octaves = reader.args[0], reader.args[_OCTAVES]
    assert isinstance(codes, fx.Node)
    assert isinstance(octaves, fx.Node)
    packed, K = graph.constant(octaves), graph.shape(codes)[-1]
    if packed is None or K is None:
        return None
    shift = unpacked_octaves(packed, K)
    return None if int(shift.max()) > APART else shift


def _channels(graph: FxGraph, masked: Masked) -> fx.Node:
    """Those of the tail, as a constant beside the mask."""
    index = torch.tensor(masked.channels, dtype=torch.int32, device=attribute(masked.keep).device)
    return graph.add_constant(f"{graph.name(masked.keep)}.channels", index)


def _part(made: fx.Node, index: int, like: fx.Node | None = None) -> fx.Node:
    part = made.graph.call_function(getitem, (made, index))
    part.meta = (made if like is None else like).meta | {
        "example_value": None if (found := example(made)) is None else found[index]
    }
    return part


def _narrowest(tail: fx.Node, masked: Masked) -> fx.Node:
    """The outliers as wide as all that read them take them."""
    count = len(masked.channels)
    if count == tail_width(count) or all(is_call(reader, *_TAKES_WIDE) for reader in masked.selected.users):
        return tail
    columns = tail.graph.call_function(aten.slice.Tensor, (tail, -1, 0, count))
    columns.meta = dict(masked.selected.meta)
    return columns


def _takes_offset(quantize: fx.Node) -> bool:
    """Whether all that read the codes take them less OFFSET."""
    return all(is_call(reader, *_TAKES_OFFSET) for reader in _readers(quantize))


def _readers(quantize: fx.Node) -> list[fx.Node]:
    """What reads the codes."""
    codes = [part for part in quantize.users if part.target is getitem and part.args[1] == 0]
    return [reader for part in codes for reader in part.users]


def _take_narrow(graph: FxGraph, readers: Sequence[fx.Node]) -> bool:
    """Whether all that read codes of fewer bits take them as E4M3, and channels lowered alike."""
    if not all(is_call(reader, *_TAKES_NARROW) for reader in readers):
        return False
    shifts = [None if (node := _shift_of(reader)) is None else graph.constant(node) for reader in readers]
    return all(_is_equal(shift, shifts[0]) for shift in shifts)


def _is_equal(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    return a is b or (a is not None and b is not None and torch.equal(a[:1], b[:1]))


def _shift_of(reader: fx.Node) -> fx.Node | None:
    _, position = _TAKES_NARROW[reader.target]
    shift = None if position is None else reader.args[position]
    return shift if isinstance(shift, fx.Node) else None


def _narrowed(readers: Sequence[fx.Node]) -> fx.Node | None:
    """Tell readers that codes will be E4M3, lowered where need be; returns octaves of channels."""
    shift = _shift_of(readers[0])
    for reader in readers:
        name, position = _TAKES_NARROW[reader.target]
        reader.update_arg(name, "")
        if position is not None:
            reader.update_arg(position, None)
    return shift


def _norm(graph: FxGraph, value: fx.Node, readers: Collection[fx.Node]) -> _Before | None:
    """A norm over the last dimension that these alone read, and the sum before it."""
    found = _norm_of(graph, value)
    if found is None or not _is_alone(graph, value, readers):
        return None
    x, weight, bias = (*graph.inputs(value), None, None)[:3]
    if x is None or dtype(x) != dtype(value):
        return None
    kind, eps = found
    a, b = _summands(graph, x)
    total = None if b is None or _is_alone(graph, x, (value,)) else x
    late = total is not None and any(v is not None and not v < min(total.users) for v in (weight, bias))
    if b is None or late:
        return _Before(kind=kind, x=x, gone=(value,), weight=weight, bias=bias, eps=eps)
    return _Before(kind=kind, x=a, second=b, gone=(value, x), weight=weight, bias=bias, eps=eps, total=total)


def _norm_of(graph: FxGraph, value: fx.Node) -> tuple[str, float] | None:
    """Kind and epsilon."""
    match graph.op(value):
        case Op.LAYER_NORM:
            kind, given = "layer_norm", _argument(value, 4, "eps", _LAYER_NORM_EPS)
        case Op.RMS_NORM if is_call(value, ops.RMS_NORM):
            kind = "rms_norm_weight_last" if value.args[3] else "rms_norm"
            given = value.args[2]
        case Op.RMS_NORM:
            kind, given = "rms_norm", _argument(value, 3, "eps", None)
        case _:
            return None
    return (kind, float(given)) if isinstance(given, float | int) else None


def _activation(graph: FxGraph, value: fx.Node, readers: Collection[fx.Node]) -> _Before | None:
    """An activation, or the product of one with another value, that these alone read."""
    if not _is_alone(graph, value, readers):
        return None
    if (kind := _activation_kind(graph, value)) is not None:
        x = graph.inputs(value)[0]
        assert x is not None
        return _Before(kind=kind, x=_strided(x), gone=(value,))
    if graph.op(value) is not Op.MUL:
        return None
    for active, gate in (tuple(graph.inputs(value)), tuple(graph.inputs(value))[::-1]):
        kind = None if active is None else _activation_kind(graph, active)
        # exact GELU times a gate was not measured beside Inductor, as all others were (quantize_rows.md)
        if active is None or gate is None or kind in (None, "gelu") or not _is_alone(graph, active, (value,)):
            continue
        x = graph.inputs(active)[0]
        if x is not None and _are_alike(value, x, gate):
            return _Before(kind=kind, x=_strided(x), second=_strided(gate), gone=(value, active))
    return None


def _activation_kind(graph: FxGraph, value: fx.Node) -> str | None:
    """What the op calls this activation; None if it computes none such."""
    if graph.op(value) is Op.SILU:
        return "silu"
    return _GELU.get(str(_argument(value, 1, "approximate", "none"))) if graph.op(value) is Op.GELU else None


def _scaled(graph: FxGraph, value: fx.Node, readers: Collection[fx.Node]) -> _Before | None:
    """An activation, or what stands in memory, times a factor of each channel, if these alone read the product.

    A norm has a weight of its own, into which such factors are folded.
    """
    if graph.op(value) is not Op.MUL or not _is_alone(graph, value, readers):
        return None
    for x, factor in (tuple(graph.inputs(value)), tuple(graph.inputs(value))[::-1]):
        if x is None or factor is None or not _is_factor(graph, factor, value) or not _are_alike(value, x):
            continue
        before = _activation(graph, x, (value,)) or _whole(graph, x)
        return None if before is None else replace(before, weight=factor, gone=(value, *before.gone))
    return None


def _is_factor(graph: FxGraph, factor: fx.Node, product: fx.Node) -> bool:
    """Whether it is a number for each channel of the product, in its dtype."""
    return is_constant(factor) and graph.shape(factor) == graph.shape(product)[-1:] and dtype(factor) == dtype(product)


def _whole(graph: FxGraph, value: fx.Node) -> _Before | None:
    """What stands in memory before it is quantized: Inductor does not make it itself, and so fuses it with nothing."""
    source = value
    while graph.op(source) in (Op.RESHAPE, Op.TRANSPOSE):
        below = graph.inputs(source)[0]
        assert below is not None
        source = below
    return _Before(kind="nothing", x=value, gone=()) if graph.op(source) in _IN_MEMORY else None


def _summands(graph: FxGraph, value: fx.Node) -> tuple[fx.Node, fx.Node] | tuple[fx.Node, None]:
    """Both of a sum of values of its own shape and dtype; else the value itself."""
    a, b = graph.inputs(value)[:2] if graph.op(value) is Op.ADD else (None, None)
    return (a, b) if a is not None and b is not None and _are_alike(value, a, b) else (value, None)


def _strided(value: fx.Node) -> fx.Node:
    """Columns of a wider matrix where they lie, if `value` is a copy of them."""
    columns = value.args[0] if is_call(value, aten.clone.default) else None
    return columns if isinstance(columns, fx.Node) and is_call(columns, aten.slice.Tensor) else value


def _are_alike(*values: fx.Node) -> bool:
    """Whether the values have one shape and one dtype."""
    known = [example(value) for value in values]
    return all(isinstance(k, torch.Tensor) for k in known) and len({(tuple(k.shape), k.dtype) for k in known}) == 1


def _is_alone(graph: FxGraph, value: fx.Node, readers: Collection[fx.Node]) -> bool:
    """Whether nothing but these reads the value."""
    return set(graph.users(value)) <= set(readers) and value not in graph.outputs()


def _argument(node: fx.Node, position: int, name: str, default: object) -> object:
    return node.args[position] if position < len(node.args) else node.kwargs.get(name, default)
