"""How far the outputs of a model move when one of its weights is replaced: runs of the model, one weight each."""

from collections.abc import Callable, Mapping
from math import isfinite
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from qcompile.binding import Binding
from qcompile.calls import Calls
from qcompile.errors import CalibrationError
from qcompile.watch import evaluating, find_call, first_rows, run_batch


class Sensitivity:
    """A model on the first rows of a batch, and its outputs with one weight replaced beside those with its own."""

    def __init__(self, model: nn.Module, batch: Any) -> None:
        self._model, self._batch, self._binding = model, first_rows(batch), Binding(model)
        self._output = self._run(None)

    def moved(self, name: str, weight: Tensor) -> float:
        """Squared distance over the output's own variance along its last dimension: what shifts a row alone is nothing.

        name: of a site.  weight: [N, K], which it reads in place of its own.
        """
        found = self._run(_Replacing(self._binding, name, weight))
        ratio = float((found - self._output).square().sum() / self._output.square().sum())
        if not isfinite(ratio):
            raise CalibrationError(
                f"with the weight of {name!r} replaced, the outputs of {type(self._model).__name__} are NaN or all "
                "0: no budget can be spent by that; calibrate on other data"
            )
        return ratio

    def _run(self, replacing: Calls | None) -> Tensor:
        with evaluating(self._model), torch.no_grad():
            if replacing is None:
                made = run_batch(self._model, self._batch, 0)
            else:
                with replacing:
                    made = run_batch(self._model, self._batch, 0)
        found = output_of(made, type(self._model).__name__).double()
        return found - found.mean(-1, keepdim=True) if found.dim() > 1 and found.shape[-1] > 1 else found


def output_of(made: Any, model: str) -> Tensor:
    """The tensor among what a model gives that says most: the first of several dimensions, if there is one.

    model: its name, for messages.  Raises CalibrationError if no tensor is of floats.
    """
    found = [y for y in pytree.tree_leaves(made) if isinstance(y, Tensor) and y.is_floating_point()]
    if not found:
        raise CalibrationError(
            f"{model} gave no tensor of floats, by which is told what errors cost: calibrate a model that returns its "
            "logits or embeddings"
        )
    # a loss, or one number a row, is no place to look for noise, where there is another
    wide = [y for y in found if y.dim() > 1 and y.shape[-1] > 1]
    return (wide or found)[0]


class _Replacing(Calls):
    def __init__(self, binding: Binding, name: str, weight: Tensor) -> None:
        super().__init__()
        self._binding, self._name, self._weight = binding, name, weight

    def called(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        call = find_call(self._binding, func, args, kwargs)
        if call is None or call.name != self._name:
            return func(*args, **kwargs)
        positional, named = call.arguments(args, kwargs, call.x, self._weight.to(call.weight.dtype))
        return func(*positional, **named)
