"""Floats of 4 bits on both sides, shifted and not, in files that compute what torch computes from its graph."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from qcompile import pipeline
from qcompile.backends.onnx.emit import emit
from qcompile.backends.onnx.fusion import check_fusion
from qcompile.folds import Fold
from qcompile.formats import code_values, parse_format
from qcompile.graph import Graph
from qcompile.numerics import QParams, dequantize, fake_quantize, find_qparams, quantize
from qcompile.plan import Plan, make_plan
from qcompile.recipe import Recipe, Rule
from qcompile.sites import find_sites
from qcompile.spec import parse_spec
from tests.hosts import FX, ONNX, result
from tests.onnx.canonical import linear_model, run_onnxruntime, run_reference

FLOATS = ("fp4_e2m1", "fp4_e1m2", "fp4_e3m0")
# of inputs, digits of their numbers
LONG = {"fp8_e4m3/token": 3, "fp8_e4m3/tensor": 3, "fp6_e3m2/token": 2, "fp8_e3m4/token": 2, "fp8_e2m5/tensor": 2}
LONG |= {"e4m0/token": 2, "e4m1/token": 3, "fp8_e4m3fnuz/token": 3}
INPUTS = [f"{name}/{who}" for name in FLOATS for who in ("tensor", "token")]


def assert_exact(y: Tensor, x: Tensor, weight: Tensor, bias: Tensor) -> None:
    """y is x @ weight.T + bias, but for a few roundings of the sum of magnitudes."""
    expected = x.double() @ weight.double().T + bias.double()
    size = x.double().abs() @ weight.double().abs().T + bias.double().abs()
    assert ((y.double() - expected).abs() <= size * 8 * torch.finfo(torch.float32).eps).all()


def assert_all_exact(found: Sequence[Tensor], x: Tensor, numbers: Sequence[tuple[Tensor, Tensor | None]]) -> None:
    """`assert_exact` of each linear that reads x."""
    for y, (weight, bias) in zip(found, numbers, strict=True):
        assert bias is not None
        assert_exact(y, x, weight, bias)


@pytest.mark.parametrize("given", [*INPUTS, "fp6_e2m3/token", "static"])
@pytest.mark.parametrize("weight", [*(f"{name}/channel" for name in FLOATS), "fp6_e2m3/tensor", "int4/channel"])
def test_both_sides_fuse_and_are_exact(weight: str, given: str) -> None:
    torch.manual_seed(3)
    x = torch.randn(7, 96) * torch.exp2(torch.randn(7, 1) * 3)
    # numbers midway between two of the format, either way
    x[0, :24] = torch.arange(24) / 8 * x[0].abs().max()
    spec = parse_spec("fp4_e2m1/tensor" if given == "static" else given)
    qparams: QParams | str = find_qparams(x * 0.7, spec) if given == "static" else given
    model, numbers = linear_model(weight=weight, given=qparams, shape=("M", 96), linears=2)
    emitted = emit(model, "ort-cpu")
    kernels = check_fusion(emitted).counts
    assert kernels["MatMulIntegerToFloat"] == 2
    assert not {"MatMul", "MatMulNBits", "FusedMatMul", "DequantizeLinear"} & kernels.keys()
    assert emitted.notes == ()
    seen = fake_quantize(x, spec) if isinstance(qparams, str) else dequantize(quantize(x, qparams), qparams)
    assert_all_exact(run_onnxruntime(emitted.model, x), seen, numbers)
    assert_all_exact(run_reference(emit(model, "portable").model, x), seen, numbers)


@pytest.mark.parametrize("given", [*LONG, "static"])
@pytest.mark.parametrize("weight", ["fp4_e2m1/channel", "fp6_e2m3/tensor", "int4/channel", "int8/channel"])
@pytest.mark.parametrize("shape", [("M", 96), (2, "M", 96)], ids=str)
def test_inputs_of_several_digits_are_multiplied_exactly(weight: str, given: str, shape: tuple[int | str, ...]) -> None:
    torch.manual_seed(4)
    x = torch.randn(*(n if isinstance(n, int) else 7 for n in shape))
    x = x * torch.exp2(torch.randn(*x.shape[:-1], 1) * 3)
    spec = parse_spec("fp8_e4m3/tensor" if given == "static" else given)
    qparams: QParams | str = find_qparams(x * 0.7, spec) if given == "static" else given
    model, numbers = linear_model(weight=weight, given=qparams, shape=shape, linears=2)
    emitted = emit(model, "ort-cpu")
    kernels, digits = check_fusion(emitted).counts, LONG.get(given, 3)
    assert kernels["MatMulIntegerToFloat"] == 2 * digits
    assert not {"MatMul", "MatMulNBits", "FusedMatMul", "DequantizeLinear"} & kernels.keys()
    # inputs are rounded and taken apart once for both
    assert kernels["QuantizeLinear"] == digits
    assert len(emitted.notes) == 2
    assert all(f"are {digits} digits" in note and "slower than float" in note for note in emitted.notes)
    seen = fake_quantize(x, spec) if isinstance(qparams, str) else dequantize(quantize(x, qparams), qparams)
    assert_all_exact(run_onnxruntime(emitted.model, x), seen, numbers)


@pytest.mark.parametrize("name", [*FLOATS, "fp6_e2m3", "fp6_e3m2", "fp8_e4m3", "fp8_e3m4", "fp8_e2m5", "e4m0", "e1m6"])
def test_numbers_between_two_of_a_format_go_where_torch_takes_them(name: str) -> None:
    fmt = parse_format(name)
    numbers = code_values(fmt)
    ordered = numbers[numbers.isfinite()].unique()
    middle = (ordered[1:] + ordered[:-1]) / 2
    near = [middle, *(middle.nextafter(torch.full_like(middle, to)) for to in (-torch.inf, torch.inf))]
    x = torch.cat([*near, ordered, ordered * 1.01])[:, None]
    given = replace(find_qparams(x, parse_spec(f"{name}/tensor")), scale=torch.tensor(0.5))
    model, ((weight, _),) = linear_model(weight="int8/channel", given=given, shape=("M", 1), bias=False)
    (y,) = run_onnxruntime(emit(model, "ort-cpu").model, x * 0.5)
    assert_exact(y, dequantize(quantize(x * 0.5, given), given), weight, torch.zeros(len(weight)))


@pytest.mark.parametrize("given", ["fp4_e2m1/token", "fp8_e4m3/token"])
def test_rows_that_are_not_finite_are_alone(given: str) -> None:
    x = torch.randn(4, 96)
    x[1, 3], x[2, 5] = torch.nan, torch.inf
    model, _ = linear_model(weight="fp4_e2m1/channel", given=given, shape=("M", 96))
    (y,) = run_onnxruntime(emit(model, "ort-cpu").model, x)
    assert y[[0, 3]].isfinite().all()
    assert not y[[1, 2]].isfinite().any()


class Net(nn.Module):
    """A norm, and a linear that reads it; its channels are far apart."""

    def __init__(self, K: int, N: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(K, eps=1e-6)
        self.fc = nn.Linear(K, N)
        self.norm.weight.data = torch.exp2(torch.linspace(-4, 4, K))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.norm(x))


def shifted(graph: Graph, fmt: str, given: str, shift: tuple[int, ...]) -> Plan:
    rule = Rule(weight=parse_spec(f"{fmt}/channel"), input=parse_spec(given), solver="mse")
    plan = make_plan([found.site for found in find_sites(graph)], Recipe(name="test", rules=(rule,)))
    fold = Fold(sites=("fc",), scale=torch.tensor(shift).neg().float().exp2(), into="norm")
    decisions = {name: replace(decision, shift=shift) for name, decision in plan.decisions.items()}
    return replace(plan, decisions=decisions, folds=(fold,))


@pytest.mark.parametrize("given", ["fp4_e2m1/token", "fp4_e3m0/token", "fp8_e4m3/token"])
@pytest.mark.parametrize("fmt", FLOATS)
@pytest.mark.parametrize(("few", "most"), [(0, 2), (3, 9), (30, 9)])
def test_shifted_models_compute_what_torch_computes(fmt: str, given: str, few: int, most: int) -> None:
    torch.manual_seed(0)
    K, N = 66, 24
    net, x = Net(K, N).eval(), torch.randn(5, K)
    shift = tuple([0] * few + [most] * (K - few))
    expected = FX.open(net, x)
    pipeline.quantize(expected, shifted(expected, fmt, given, shift))
    y = result(expected, x)
    graph = ONNX.open(net, x)
    pipeline.quantize(graph, shifted(graph, fmt, given, shift))
    limit = {"rtol": 1e-5, "atol": 1e-5 * float(y.abs().max())}
    (portable,) = run_reference(emit(graph.model, "portable").model, x)
    torch.testing.assert_close(portable, y, **limit)
    emitted = emit(graph.model, "ort-cpu")
    kernels = check_fusion(emitted).counts
    assert kernels["MatMulIntegerToFloat"] == LONG.get(given, 1)
    # onnxruntime makes one op of the thin matmul and the sum
    assert kernels.get("Gemm", 0) == (few > 0)
    (fast,) = run_onnxruntime(emitted.model, x)
    torch.testing.assert_close(fast, y, **limit)
