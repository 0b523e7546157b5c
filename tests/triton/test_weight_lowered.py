"""4-bit floats with lowered columns under 16-bit inputs, without a GPU: packs, what an op of them gives, choices."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton.experimental.gluon.language.nvidia.hopper")

import qcompile
from qcompile.backends.fx.kernels import choose as choose_kernel
from qcompile.backends.fx.kernels import weight_lowered
from qcompile.backends.triton.widths import WIDTHS, unpack_codes
from qcompile.formats import parse_format
from qcompile.numerics import dequantize, find_qparams, quantize
from qcompile.shifts import lowered_codes, room
from qcompile.spec import parse_spec
from tests.triton.fp4_on_cpu import FORMATS
from tests.triton.on_cpu import Heads, lowered_for_hopper, on_cpu
from tests.triton.test_fp4_cpu import lowered_by, problem

ALONE: dict[str, Any] = {"input": None}


def multiplied(
    x: Tensor, words: Tensor, scales: Tensor, levels: Tensor, bias: Tensor | None, N: int, width: str, *rest: Any
) -> Tensor:
    """What the opaque op computes of 4-bit codes with a float32 scale for each channel, in plain torch."""
    assert width == "book"
    # the low one of each pair, of the first sixteen pairs
    numbers = levels.view(x.dtype)[:32:2].double()
    rows = scales.view(torch.float32).reshape(-1, 1)[:N].double()
    weight = numbers[unpack_codes(words, WIDTHS[width], N, x.shape[1]).long()] * rows
    y = x.double() @ weight.T
    return (y if bias is None else y + bias.double()).to(x.dtype)


@pytest.fixture
def op_on_cpu() -> Iterator[None]:
    with on_cpu(weight_mm=multiplied):
        yield


@pytest.mark.usefixtures("op_on_cpu")
@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize(("N", "K"), [(64, 128), (75, 272)])
def test_the_input_is_lowered_in_place_of_the_weight(fmt: str, N: int, K: int) -> None:
    torch.manual_seed(0)
    shift = tuple(torch.randint(0, room(parse_format(fmt)) + 1, (K,)).tolist())
    w, x, bias = torch.randn(N, K), torch.randn(7, K).bfloat16(), torch.randn(N).bfloat16()
    found = find_qparams(w, parse_spec(f"{fmt}/channel"))
    codes, qparams = lowered_codes(quantize(w, found), found, shift)
    p = problem(N=N, K=K, weight=qparams.spec, lowered=qparams.lowered, **ALONE)
    assert choose_kernel(p)[0].name == "weight-lowered"
    kernel = weight_lowered.KERNEL
    y = kernel.op(*kernel.arguments(p, (x,), kernel.pack(codes, qparams, torch.bfloat16), bias))
    expected = x.double() @ dequantize(codes, qparams).double().T + bias.double()
    torch.testing.assert_close(y.double(), expected, rtol=2.0**-8, atol=2.0**-8 * float(expected.abs().max()))


@pytest.mark.usefixtures("op_on_cpu")
def test_a_graph_lowered_for_hopper_computes_what_was_planned() -> None:
    torch.manual_seed(0)
    model, x = Heads(160).bfloat16().eval(), torch.randn(2, 30, 160).bfloat16()
    rule = {"weight": "fp4_e2m1/channel", "solver": "mse"}
    plan = qcompile.calibrate(model, [x], recipe={"rules": [rule]}, progress=False)
    decisions = {
        name: replace(d, shift=tuple((k * 5 + (name == "v")) % 12 for k in range(160)))
        for name, d in plan.decisions.items()
    }
    text, error = lowered_for_hopper(replace(plan, decisions=decisions), model, x)
    # q and k are one matmul, v has other octaves
    assert text.count("linear_weight_lowered") == 2
    assert error < 5e-3


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        (lowered_by(14) | ALONE, None),
        (lowered_by(14) | ALONE | {"dtype": torch.float16}, "float16 cannot be lowered without loss"),
        (lowered_by(3, "fp6_e3m2") | ALONE, "codes of 6 bits fill bytes here"),
        (lowered_by(3), "the input is quantized"),
        (lowered_by(3) | ALONE | {"K": 132}, "K=132 is not a multiple of 8"),
        (ALONE, "no columns of the weight are lowered"),
    ],
)
def test_refusals_say_why(more: dict[str, Any], reason: str | None) -> None:
    found = weight_lowered.why_not(problem(**more))
    assert found is None if reason is None else reason in str(found)
