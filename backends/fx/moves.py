"""Ops that only move elements, followed exactly: the call itself is run on the numbers of channels."""

from collections.abc import Mapping
from operator import getitem
from typing import Any

import torch
from torch import Tensor, fx

from qcompile.backends.fx.targets import CASTS, LOOKS, MOVES, aten, is_call, spelling
from qcompile.backends.fx.values import constant, dtype, example
from qcompile.backends.fx.writes import is_written
from qcompile.channels import Channels, reshaped, shrunk
from qcompile.graph import Op

# the second tensor of these gives its shape alone
_LIKE = ("expand_as", aten.expand_as.default)


def moved(node: fx.Node, channels: Channels) -> Channels | None:
    """What `Graph.moved` says. Dynamic sizes are taken as they were while tracing."""
    source = node.args[0] if node.args else None
    if is_call(node, *LOOKS):
        return torch.empty(0, dtype=torch.int64, device="cpu")
    if not isinstance(source, fx.Node) or is_written(source):
        return None
    if isinstance(channels, tuple):
        return _part(node, channels)
    before = _sizes(source)
    if before is None or 0 in before or not _fits(channels, before):
        return None
    if is_call(node, *CASTS):
        return channels if _is_float(source) and _is_float(node) else None
    return _placed(node, source, channels, before)


def _placed(node: fx.Node, source: fx.Node, channels: Tensor, before: list[int]) -> Channels | None:
    found = spelling(node)
    op = None if found is None else found.op
    if op is Op.RESHAPE:
        after = _sizes(node)
        return None if after is None or 0 in after else reshaped(channels, before, after)
    if op is not Op.TRANSPOSE and not is_call(node, *MOVES):
        return None
    read = _stand_ins(node, source)
    if read is None:
        return None
    result = _run(node, {**read, source: channels.expand(_grown(node, channels, before))})
    return tuple(map(shrunk, result)) if isinstance(result, tuple | list) else shrunk(result)


def _fits(channels: Tensor, sizes: list[int]) -> bool:
    return channels.dim() == len(sizes) and all(c in (1, size) for c, size in zip(channels.shape, sizes, strict=True))


def _part(node: fx.Node, channels: tuple[Tensor, ...]) -> Tensor | None:
    index = node.args[1] if node.target is getitem else None
    return channels[index] if isinstance(index, int) else None


def _grown(node: fx.Node, channels: Tensor, before: list[int]) -> list[int]:
    """Sizes for the call: whole, but where a copy would be large and the sizes are to stay, as small as they are."""
    after = _sizes(node)
    if after is None or len(after) != len(before) or "repeat" not in str(node.target):
        return before
    return [size if size != new else old for size, new, old in zip(before, after, channels.shape, strict=True)]


def _stand_ins(node: fx.Node, source: fx.Node) -> dict[fx.Node, Any] | None:
    """Sizes and constant indices for the call; None if it reads anything that is not known yet."""
    found = {read: _stand_in(node, read) for read in node.all_input_nodes if read is not source}
    return None if any(value is None for value in found.values()) else found


def _stand_in(node: fx.Node, read: fx.Node) -> int | Tensor | None:
    known = example(read)
    if not isinstance(known, Tensor):
        return _size(known)
    if is_call(node, *_LIKE):
        sizes = _sizes(read)
        return None if sizes is None else torch.zeros((), dtype=torch.int64, device="cpu").expand(sizes)
    index = constant(read)
    return None if index is None or index.is_meta else index.cpu()


def _run(node: fx.Node, read: Mapping[fx.Node, Any]) -> Any:
    args, kwargs = fx.map_arg((node.args, node.kwargs), read.__getitem__)
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    assert callable(node.target)
    return node.target(*args, **kwargs)


def _is_float(node: fx.Node) -> bool:
    found = dtype(node)
    return found is not None and found.is_floating_point


def _sizes(node: fx.Node) -> list[int] | None:
    known = example(node)
    if not isinstance(known, Tensor):
        return None
    sizes = [_size(d) for d in known.shape]
    return None if None in sizes else [size for size in sizes if size is not None]


def _size(known: object) -> int | None:
    if isinstance(known, torch.SymInt):
        return int(known.node.hint) if known.node.has_hint() else None
    return known if isinstance(known, int) else None
