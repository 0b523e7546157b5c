"""The FX host's kernels and whole models on a CUDA device."""

from dataclasses import replace

import pytest
import torch

import qcompile
from qcompile.backends.fx.kernels import KERNELS, Problem
from qcompile.graph import Op
from qcompile.numerics import dequantize, find_qparams, quantize
from qcompile.shifts import lowered_codes
from qcompile.spec import parse_spec
from tests.families import build, tokens

pytestmark = [
    pytest.mark.gpu,
    # Inductor's advice on float32 models
    pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores:UserWarning"),
    # what its CUDA graph trees say while they warm up
    pytest.mark.filterwarnings("ignore:The CUDA Graph is empty:UserWarning"),
]

BY_NAME = {kernel.name: kernel for kernel in KERNELS}
CASES = [
    ("int8-triton", "int8/channel", "int8/token"),
    ("int8-triton", "int8/channel", "int8/token/asym"),
    ("int8", "int8/channel", "int8/token"),
    ("int8", "int8/channel", "int8/token/asym"),
    ("fp8-triton", "fp8_e4m3/channel", "fp8_e4m3/token"),
    ("fp8", "fp8_e4m3/channel", "fp8_e4m3/token"),
    ("fp8", "fp8_e4m3/channel", "fp8_e5m2/token"),
    ("weight-triton", "int4/g32/asym/bf16", None),
    ("weight-triton", "int4/channel", None),
    ("weight-triton", "int8/channel", None),
    ("weight-triton", "nf4/g32/dq256", None),
    ("weight-triton", "int6/g32/asym/bf16", None),
    ("weight-triton", "int5/g32/asym/bf16", None),
    ("weight-triton", "int3/g32/asym/bf16", None),
    ("weight-triton", "int2/channel", None),
    ("weight-triton", "e1m6/channel", None),
    ("weight-triton", "e1m6/g32/bf16", None),
    ("int4-int8", "int4/g32/asym/bf16", "int8/token/asym"),
    ("int4-int8", "int4/g32/asym/u4row", "int8/token/asym"),
    ("weight-triton", "int4/g32/asym/u4row", None),
    ("weight-triton", "fp8_e4m3/b2x32", "fp8_e4m3/token"),
    ("weight-triton", "int8/tensor", None),
    ("int4-int8", "int4/g32", "int8/token"),
    ("int4-int8", "int4/b2x32/asym", "int8/token"),
    ("fp4", "fp4_e2m1/channel", "fp8_e4m3/token"),
    ("fp4", "fp4_e1m2/channel", "fp4_e2m1/token"),
    ("fp4-lowered", "fp4_e2m1/channel", "fp8_e4m3/token"),
    ("fp4-lowered", "fp4_e3m0/channel", "fp8_e4m3/tensor"),
    ("weight-lowered", "fp4_e2m1/channel", None),
    ("weight-lowered", "fp4_e3m0/channel", None),
    ("book-triton", "dynamic8/g32", None),
    ("book-triton", "e6m1/g32", None),
    ("book-triton", "e6m0/channel", None),
    ("book-triton", "e7m0/channel", None),
    ("book-triton", "lloyd5/g32", None),
    ("packed", "int3/g32/asym/bf16", None),
    ("packed", "nf4/g32/dq256", None),
]


