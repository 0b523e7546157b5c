import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qcompile.errors import SpecError
from qcompile.numerics import QParams, dequantize, find_qparams, quantize, snr_db, tiles
from qcompile.solvers import SOLVERS, mse
from qcompile.spec import parse_spec

SPECS = [
    *("int4/channel", "int4/g32/asym", "int2/g32", "int3/g32/fp16", "int8/tensor", "int4/tensor/asym", "int4/b4x32"),
    *("fp8_e4m3/channel", "fp4_e2m1/g32", "fp4_e2m1/b32/e8m0", "int4/b32/e8m0", "nf4/b32/e8m0"),
    *(
        "int4/g32/asym/u4row",
        "int3/g32/u4row",
        "fp4_e2m1/b16/fp8_e4m3",
        "nf4/g32",
        "nf4/g32/dq256",
        "lloyd4/g32",
        "quantile4/channel",
        "e3m2/g32/bf16",
    ),
]


def weight(seed: int = 0, rows: int = 16, columns: int = 256) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(rows, columns, generator=generator)
    # Student's t with 4 degrees of freedom
    return normal / (torch.randn(4, rows, columns, generator=generator).square().sum(0) / 4).sqrt()


def rounded(x: Tensor, qparams: QParams) -> Tensor:
    return dequantize(quantize(x, qparams), qparams)


def tile_errors(x: Tensor, qparams: QParams) -> Tensor:
    view, dims = tiles((rounded(x, qparams).double() - x.double()).square(), qparams.spec.granularity)
    return view.sum(dims)


@pytest.mark.parametrize("text", SPECS)
def test_round_covers_the_range_of_each_tile(text):
    spec, x = parse_spec(text), weight()
    found, expected = SOLVERS["round"](x, spec), find_qparams(x, spec)
    assert torch.equal(found.scale, expected.scale)
    assert torch.equal(rounded(x, found), rounded(x, expected))


@pytest.mark.parametrize("text", SPECS)
def test_round_needs_shapes_only(text):
    spec = parse_spec(text)
    found = SOLVERS["round"](torch.empty(16, 256, device="meta", dtype=torch.bfloat16), spec)
    real = SOLVERS["round"](weight(), spec)
    assert found.scale.is_meta
    assert {k: (t.shape, t.dtype) for k, t in found.stored.items()} == {
        k: (t.shape, t.dtype) for k, t in real.stored.items()
    }


@settings(max_examples=30)
@given(st.sampled_from(SPECS), st.integers(0, 999), st.sampled_from([1e-6, 1.0, 1e6]))
def test_mse_is_never_worse_than_round(text, seed, size):
    spec, x = parse_spec(text), weight(seed, rows=4, columns=64) * size
    best, base = (tile_errors(x, SOLVERS[name](x, spec)) for name in ("mse", "round"))
    if spec.scale in ("dq256", "u4row"):  # scales that are kept together are compared together
        best, base = best.sum(), base.sum()
    # the search sums in float32
    assert (best <= base * (1 + 1e-5)).all()


# under one number of a row, small groups whose range is clipped get coarser integers, which may take all gain
@pytest.mark.parametrize("text", [s for s in SPECS if not s.startswith("int8") and not s.endswith("asym/u4row")])
def test_mse_gains_on_heavy_tails(text):
    spec, x = parse_spec(text), weight()
    gain = snr_db(x, rounded(x, SOLVERS["mse"](x, spec))) - snr_db(x, rounded(x, SOLVERS["round"](x, spec)))
    assert gain > 0.05


@pytest.mark.parametrize("text", ["int2/channel", "int4/channel", "int4/g64/asym", "fp4_e2m1/g64", "nf4/g64"])
def test_mse_comes_close_to_a_search_sixty_times_as_fine(text):
    spec, x = parse_spec(text), weight(rows=8)
    found = tile_errors(x, SOLVERS["mse"](x, spec))
    clips = torch.linspace(0.03, 1.25, 1221).tolist()
    best = torch.stack([tile_errors(x, find_qparams(x, spec, clip=clip)) for clip in clips]).amin(0)
    # tile by tile the error jumps with each element that changes its code
    assert (found <= 1.1 * best).all()
    assert found.sum() <= 1.02 * best.sum()


@pytest.mark.parametrize("text", ["fp4_e2m1/b32/e8m0", "int4/b32/e8m0", "int2/channel/e8m0"])
def test_mse_takes_the_best_neighbour_of_a_power_of_two_scale(text):
    spec, x = parse_spec(text), weight()
    found = SOLVERS["mse"](x, spec)
    errors = torch.stack([tile_errors(x, find_qparams(x, spec, clip=2.0**i)) for i in range(-6, 3)])
    torch.testing.assert_close(tile_errors(x, found), errors.amin(0), rtol=1e-5, atol=0)
    assert not torch.equal(found.scale, find_qparams(x, spec).scale)
    mantissa, _ = torch.frexp(found.scale)
    assert (mantissa == 0.5).all()


def test_mse_finds_the_clip_of_int4_on_normal_data():
    # numerics.md 1.6: 3.14 bits of accuracy; the clip of least error is 2.45 standard deviations
    x = torch.special.ndtri((torch.arange(2**16, dtype=torch.float64) + 0.5) / 2**16).float().reshape(1, -1)
    found = SOLVERS["mse"](x, parse_spec("int4/channel"))
    assert float(found.scale) * 7 == pytest.approx(2.45, rel=0.02)
    assert snr_db(x, rounded(x, found)) / 6.0206 == pytest.approx(3.14, abs=0.01)


@pytest.mark.parametrize("text", ["int4/g32/asym", "int4/tensor", "int4/b4x32", "fp4_e2m1/b16/fp8_e4m3"])
def test_slices_of_rows_do_not_change_the_result(text, monkeypatch):
    spec, x = parse_spec(text), weight(rows=20)
    whole = SOLVERS["mse"](x, spec)
    monkeypatch.setattr(mse, "CHUNK", 3 * 256)
    assert torch.equal(SOLVERS["mse"](x, spec).scale, whole.scale)


def takes(solver: str, text: str) -> bool:
    """Of two solvers that say so before they look at a weight."""
    if solver not in ("hqq", "kquant"):
        return True
    try:
        SOLVERS[solver](torch.empty(16, 256, device="meta"), parse_spec(text))
    except SpecError:
        return False
    return True


@pytest.mark.parametrize(("solver", "text"), [(n, t) for n in SOLVERS for t in SPECS if takes(n, t)])
def test_dead_rows_stay_zero(solver, text):
    x = weight()
    x[4:8] = 0
    found = SOLVERS[solver](x, parse_spec(text))
    assert found.scale.isfinite().all()
    if not text.startswith(("lloyd", "quantile")):  # learned levels need not hold a zero
        assert not rounded(x, found)[4:8].any()


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_group_that_does_not_divide_is_refused(solver):
    with pytest.raises(SpecError, match="'g100' needs"):
        SOLVERS[solver](weight(), parse_spec("int4/g100"))
