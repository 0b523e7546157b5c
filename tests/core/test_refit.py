"""Scales that are fitted to codes: against the normal equations of the whole row, and where they must stay."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from qcompile.numerics import QParams, dequantize
from qcompile.solvers import IN_TURN
from qcompile.solvers.gptq import solve_gptq
from qcompile.solvers.moments import Moments
from qcompile.solvers.refit import refitted
from qcompile.spec import parse_spec
from tests.core.test_gptq import ROWS, K, cost, moments
from tests.core.test_solvers import weight

FITTED = ["int4/g32/asym/bf16", "int3/channel", "nf4/g32/fp16", "fp4_e2m1/channel", "lloyd4/g48"]
# shared by rows, of powers of two, integers themselves, beside a minimum
KEPT = ["int4/b4x32", "int4/tensor", "fp4_e2m1/b32/e8m0", "int4/g32/u6x8", "int4/g32/asym/u4row", "int4/g32/min/bf16"]
KEPT += ["nf4/g32/dq256"]


def pair(text: str, columns: int = K) -> tuple[Tensor, Tensor, QParams]:
    x, h = weight(rows=ROWS, columns=columns), moments(k=columns)
    return x, h, solve_gptq(x, parse_spec(text), h)


@pytest.mark.parametrize("text", FITTED)
def test_outputs_lose_less_under_the_same_codes(text: str) -> None:
    x, h, found = pair(text)
    again = refitted(x, found, Moments(matrix=h), 0.0)
    assert again.codes is found.codes
    assert again.spec == found.spec
    for row in range(ROWS):
        before, after = (_row_cost(x, qparams, h, row) for qparams in (found, again))
        assert after <= before * (1 + 1e-6)
    assert cost(x, again, h) < cost(x, found, h)


def _row_cost(x: Tensor, qparams: QParams, h: Tensor, row: int) -> float:
    assert qparams.codes is not None
    apart = dequantize(qparams.codes, qparams).double()[row] - x.double()[row]
    return float(apart @ h @ apart)


def test_they_solve_the_normal_equations() -> None:
    x, h, found = pair("int4/g32")
    again = refitted(x, found, Moments(matrix=h), 0.0)
    assert again.codes is not None
    for row in range(ROWS):
        units = torch.block_diag(*again.codes[row].double().split(32)).view(3, K)
        exact = torch.linalg.solve(units @ h @ units.T, units @ h @ x[row].double())
        torch.testing.assert_close(again.scale[row].double(), exact, rtol=2e-3, atol=0)


def test_scales_are_those_that_are_stored() -> None:
    x, h, found = pair("int4/g32/asym/bf16")
    again = refitted(x, found, Moments(matrix=h), 0.01)
    assert torch.equal(again.scale, again.scale.bfloat16().float())
    assert torch.equal(again.stored["scale"].float(), again.scale)


@pytest.mark.parametrize("text", KEPT)
def test_other_scales_stay(text: str) -> None:
    x, h, found = pair(text, 256)
    assert refitted(x, found, Moments(matrix=h), 0.01) is found


def test_groups_of_zeros_keep_their_scale() -> None:
    x, h, found = pair("int4/g32")
    assert found.codes is not None
    codes = found.codes.index_fill(1, torch.arange(32, 64), 0)
    again = refitted(x, replace(found, codes=codes), Moments(matrix=h), 0.01)
    assert torch.equal(again.scale[:, 1], found.scale[:, 1])
    assert bool(torch.isfinite(again.scale).all())
    nothing = refitted(x, replace(found, codes=torch.zeros_like(codes)), Moments(matrix=torch.zeros(K, K)), 0.01)
    assert torch.equal(nothing.scale, found.scale)


def test_it_follows_gptq() -> None:
    x, h, found = pair("int3/g32/asym")
    solved = IN_TURN["gptq"](x, parse_spec("int3/g32/asym"), h)
    assert torch.equal(solved.codes, found.codes)
    assert cost(x, solved, h) < cost(x, found, h)
    assert torch.equal(IN_TURN["gptq-unordered"](x, found.spec, h).scale, found.scale)
