"""Watching an ONNX model: run it on data, and keep what a plan needs to know of the activations that it computes.

The watched activations become outputs of a copy of the model. Batches are run one by one and nothing of a batch is
kept but its statistics, so memory does not depend on how many there are.
"""

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import torch
from torch import Tensor

from qcompile.backends.onnx.feeds import inputs_of, sizes_of, to_feed
from qcompile.backends.onnx.runtime import results_of, session
from qcompile.errors import CalibrationError, nearest
from qcompile.gathering import Gathering, Room, not_finite
from qcompile.observers import Part, Stats
from qcompile.watch import mask_of, real_rows

_LOG = logging.getLogger(__name__)

# of the activations that one run hands out; the rest waits for another run of the same batch
_BYTES = 2**30


@dataclass(frozen=True, kw_only=True)
class _Watched:
    """An activation of the model, and the dimension that its channels lie in: rows are all others."""

    name: str
    axis: int = -1


def watch_onnx(
    model: ir.Model,
    values: Mapping[str, ir.Value],
    batches: Iterable[Mapping[str, Any]],
    parts: Part,
    axes: Mapping[str, int] | None = None,
) -> dict[str, Stats]:
    """Stats of the activations, by the names of the sites that read them; sites of one value share one object.

    model: one that onnxruntime can run; it is not changed. values: what each site reads, found in the model by name.
    batches: dicts of all inputs of the model, torch tensors or numpy arrays; rows that a two-dimensional
    attention_mask hides are left out. parts: the histograms to keep of each activation. axes: by site, the dimension
    of channels where it is not the last.
    A site whose every row was hidden or missing is left out.
    Raises CalibrationError for no batches, batches that do not fit the model's inputs, values that it does not
    compute, or an activation with NaN or Inf; UnsupportedError if onnxruntime cannot run the model.
    """
    seen: dict[_Watched, Gathering] = {}
    room = Room()
    watched = {site: _Watched(name=str(v.name), axis=(axes or {}).get(site, -1)) for site, v in values.items()}
    for index, one, rows in _rows(model, values, watched, batches):
        if one not in seen:
            seen[one] = Gathering(f"in {one.name!r}", parts, room)
        seen[one].add(rows, batch=index)
    stats = {one: found for one, gathering in seen.items() if (found := gathering.stats()) is not None}
    return {site: stats[one] for site, one in watched.items() if one in stats}


def watch_products(
    model: ir.Model, values: Mapping[str, ir.Value], batches: Iterable[Mapping[str, Any]]
) -> dict[str, Tensor]:
    """X^T X of the activations X [rows, K], float64 [K, K], by the names of the sites that read them.

    Arguments, rows and errors: as of `watch_onnx`. Sites of one value share one tensor.
    """
    seen: dict[_Watched, Tensor] = {}
    watched = {site: _Watched(name=str(value.name)) for site, value in values.items()}
    for index, one, rows in _rows(model, values, watched, batches):
        wide = rows.double()
        product = wide.T @ wide
        if not bool(torch.isfinite(product).all()):
            raise not_finite(index, f"in {one.name!r}", rows)
        seen[one] = seen[one].add_(product) if one in seen else product
    return {site: seen[one] for site, one in watched.items() if one in seen}


def _rows(
    model: ir.Model,
    values: Mapping[str, ir.Value],
    watched: Mapping[str, _Watched],
    batches: Iterable[Mapping[str, Any]],
) -> Iterator[tuple[int, _Watched, Tensor]]:
    """The number of a batch, an activation, and its real rows there [rows, K], at least one."""
    if isinstance(batches, Mapping | Tensor | np.ndarray | str):
        raise CalibrationError(f"batches is one {type(batches).__name__}, not a collection of batches: write [batch]")
    found_values = _watched(model, values)
    wanted: dict[str, dict[_Watched, None]] = {}
    for one in watched.values():
        wanted.setdefault(one.name, {})[one] = None
    inputs = inputs_of(model)
    index, said = -1, False
    with session(_showing(model, found_values), "the model") as running:
        for index, batch in enumerate(batches):
            feed = to_feed(batch, inputs, index)
            mask = mask_of(batch)
            for name, found in _activations(running, found_values, inputs, feed, index):
                for one in wanted[name]:
                    rows, fits = real_rows(found.movedim(one.axis, -1), mask)
                    if not fits and not said:
                        said = True
                        _LOG.warning(
                            "%r %s has not the attention_mask's shape: padding is counted there",
                            name,
                            list(found.shape),
                        )
                    if rows.numel():
                        yield index, one, rows
    if index < 0:
        raise CalibrationError("there are no batches to calibrate with: give at least one")


def _watched(model: ir.Model, values: Mapping[str, ir.Value]) -> dict[str, ir.Value]:
    """The model's own values to watch, by name, each once."""
    known = {value.name: value for value in model.graph.inputs}
    known.update((value.name, value) for node in model.graph for value in node.outputs)
    found: dict[str, ir.Value] = {}
    for site, value in values.items():
        name = str(value.name)
        if name in model.graph.initializers or name not in known:
            what = "a constant" if name in model.graph.initializers else "no value of the model's main graph"
            raise CalibrationError(
                f"site {site!r} reads {name!r}, which is {what}: only what the model computes can be watched; "
                f"nearest names: {nearest(name, (str(n) for n in known if n))}"
            )
        found[name] = known[name]
    return found


def _showing(model: ir.Model, watched: Mapping[str, ir.Value]) -> ir.Model:
    """A copy of the model that hands out the watched values too; inputs are at hand without it."""
    copy = model.clone()
    shown = {value.name for value in copy.graph.outputs}
    given = {value.name for value in copy.graph.inputs}
    made = {value.name: value for node in copy.graph for value in node.outputs}
    copy.graph.outputs.extend(made[name] for name in watched if name not in shown | given)
    return copy


def _activations(
    running: ort.InferenceSession,
    watched: Mapping[str, ir.Value],
    inputs: Mapping[str, ir.Value],
    feed: Mapping[str, np.ndarray[Any, Any]],
    index: int,
) -> Iterator[tuple[str, Tensor]]:
    """Each watched activation of one batch; few enough are held at a time."""
    yield from ((name, torch.from_numpy(feed[name])) for name in watched if name in feed)
    computed = {name: value for name, value in watched.items() if name not in inputs}
    sizes = sizes_of(feed, inputs)
    largest = max((x.size for x in feed.values()), default=1)
    for names in _groups({name: _bytes(value, sizes, largest) for name, value in computed.items()}):
        results = results_of(running, names, feed, f"batch {index}")
        # each is let go as soon as it has been seen
        for name in names:
            yield name, torch.from_numpy(results.pop(0))


def _groups(sizes: Mapping[str, int]) -> Iterator[list[str]]:
    """Names, in order, whose sizes together stay below the limit; one that is larger stands alone."""
    group: list[str] = []
    held = 0
    for name, size in sizes.items():
        if group and held + size > _BYTES:
            yield group
            group, held = [], 0
        group.append(name)
        held += size
    if group:
        yield group


def _bytes(value: ir.Value, sizes: Mapping[str, int], largest: int) -> int:
    """What an activation takes in a batch with these sizes of symbols; an unknown size counts as the largest input."""
    shape: Sequence[Any] = (None, None) if value.shape is None else tuple(value.shape)
    count = 1
    for size in shape:
        count *= size if isinstance(size, int) else sizes.get(str(getattr(size, "value", None)), largest)
    return count * (4 if value.dtype is None else max(1, int(value.dtype.itemsize)))
