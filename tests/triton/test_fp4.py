"""4-bit floats under 4- and 8-bit ones on a GPU, against the oracle's numbers in float64."""

import pytest
import torch
from torch import Tensor, library, nn
from torch._inductor.utils import run_and_get_code

pytest.importorskip("triton.experimental.gluon.language.nvidia.hopper")

import qcompile
from qcompile.backends.fx.kernels import fp4, fp4_lowered
from qcompile.backends.fx.kernels.narrow_floats import is_narrow, lowered
from qcompile.backends.triton.fp4_linear import Operands, fp4_linear
from qcompile.backends.triton.fp4_table import TABLE, Config, Tiles, Unpack
from qcompile.backends.triton.fp4_unpack import unpack
from qcompile.backends.triton.quantize_rows import quantize_rows
from qcompile.backends.triton.table import configs_of
from qcompile.formats import parse_format
from qcompile.numerics import QParams, dequantize, find_qparams, quantize
from qcompile.shifts import raised, room
from qcompile.spec import Spec, parse_spec
from tests.triton.alone import check_alone
from tests.triton.compiled import name_of
from tests.triton.needs import hopper
from tests.triton.test_fp4_cpu import FORMATS, container

pytestmark = [pytest.mark.gpu, hopper]

BFLOAT16 = torch.bfloat16
# tensor cores keep about 14 bits of sums of fp8 products, and results are rounded to 16-bit floats
LIMIT = 5e-3


def packed(fmt: str, N: int, K: int) -> tuple[dict[str, Tensor], Tensor]:
    """A random weight without shift, and the oracle's floats."""
    weight = torch.randn(N, K, device="cuda")
    qparams = find_qparams(weight, parse_spec(f"{fmt}/channel"))
    codes = quantize(weight, qparams)
    return fp4.pack(codes, qparams, BFLOAT16), dequantize(codes, qparams).double()


def inputs(M: int, K: int, text: str) -> tuple[Tensor, QParams]:
    x = torch.randn(M, K, device="cuda")
    qparams = find_qparams(x, parse_spec(text))
    return quantize(x, qparams), qparams


def run(codes: Tensor, qparams: QParams, pack: dict[str, Tensor], fmt: str, bias: Tensor | None = None) -> Tensor:
    # what the allocator hands out next holds NaN
    torch.full((8 * codes.shape[0] * pack["scale"].shape[0],), torch.nan, device="cuda")
    form = qparams.spec.format
    narrow = form.name if is_narrow(form) else ""
    return torch.ops.qcompile.linear_fp4(
        codes, qparams.scale, pack["words"], pack["scale"], pack.get("shift"), bias, fmt, narrow, BFLOAT16
    )


def run_lowered(codes: Tensor, qparams: QParams, pack: dict[str, Tensor], fmt: str) -> Tensor:
    # what the allocator hands out next holds NaN
    torch.full((8 * codes.shape[0] * pack["scale"].shape[0],), torch.nan, device="cuda")
    form = qparams.spec.format
    narrow = form.name if is_narrow(form) else ""
    return torch.ops.qcompile.linear_fp4_lowered(
        codes, qparams.scale, pack["words"], pack["scale"], pack["octaves"], None, fmt, narrow, BFLOAT16
    )


def check(y: Tensor, codes: Tensor, qparams: QParams, weight: Tensor, bias: Tensor | None = None) -> None:
    expected = dequantize(codes, qparams).double() @ weight.T + (0.0 if bias is None else bias.double())
    assert y.isfinite().all()
    assert float(((y.double() - expected).norm(dim=1) / expected.norm(dim=1)).max()) < LIMIT


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("given", ["fp8_e4m3/token", "fp4_e2m1/token", "fp4_e1m2/tensor", "fp4_e3m0/token"])
@pytest.mark.parametrize(("M", "N", "K"), [(1, 64, 128), (7, 200, 272), (40, 72, 4096), (2, 128, 28672)])
def test_products(fmt: str, given: str, M: int, N: int, K: int) -> None:
    pack, weight = packed(fmt, N, K)
    codes, qparams = inputs(M, K, given)
    check(run(codes, qparams, pack, fmt), codes, qparams, weight)


def check_configuration(config: Config, fmt: str, pack: dict[str, Tensor], weight: Tensor, M: int, K: int) -> None:
    codes, qparams = inputs(M, K, "fp8_e4m3/token")
    torch.full((8 * M * len(weight),), torch.nan, device="cuda")
    operands = Operands(
        x=codes.view(torch.float8_e4m3fn),
        scale_x=qparams.scale,
        words=pack["words"],
        scale_w=pack["scale"],
        mantissa=parse_format(fmt).mantissa,
        dtype=BFLOAT16,
        octaves=pack.get("octaves"),
    )
    check(fp4_linear(operands, config), codes, qparams, weight)


