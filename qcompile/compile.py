"""`torch.compile(model, backend="qcompile")`: the backend, and the report of what it compiled."""

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule

from qcompile.backends.fx.dynamo import refuse_training
from qcompile.errors import UnsupportedError
from qcompile.frame import Bound, Frame
from qcompile.options import Options
from qcompile.plan import Plan
from qcompile.report import Report, merge

_MANY = 2**16
_FRAMES: "weakref.WeakSet[Frame]" = weakref.WeakSet()


def backend(
    gm: GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """Entry point of `torch.compile(model, backend="qcompile", options=...)`.

    options: see `qcompile.options.Options`. mode: the option of that name.
    Raises OptionsError, RecipeError, PlanError, WeightError, SpecError, CoverageError or UnsupportedError; torch
    wraps them in its BackendCompilerFailed.
    """
    parsed = _parsed(options, mode)
    refuse_training(gm, example_inputs)
    with torch.no_grad():
        frame = Frame(gm, example_inputs, parsed)
        frame.bind(example_inputs)
    _FRAMES.add(frame)
    return frame


def report(compiled: Any) -> Report:
    """What became of a compiled model: every site, what runs it, what it cost and what it saved.

    compiled: what torch.compile returned, or a model that was compiled in place or in parts, after its first call.
    Raises UnsupportedError if nothing of it has been compiled with backend "qcompile", or if it is a function.
    """
    names = _names(compiled)
    return merge([bound.named_report(names) for _, bound in bounds_of(compiled)])


def bounds_of(compiled: Any) -> list[tuple[Frame, Bound]]:
    """What a compiled model became: every piece of bytecode, with each set of weights that it was called with.

    Raises UnsupportedError if nothing of it has been compiled with backend "qcompile", or if it is a function.
    """
    names, asked = _names(compiled), _options_of(compiled)
    found = [
        (frame, bound)
        for frame in _FRAMES
        if asked is None or frame.asked == asked
        for bound in frame.bounds()
        if bound.reads(names)
    ]
    if not names:
        kind = type(getattr(compiled, "_orig_mod", compiled)).__name__
        raise UnsupportedError(
            f"a {kind} owns no parameters by which its report could be found: compile it with "
            "options={'report': function or path}, which gets the report of each compilation"
        )
    if not found:
        raise UnsupportedError(
            "nothing of this model was compiled by backend 'qcompile' yet: compile it with "
            "torch.compile(model, backend='qcompile'), call it once, and ask again with what torch.compile gave"
        )
    return found


def _names(compiled: Any) -> dict[int, str]:
    """The parameters of a compiled model, by identity."""
    model = getattr(compiled, "_orig_mod", compiled)
    return {id(p): name for name, p in model.named_parameters()} if isinstance(model, nn.Module) else {}


@contextmanager
def reference(model: nn.Module, plan: Plan) -> Iterator[Callable[..., Any]]:
    """The model quantized by a plan that is bound to it, in plain PyTorch: slow, and what the plan means."""
    options: Any = {"plan": plan, "lower": False}
    # torch runs the float model once a model was compiled often, which would pass for what the plan means
    with torch._dynamo.config.patch(recompile_limit=_MANY, accumulated_recompile_limit=_MANY):
        # a new function each time: torch takes what it compiled for an equal plan, which may be bound to another model
        yield torch.compile(model, backend=partial(backend), options=options)


def _parsed(options: Mapping[str, Any] | None, mode: str | None) -> Options:
    """torch takes either of them."""
    return Options.parse(options if mode is None else {**(options or {}), "mode": mode})


def _options_of(compiled: Any) -> Options | None:
    """The options that a torch.compile wrapper was made with; None for a bare model."""
    layer = getattr(getattr(compiled, "dynamo_ctx", None), "callback", None)
    while layer is not None and not hasattr(layer, "kwargs"):
        layer = getattr(layer, "_torchdynamo_orig_backend", None)
    if layer is None:
        return None
    return _parsed(layer.kwargs.get("options"), layer.kwargs.get("mode"))
