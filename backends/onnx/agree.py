"""Whether an ONNX model computes what a torch model does, on data that neither was made with."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from qcompile.backends.onnx.runtime import RUNTIME_ERRORS, session
from qcompile.errors import UnsupportedError

_SEED = 0


@dataclass(frozen=True, kw_only=True)
class Axis:
    """One axis of an input: its size in the example, and where it is free its symbol and bounds (most: None, no)."""

    size: int
    symbol: str | None
    least: int = 1
    most: int | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class Example:
    """Inputs of a torch model by name, their axes, and what it makes of such.

    takes_one: whether it may run with one sequence, whatever the bounds of axis 0 say.
    """

    inputs: Mapping[str, Tensor]
    axes: Mapping[str, Sequence[Axis]]
    reference: Callable[..., list[Tensor]]
    takes_one: bool


def check_agreement(model: ir.Model, example: Example, name: str) -> None:
    """Raise UnsupportedError if onnxruntime's results differ from the reference by more than rounding explains.

    Both run on new data: with one sequence more and another length, and with a single sequence.
    """
    generator = torch.Generator().manual_seed(_SEED)
    takes_one = example.takes_one or all(a[0].least <= 1 for a in example.axes.values() if a)
    with session(model, f"the export of {name}") as running:
        for one in (False, True) if takes_one else (False,):
            sizes = _sizes(example, one)
            inputs = {key: _fresh(key, x, sizes[key], generator) for key, x in example.inputs.items()}
            expected = example.reference(*(x.clone() for x in inputs.values()))
            taken = {i.name for i in running.get_inputs()}
            feed = {key: x.cpu().numpy() for key, x in inputs.items() if key in taken}
            shapes = ", ".join(f"{key} {list(x.shape)}" for key, x in inputs.items())
            try:
                results = running.run(None, feed)
            except RUNTIME_ERRORS as e:
                raise UnsupportedError(
                    f"the export of {name} fails in onnxruntime on {shapes}, where torch runs: {str(e).strip()}; "
                    "export it at another opset"
                ) from e
            for output, found, wanted in zip(running.get_outputs(), results, expected, strict=True):
                _compare(torch.from_numpy(np.asarray(found)), wanted.cpu(), f"output {output.name!r} of {name}", shapes)


def _compare(found: Tensor, wanted: Tensor, where: str, shapes: str) -> None:
    if found.shape != wanted.shape or found.dtype != wanted.dtype:
        raise UnsupportedError(
            f"{where} is {found.dtype} {list(found.shape)} in ONNX and {wanted.dtype} {list(wanted.shape)} in torch "
            f"on {shapes}: the exporter got the model wrong; try another opset"
        )
    distance, bound = _distance(found, wanted)
    if not distance <= bound:
        raise UnsupportedError(
            f"{where} differs from torch's by {distance:.2g} of its largest magnitude on {shapes}, rounding explains "
            f"{bound:.2g}: the exporter got the model wrong; try another opset, or inputs that differ from each other"
        )


def _distance(found: Tensor, wanted: Tensor) -> tuple[float, float]:
    """The largest difference, relative to the largest magnitude, and the bound of what rounding explains."""
    if not wanted.is_floating_point():
        return float((found != wanted).double().mean()) if wanted.numel() else 0.0, 0.0
    # each of many layers adds some units in the last place: half of all digits is far more than they come to, and far
    # less than one wrong op costs
    bound = torch.finfo(wanted.dtype).eps ** 0.5
    a, b = found.double(), wanted.double()
    same = (a == b) | (a.isnan() & b.isnan())
    if same.all():
        return 0.0, bound
    peak = float(b[b.isfinite()].abs().max()) if b.isfinite().any() else 0.0
    return float((a - b)[~same].abs().max()) / max(peak, torch.finfo(wanted.dtype).tiny), bound


def _sizes(example: Example, one: bool) -> dict[str, list[int]]:
    """Other sizes of the free axes: a batch of one more, or of 1; lengths of one less, for which a model has room."""
    new: dict[str, int] = {}
    for axes in example.axes.values():
        for i, axis in enumerate(axes):
            if axis.symbol is None:
                continue
            size = (1 if one else axis.size + 1) if i == 0 else axis.size - 1
            least = 1 if one and i == 0 else max(axis.least, 2)
            size = axis.size + 1 if size < least else size
            new.setdefault(axis.symbol, size if axis.most is None else min(size, axis.most))
    return {
        key: [axis.size if axis.symbol is None else new[axis.symbol] for axis in axes]
        for key, axes in example.axes.items()
    }


def _fresh(name: str, x: Tensor, sizes: Sequence[int], generator: torch.Generator) -> Tensor:
    """New data of these sizes with the example's values in another order; a mask hides the ends of some rows."""
    if x.dim() == 2 and "mask" in name and not x.is_floating_point() and bool(((x == 0) | (x == 1)).all()):
        batch, length = sizes
        lengths = torch.randint(1, length + 1, (batch, 1), generator=generator)
        # the first row is cut, so that a mask that the graph lost is found out
        lengths[0] = max(1, length - 1)
        return (torch.arange(length) < lengths).to(device=x.device, dtype=x.dtype)
    count = int(np.prod(sizes, dtype=np.int64))
    if not x.numel():
        return x.new_zeros(tuple(sizes))
    order: Any = torch.randint(x.numel(), (count,), generator=generator)
    return x.flatten()[order.to(x.device)].reshape(tuple(sizes))
