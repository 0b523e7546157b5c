"""A model's graphs, for those who want to look at them and change copies: as torch.compile would see them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule

from qcompile.backends.fx.door import Constant, open_dynamo
from qcompile.backends.fx.dynamo import is_whole, parameters
from qcompile.backends.fx.graph import FxGraph
from qcompile.binding import Binding

_MANY = 2**16


@dataclass(frozen=True, kw_only=True, eq=False)
class Captured:
    """One graph of a model, with the inputs that it was captured with, less its weights."""

    module: GraphModule
    constants: Mapping[str, Constant]
    args: Sequence[Any]

    def open(self) -> FxGraph:
        """A new graph in canonical form, to be changed at will."""
        return open_dynamo(self.module, self.constants)


class _Captured(Exception):
    """Raised to end a compilation that has shown all it was started for."""


def capture(model: nn.Module, run: Callable[[Callable[..., Any]], Any]) -> list[Captured]:
    """The graphs that torch.compile makes of the model while `run` calls it with example inputs.

    A model that becomes one graph does not run, and leaves nothing in torch's caches. Code that torch.compile may not
    see (`torch._dynamo.disable`) is in none of them.
    """
    # torch keeps `keep` alive, which must not keep the model
    held: list[Binding] = [Binding(model)]
    found: list[Captured] = []

    def keep(gm: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        weights = {
            p.placeholder: (next(iter(held[0].name_of(inputs[p.position])), p.name), inputs[p.position])
            for p in parameters(gm, inputs)
        }
        names = [node.name for node in gm.graph.find_nodes(op="placeholder")]
        args = [x for name, x in zip(names, inputs, strict=True) if name not in weights]
        found.append(Captured(module=gm, constants=weights, args=args))
        if is_whole(gm):
            raise _Captured
        return gm.forward

    try:
        # graphs of a model that is compiled in parts stay in torch's cache, where earlier calls may have filled it
        with torch.no_grad(), torch._dynamo.config.patch(recompile_limit=_MANY):
            run(torch.compile(model, backend=keep, dynamic=False))
    except Exception as error:
        if not _is_end(error):
            raise
    finally:
        graphs = [*found]
        found.clear()
        held.clear()
    return graphs


def _is_end(error: BaseException) -> bool:
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, _Captured):
        cause = getattr(cause, "inner_exception", None) or cause.__cause__
    return cause is not None
