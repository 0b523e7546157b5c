"""Ops that only move elements, followed exactly by the numbers of the channels they carry.

An axis along which the numbers stay the same needs no size: so batches and lengths may be dynamic.
"""

import math
from collections.abc import Callable, Mapping, Sequence

import onnx_ir as ir
import torch
from torch import Tensor

from qcompile.backends.onnx.ops import EMBEDDING, attribute, is_op, spelling, standard
from qcompile.backends.onnx.sizes import sizes, sizes_of_reshape
from qcompile.backends.onnx.values import constant, is_float
from qcompile.channels import Channels, blocks, reshaped, shrunk

# they read the shape of a tensor and none of its elements
_LOOKS = ("Shape", "Size")
# numbers that are written out where a reshape mixes channels with batches or tokens; such a way leads nowhere
_MOST = 2**24


def moved(value: ir.Value, channels: Channels) -> Channels | None:
    """What `Graph.moved` says."""
    node = value.producer()
    if node is None or not isinstance(channels, Tensor):
        return None
    if is_op(node, *_LOOKS):
        return torch.empty(0, dtype=torch.int64)
    source = node.inputs[0] if node.inputs else None
    follow = _MOVES.get(node.op_type) if standard(node.domain) == "" else None
    if source is None or source.shape is None or follow is None or spelling(value) is EMBEDDING:
        return None
    before = sizes(source)
    if before is None or 0 in before or not _fits(channels, before):
        return None
    after = follow(node, value, channels)
    return None if after is None or 0 in after.shape else shrunk(after)


def _fits(channels: Tensor, before: Sequence[int]) -> bool:
    return channels.dim() == len(before) and all(c in (1, s) for c, s in zip(channels.shape, before, strict=True))


def _cast(node: ir.Node, value: ir.Value, channels: Tensor) -> Tensor | None:
    source = node.inputs[0]
    return channels if source is not None and is_float(source) and is_float(value) else None


def _same(node: ir.Node, value: ir.Value, channels: Tensor) -> Tensor | None:
    return channels


def _reshape(node: ir.Node, value: ir.Value, channels: Tensor) -> Tensor | None:
    source = node.inputs[0]
    assert source is not None
    before = sizes(source)
    after = sizes_of_reshape(node)
    if before is None or after is None or 0 in after or math.prod(before) != math.prod(after):
        return None
    for old, _ in blocks(before, after):
        varies = any(channels.shape[d] > 1 for d in old)
        if varies and math.prod(before[old.start : old.stop]) > _MOST:
            return None
    return reshaped(channels, before, after)


def _transpose(node: ir.Node, value: ir.Value, channels: Tensor) -> Tensor | None:
    perm = attribute(node, "perm", tuple(reversed(range(channels.dim()))))
    return channels.permute(tuple(perm)) if len(perm) == channels.dim() else None


def _slice(node: ir.Node, value: ir.Value, channels: Tensor) -> Tensor | None:
    starts, ends = _numbers(node, 1, "starts"), _numbers(node, 2, "ends")
    axes, steps = _numbers(node, 3, "axes"), _numbers(node, 4, "steps")
    if axes is None:
        if len(node.inputs) > 3 and node.inputs[3] is not None:
            return None
        axes = list(range(channels.dim()))
    for i, axis in enumerate(axes):
        if channels.shape[axis] == 1:
            continue
        if starts is None or ends is None or (steps is None and len(node.inputs) > 4 and node.inputs[4] is not None):
            return None
        step = 1 if steps is None else steps[i]
        taken = range(channels.shape[axis])[slice(*_bounds(starts[i], ends[i], step), step)]
        channels = channels.index_select(axis, torch.tensor(list(taken), dtype=torch.int64))
    return channels


def _bounds(start: int, end: int, step: int) -> tuple[int, int | None]:
    # ONNX: far below zero means before the first, which Python's slices write as None
    before_first = step < 0 and end < -(2**31)
    return start, None if before_first else end


def _split(node: ir.Node, value: ir.Value, channels: Tensor) -> Tensor | None:
    axis = attribute(node, "axis", 0)
    index = value.index()
    assert index is not None
    if channels.shape[axis] == 1:
        return channels
    lengths = _numbers(node, 1, "split")
    if lengths is None:
        if len(node.inputs) > 1 and node.inputs[1] is not None:
            return None
        count = attribute(node, "num_outputs", len(node.outputs))
        # equal parts, of which the last may be smaller
        lengths = [len(part) for part in torch.arange(channels.shape[axis]).split(-(-channels.shape[axis] // count))]
    if len(lengths) != len(node.outputs) or sum(lengths) != channels.shape[axis]:
        return None
    return channels.narrow(axis, sum(lengths[:index]), lengths[index])


def _gather(node: ir.Node, value: ir.Value, channels: Tensor) -> Tensor | None:
    axis = attribute(node, "axis", 0) % channels.dim()
    indices = node.inputs[1]
    if indices is None or indices.shape is None:
        return None
    rank = len(indices.shape)
    if channels.shape[axis] == 1:
        return channels.reshape([*channels.shape[:axis], *[1] * rank, *channels.shape[axis + 1 :]])
    index = constant(indices)
    if index is None:
        return None
    wrapped = index.long() % channels.shape[axis]
    found = channels.index_select(axis, wrapped.flatten())
    return found.reshape([*channels.shape[:axis], *index.shape, *channels.shape[axis + 1 :]])


def _gather_nd(node: ir.Node, value: ir.Value, channels: Tensor) -> Tensor | None:
    """Of whole slices along the first axis, which is how torch's exporter writes an index that is a list."""
    indices = node.inputs[1]
    if indices is None or indices.shape is None or indices.shape[-1] != 1 or attribute(node, "batch_dims", 0):
        return None
    if channels.shape[0] == 1:
        return channels.reshape([1] * (len(indices.shape) - 1) + list(channels.shape[1:]))
    index = constant(indices)
    if index is None:
        return None
    found = channels.index_select(0, index.long().flatten() % channels.shape[0])
    return found.reshape([*index.shape[:-1], *channels.shape[1:]])


def _expand(node: ir.Node, value: ir.Value, channels: Tensor) -> Tensor | None:
    after = sizes(value)
    rank = None if after is None else len(after)
    if rank is None or rank < channels.dim():
        return None
    return channels.reshape([1] * (rank - channels.dim()) + list(channels.shape))


def _tile(node: ir.Node, value: ir.Value, channels: Tensor) -> Tensor | None:
    repeats = _numbers(node, 1, "repeats")
    for axis in range(channels.dim()):
        if channels.shape[axis] == 1:
            continue
        if repeats is None:
            return None
        channels = torch.cat([channels] * repeats[axis], axis)
    return channels


def _numbers(node: ir.Node, index: int, name: str) -> list[int] | None:
    """An input that is a constant list, or the attribute that older opsets have in its place."""
    value = node.inputs[index] if index < len(node.inputs) else None
    if value is None:
        found = attribute(node, name)
        return None if found is None else [int(n) for n in found]
    held = constant(value)
    return None if held is None else [int(n) for n in held.flatten()]


_MOVES: Mapping[str, Callable[[ir.Node, ir.Value, Tensor], Tensor | None]] = {
    "Cast": _cast,
    "CastLike": _cast,
    "Identity": _same,
    "Reshape": _reshape,
    "Flatten": _reshape,
    "Squeeze": _reshape,
    "Unsqueeze": _reshape,
    "Transpose": _transpose,
    "Slice": _slice,
    "Split": _split,
    "Gather": _gather,
    "GatherND": _gather_nd,
    "Expand": _expand,
    "Tile": _tile,
}
