"""Scales and minima by least squares: K-quants' search, for any groups."""

import pytest
import torch
from torch import Tensor

from qcompile.errors import SpecError
from qcompile.numerics import dequantize, find_qparams, quantize
from qcompile.solvers import SOLVERS
from qcompile.solvers.kquant import solve_kquant
from qcompile.spec import parse_spec

SPECS = [
    *(
        "int4/b32/full/fp16",
        "int4/g32/min/fp16",
        "int3/g64/min",
        "int2/g16/min/bf16",
        "int4/g128/bf16",
        "int4/g32/u6x8",
    ),
    *("int4/b32/min/u6x8", "int2/b16/min/u4x16", "int3/b16/full/i6x16", "int6/b16/full/i8x16", "iq4_nl/b32/i6x8"),
    *("iq4_nl/b32/fp16", "nf4/g64/fp16"),
]


def error(weight: Tensor, qparams, importance: Tensor | float = 1.0) -> float:
    return float(((dequantize(quantize(weight, qparams), qparams) - weight).square() * importance).sum())


def heavy(rows: int, columns: int) -> Tensor:
    return torch.distributions.StudentT(4.0).sample((rows, columns)) * 0.02


@pytest.mark.parametrize("text", SPECS)
@pytest.mark.parametrize("columns", [384, 512])
def test_errors_are_below_those_of_whole_ranges(text, columns):
    weight, spec = heavy(48, columns), parse_spec(text)
    found = solve_kquant(weight, spec)
    assert error(weight, found) < 0.97 * error(weight, find_qparams(weight, spec))
    # signs do not matter, save that minima are at most 0
    if spec.symmetric:
        assert error(-weight, solve_kquant(-weight, spec)) < 0.97 * error(-weight, find_qparams(-weight, spec))


@pytest.mark.parametrize("text", [t for t in SPECS if t.startswith("int")])
def test_errors_are_no_more_than_by_clipping(text):
    weight, spec = heavy(64, 512), parse_spec(text)
    assert error(weight, solve_kquant(weight, spec)) <= 1.01 * error(weight, SOLVERS["mse"](weight, spec))


@pytest.mark.parametrize("text", ["int4/b32/min/u6x8", "int4/b32/full/fp16", "iq4_nl/b32/fp16"])
def test_columns_of_large_inputs_lose_less(text):
    weight, spec = heavy(64, 512), parse_spec(text)
    importance = torch.rand(512) ** 4 + 1e-3
    weighed = error(weight, solve_kquant(weight, spec, importance), importance)
    assert weighed < 0.95 * error(weight, solve_kquant(weight, spec), importance)
    # which no unit changes
    scaled = solve_kquant(weight, spec, importance * 1024)
    assert error(weight, scaled, importance) == pytest.approx(weighed, rel=1e-3)


def test_rows_are_alone_and_odd_tiles_are_held():
    weight, spec = heavy(9, 256), parse_spec("int4/b32/min/u6x8")
    weight[1], weight[2], weight[3, :32], weight[4, 5] = 0, 0.25, 1e-30, 30
    weight[5] = weight[5].abs() + 1
    found = solve_kquant(weight, spec)
    values = dequantize(quantize(weight, found), found)
    assert values.isfinite().all()
    assert not values[1].any()
    assert not values[3, :32].any()
    torch.testing.assert_close(values[2], weight[2], rtol=2e-3, atol=0)
    for row in range(9):
        alone = solve_kquant(weight[row : row + 1], spec)
        assert torch.equal(alone.scale, found.scale[row : row + 1])


def test_nothing_matters_where_nothing_comes_in():
    weight = heavy(4, 256)
    found = solve_kquant(weight, parse_spec("int4/b32/min/u6x8"), torch.zeros(256))
    assert dequantize(quantize(weight, found), found).isfinite().all()


@pytest.mark.parametrize("text", ["int4/b32/min/u6x8", "int4/g32/min/fp16", "int6/b16/full/i8x16"])
def test_imatrix_weighs_groups_that_are_fitted(text):
    weight, importance, spec = heavy(8, 512), torch.rand(512), parse_spec(text)
    found, expected = SOLVERS["imatrix"](weight, spec, importance), solve_kquant(weight, spec, importance)
    assert torch.equal(found.scale, expected.scale)
    assert (found.zero is None) == spec.symmetric
    assert found.zero is None or torch.equal(found.zero, expected.zero)


def test_gptq_takes_minima_for_what_they_are():
    weight, spec = heavy(32, 256), parse_spec("int4/b32/min/u6x8")
    x = torch.randn(2048, 256) @ torch.randn(256, 256)
    moments = x.T @ x / len(x)
    nearest, chosen = solve_kquant(weight, spec, moments.diagonal()), SOLVERS["gptq"](weight, spec, moments)

    def lost(qparams) -> float:
        off = dequantize(quantize(weight, qparams), qparams) - weight
        return float(((off @ moments) * off).sum())

    assert lost(chosen) < 0.7 * lost(nearest)


@pytest.mark.parametrize(
    ("solver", "text", "why"),
    [
        ("kquant", "int4/g32/asym", "fits groups of integers with a minimum or without zero point"),
        ("kquant", "int4/channel", "fits groups"),
        ("kquant", "lloyd4/g32", "fixed code books"),
        ("kquant", "fp4_e2m1/b32/e8m0", "fits groups"),
        ("kquant", "int4/g32/dq256", "those of int4/g32/dq256 are not free"),
        ("hqq", "int4/g32/min/fp16", "has minima: take solver 'kquant'"),
    ],
)
def test_what_a_solver_cannot_fit_is_refused(solver, text, why):
    with pytest.raises(SpecError, match=why):
        SOLVERS[solver](torch.randn(4, 64), parse_spec(text))
