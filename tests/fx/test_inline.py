"""Attention and encoder layers that torch leaves as one call are the ops that they are made of."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qcompile
from qcompile.graph import Op
from tests.fx.capture import dynamo_graphs, ops_of, result
from tests.variants import variants

B, T, D, H = 2, 7, 16, 2
CAUSAL = torch.triu(torch.ones(T, T, dtype=torch.bool), 1)
PADDING = torch.arange(T)[None, :] >= torch.tensor([[T], [T - 3]])


class Attending(nn.Module):
    """Attention, asked as its caller says.  index: of what is read of its results."""

    def __init__(self, index: int, asked: dict[str, Any], **made: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(D, H, **{"batch_first": True, **made})
        self.index, self.asked = index, asked

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, **self.asked)[self.index]


class Encoding(nn.Module):
    def __init__(self, asked: dict[str, Any], **made: Any) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(D, H, 2 * D, batch_first=True, **made)
        self.asked = asked

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x, **self.asked)


def float_mask() -> Tensor:
    return torch.zeros(T, T).masked_fill(CAUSAL, float("-inf"))


CASES: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "attention": (lambda: Attending(0, {}), 2),
    "without weights": (lambda: Attending(0, {"need_weights": False}), 2),
    "weights that are read": (lambda: Attending(1, {}), 1),
    "tokens first": (lambda: Attending(0, {}, batch_first=False), 2),
    "no biases": (lambda: Attending(0, {}, bias=False), 2),
    "biases of keys": (lambda: Attending(0, {}, add_bias_kv=True), 2),
    "causal": (lambda: Attending(0, {"attn_mask": CAUSAL}), 2),
    "padding": (lambda: Attending(0, {"key_padding_mask": PADDING}), 2),
    "encoder": (lambda: Encoding({}), 4),
    "norm first, gelu": (lambda: Encoding({}, norm_first=True, activation="gelu"), 4),
    "encoder, causal": (lambda: Encoding({"src_mask": float_mask()}), 4),
    "encoder, padding": (lambda: Encoding({"src_key_padding_mask": PADDING}), 4),
    "encoder, both": (lambda: Encoding({"src_mask": CAUSAL, "src_key_padding_mask": PADDING}), 4),
}


@pytest.mark.parametrize("name", variants(CASES, quick=("attention", "weights that are read", "encoder, padding")))
def test_linears_are_found_and_the_result_stays(name: str) -> None:
    torch.manual_seed(0)
    make, linears = CASES[name]
    model, x = make().eval(), torch.randn(B, T, D)
    with torch.no_grad():
        (opened,) = dynamo_graphs(model, x)
        assert len(ops_of(opened.graph, Op.LINEAR)) == linears
        expected = model(x)
        assert (result(opened.graph, *opened.inputs) - expected).abs().max() <= 1e-6 * expected.abs().max()


def test_results_have_the_dtype_of_the_autocast_around_the_call() -> None:
    class Cast(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Attending(0, {})

        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return self.inner(x)

    model, x = Cast().eval(), torch.randn(B, T, D)
    (opened,) = dynamo_graphs(model, x)
    with torch.no_grad():
        expected, found = model(x), result(opened.graph, *opened.inputs)
    assert found.dtype is expected.dtype is torch.bfloat16
    assert (found.float() - expected.float()).norm() < 1e-2 * expected.float().norm()


def test_a_mask_that_is_more_than_its_hint_says_is_kept() -> None:
    slope = torch.arange(T).float().sub(torch.arange(T)[:, None]) + float_mask()
    model, x = Attending(0, {"attn_mask": slope, "is_causal": True}).eval(), torch.randn(B, T, D)
    (opened,) = dynamo_graphs(model, x)
    with torch.no_grad():
        expected, found = model(x), result(opened.graph, *opened.inputs)
    assert (found - expected).abs().max() <= 1e-6 * expected.abs().max()


def test_arguments_may_be_given_by_position() -> None:
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.MultiheadAttention(D, H)

        def forward(self, x: Tensor) -> Tensor:
            a = self.a
            given = (a.in_proj_weight, a.in_proj_bias, None, None, False, 0.0, a.out_proj.weight, a.out_proj.bias)
            return nn.functional.multi_head_attention_forward(x, x, x, D, H, *given, False, None, True)[0]

    model, x = Functional().eval(), torch.randn(T, B, D)
    (opened,) = dynamo_graphs(model, x)
    with torch.no_grad():
        expected, found = model(x), result(opened.graph, *opened.inputs)
    assert len(ops_of(opened.graph, Op.LINEAR)) == 2
    assert (found - expected).abs().max() <= 1e-6 * expected.abs().max()


def test_calibration_sees_what_attention_calls() -> None:
    model = nn.Sequential(Attending(0, {}), Encoding({})).eval()
    batch = torch.randn(B, T, D)
    plan = qcompile.calibrate(model, [batch], "int8-static", progress=False)
    names = {"0.attention.in_proj_weight", "0.attention.out_proj", "1.layer.linear1", "1.layer.linear2"}
    names |= {"1.layer.self_attn.in_proj_weight", "1.layer.self_attn.out_proj"}
    assert set(plan.decisions) == names
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="qcompile", options={"plan": plan})
    with torch.no_grad():
        found, expected = compiled(batch), model(batch)
    assert (found - expected).norm() < 0.05 * expected.norm()
    assert all(site.kernel for site in qcompile.report(compiled).sites)
