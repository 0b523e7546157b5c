"""Errors weighed by importance: never more than without it, close to the best there is, and right at the edges."""

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qcompile.numerics import QParams, dequantize, quantize, tiles
from qcompile.solvers import SOLVERS, imatrix
from qcompile.spec import parse_spec
from tests.core.test_solvers import SPECS, weight

INTEGERS = [*("int4/g32/asym", "int4/g32/asym/bf16", "int4/g32", "int3/channel/asym", "int2/g16/fp16"), "int8/g32/asym"]


def importance(seed: int = 0, columns: int = 256, *, spread: float = 1.5) -> Tensor:
    return torch.randn(columns, generator=torch.Generator().manual_seed(seed)).mul(spread).exp()


def solved(x: Tensor, text: str, weights: Tensor | None = None, solver: str = "imatrix") -> QParams:
    return SOLVERS[solver](x, parse_spec(text), weights)


def errors(x: Tensor, qparams: QParams, weights: Tensor) -> Tensor:
    """Weighted squared errors by tile, float64."""
    apart = (dequantize(quantize(x, qparams), qparams).double() - x.double()).square()
    view, dims = tiles(apart * weights, qparams.spec.granularity)
    return view.sum(dims)


@settings(max_examples=40)
@given(
    text=st.sampled_from([*SPECS, *INTEGERS]),
    seed=st.integers(0, 999),
    spread=st.sampled_from([0.0, 1.5, 6.0]),
    silent=st.sampled_from([0.0, 0.5, 1.0]),
    size=st.sampled_from([1e-6, 1.0, 1e6]),
)
def test_no_tile_is_worse_than_without_importance(
    text: str, seed: int, spread: float, silent: float, size: float
) -> None:
    x, weights = weight(seed, rows=8, columns=64) * size, importance(seed, 64, spread=spread)
    weights[torch.rand(64, generator=torch.Generator().manual_seed(seed)) < silent] = 0
    best = errors(x, solved(x, text, weights), weights)
    for other in ("mse", "round"):
        known = errors(x, solved(x, text, solver=other), weights)
        if parse_spec(text).scale in ("dq256", "u4row"):  # scales that are kept together are compared together
            best, known = best.sum(), known.sum()
        # the search sums in float32
        assert (best <= known * (1 + 1e-5)).all()


@pytest.mark.parametrize("text", ["int2/b3/asym", "int2/b4/asym", "int3/b3/asym", "int3/b3", "int3/b4", "int4/b3"])
def test_it_comes_close_to_the_best_of_all_codes(text: str) -> None:
    columns = parse_spec(text).granularity.columns
    x, weights = weight(seed=3, rows=200, columns=columns), importance(1, columns)
    least, most = parse_spec(text).code_range
    zeros = range(least, most + 1) if "asym" in text else (0,)
    codes = torch.tensor(
        sorted({tuple(c - z for c in p) for z in zeros for p in product(range(least, most + 1), repeat=columns)})
    ).double()
    # under its best scale, the error of codes c is sum w x^2 - (sum w c x)^2 / sum w c^2; every zero point is in codes
    along = (x.double() * weights) @ codes.T  # [N, codes]
    gain = along.clamp(min=0).square() / (codes.square() * weights).sum(1).clamp(min=1e-30)
    best = (x.double().square() * weights).sum(1) - gain.amax(1)
    found = errors(x, solved(x, text, weights), weights).flatten()
    assert (found >= best - 1e-6 * found.amax()).all()
    # of so few elements, scales that happen to hit all of them are many; clips alone leave half as much again
    assert found.sum() < 1.2 * best.sum()
    assert found.sum() < errors(x, solved(x, text, weights, "mse"), weights).sum()


@pytest.mark.parametrize("text", [t for t in INTEGERS if "asym" in t])
def test_it_gains_more_than_a_search_of_clips_alone(text: str) -> None:
    x, weights = weight(rows=64), importance()
    found, clipped = (errors(x, solved(x, text, weights, name), weights).sum() for name in ("imatrix", "mse"))
    assert clipped <= errors(x, solved(x, text, solver="mse"), weights).sum()
    assert found < 0.95 * clipped


@pytest.mark.parametrize("text", INTEGERS)
def test_columns_that_all_count_alike_are_as_without_importance(text: str) -> None:
    x = weight()
    found, alike, halved = (solved(x, text, w) for w in (None, torch.ones(256), torch.full((256,), 0.5)))
    assert torch.equal(found.scale, alike.scale)
    assert torch.equal(found.scale, halved.scale)
    assert (errors(x, found, torch.ones(256)) <= errors(x, solved(x, text, solver="mse"), torch.ones(256))).all()


@pytest.mark.parametrize("text", INTEGERS)
def test_what_has_no_importance_costs_the_rest_nothing(text: str) -> None:
    x, weights = weight(), importance()
    x[:, ::8] *= 100
    weights[::8] = 0
    loud = errors(x, solved(x, text, weights), weights).sum()
    x[:, ::8] = 0
    # zero points of 8 bits reach far, and steps are small: what is left to find costs little
    assert loud < (1.3 if not text.startswith("int8") else 10) * errors(x, solved(x, text, weights), weights).sum()


@pytest.mark.parametrize("text", INTEGERS)
def test_tiles_without_importance_are_as_mse_has_them(text: str) -> None:
    x, weights = weight(), importance()
    weights[:64] = 0
    if "channel" in text:
        weights[:] = 0
    found, known = (dequantize(quantize(x, q), q) for q in (solved(x, text, weights), solved(x, text, solver="mse")))
    assert torch.equal(found[:, :64], known[:, :64])
    assert torch.equal(found, known) is ("channel" in text)


@pytest.mark.parametrize("text", INTEGERS)
def test_sizes_change_no_code(text: str) -> None:
    # float16 scales reach less far
    power = 4 if "fp16" in text else 40
    x, weights = weight(), importance()
    found = solved(x, text, weights)
    for size, heavier in ((2.0**power, 2.0**60), (2.0**-power, 2.0**-60)):
        other = solved(x * size, text, weights * heavier)
        assert torch.equal(other.scale, found.scale * size)
        assert torch.equal(quantize(x * size, other), quantize(x, found))


@pytest.mark.parametrize("text", ["int4/g32/asym", "int4/b4x32", "int4/channel/bf16", "int4/tensor"])
def test_slices_of_rows_do_not_change_the_result(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x, weights = weight(rows=20), importance()
    whole = solved(x, text, weights)
    monkeypatch.setattr(imatrix, "CHUNK", 3 * 256)
    found = solved(x, text, weights)
    assert torch.equal(found.scale, whole.scale)
    assert torch.equal(quantize(x, found), quantize(x, whole))


@pytest.mark.parametrize("text", [*SPECS, *INTEGERS])
def test_it_needs_shapes_only(text: str) -> None:
    found = SOLVERS["imatrix"](torch.empty(16, 256, device="meta"), parse_spec(text), importance())
    real = solved(weight(), text, importance())
    assert found.scale.is_meta
    assert found.scale.shape == real.scale.shape
    assert {k: (t.shape, t.dtype) for k, t in found.stored.items()} == {
        k: (t.shape, t.dtype) for k, t in real.stored.items()
    }
    assert (found.zero is None) == (real.zero is None)


@pytest.mark.parametrize("text", INTEGERS)
def test_scales_are_what_is_stored(text: str) -> None:
    found = solved(weight(), text, importance())
    assert torch.equal(found.stored["scale"].float(), found.scale)
    if found.zero is not None:
        least, most = found.spec.code_range
        assert torch.equal(found.zero, found.zero.round().clamp(least, most))
