"""Calls of torch that multiply by several weights become the ops that they are made of: attention, encoder layers.

Dynamo leaves `nn.MultiheadAttention` and, without gradients, `nn.TransformerEncoderLayer` as one call each, in which no
pass can see a linear.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from inspect import signature
from itertools import takewhile
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch.amp.autocast_mode import _enter_autocast, _exit_autocast
from torch.fx.experimental.proxy_tensor import make_fx

from qcompile.backends.fx.targets import aten
from qcompile.backends.fx.values import example, fake_mode

# mask_type of masks of padding
_OF_KEYS = 1


def inline_calls(graph: fx.Graph) -> None:
    """Put the ops of such calls in their place, where all that they read are tensors that are not nested."""
    for node in list(graph.nodes):
        if node.op == "call_function" and node.target in _BODIES and _reads_plain_tensors(node):
            _inline(node, _BODIES[node.target])


def _reads_plain_tensors(node: fx.Node) -> bool:
    known = [example(read) for read in node.all_input_nodes]
    plain = all(isinstance(value, Tensor) and not value.is_nested for value in known)
    return plain and fake_mode(node.graph) is not None


def _inline(node: fx.Node, body: Callable[..., Any]) -> None:
    read = node.all_input_nodes
    if body is F.multi_head_attention_forward and all(user.args[1:] == (0,) for user in node.users):
        body = _attention_alone

    def run(*tensors: Tensor) -> Any:
        given = dict(zip(read, tensors, strict=True))
        args, kwargs = fx.map_arg((node.args, node.kwargs), given.__getitem__)
        return body(*args, **kwargs)

    mode = fake_mode(node.graph)
    assert mode is not None
    with ExitStack() as entered, torch.no_grad(), mode:
        for autocast in _autocasts(node):
            entered.enter_context(autocast)
        # before autograd's dispatch a linear is still one op
        traced = make_fx(run, pre_dispatch=True)(*map(example, read)).graph
    if traced.find_nodes(op="get_attr"):
        return
    made = dict(zip(traced.find_nodes(op="placeholder"), read, strict=True))
    with node.graph.inserting_before(node):
        for inner in traced.nodes:
            if inner.op == "call_function":
                made[inner] = node.graph.node_copy(inner, made.__getitem__)
                kept = {key: node.meta[key] for key in ("nn_module_stack", "stack_trace") if key in node.meta}
                made[inner].meta = {**kept, "example_value": inner.meta.get("val")}
    _replace(node, fx.map_arg(traced.output_node().args[0], made.__getitem__))


def _autocasts(node: fx.Node) -> Iterator[torch.autocast]:
    """Those that the graph has entered, and not left, where the node runs."""
    entered: dict[Any, torch.autocast] = {}
    for before in takewhile(lambda other: other is not node, node.graph.nodes):
        if before.target is _enter_autocast:
            entered[before] = torch.autocast(*before.args)
        elif before.target is _exit_autocast:
            entered.pop(before.args[0], None)
    yield from entered.values()


def _attention_alone(*args: Any, **kwargs: Any) -> Any:
    """Attention whose weights nobody reads: its product is one op then."""
    bound = signature(F.multi_head_attention_forward).bind(*args, **kwargs)
    if bound.arguments.get("need_weights", True):
        # without weights torch takes the hint that a mask is causal for the mask
        bound.arguments |= {"need_weights": False, "is_causal": False}
    return F.multi_head_attention_forward(*bound.args, **bound.kwargs)


def _replace(node: fx.Node, results: Any) -> None:
    if isinstance(results, fx.Node):
        node.replace_all_uses_with(results)
    else:
        for user in list(node.users):
            user.replace_all_uses_with(results[user.args[1]])
            node.graph.erase_node(user)
    node.graph.erase_node(node)


def _encoder_layer(
    x: Tensor,
    width: int,
    heads: int,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    out_weight: Tensor,
    out_bias: Tensor,
    use_gelu: bool,
    norm_first: bool,
    eps: float,
    norm_weight_1: Tensor,
    norm_bias_1: Tensor,
    norm_weight_2: Tensor,
    norm_bias_2: Tensor,
    weight_1: Tensor,
    bias_1: Tensor,
    weight_2: Tensor,
    bias_2: Tensor,
    mask: Tensor | None = None,
    mask_type: int | None = None,
) -> Tensor:
    """torch._transformer_encoder_layer_fwd, x [B, T, D].

    mask: what is not 0 is left out: [T, T], or of mask_type 1 [B, T], or of 2 [B, H, T, T]. What attends to nothing is
    0, and no NaN.
    """
    kept = None if mask is None else mask == 0
    if kept is not None and mask_type == _OF_KEYS:
        kept = kept[:, None, None, :]

    def attend(x: Tensor) -> Tensor:
        parts = F.linear(x, qkv_weight, qkv_bias).chunk(3, dim=-1)
        q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in parts)
        made = F.scaled_dot_product_attention(q, k, v, kept)
        return F.linear(made.transpose(1, 2).flatten(-2), out_weight, out_bias)

    def feed(x: Tensor) -> Tensor:
        inner = F.linear(x, weight_1, bias_1)
        return F.linear(F.gelu(inner) if use_gelu else F.relu(inner), weight_2, bias_2)

    def norm_1(x: Tensor) -> Tensor:
        return F.layer_norm(x, (width,), norm_weight_1, norm_bias_1, eps)

    def norm_2(x: Tensor) -> Tensor:
        return F.layer_norm(x, (width,), norm_weight_2, norm_bias_2, eps)

    if norm_first:
        x = x + attend(norm_1(x))
        return x + feed(norm_2(x))
    x = norm_1(x + attend(x))
    return norm_2(x + feed(x))


_BODIES: dict[Any, Callable[..., Any]] = {
    F.multi_head_attention_forward: F.multi_head_attention_forward,
    torch._transformer_encoder_layer_fwd: _encoder_layer,
    aten._transformer_encoder_layer_fwd.default: _encoder_layer,
}
