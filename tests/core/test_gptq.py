"""GPTQ against its definition: what each column's rounding costs, and how the columns behind it make up for it."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from qcompile.errors import CalibrationError, SpecError
from qcompile.numerics import QParams, dequantize, on_device, quantize
from qcompile.solvers import SOLVERS
from qcompile.solvers.gptq import _Rounding, solve_gptq
from qcompile.solvers.moments import PANEL, turned_factor, upper_rows
from qcompile.spec import parse_spec
from tests.core.test_solvers import SPECS, weight

ROWS, K = 24, 96
TEXTS = [text for text in SPECS if text != "int8/tensor"]


def moments(seed: int = 0, k: int = K) -> Tensor:
    """Second moments of inputs whose channels go together, and of which some are far larger than others."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.eye(k) + torch.randn(k, k, generator=generator) / k**0.5
    rows = torch.randn(4 * k, k, generator=generator).double() @ mixed.double()
    rows *= torch.randn(k, generator=generator).exp()
    return rows.T @ rows / len(rows)


def values(qparams: QParams) -> Tensor:
    assert qparams.codes is not None
    return dequantize(qparams.codes, qparams).double()


def cost(x: Tensor, qparams: QParams, h: Tensor) -> float:
    """tr(dW H dW^T), the squared error of the outputs."""
    apart = dequantize(quantize(x, qparams), qparams).double() - x.double()
    return float(((apart @ h) * apart).sum())


@pytest.mark.parametrize("text", ["int4/channel", "int3/g32/asym", "nf4/g32", "fp4_e2m1/b32/e8m0", "int4/b4x32"])
@pytest.mark.parametrize("ordered", [True, False])
def test_every_code_is_nearest_after_the_columns_before_it(text: str, ordered: bool) -> None:
    x, h = weight(rows=ROWS, columns=K).double(), moments()
    found = solve_gptq(x, parse_spec(text), h, damping=0.0, ordered=ordered)
    order = h.diagonal().argsort(descending=True) if ordered else torch.arange(K)
    left, inverse, total = x.clone(), torch.linalg.inv(h), 0.0
    rounded = values(found)
    # the textbook's optimal brain surgeon, with the inverse of what is left of H at every step
    for i in order.tolist():
        assert torch.equal(quantize(left, replace(found, codes=None))[:, i], found.codes[:, i])
        error = left[:, i] - rounded[:, i]
        total += float(error.square().sum() / inverse[i, i])
        left -= torch.outer(error, inverse[i] / inverse[i, i])
        inverse = inverse - torch.outer(inverse[i], inverse[i]) / inverse[i, i]
        inverse[i], inverse[:, i] = 0, 0
    assert total == pytest.approx(cost(x, found, h), rel=1e-10)


def factor(h: Tensor) -> Tensor:
    return upper_rows(turned_factor(h.flip(0, 1)), 0, len(h))


# the second is inverted in parts, of which one has a column more
@pytest.mark.parametrize("k", [K, 2 * PANEL + 1])
def test_the_factor_is_that_of_the_inverse(k: int) -> None:
    h = moments(k=k)
    upper = factor(h)
    assert torch.equal(upper, upper.triu())
    assert (upper.diagonal() > 0).all()
    apart = upper @ h @ upper.T - torch.eye(k).double()
    assert float(apart.abs().max()) < 1e-10
    assert torch.equal(upper_rows(turned_factor(h.flip(0, 1)), 7, 9), upper[7:9, 7:])


@pytest.mark.parametrize("text", TEXTS)
def test_blocks_and_the_size_of_moments_change_no_code(text: str) -> None:
    x, h, spec = weight(rows=ROWS, columns=K).double(), moments(), parse_spec(text)
    found = solve_gptq(x, spec, h)
    for other in (solve_gptq(x, spec, h, block=block) for block in (1, 16, 40, K, 1000)):
        assert torch.equal(other.codes, found.codes)
    assert torch.equal(solve_gptq(x, spec, h * 1e3).codes, found.codes)


@pytest.mark.parametrize("text", TEXTS)
def test_channels_that_do_not_go_together_give_the_nearest_codes(text: str) -> None:
    x, h, spec = weight(rows=ROWS, columns=K), moments().diagonal(), parse_spec(text)
    for found in (solve_gptq(x, spec, h, ordered=ordered) for ordered in (True, False)):
        assert torch.equal(found.codes, quantize(x, replace(found, codes=None)))
    assert torch.equal(found.codes, solve_gptq(x, spec, torch.diag(h)).codes)
    silent = solve_gptq(x, spec, torch.zeros(K, K))
    assert torch.equal(silent.codes, solve_gptq(x, spec).codes)


