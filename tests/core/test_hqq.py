"""HQQ: less of what it counts than any other solver leaves, zeros that stay zeros, and no unit that matters."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qcompile.errors import SpecError
from qcompile.numerics import QParams, dequantize, quantize
from qcompile.solvers import SOLVERS, hqq
from qcompile.solvers.hqq import POWER, lost
from qcompile.spec import parse_spec
from tests.core.test_imatrix import INTEGERS
from tests.core.test_solvers import SPECS, weight

KINDS = ("e8m0", "fp8_e4m3", "dq256", "u4row")
# whose scales may be negative
FULL = ["int4/b32/full/fp16", "int5/b32/full/fp16", "int4/g32/full", "int3/g32/full/bf16"]
FREE = [text for text in SPECS if parse_spec(text).scale not in KINDS] + INTEGERS + FULL
FIXED = [text for text in SPECS if parse_spec(text).scale in KINDS]


def solved(x: Tensor, text: str, solver: str = "hqq") -> QParams:
    return SOLVERS[solver](x, parse_spec(text))


def original(x: Tensor, columns: int) -> Tensor:
    """What the paper's code makes of 4-bit groups: real zero points, and errors in the weights' own unit."""
    w, beta, least = x.reshape(-1, columns), 10.0, torch.inf
    low, high = w.amin(1, keepdim=True), w.amax(1, keepdim=True)
    inverse = 15 / (high - low)
    zero = (-low * inverse).round()
    kept = zero
    for _ in range(20):
        codes = (w * inverse + zero).round().clamp(0, 15)
        errors = w - (codes - zero) / inverse
        if errors.abs().mean() >= least:
            break
        least, kept = errors.abs().mean(), zero
        aside = errors.sign() * (errors.abs() - errors.abs().pow(POWER - 1) / beta).clamp(min=0)
        zero = (codes - (w - aside) * inverse).mean(1, keepdim=True)
        beta *= 1.01
    return (((w * inverse + kept).round().clamp(0, 15) - kept) / inverse).reshape(x.shape)


@settings(max_examples=40)
@given(st.sampled_from(FREE), st.integers(0, 999), st.sampled_from([1e-6, 1.0, 1e6]))
def test_no_tile_loses_more_than_under_mse_or_round(text: str, seed: int, size: float) -> None:
    x = weight(seed, rows=8, columns=64) * (1.0 if "fp16" in text else size)
    best = lost(x, solved(x, text))
    for other in ("mse", "round"):
        assert (best <= lost(x, solved(x, text, other)) * (1 + 1e-5)).all()


@pytest.mark.parametrize("text", [text for text in FREE if not text.startswith(("int8", "fp8"))])
def test_it_gains_on_what_it_counts(text: str) -> None:
    x = weight()
    assert lost(x, solved(x, text)).sum() < 0.995 * lost(x, solved(x, text, "mse")).sum()


def test_a_fitted_scale_gains_more_than_real_zero_points() -> None:
    x = weight(rows=64) * 0.02
    found, rounded = (dequantize(quantize(x, q), q) for q in (solved(x, "int4/g64/asym", n) for n in ("hqq", "round")))
    ours, paper, base = (float((values - x).abs().pow(POWER).sum()) for values in (found, original(x, 64), rounded))
    assert ours < 0.99 * paper
    assert paper < 0.98 * base


@pytest.mark.parametrize("text", ["int4/g64/asym", "int3/g32/asym/bf16", "int2/channel/asym"])
def test_zeros_stay_zeros(text: str) -> None:
    # smoothing makes columns that are next to nothing beside the others, and real zero points moved them all
    x = weight() + 0.3
    x[:, ::2] = 0
    found = solved(x, text)
    assert not dequantize(quantize(x, found), found)[:, ::2].any()
    assert found.zero is not None
    assert torch.equal(found.zero, found.zero.round().clamp(*found.spec.code_range))


@pytest.mark.parametrize("text", FREE)
def test_sizes_change_no_code(text: str) -> None:
    x, power = weight(), 4 if "fp16" in text else 40
    found = solved(x, text)
    for size in (2.0**power, 2.0**-power):
        other = solved(x * size, text)
        assert torch.equal(other.scale, found.scale * size)
        assert torch.equal(quantize(x * size, other), quantize(x, found))


@pytest.mark.parametrize("text", ["int4/g32/asym/bf16", "int4/b4x32", "int4/channel", "nf4/g32", "int4/tensor"])
def test_slices_of_rows_do_not_change_the_result(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x = weight(rows=20)
    whole = solved(x, text)
    monkeypatch.setattr(hqq, "CHUNK", 3 * 256)
    found = solved(x, text)
    assert torch.equal(found.scale, whole.scale)
    assert torch.equal(quantize(x, found), quantize(x, whole))
    assert {name: t.shape for name, t in found.stored.items()} == {name: t.shape for name, t in whole.stored.items()}


@pytest.mark.parametrize("text", FREE)
def test_it_needs_shapes_only(text: str) -> None:
    found, real = solved(torch.empty(16, 256, device="meta"), text), solved(weight(), text)
    assert found.scale.is_meta
    assert found.scale.shape == real.scale.shape
    assert torch.equal(real.stored["scale"].float(), real.scale)


@pytest.mark.parametrize("text", FIXED)
def test_scales_that_depend_on_others_are_refused(text: str) -> None:
    with pytest.raises(SpecError, match=r"fits the scale of each tile.*or solver 'mse'"):
        solved(weight(), text)
