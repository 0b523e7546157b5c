"""How much each feature of a linear's output matters: the diagonal of the Fisher information of what the model says.

Of a model that gives logits, labels are drawn from its own distribution; the expected squared gradient of their
log-likelihood is, to second order and twice, the KL divergence that an error there costs. Outputs of any other model
are taken for means of unit normal distributions, whose divergence is half of the squared error.
Sources: Li 2021 (BRECQ), section 3; LLM-FP4 (Liu 2023), whose official code offers it as an objective.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qcompile.binding import Binding
from qcompile.calls import Calls
from qcompile.errors import CalibrationError
from qcompile.graph import Op
from qcompile.sensitivity import output_of
from qcompile.watch import evaluating, find_call, mask_of, run_batch


def output_fisher(model: nn.Module, batches: Iterable[Any]) -> dict[str, Tensor]:
    """Of each linear's output features, float32 [N] by site name, summed over tokens.

    batches: see `qcompile.calibrate`; what an attention_mask hides says nothing.  No gradient is left in the model.
    Takes as much memory as a step of training on the largest batch, but for gradients of weights. A linear that the
    outputs do not depend on has no entry.
    Raises CalibrationError if the model's outputs have no gradient, or one is NaN or Inf.
    """
    binding, found = Binding(model), dict[str, Tensor]()
    draw = torch.Generator().manual_seed(0)
    for index, batch in enumerate(batches):
        seen = _Outputs(binding)
        with evaluating(model), torch.enable_grad():
            with seen:
                made = run_batch(model, batch, index)
            loss = _surprise(made, mask_of(batch), draw, type(model).__name__)
            gradients = torch.autograd.grad(loss, [y for _, y in seen.found], allow_unused=True)
        for (name, _), gradient in zip(seen.found, gradients, strict=True):
            if gradient is not None:
                squares = gradient.detach().double().square().reshape(-1, gradient.shape[-1]).sum(0)
                if not bool(torch.isfinite(squares).all()):
                    raise CalibrationError(
                        f"batch {index} gives NaN or Inf in the gradient of {name!r} {list(gradient.shape)}, which "
                        "objective = 'fisher' squares: calibrate the model in float32 or bfloat16"
                    )
                found[name] = found[name] + squares if name in found else squares
    return {name: squares.float() for name, squares in found.items()}


def features_of(found: Mapping[str, Tensor], site: str) -> Tensor:
    """What errors of a site's output features cost.  Raises CalibrationError if nothing depends on them."""
    if site not in found or not bool(found[site].any()):
        raise CalibrationError(
            f"no gradient of the model's outputs reaches {site!r}, by which objective = 'fisher' chooses its format: "
            "give it a rule of its own, with objective = 'output'"
        )
    return found[site]


def _surprise(made: Any, mask: Tensor | None, draw: torch.Generator, model: str) -> Tensor:
    """Minus the log-likelihood of something drawn from the model's own distribution."""
    logits = made.get("logits") if isinstance(made, Mapping) else getattr(made, "logits", None)
    y = output_of(made, model) if logits is None else logits
    if not y.requires_grad:
        raise CalibrationError(
            f"the outputs of {model} have no gradient, which objective = 'fisher' is found from: give a model that "
            "does not run under torch.no_grad or torch.inference_mode, or take objective = 'output'"
        )
    # a mask has all dimensions of an output but that of its features
    hidden = None if mask is None or mask.dim() >= y.dim() or mask.shape != y.shape[: mask.dim()] else mask == 0
    rows = (y if hidden is None else y[~hidden]).float()
    # of one number a row, as regression gives, nothing would be drawn
    if logits is None or y.shape[-1] == 1:
        return -(rows * torch.randn(rows.shape, generator=draw).to(rows)).sum()
    rows = rows.reshape(-1, rows.shape[-1])
    labels = torch.multinomial(rows.detach().softmax(-1).cpu(), 1, generator=draw).to(rows.device)
    return -rows.log_softmax(-1).gather(1, labels).sum()


class _Outputs(Calls):
    """Keeps the output of every linear that a model calls, with its site's name, and lets gradients reach it."""

    def __init__(self, binding: Binding) -> None:
        super().__init__()
        self.found: list[tuple[str, Tensor]] = []
        self._binding = binding

    def called(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        y = func(*args, **kwargs)
        call = find_call(self._binding, func, args, kwargs)
        if call is None or call.spelling.op is not Op.LINEAR:
            return y
        kept = y if y.requires_grad else y.detach().requires_grad_()
        self.found.append((call.name, kept))
        # what is written into it later is another tensor
        return kept.clone()