@pytest.mark.parametrize("config", configs_of(TABLE, 90), ids=name_of)
@pytest.mark.parametrize(("M", "N", "K"), [(1, 4096, 512), (130, 208, 1040), (300, 8192, 256), (1000, 144, 4096)])
def test_configurations(config: Config, M: int, N: int, K: int) -> None:
    pack, weight = packed("fp4_e2m1", N, K)
    check_configuration(config, "fp4_e2m1", pack, weight, M, K)


@pytest.mark.parametrize("M", [1, 33, 257, 1025, 2100])
def test_small_numbers_are_summed_exactly(M: int) -> None:
    """Few products of few bits: nothing is rounded before the end."""
    pack, weight = packed("fp4_e2m1", 192, 256)
    pack["scale"] = torch.full_like(pack["scale"], 2.0**6)
    codes = torch.randint(0, 3, (M, 256), device="cuda", dtype=torch.uint8)
    codes[:, 5:] = 0
    one = QParams(spec=parse_spec("fp4_e2m1/token"), scale=torch.ones(M, 1, device="cuda"))
    found = find_qparams(torch.ones(192, 256, device="cuda") * 6, parse_spec("fp4_e2m1/channel"))
    words = torch.randint(0, 16, (192, 256), device="cuda", dtype=torch.uint8)
    pack = fp4.pack(words, found, BFLOAT16)
    expected = dequantize(codes, one).double() @ dequantize(words, found).double().T
    assert torch.equal(run(codes, one, pack, "fp4_e2m1").double(), expected.to(BFLOAT16).double())
    assert weight.shape == (192, 256)


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("given", FORMATS)
@pytest.mark.parametrize("M", [1, 20, 400, 1500])
def test_lowered_columns(fmt: str, given: str, M: int) -> None:
    K = 512
    most = min(room(parse_format(fmt)), room(parse_format(given)))
    shift = tuple(torch.randint(0, most + 1, (K,)).tolist())
    made, found, _ = container(fmt, 96, shift)
    pack = {name: t.cuda() for name, t in fp4.pack(made, found, BFLOAT16).items()}
    codes, qparams = inputs(M, K, f"{given}/token")
    check(run(codes, qparams, pack, fmt), codes, qparams, dequantize(made, found).double().cuda())


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("given", ["fp8_e4m3/token", "fp8_e4m3/tensor", "fp4_e3m0/token"])
@pytest.mark.parametrize("M", [1, 16, 17, 64, 257, 1100])
@pytest.mark.parametrize(("N", "K"), [(75, 272), (192, 1024)])
def test_weights_are_lowered_under_all_of_e4m3(fmt: str, given: str, M: int, N: int, K: int) -> None:
    most = room(parse_format(fmt))
    shift = (most, *torch.randint(0, most + 1, (K - 2,)).tolist(), 0)
    made, found, _ = container(fmt, N, shift)
    pack = {name: t.cuda() for name, t in fp4_lowered.pack(made, found, BFLOAT16).items()}
    codes, qparams = inputs(M, K, given)
    weight = dequantize(made, found).double().cuda()
    check(run_lowered(codes, qparams, pack, fmt), codes, qparams, weight)
    # one column alone, as much lowered as columns are, whose products are exact
    alone = torch.zeros_like(codes)
    alone[:, 0] = codes[:, 0]
    y = run_lowered(alone, qparams, pack, fmt).double()
    torch.testing.assert_close(y, dequantize(alone, qparams).double() @ weight.T, rtol=2.0**-8, atol=0)


@pytest.mark.parametrize("config", configs_of(TABLE, 90), ids=name_of)
@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize(("M", "N", "K"), [(1, 4096, 512), (130, 208, 1040), (1000, 144, 4096)])
def test_configurations_lower_columns(config: Config, fmt: str, M: int, N: int, K: int) -> None:
    shift = tuple(torch.randint(0, room(parse_format(fmt)) + 1, (K,)).tolist())
    made, found, _ = container(fmt, N, shift)
    pack = {name: t.cuda() for name, t in fp4_lowered.pack(made, found, BFLOAT16).items()}
    check_configuration(config, fmt, pack, dequantize(made, found).double().cuda(), M, K)


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize(("N", "K"), [(64, 128), (200, 272), (16, 4096)])
def test_unpacked_weights_are_lowered_exactly(fmt: str, N: int, K: int) -> None:
    shift = tuple(torch.randint(0, room(parse_format(fmt)) + 1, (K,)).tolist())
    made, found, _ = container(fmt, N, shift)
    pack = {name: t.cuda() for name, t in fp4_lowered.pack(made, found, BFLOAT16).items()}
    torch.full((N, K), 0x7F, dtype=torch.uint8, device="cuda")
    floats = unpack(pack["words"], pack["octaves"], N, K, parse_format(fmt).mantissa, 4).float() * pack["scale"]
    assert torch.equal(floats.cpu(), dequantize(made, found))


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize(("N", "K"), [(64, 128), (200, 272), (16, 4096)])
def test_unpacked_weights_are_exact(fmt: str, N: int, K: int) -> None:
    pack, weight = packed(fmt, N, K)
    torch.full((N, K), 0x7F, dtype=torch.uint8, device="cuda")
    form = parse_format(fmt)
    floats = unpack(pack["words"], None, N, K, form.mantissa, 4).double() * pack["scale"].double()
    torch.testing.assert_close(floats, weight, rtol=1e-6, atol=0)


