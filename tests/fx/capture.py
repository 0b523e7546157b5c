"""Graphs of models as the FX host opens them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from qcompile.backends.fx.door import open_dynamo, open_exported
from qcompile.backends.fx.graph import FxGraph
from qcompile.graph import Op


@dataclass(frozen=True, kw_only=True)
class Opened:
    """A graph, what Dynamo opened it from, and the inputs that are no weights."""

    graph: FxGraph
    original: fx.GraphModule
    inputs: Sequence[Any]


def dynamo_graphs(
    run: Callable[..., Any],
    *args: Any,
    whole: nn.Module | None = None,
    meta: bool = False,
    dynamic: bool | None = None,
    **kwargs: Any,
) -> list[Opened]:
    """The graphs that torch.compile makes of `run(*args, **kwargs)`.

    whole: the model that weights are named after; by default `run`. meta: weights have shapes only.
    """
    model = run if whole is None else whole
    assert isinstance(model, nn.Module)
    opened: list[Opened] = []
    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(run, backend=backend(model, opened, meta), dynamic=dynamic)(*args, **kwargs)
    torch._dynamo.reset()
    return opened


def backend(model: nn.Module, opened: list[Opened], meta: bool = False) -> Callable[..., Any]:
    """A torch.compile backend that opens what it gets, and runs the original."""
    names = {id(tensor): name for name, tensor in (*model.named_parameters(), *model.named_buffers())}

    def receive(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> fx.GraphModule:
        placeholders = [node.name for node in gm.graph.nodes if node.op == "placeholder"]
        given = dict(zip(placeholders, example_inputs, strict=True))
        constants = {name: (names[id(x)], x.to("meta") if meta else x) for name, x in given.items() if id(x) in names}
        # a dynamic size is a symbol here, and a number when the graph runs
        sizes = {name: x.node.hint if isinstance(x, torch.SymInt) else x for name, x in given.items()}
        inputs = [x for name, x in sizes.items() if name not in constants]
        opened.append(Opened(graph=open_dynamo(gm, constants), original=gm, inputs=inputs))
        return gm

    return receive


def dynamo_graph(run: Callable[..., Any], *args: Any, **kwargs: Any) -> FxGraph:
    """The one graph of a model without graph breaks."""
    (opened,) = dynamo_graphs(run, *args, **kwargs)
    return opened.graph


def exported_graph(model: nn.Module, *args: Any, **kwargs: Any) -> FxGraph:
    with torch.no_grad():
        return open_exported(torch.export.export(model, args, kwargs))


def ops_of(graph: FxGraph, op: Op) -> list[fx.Node]:
    """The values that are made by an op of that kind."""
    return [value for value in graph.values() if graph.op(value) is op]


def result(graph: FxGraph, *args: Any) -> Tensor:
    """The first output of the graph's module, run eagerly."""
    with torch.no_grad():
        output = graph.module(*args)
    while not isinstance(output, Tensor):
        output = output[0]
    return output