@pytest.mark.parametrize("text", TEXTS)
def test_outputs_lose_less_than_with_nearest_codes(text: str) -> None:
    x, h, spec = weight(rows=ROWS, columns=K), moments(), parse_spec(text)
    nearest = cost(x, SOLVERS["imatrix"](x, spec, h.diagonal().float()), h)
    unordered, ordered = (cost(x, solve_gptq(x, spec, h, ordered=flag), h) for flag in (False, True))
    # of few values, the largest are clipped, and what they lose is too much for the columns behind
    coarse = spec.format.bits < 4
    assert unordered < (0.9 if coarse else 0.7) * nearest
    assert ordered < (0.9 if coarse else 0.85) * unordered


def test_a_silent_channel_is_rounded_to_nearest_and_moves_no_other() -> None:
    x, h, spec = weight(rows=ROWS, columns=K), moments(), parse_spec("int4/channel/asym")
    h[5], h[:, 5] = 0, 0
    found = solve_gptq(x, spec, h)
    assert torch.equal(found.codes[:, 5], quantize(x, replace(found, codes=None))[:, 5])
    h[5, 5] = 1
    assert factor(h)[5].count_nonzero() == 1


@pytest.mark.parametrize("text", ["int4/g32/asym", "nf4/channel"])
def test_rows_do_not_see_each_other(text: str) -> None:
    x, h, spec = weight(rows=ROWS, columns=K).double(), moments(), parse_spec(text)
    assert torch.equal(solve_gptq(x, spec, h).codes[3:7], solve_gptq(x[3:7], spec, h).codes)


@pytest.mark.parametrize("text", SPECS)
def test_it_needs_shapes_only(text: str) -> None:
    spec, x = parse_spec(text), weight(rows=ROWS, columns=K)
    found, real = solve_gptq(x.to("meta"), spec), solve_gptq(x, spec)
    assert found.codes is not None
    assert found.codes.is_meta
    assert (found.codes.shape, found.codes.dtype) == (real.codes.shape, real.codes.dtype)


def test_moments_that_no_data_has_are_refused() -> None:
    x, h, spec = weight(rows=ROWS, columns=K), moments(), parse_spec("int4/channel")
    for bad in (h - h.diagonal().mean() * torch.eye(K), torch.full((K, K), torch.nan)):
        with pytest.raises(CalibrationError, match=r"not positive definite.*calibrate with more batches"):
            solve_gptq(x, spec, bad)


def test_codes_are_of_one_tensor_alone() -> None:
    found = solve_gptq(weight(rows=ROWS, columns=K), parse_spec("int4/channel"), moments())
    with pytest.raises(SpecError, match=r"codes of a tensor \[24, 96\], got \[3, 96\]"):
        quantize(weight(rows=3, columns=K), found)


@pytest.mark.gpu
@pytest.mark.parametrize("text", ["int4/g64/asym/bf16", "int3/channel", "int4/g32/min/fp16"])
@pytest.mark.parametrize("k", [5 * 128, 5 * 128 + 64])
def test_recorded_blocks_round_as_others_do(text: str, k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x, h, spec = weight(rows=200, columns=k).cuda(), moments(k=k).cuda(), parse_spec(text)
    found = solve_gptq(x, spec, h)
    monkeypatch.setattr(_Rounding, "_recorded", lambda *_: None)
    plain = solve_gptq(x, spec, h)
    assert found.codes is not None
    assert torch.equal(found.scale, plain.scale)
    assert torch.equal(found.codes, plain.codes)
    x, h = x.cpu(), h.cpu()
    elsewhere = replace(on_device(plain, x.device), codes=plain.codes.cpu())
    assert cost(x, elsewhere, h) == pytest.approx(cost(x, solve_gptq(x, spec, h), h), rel=0.05)


@pytest.mark.parametrize("text", ["int4/g32/asym/u4row", "int3/g32/u4row"])
def test_codes_chosen_together_stay_int8_under_a_row(text: str) -> None:
    """What columns make up for may lie outside of the range that scales were found for."""
    x, h = weight(rows=ROWS, columns=K) * 3, moments(k=K)
    qparams = solve_gptq(x, parse_spec(text), h)
    whole = dequantize(quantize(x, qparams), qparams) / qparams.stored["outer"].float()
    assert torch.equal(whole, whole.to(torch.int8).float())
