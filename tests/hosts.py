"""Both hosts behind one door, so that one test and one golden text serve them."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from qcompile.backends.fx.door import open_exported
from qcompile.graph import Graph, Op, graph_text

# the first opset with Attention and RMSNormalization: the graph is then the one that torch.export makes
OPSET = 23


@dataclass(frozen=True, kw_only=True)
class Host:
    """open(model, *args): the graph of a model in eval mode.

    sums_like_torch: results are those of torch to the last bit; onnxruntime sums products in another order.
    """

    name: str
    open: Callable[..., Graph[Any]]
    sums_like_torch: bool

    def assert_equal(self, found: Tensor, expected: Tensor) -> None:
        """The same numbers, but for the order of sums."""
        exact = {"rtol": 0, "atol": 0} if self.sums_like_torch else {}
        torch.testing.assert_close(found, expected, **exact)

    def __str__(self) -> str:
        return self.name


def open_fx(model: nn.Module, *args: Tensor) -> Graph[Any]:
    with torch.no_grad():
        return open_exported(torch.export.export(model.eval(), args))


def open_exported_onnx(model: nn.Module, *args: Tensor) -> Graph[Any]:
    from qcompile.backends.onnx.door import open_onnx

    return open_onnx(exported_onnx(model, *args))


def exported_onnx(model: nn.Module, *args: Tensor, opset: int = OPSET, **options: Any) -> Any:
    """What torch's exporter makes of a model: an onnx_ir.Model."""
    _read_op_library_once()
    with warnings.catch_warnings(), torch.no_grad():
        # torch's own code
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", UserWarning)
        program = torch.onnx.export(model.eval(), args, dynamo=True, opset_version=opset, verbose=False, **options)
    assert program is not None
    return program.model


@cache
def _read_op_library_once() -> None:
    """The exporter looks up the signatures of all its ops anew for every export, which is most of its time."""
    from torch.onnx._internal.exporter import _registration

    registry: Any = _registration.ONNXRegistry
    registry.from_torchlib = staticmethod(lru_cache(maxsize=None)(registry.from_torchlib))


FX = Host(name="fx", open=open_fx, sums_like_torch=True)
ONNX = Host(name="onnx", open=open_exported_onnx, sums_like_torch=False)
HOSTS = (FX, ONNX)


def result(graph: Graph[Any], *args: Tensor) -> Tensor:
    """The first output."""
    found = graph.run(args, [])[0]
    if isinstance(found, Mapping):
        found = tuple(found.values())
    return found[0] if isinstance(found, tuple | list) else found


class _InOrder:
    """A graph whose values stand in an order of its own: each right before the first that reads it."""

    def __init__(self, graph: Graph[Any]) -> None:
        self._graph = graph

    def __getattr__(self, name: str) -> Any:
        return getattr(self._graph, name)

    def values(self) -> Sequence[Any]:
        graph, placed = self._graph, dict[Any, None]()

        def place(value: Any) -> None:
            if value in placed:
                return
            for read in graph.inputs(value):
                if read is not None:
                    place(read)
            placed[value] = None

        every = graph.values()
        for value in [*(v for v in every if graph.op(v) is Op.INPUT), *graph.outputs(), *every]:
            place(value)
        return list(placed)


def ordered_text(graph: Graph[Any]) -> str:
    """The graph as text, in an order that does not depend on where a host puts new values."""
    return graph_text(_InOrder(graph))