@pytest.mark.parametrize(("name", "weight", "given"), CASES)
@pytest.mark.parametrize("M", [1, 3, 16, 17, 33, 257])
@pytest.mark.parametrize(("N", "K"), [(48, 64), (400, 352)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
def test_kernel_equals_oracle(
    name: str, weight: str, given: str | None, M: int, N: int, K: int, dtype: torch.dtype
) -> None:
    x, W = torch.randn(M, K, dtype=dtype, device="cuda"), torch.randn(N, K, dtype=dtype, device="cuda")
    bias = torch.randn(N, dtype=dtype, device="cuda")
    spec = None if given is None else parse_spec(given)
    capability = torch.cuda.get_device_capability()
    p = Problem(
        N=N,
        K=K,
        weight=parse_spec(weight),
        input=spec,
        dtype=dtype,
        device="cuda",
        capability=capability,
        small=name in ("packed", "book-triton"),
    )
    qparams = find_qparams(W, p.weight)
    codes = quantize(W, qparams)
    if name in ("fp4-lowered", "weight-lowered"):
        codes, qparams = lowered_codes(codes, qparams, tuple(k % 12 for k in range(K)))
        p = replace(p, weight=qparams.spec, lowered=qparams.lowered)
    kernel = BY_NAME[name]
    refused = kernel.why_not(p)
    if refused is not None:
        assert ("sm_" in refused and capability != (9, 0)) or ("bfloat16" in refused and dtype is not torch.bfloat16)
        return
    operands, wide = (x,), x.double()
    if spec is not None:
        found = find_qparams(x, spec)
        given_codes = quantize(x, found)
        rounded = dequantize(given_codes, found)
        operands = (given_codes, found.scale, found.zero) if kernel.takes_codes else (rounded.to(dtype),)
        wide = (rounded if kernel.takes_codes else operands[0]).double()
    y = kernel.op(*kernel.arguments(p, operands, kernel.pack(codes, qparams, dtype), bias))
    held = dequantize(codes, qparams).double()
    magnitude = wide.abs() @ held.abs().T + bias.double().abs()
    # fp8 tensor cores, which multiply floats of 4 bits too, keep about 14 bits of a sum; tf32 is off
    unit = max(torch.finfo(dtype).eps, 2.0**-12 if name.startswith("fp") else 2.0**-21)
    assert y.dtype is dtype
    assert ((y.double() - wide @ held.T - bias.double()).abs() <= 2 * unit * magnitude).all()


@pytest.mark.parametrize("recipe", ["int8", "fp8", "int8-weight", "int4-weight", "nf4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_whole_model(recipe: str, dtype: torch.dtype, mode: str) -> None:
    torch._dynamo.reset()
    model, ids = build("llama").to("cuda", dtype), tokens(2, 16).cuda()
    with torch.no_grad():
        options = {"recipe": recipe}
        fast = torch.compile(model, backend="qcompile", fullgraph=True, options=options | {"mode": mode})
        reference = torch.compile(model, backend="qcompile", options=options | {"lower": False})
        for _ in range(3):
            y = fast(ids).logits.clone()
        expected = reference(ids).logits
    # a step between two codes of fp8 is 6 %, and its tensor cores' rounding moves values over it
    limit = 2e-2 if recipe != "fp8" else 0.1
    assert float((y - expected).float().norm() / expected.float().norm()) < limit
    kernels, own = {site.kernel for site in qcompile.report(fast).sites if site.weight}, own_kernels(dtype)
    assert own.get(recipe, "dense") in kernels
    # the logits keep 8 bits
    assert kernels <= {own.get(recipe, "dense"), own.get("int8-weight", "dense"), "dense"}


def own_kernels(dtype: torch.dtype) -> dict[str, str]:
    """The kernel that runs a preset's linears on this device, where it is none of floats."""
    hopper, narrow = torch.cuda.get_device_capability() == (9, 0), dtype is not torch.float32
    return {
        "int8": "int8-triton" if hopper else "int8",
        "fp8": "fp8-triton" if hopper and dtype is torch.bfloat16 else "fp8",
    } | (dict.fromkeys(("int4-weight", "int8-weight", "nf4"), "weight-triton") if hopper and narrow else {})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("count", [2, 20])
@pytest.mark.parametrize("threshold", [None, 2.5])
@pytest.mark.parametrize("graphs", [False, True])
def test_split_outliers(dtype: torch.dtype, count: int, threshold: float | None, graphs: bool) -> None:
    torch._dynamo.reset()
    model, inputs = build("llama").to("cuda", dtype), [tokens(2, 16, seed).cuda() for seed in (1, 2, 3)]
    plan = qcompile.calibrate(model, inputs[:1], recipe="int8", progress=False)
    outliers = () if threshold is not None else tuple(range(0, 3 * count, 3))
    decisions = {
        name: replace(d, outliers=outliers, threshold=threshold) if d.op is Op.LINEAR and d.weight is not None else d
        for name, d in plan.decisions.items()
    }
    plan = replace(plan, decisions=decisions)
    with torch.no_grad(), torch._inductor.config.patch({"triton.cudagraphs": graphs}):
        fast = torch.compile(model, backend="qcompile", fullgraph=True, options={"plan": plan})
        reference = torch.compile(model, backend="qcompile", options={"plan": plan, "lower": False})
        for ids in (*inputs, *inputs):
            y, expected = fast(ids).logits.clone(), reference(ids).logits
            # the sum of two linears is rounded once more in bfloat16, which moves codes of the layers behind
            limit = 2e-2 if dtype is torch.float32 else 4e-2
            assert float((y - expected).float().norm() / expected.float().norm()) < limit
    kernels = {site.kernel for site in qcompile.report(fast).sites if site.weight}
    assert kernels == {f"{own_kernels(dtype)['int8']} + tail" if threshold is None else "llm-int8"}


class Gated(torch.nn.Module):
    """x [M, K]: longer rows than Inductor keeps while it finds their range, behind an activation that FUSE leaves."""

    def __init__(self, K: int) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(K, 256, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(torch.nn.functional.gelu(x) * x.flip(-1))


@pytest.mark.parametrize("recipe", ["int8", "fp8"])
def test_codes_are_of_the_scale_that_they_are_multiplied_by(recipe: str) -> None:
    """Where a kernel finds the range, and others the codes and the scale."""
    torch._dynamo.reset()
    model, x = Gated(14336).cuda().bfloat16(), torch.randn(64, 14336, device="cuda").bfloat16()
    with torch.no_grad():
        exact = model(x).float()
        options = {"recipe": recipe}
        fast, reference = (
            torch.compile(model, backend="qcompile", options=options | {"lower": lower})(x).float()
            for lower in (True, False)
        )
    assert (fast - exact).norm() < 1.05 * (reference - exact).norm()


@pytest.mark.parametrize(
    "text", ["int8/token/asym", "int4/g32", "fp8_e4m3/channel", "fp4_e2m1/b16/fp8_e4m3", "int4/g32/u6x8"]
)
def test_scales_are_those_of_the_cpu(text: str) -> None:
    x, spec = torch.randn(300, 512), parse_spec(text)
    found, expected = find_qparams(x.cuda(), spec), find_qparams(x, spec)
    assert torch.equal(found.scale.cpu(), expected.scale)
    assert torch.equal(quantize(x.cuda(), found).cpu(), quantize(x, expected))


@pytest.mark.parametrize("recipe", ["int8", "nf4"])
def test_memory_is_freed(recipe: str) -> None:
    torch._dynamo.reset()
    model = torch.nn.Sequential(*(torch.nn.Linear(2048, 2048, bias=False) for _ in range(8))).cuda().eval()
    x = torch.randn(32, 2048, device="cuda")
    held = sum(p.nbytes for p in model.parameters())
    before = torch.cuda.memory_allocated()
    with torch.no_grad():
        fast = torch.compile(model, backend="qcompile", options={"recipe": recipe, "free_weights": True})
        first = fast(x).clone()
        # cuBLAS takes a workspace of its own meanwhile
        assert before - torch.cuda.memory_allocated() > 0.45 * held
        torch.testing.assert_close(fast(x), first, atol=1e-3, rtol=1e-2)


@pytest.mark.parametrize("recipe", ["int4-weight", "nf4", "fp8"])
def test_weights_are_packed_one_at_a_time(recipe: str) -> None:
    torch._dynamo.reset()
    model = torch.nn.Sequential(*(torch.nn.Linear(2048, 2048, bias=False) for _ in range(32))).cuda().bfloat16().eval()
    one = model[0].weight.numel()
    x = torch.randn(4, 2048, device="cuda", dtype=torch.bfloat16)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    with torch.no_grad():
        fast = torch.compile(model, backend="qcompile", options={"recipe": recipe, "free_weights": True})
        fast(x)
    packed = sum(site.bytes_after for site in qcompile.report(fast).sites)
    # of one weight some copies in float32; the codes of all of them would be eight
    assert torch.cuda.max_memory_allocated() - before < packed + 7 * 4 * one


def test_every_kernel_but_those_of_the_cpu_is_tested() -> None:
    assert {kernel.name for kernel in KERNELS} == {case[0] for case in CASES} | {"dense", "narrow", "lifted"}
