"""Floats of few bits as whole numbers on integer units: every product is the exact one, and sums round once."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from qcompile.backends.fx.kernels import Problem, choose, lifted
from qcompile.formats import Float, code_values, parse_format
from qcompile.numerics import Lowered, QParams, dequantize, find_qparams, quantize
from qcompile.spec import parse_spec

FLOATS = (
    "fp4_e2m1",
    "fp4_e1m2",
    "fp4_e3m0",
    "fp6_e2m3",
    "fp6_e3m2",
    "fp8_e4m3",
    "fp8_e3m4",
    "fp8_e2m5",
    "e2m2",
    "e4m0",
)
WEIGHTS = ("fp4_e2m1", "fp4_e1m2", "fp4_e3m0", "fp6_e2m3", "e2m2", "int4", "int8")
# digits of their numbers
LONG = {name: 2 for name in ("fp6_e3m2", "fp8_e3m4", "fp8_e2m5", "e3m1", "e3m3", "e4m0")}
LONG |= {name: 3 for name in ("fp8_e4m3", "e4m1", "e4m3")}
INPUTS = ("int8/token", "int8/token/asym", "int8/tensor/asym", *(f"{name}/token" for name in FLOATS), "fp4_e2m1/tensor")


E3M0 = find_qparams(torch.ones(1, 1), parse_spec("fp4_e3m0/channel"))


def problem(weight: str, given: str, N: int, K: int, **more: object) -> Problem:
    specs = {"weight": parse_spec(weight), "input": parse_spec(given)}
    return Problem(N=N, K=K, dtype=torch.float32, device="cpu", **(specs | more))


def lowered_codes(weight: Tensor, narrow: QParams, shift: tuple[int, ...]) -> tuple[Tensor, QParams]:
    """As `fold_exponent_bias` makes them."""
    values = dequantize(quantize(weight, narrow), narrow) * torch.tensor(shift).neg().float().exp2()
    room = {"fp4_e2m1": 6, "fp4_e1m2": 7, "fp4_e3m0": 4}[narrow.spec.format.name]
    spec = replace(narrow.spec, format=parse_format("fp8_e4m3"))
    held = replace(narrow, spec=spec, scale=narrow.scale * 2.0**-room, lowered=Lowered(narrow=narrow, shift=shift))
    codes = quantize(values, held)
    assert torch.equal(dequantize(codes, held), values)
    return codes, held


def exact(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """The result in float64, and how far float32 sums may be off: a few roundings of the sum of magnitudes."""
    y = x.double() @ weight.double().T + bias.double()
    size = x.double().abs() @ weight.double().abs().T + bias.double().abs()
    return y, size * 8 * torch.finfo(torch.float32).eps


def run(p: Problem, codes: Tensor, qparams: QParams, x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """What the kernel makes of x, and x as it is quantized."""
    assert p.input is not None
    given = find_qparams(x, p.input)
    taken = (quantize(x, given), given.scale, given.zero)
    packed = lifted.pack(codes, qparams, p.dtype)
    return lifted.KERNEL.op(*lifted.KERNEL.arguments(p, taken, packed, bias)), dequantize(taken[0], given)


@pytest.mark.parametrize("name", FLOATS)
def test_every_number_is_whole(name: str) -> None:
    fmt = parse_format(name)
    assert isinstance(fmt, Float)
    codes = torch.arange(2**fmt.bits, dtype=torch.uint8)
    values = code_values(fmt)
    known = values.isfinite()
    assert torch.equal(lifted.whole(codes[known], fmt).double() * fmt.step, values[known].double())


@pytest.mark.parametrize("given", INPUTS)
@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize(("M", "N", "K"), [(1, 7, 33), (5, 33, 130)])
def test_products_are_exact(weight: str, given: str, M: int, N: int, K: int) -> None:
    p = problem(f"{weight}/channel", given, N, K)
    w, x, bias = torch.randn(N, K), torch.randn(M, K) * torch.exp2(torch.randn(M, 1) * 4), torch.randn(N)
    qparams = find_qparams(w, p.weight)
    assert lifted.why_not(p) is None
    y, quantized = run(p, quantize(w, qparams), qparams, x, bias)
    expected, limit = exact(quantized, dequantize(quantize(w, qparams), qparams), bias)
    assert ((y.double() - expected).abs() <= limit).all()


@pytest.mark.parametrize("given", ["int8/token", "int8/tensor/asym", "fp4_e2m1/token", "fp6_e2m3/tensor"])
@pytest.mark.parametrize("weight", LONG)
@pytest.mark.parametrize("who", ["channel", "tensor"])
def test_weights_of_several_digits_are_exact(
    weight: str, who: str, given: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    M, N, K = 5, 33, 130
    p = problem(f"{weight}/{who}", given, N, K)
    w, x, bias = torch.randn(N, K), torch.randn(M, K) * torch.exp2(torch.randn(M, 1) * 4), torch.randn(N)
    qparams = find_qparams(w, p.weight)
    codes = quantize(w, qparams)
    y, quantized = run(p, codes, qparams, x, bias)
    expected, limit = exact(quantized, dequantize(codes, qparams), bias)
    assert ((y.double() - expected).abs() <= limit).all()
    assert len(lifted.pack(codes, qparams, torch.float32)["weight"]) == LONG[weight] * N
    for units in (True, False):
        monkeypatch.setattr(lifted.int8, "has_integer_units", lambda units=units: units)
        assert (choose(p)[0] is lifted.KERNEL) == (units and LONG[weight] == 2)


@pytest.mark.parametrize("given", ["fp4_e2m1/tensor", "fp4_e3m0/token", "fp8_e4m3/token", "int8/token/asym"])
@pytest.mark.parametrize("weight", ["fp4_e2m1", "fp4_e1m2", "fp4_e3m0"])
@pytest.mark.parametrize("most", [0, 3, 9])
@pytest.mark.parametrize("few", [0, 3, 25])
def test_lowered_columns(weight: str, given: str, most: int, few: int) -> None:
    N, K = 20, 90
    shift = tuple([0] * few + [most] * (K - few))
    w, x, bias = torch.randn(N, K), torch.randn(6, K), torch.randn(N)
    codes, held = lowered_codes(w, find_qparams(w, parse_spec(f"{weight}/channel")), shift)
    p = problem("fp8_e4m3/channel", given, N, K, lowered=held.lowered)
    assert choose(p)[0] is lifted.KERNEL
    y, quantized = run(p, codes, held, x, bias)
    expected, limit = exact(quantized, dequantize(codes, held), bias)
    assert ((y.double() - expected).abs() <= limit).all()
    beside = lifted.pack(codes, held, torch.float32).get("channels")
    spare = {"fp4_e2m1": 3, "fp4_e1m2": 4, "fp4_e3m0": 0}[weight]
    assert (0 if beside is None else len(beside)) == (few if most > spare else 0)


def test_rows_that_are_not_finite_are_alone() -> None:
    p = problem("fp4_e2m1/channel", "fp4_e2m1/token", 8, 40)
    w, x = torch.randn(8, 40), torch.randn(4, 40)
    x[1, 3], x[2, 5] = torch.nan, torch.inf
    qparams = find_qparams(w, p.weight)
    y, _ = run(p, quantize(w, qparams), qparams, x, torch.zeros(8))
    assert y[[0, 3]].isfinite().all()
    assert not y[[1, 2]].isfinite().any()


@pytest.mark.parametrize(
    ("weight", "given", "more", "reason"),
    [
        ("fp8_e4m3/channel", "fp8_e4m3/token", {}, "fp8_e4m3 are 3 digits of 8 bits, those of fp8_e4m3 3: 9 matmuls"),
        ("fp6_e3m2/channel", "fp6_e3m2/token", {}, "fp6_e3m2 are 2 digits of 8 bits, those of fp6_e3m2 2: 4 matmuls"),
        ("fp6_e3m2/channel", "int8/token", {"small": True}, "free_weights"),
        ("fp6_e3m2/channel", "int8/token", {"dtype": torch.bfloat16}, "one in bfloat16"),
        ("fp8_e4m3/channel", "int8/token", {}, "3 matmuls of integers take longer"),
        ("e5m0/channel", "int8/token", {}, "e5m0 are no multiples"),
        ("nf4/channel", "int8/token", {}, "nf4"),
        ("fp4_e2m1/b32/e8m0", "fp4_e2m1/b32/e8m0", {}, "one scale a channel"),
        ("fp4_e2m1/channel", "fp8_e5m2/token", {}, "fp8_e5m2"),
        ("fp4_e2m1/channel", "fp4_e2m1/token", {"device": "cuda"}, "CPU"),
        ("fp4_e2m1/channel", "fp4_e2m1/token", {"K": 70_000}, "overflow"),
        (
            "fp8_e4m3/channel",
            "fp4_e2m1/token",
            {"lowered": Lowered(narrow=E3M0, shift=tuple(range(12)) * 4)},
            "44 of 48 columns",
        ),
    ],
)
def test_what_it_refuses(weight: str, given: str, more: dict, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lifted.int8, "has_integer_units", lambda: True)
    p = replace(problem(weight, given, 16, 48), **more)
    assert reason in str(lifted.why_not(p))