@pytest.mark.parametrize("given", ["fp8_e4m3/token", "fp4_e2m1/token"])
@pytest.mark.parametrize("M", [4, 16, 48, 130, 1300])
@pytest.mark.parametrize("octaves", [0, 3])
def test_rows_are_alone(given: str, M: int, octaves: int) -> None:
    N, K, spec = 192, 1024, parse_spec(given)
    if octaves:
        made, found, _ = container("fp4_e2m1", N, tuple(torch.randint(0, octaves + 1, (K,)).tolist()))
        lowered_pack = {name: t.cuda() for name, t in fp4_lowered.pack(made, found, BFLOAT16).items()}
    plain, _ = packed("fp4_e2m1", N, K)

    def linear(x: Tensor) -> Tensor:
        qparams = find_qparams(x, spec)
        codes = quantize(x, qparams)
        if octaves:
            return run_lowered(codes, qparams, lowered_pack, "fp4_e2m1")
        return run(codes, qparams, plain, "fp4_e2m1")

    x = torch.randn(M, K, device="cuda")
    assert (check_alone(linear, x) == 0).all()
    # the same rows elsewhere in x of the same length
    order = torch.randperm(M, device="cuda")
    assert torch.equal(linear(x[order]), linear(x)[order])


def test_a_bias_and_strides() -> None:
    pack, weight = packed("fp4_e2m1", 64, 256)
    codes, qparams = inputs(6, 256, "fp4_e2m1/token")
    bias = torch.randn(64, device="cuda", dtype=BFLOAT16)
    check(run(codes, qparams, pack, "fp4_e2m1", bias), codes, qparams, weight, bias)
    apart = codes.t().contiguous().t()
    assert torch.equal(run(apart, qparams, pack, "fp4_e2m1"), run(codes, qparams, pack, "fp4_e2m1"))


@pytest.mark.parametrize("M", [1, 20, 140, 1200])
def test_results_repeat_and_graphs_replay(M: int) -> None:
    pack, _ = packed("fp4_e2m1", 512, 1024)
    codes, qparams = inputs(M, 1024, "fp4_e2m1/token")
    first = run(codes, qparams, pack, "fp4_e2m1")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = run(codes, qparams, pack, "fp4_e2m1")
    for _ in range(5):
        graph.replay()
        assert torch.equal(y, first)


@pytest.mark.parametrize("M", [0, 3, 40, 1300])
def test_the_op_is_clean(M: int) -> None:
    pack, _ = packed("fp4_e2m1", 64, 256)
    codes, qparams = inputs(max(M, 1), 256, "fp8_e4m3/token")
    arguments = (codes[:M], qparams.scale[:M], pack["words"], pack["scale"], 1, BFLOAT16)
    library.opcheck(torch.ops.qcompile.fp4_mm.default, arguments)
    octaves = torch.zeros(1, 2, 32, device="cuda", dtype=torch.int32)
    library.opcheck(torch.ops.qcompile.fp4_mm.default, (*arguments, octaves))


