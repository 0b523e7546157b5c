"""AWQ's clip against its definition: what the columns of each tile cost the outputs together."""

import pytest
import torch
from torch import Tensor

from qcompile.numerics import QParams, dequantize, quantize
from qcompile.solvers import IN_TURN, SOLVERS
from qcompile.solvers.awq import solve_awq
from qcompile.solvers.moments import Moments
from qcompile.solvers.mse import squared_error
from qcompile.spec import parse_spec
from tests.core.test_gptq import moments
from tests.core.test_solvers import SPECS, weight

ROWS, K = 24, 96
GROUPS = ["int4/g32/asym", "int3/g32/fp16", "nf4/g32", "fp4_e2m1/g48", "int4/channel"]


def tile_costs(x: Tensor, qparams: QParams, h: Tensor) -> Tensor:
    """tr(dW H dW^T) of each row and group alone, float64 [N, G], written out."""
    apart = dequantize(quantize(x, qparams), qparams).double() - x.double()
    size = qparams.spec.granularity.columns or K
    parts = [slice(start, start + size) for start in range(0, K, size)]
    return torch.stack([((apart[:, part] @ h[part, part]) * apart[:, part]).sum(1) for part in parts], 1)


@pytest.mark.parametrize("text", GROUPS)
def test_no_tile_costs_more_than_with_other_clips(text: str) -> None:
    x, h, spec = weight(rows=ROWS, columns=K), moments(), parse_spec(text)
    found = tile_costs(x, solve_awq(x, spec, h), h)
    for other in ("round", "mse"):
        known = tile_costs(x, SOLVERS[other](x, spec), h)
        # both sides are summed in float32 where it is decided
        assert (found <= known * (1 + 1e-4)).all()
    assert found.sum() < 0.97 * known.sum()


@pytest.mark.parametrize("text", GROUPS)
def test_costs_are_those_of_the_definition(text: str) -> None:
    x, h, spec = weight(rows=ROWS, columns=K), moments(), parse_spec(text)
    qparams = SOLVERS["round"](x, spec)
    blocks = Moments(matrix=h).blocks(spec.granularity.columns or K)
    found = squared_error(x, qparams, blocks).double() * h.diagonal().mean()
    torch.testing.assert_close(found, tile_costs(x, qparams, h), rtol=1e-4, atol=1e-6 * float(found.max()))


@pytest.mark.parametrize("text", SPECS)
def test_channels_that_do_not_go_together_count_each_for_itself(text: str) -> None:
    x, h, spec = weight(rows=ROWS, columns=K), moments().diagonal(), parse_spec(text)
    found, expected = solve_awq(x, spec, h), SOLVERS["mse"](x, spec, h.float() / h.float().mean())
    assert torch.equal(found.scale, expected.scale)
    assert torch.equal(found.codes, quantize(x, expected))


@pytest.mark.parametrize("solver", IN_TURN)
def test_moments_may_have_any_size_and_shapes_are_enough(solver: str) -> None:
    x, h, spec = weight(rows=ROWS, columns=K), moments(), parse_spec("int4/g32/asym")
    found = IN_TURN[solver](x, spec, h)
    assert found.codes is not None
    for size in (2.0**-60, 2.0**60):
        assert torch.equal(IN_TURN[solver](x, spec, h * size).codes, found.codes)
    shape = IN_TURN[solver](x.to("meta"), spec).codes
    assert shape is not None
    assert (shape.is_meta, shape.shape, shape.dtype) == (True, found.codes.shape, found.codes.dtype)


@pytest.mark.parametrize("solver", IN_TURN)
def test_silent_inputs_leave_all_columns_alike(solver: str) -> None:
    x, spec = weight(rows=ROWS, columns=K), parse_spec("int4/g32/asym")
    assert torch.equal(IN_TURN[solver](x, spec, torch.zeros(K, K)).codes, IN_TURN[solver](x, spec).codes)


def test_moments_are_factored_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made, spec, h = [], parse_spec("int4/g32/asym"), moments()
    factor = torch.linalg.cholesky_ex
    monkeypatch.setattr(torch.linalg, "cholesky_ex", lambda x, **more: made.append(x) or factor(x, **more))
    one = Moments(matrix=h)
    weights = [weight(seed, rows=ROWS, columns=K) for seed in range(3)]
    shared = [IN_TURN["gptq"](x, spec, one).codes for x in weights]
    assert len(made) == 1
    assert all(torch.equal(a, IN_TURN["gptq"](x, spec, h).codes) for a, x in zip(shared, weights, strict=True))


def test_the_noise_of_outputs_is_that_of_the_rows() -> None:
    rows = torch.randn(300, K, generator=torch.Generator().manual_seed(3))
    x = weight(rows=ROWS, columns=K)
    values = x + 0.01 * torch.randn(ROWS, K, generator=torch.Generator().manual_seed(4))
    found = Moments(matrix=rows.T @ rows / len(rows)).snr_db(x, values)
    outputs = (rows @ x.T).double()
    noise = (rows @ values.T).double() - outputs
    assert found == pytest.approx(float(10 * (outputs.square().sum() / noise.square().sum()).log10()), abs=1e-3)
    assert Moments(matrix=torch.eye(K)).snr_db(x, x) == float("inf")
