"""Quantized linears for the benchmarks on CUDA; those of other libraries stand in linear_peers.py.

Each takes x in bfloat16 and gives y in bfloat16: quantizing x is part of it, fused and compiled by Inductor as it is in
a compiled model. To add a format, add a line to FORMATS.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from qcompile.backends.fx.fuse import fuse
from qcompile.backends.fx.graph import FxGraph
from qcompile.backends.fx.inductor import Inductor
from qcompile.backends.fx.kernels import Kernel, Problem, choose, tail
from qcompile.backends.fx.kernels.narrow_floats import raised
from qcompile.backends.fx.ops import QUANTIZE_DYNAMIC
from qcompile.ggml import TYPES
from qcompile.numerics import Lowered, QParams, dequantize, fake_quantize, find_qparams, quantize
from qcompile.spec import Spec, parse_spec

DTYPE = torch.bfloat16
# what all copies of a weight fill, so that none is in the cache when its turn comes
ROTATED = 400e6
# how much larger outlier channels are
LOUD = 30
# relative error to float32 on the same codes that bfloat16 results may have
LIMIT = 4e-3
# operations a microsecond, dense, of the data sheets of H100 and H200
EIGHT_BIT_RATE = 1979e6


@dataclass(frozen=True, kw_only=True)
class Format:
    """Specs of weight and input, and the share of input channels that stay in 16 bits.

    rate: operations a microsecond that the device makes at most; None: as many as of bfloat16.
    shift: octaves by which every other column of a 4-bit float is lowered.
    """

    weight: str
    input: str | None = None
    outliers: float = 0.0
    rate: float | None = None
    shift: int = 0


FORMATS: Mapping[str, Format] = {
    "int4": Format(weight="int4/g128/asym/bf16"),
    "nf4": Format(weight="nf4/g64"),
    "q4_k": Format(weight=str(TYPES["Q4_K"].spec)),
    "int8 weight": Format(weight="int8/channel"),
    "int6": Format(weight="int6/g128/asym/bf16"),
    "int5": Format(weight="int5/g128/asym/bf16"),
    "int3": Format(weight="int3/g128/asym/bf16"),
    "int2": Format(weight="int2/g64/asym/bf16"),
    "fp8 weight": Format(weight="fp8_e4m3/channel"),
    "fp6": Format(weight="fp6_e3m2/g128"),
    "w4a8": Format(weight="int4/g128/asym/u4row", input="int8/token/asym", rate=EIGHT_BIT_RATE),
    "int8": Format(weight="int8/channel", input="int8/token/asym", rate=EIGHT_BIT_RATE),
    "int8 split": Format(weight="int8/channel", input="int8/token/asym", outliers=0.01, rate=EIGHT_BIT_RATE),
    "fp8": Format(weight="fp8_e4m3/channel", input="fp8_e4m3/token", rate=EIGHT_BIT_RATE),
    "fp4": Format(weight="fp4_e2m1/channel"),
    "fp4 a8": Format(weight="fp4_e2m1/channel", input="fp8_e4m3/token", rate=EIGHT_BIT_RATE),
    "fp4 a8 shifted": Format(weight="fp4_e2m1/channel", input="fp8_e4m3/token", rate=EIGHT_BIT_RATE, shift=3),
    "fp4 a4": Format(weight="fp4_e2m1/channel", input="fp4_e2m1/token", rate=EIGHT_BIT_RATE),
    "fp4 a4 shifted": Format(weight="fp4_e2m1/channel", input="fp4_e2m1/token", rate=EIGHT_BIT_RATE, shift=3),
}


@dataclass(frozen=True, kw_only=True)
class Weight:
    """A random weight under a format: floats [N, K], codes with qparams, and the channels that stay in 16 bits."""

    format: str
    floats: Tensor
    codes: Tensor
    qparams: QParams
    outliers: Tensor

    @property
    def input(self) -> Spec | None:
        text = FORMATS[self.format].input
        return None if text is None else parse_spec(text)

    def example(self, M: int) -> Tensor:
        """x [M, K], loud where outlier channels are."""
        x = torch.randn(M, self.floats.shape[1], device="cuda")
        x[:, self.outliers] *= LOUD
        return x.to(DTYPE)

    def oracle(self, x: Tensor) -> Tensor:
        """y in float32 of the same codes, each step rounded where the linear rounds it."""
        rest = self.without_outliers(x).float()
        if self.input is not None:
            # the fused kernel's codes are those of exact division
            rest = fake_quantize(rest, self.input)
        y = rest @ dequantize(self.codes, self.qparams).T
        columns = self.floats[:, self.outliers].to(DTYPE).float()
        return y + x[:, self.outliers].float() @ columns.T

    def without_outliers(self, x: Tensor) -> Tensor:
        return x.index_fill(1, self.outliers, 0)


def random_weight(name: str, N: int, K: int) -> Weight:
    spec = parse_spec(FORMATS[name].weight)
    floats = torch.randn(N, K, device="cuda") * K**-0.5
    count = round(FORMATS[name].outliers * K)
    outliers = torch.arange(count, device="cuda") * K // max(count, 1)
    rest = floats.index_fill(1, outliers, 0)
    qparams = find_qparams(rest, spec)
    codes = quantize(rest, qparams)
    if FORMATS[name].shift:
        codes, qparams = _lowered(codes, qparams, FORMATS[name].shift)
    return Weight(format=name, floats=floats, codes=codes, qparams=qparams, outliers=outliers)


def _lowered(codes: Tensor, qparams: QParams, octaves: int) -> tuple[Tensor, QParams]:
    """The weight with every other column lowered, in E4M3, as `fold_exponent_bias` leaves it."""
    shift = torch.arange(codes.shape[1], device="cuda") % 2 * octaves
    spec = parse_spec(str(qparams.spec).replace(qparams.spec.format.name, "fp8_e4m3"))
    scale = qparams.scale * 2.0 ** -raised(qparams.spec.format)
    made = QParams(spec=spec, scale=scale, lowered=Lowered(narrow=qparams, shift=tuple(shift.tolist())))
    return quantize(dequantize(codes, qparams) * 2.0**-shift, made), made


@dataclass(frozen=True, kw_only=True)
class Linear:
    """A linear to be timed. call: from x and the number of a copy of the weight to y.

    reference, limit: what y is checked against, and how far from it each row may be, relatively.
    graphed: no CUDA graph can hold a call whose shapes are those that data makes.
    """

    kernel: str
    call: Callable[[Tensor, int], Tensor]
    reference: Callable[[Tensor], Tensor]
    copies: int
    nbytes: int
    limit: float = LIMIT
    graphed: bool = True

    def error(self, x: Tensor) -> float:
        """Relative to the reference, of the worst row; raises SystemExit beyond the limit."""
        y, expected = self.call(x, 0).float(), self.reference(x)
        found = float(((y - expected).norm(dim=1) / expected.norm(dim=1)).max())
        if not found < self.limit:
            raise SystemExit(f"{self.kernel}, M={x.shape[0]}: relative error {found:.2g} is above {self.limit}")
        return found


def copies_of(pack: Mapping[str, Tensor]) -> tuple[list[dict[str, Tensor]], int]:
    """Enough copies of a pack that no cache holds them all, and the bytes of one."""
    nbytes = sum(t.nbytes for t in pack.values())
    return [{k: t.clone() for k, t in pack.items()} for _ in range(max(2, round(ROTATED / nbytes)))], nbytes


def ours(weight: Weight, kernel: Kernel | None = None) -> Linear:
    """The linear as qcompile lowers it.  kernel: in place of the one that it would choose."""
    problem = _problem(weight)
    kernel = kernel or choose(problem)[0]
    pack = kernel.pack(weight.codes, weight.qparams, DTYPE)
    extra: dict[str, Tensor] = {}
    if weight.outliers.numel():
        keep = torch.ones(problem.K, dtype=DTYPE, device="cuda").index_fill(0, weight.outliers, 0)
        extra = {"keep": keep, "channels": weight.outliers}
        pack = {**pack, "columns": weight.floats[:, weight.outliers].to(DTYPE).t().contiguous()}
    if "octaves" in pack:
        # what FUSE makes pairs of rows by
        extra["octaves"] = pack["octaves"]
    copies, nbytes = copies_of(pack)
    # each kernel is a function of its own to the compiler, which may hold few variants of one
    torch._dynamo.reset()

    @torch.compile(dynamic=False, fullgraph=True, backend=partial(_fused, extra))
    def run(x: Tensor, pack: dict[str, Tensor]) -> Tensor:
        return _quantized(kernel, problem, x, **pack)

    return Linear(
        kernel=kernel.name,
        call=lambda x, i: run(x, {**copies[i], **extra}),
        reference=weight.oracle,
        copies=len(copies),
        nbytes=nbytes,
    )


def _fused(constants: Mapping[str, Tensor], module: GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
    """Inductor, behind what the lowering of a model does to quantizations.

    constants: among the inputs, that a model's graph holds.
    """
    graph = FxGraph(module)
    inputs = module.graph.find_nodes(op="placeholder")
    for name, tensor in constants.items():
        (node,) = (node for node, x in zip(inputs, example_inputs, strict=True) if x is tensor)
        graph.replace_uses(node, graph.add_constant(name, tensor))
    fuse(graph, torch.cuda.get_device_capability())
    code, _, names = Inductor(module, example_inputs, None).compile(graph.module)
    held = [getattr(graph.module, name) for name in names]
    return lambda *given: code(*given, *held)


def call_on_codes(weight: Weight) -> Callable[[], Tensor]:
    """The op alone, on one row that is quantized already."""
    problem, x = _problem(weight), weight.without_outliers(weight.example(1))
    kernel = choose(problem)[0]
    given: tuple[Any, ...] = (x,)
    if problem.input is not None:
        symmetric = parse_spec(str(problem.input).removesuffix("/asym"))
        qparams = find_qparams(x, symmetric)
        given = (quantize(x, qparams), qparams.scale, None)
    arguments = kernel.arguments(problem, given, kernel.pack(weight.codes, weight.qparams, DTYPE), None)
    if weight.outliers.numel() and kernel.with_tail is not None:
        columns = weight.floats[:, weight.outliers].to(DTYPE).t().contiguous()
        arguments = kernel.with_tail(problem, arguments, x[:, weight.outliers], columns) or arguments
    return lambda: kernel.op(*arguments)


def _problem(weight: Weight) -> Problem:
    N, K = weight.floats.shape
    capability = torch.cuda.get_device_capability()
    spec = weight.qparams.spec
    return Problem(
        N=N,
        K=K,
        weight=spec,
        input=weight.input,
        dtype=DTYPE,
        device="cuda",
        capability=capability,
        lowered=weight.qparams.lowered,
    )


def _quantized(
    kernel: Kernel,
    problem: Problem,
    x: Tensor,
    columns: Tensor | None = None,
    keep: Tensor | None = None,
    channels: Tensor | None = None,
    **pack: Tensor,
) -> Tensor:
    """y as the passes and the lowering write it."""
    rest = x if keep is None else x * keep
    given: tuple[Any, ...] = (rest,)
    if kernel.takes_codes:
        assert problem.input is not None
        codes, scale, *zero = QUANTIZE_DYNAMIC(rest, str(problem.input))
        given = (codes, scale, zero[0] if zero else None)
    arguments = kernel.arguments(problem, given, pack, None)
    if channels is None:
        return kernel.op(*arguments)
    selected = torch.index_select(x, -1, channels)
    joined = None if kernel.with_tail is None else kernel.with_tail(problem, arguments, selected, columns)
    if joined is None:
        return kernel.op(*arguments) + tail.OP(selected, columns)
    return kernel.op(*joined)


def floats(weight: Weight) -> Linear:
    """bfloat16, by cuBLAS: what `torch.compile` calls for a linear, too."""
    copies, nbytes = copies_of({"weight": weight.floats.to(DTYPE)})
    return Linear(
        kernel="bf16",
        call=lambda x, i: torch.nn.functional.linear(x, copies[i]["weight"]),
        reference=lambda x: x.float() @ weight.floats.to(DTYPE).float().T,
        copies=len(copies),
        nbytes=nbytes,
    )