@pytest.mark.parametrize("fmt", [*FORMATS, "fp6_e3m2"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("M", "K"), [(3, 1), (5, 300), (7, 4096), (2, 14336)])
@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("multiplied", [False, True])
def test_rows_become_numbers_of_e4m3(
    fmt: str, dtype: torch.dtype, M: int, K: int, shifted: bool, multiplied: bool
) -> None:
    spec: Spec = parse_spec(f"{fmt}/token")
    # raised channels stay below the largest float16
    sizes = torch.randint(-12, 1, (M, 1), device="cuda")
    x = (torch.randn(M, K, device="cuda") * torch.exp2(sizes)).to(dtype)
    x[0, ::2] = -0.0
    octaves = torch.randint(0, room(spec.format) + 1, (1, K), device="cuda", dtype=torch.int8)
    torch.full((4 * M * K,), 0x7F, dtype=torch.uint8, device="cuda")
    up, shift = raised(spec.format), octaves if shifted else None
    # a channel that no fold could raise is raised there
    factor = octaves[0].to(dtype).exp2() if multiplied else None
    found = quantize_rows(x, spec, weight=factor, shift=shift, raised=up)
    x = x if factor is None else x * factor
    # eager torch on a GPU divides by multiplying with the inverse
    expected = find_qparams(x.cpu(), spec)
    codes = quantize(x.cpu(), expected)
    bits = lowered(codes, spec.format, octaves[0].cpu() * int(shifted))
    assert found.codes.dtype is torch.float8_e4m3fn
    assert torch.equal(found.codes.view(torch.uint8).cpu(), bits)
    assert torch.equal(found.scale.cpu(), expected.scale * 2.0**-up)


class Kept(nn.Module):
    """Attention whose values are results, too: what its last linear reads is raised by no other."""

    def __init__(self, K: int) -> None:
        super().__init__()
        self.v, self.o = nn.Linear(K, K, bias=False), nn.Linear(K, K, bias=False)
        self.v.weight.data *= torch.exp2(torch.linspace(-4, 4, K))[:, None]

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        v = self.v(x)
        heads = v.unflatten(-1, (4, -1)).transpose(1, 2)
        h = torch.nn.functional.scaled_dot_product_attention(heads, heads, heads).transpose(1, 2).flatten(-2)
        return x + self.o(h), v


def test_a_factor_that_stays_is_multiplied_with_by_the_pass_that_quantizes() -> None:
    torch.manual_seed(0)
    model = Kept(512).cuda().bfloat16().eval()
    x = torch.randn(2, 40, 512, device="cuda", dtype=BFLOAT16)
    plan = qcompile.calibrate(model, [x], recipe="fp4-token", progress=False)
    assert [fold.into for fold in plan.folds if fold.sites == ("o",)] == [""]
    fast = torch.compile(model, backend="qcompile", options={"plan": plan})
    with torch.no_grad():
        (y, _), codes = run_and_get_code(fast, x)
        slow, _ = torch.compile(model, backend="qcompile", options={"plan": plan, "lower": False})(x)
        exact = model(x)[0].float()
    # as in `test_a_model_runs_as_planned`
    assert (y.float() - exact).norm() < 1.05 * (slow.float() - exact).norm()
    assert "".join(codes).count("quantize_rows.default(") == 2


class Block(nn.Module):
    """A norm whose channels are far apart, and linears that read it."""

    def __init__(self, K: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(K, eps=1e-6)
        self.gate, self.up = nn.Linear(K, 256, bias=False), nn.Linear(K, 256, bias=False)
        self.down = nn.Linear(256, K, bias=False)
        self.norm.weight.data = torch.exp2(torch.linspace(-4, 4, K))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        return x + self.down(torch.nn.functional.silu(self.gate(h)) * self.up(h))


A8_SHIFTED = {"weight": "fp4_e2m1/channel", "input": "fp8_e4m3/token", "solver": "mse", "shift": 14}


@pytest.mark.parametrize("recipe", ["fp4", "fp4-token", "fp4-a8", {"rules": [A8_SHIFTED]}], ids=str)
def test_a_model_runs_as_planned(recipe: str | dict[str, object]) -> None:
    torch.manual_seed(0)
    model = Block(512).cuda().bfloat16().eval()
    x = torch.randn(2, 40, 512, device="cuda", dtype=BFLOAT16)
    plan = qcompile.calibrate(model, [x], recipe=recipe, progress=False)
    fast = torch.compile(model, backend="qcompile", options={"plan": plan})
    with torch.no_grad():
        y = fast(x)
        slow = torch.compile(model, backend="qcompile", options={"plan": plan, "lower": False})(x)
        exact = model(x).float()
    # what differs by a bit before it is quantized to 4 bits may get another code, a third larger or smaller: the result
    # is another one then, and no worse
    assert (y.float() - exact).norm() < 1.05 * (slow.float() - exact).norm()
    sites = {site.name: site for site in qcompile.report(fast).sites}
    for name, decision in plan.decisions.items():
        assert decision.input is not None
        most = room(decision.input.format) if is_narrow(decision.input.format) else 0
        # where E4M3 has no room for an input's channels, the weight's columns are lowered
        fits = max(decision.shift, default=0) <= most
        assert sites[name].kernel == ("fp4" if fits else "fp4-lowered")
        # 4 bits a weight, scales and octaves, beside 16 bits
        assert sites[name].bytes_after < 0.3 * sites[name].bytes_before
    assert {site.kernel for site in sites.values()} & {"fp4" if isinstance(recipe, str) else "fp4-lowered"}
    assert recipe == "fp4-a8" or any(decision.shift for decision in plan.decisions.values())


def test_every_config_is_known() -> None:
    assert {type(config) for config in configs_of(TABLE, 90)} == {Tiles, Unpack}
