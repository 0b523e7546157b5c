"""What Dynamo tells a backend about its frame: which inputs are parameters, their names, and how it will be used."""

import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from qcompile.backends.fx.names import module_path, root_variable
from qcompile.errors import UnsupportedError


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """A parameter among the frame's inputs: its placeholder, its position, and its name seen from the frame."""

    placeholder: str
    position: int
    name: str


def parameters(frame: GraphModule, example_inputs: Sequence[Any]) -> list[Parameter]:
    """The inputs of the frame that are parameters of modules, or float matrices that modules keep as buffers.

    The name starts at the module that the frame is a method of, which is not the whole model if the model was
    compiled in parts. Where a function runs several modules, parameters of one name start with the modules' variables.
    """
    nodes = frame.graph.find_nodes(op="placeholder")
    found = {
        node: position
        for position, (node, x) in enumerate(zip(nodes, example_inputs, strict=True))
        if isinstance(x, nn.Parameter) or _is_matrix_of_module(node, x)
    }
    names = _unique({node: module_path(spelled(node)) or node.name for node in found})
    return [Parameter(placeholder=node.name, position=found[node], name=names[node]) for node in found]


def _is_matrix_of_module(node: Node, x: Any) -> bool:
    """Whether x is a float matrix that a module keeps as a buffer or plain attribute: it may be a weight too."""
    kept = node.meta.get("tensor_dict", {}).get("_dynamo_static_input_type") == "unguarded"
    return kept and isinstance(x, Tensor) and x.is_floating_point() and x.dim() == 2


def _unique(names: Mapping[Node, str]) -> dict[Node, str]:
    """The names, those that several parameters have told apart by their variables, or else by their placeholders."""
    count = Counter(names.values())
    told = {n: f"{root_variable(spelled(n))}.{name}" if count[name] > 1 else name for n, name in names.items()}
    count = Counter(told.values())
    return {n: n.name if count[name] > 1 else name for n, name in told.items()}


def spelled(placeholder: Node) -> str:
    """Where Dynamo found an input: "L['self']._modules['fc']._parameters['weight']"; "" if it does not say."""
    source = getattr(placeholder, "_dynamo_source", None) or getattr(placeholder.meta.get("grapharg"), "source", None)
    name = getattr(source, "name", "")
    # a method in torch 2.11, a property in 2.13
    return str(name() if callable(name) else name)


def is_whole(frame: GraphModule) -> bool:
    """Whether the frame neither ends at a graph break nor begins after one. It may still be called by other code."""
    reason = getattr(frame, "compile_subgraph_reason", None)
    ends_at_break = reason is not None and reason.graph_break
    # Dynamo's name for what was on the stack at the break
    return not ends_at_break and not any("___stack" in spelled(n) for n in frame.graph.find_nodes(op="placeholder"))


def refuse_training(frame: GraphModule, example_inputs: Sequence[Any]) -> None:
    """Quantized graphs compute no gradients: refuse uses that would need them, and say so where they might.

    Raises UnsupportedError if an input requires grad, or if dropout or batch norm runs in training mode.
    """
    for node in frame.graph.nodes:
        if (op := _trains(node)) is not None:
            raise UnsupportedError(
                f"{op} ({node.name}) runs in training mode, and qcompile's graphs are for inference: "
                "call model.eval() before compiling"
            )
    if not torch.is_grad_enabled():
        return
    for node, x in zip(frame.graph.find_nodes(op="placeholder"), example_inputs, strict=True):
        if isinstance(x, Tensor) and x.requires_grad and not isinstance(x, nn.Parameter):
            raise UnsupportedError(
                f"input {node.name} {list(x.shape)} requires grad, and qcompile's graphs compute no gradients: "
                "call the model under torch.no_grad(), or detach the input"
            )
    if any(isinstance(x, nn.Parameter) and x.requires_grad for x in example_inputs):
        warnings.warn(
            "qcompile's graphs are for inference: outputs carry no gradient to the parameters. "
            "Call the model under torch.no_grad() to say that this is meant",
            stacklevel=2,
        )


def _trains(node: Node) -> str | None:
    """The name of an op that behaves differently in training and does so here, else None."""
    name = getattr(node.target, "__name__", "")
    if node.op != "call_function" or name not in _TRAINING:
        return None
    if node.target is nn.functional.batch_norm and node.args[1:3] == (None, None):
        # without running statistics it takes those of the batch at inference too
        return None
    index, keyword, rate = _TRAINING[name]
    training = node.args[index] if len(node.args) > index else node.kwargs.get(keyword, False)
    probability = 1.0 if rate is None else (node.args[rate] if len(node.args) > rate else node.kwargs.get("p", 0.5))
    return name if training is True and probability != 0 else None


# op -> position and name of its training flag, position of its dropout probability
_TRAINING: dict[str, tuple[int, str, int | None]] = {
    "dropout": (2, "training", 1),
    "dropout1d": (2, "training", 1),
    "dropout2d": (2, "training", 1),
    "alpha_dropout": (2, "training", 1),
    "batch_norm": (5, "training", None),
}
