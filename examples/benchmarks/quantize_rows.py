"""Microseconds of quantizing rows in one pass, beside what Inductor makes of the same plain torch.

    python examples/benchmarks/quantize_rows.py [--cases NAME ...] [--specs SPEC ...] [--rows M ...] [--result FILE]

Each case is a quantization and what comes before it in a decoder of Llama-3.1-8B's shapes; `float` is what comes before
it alone, compiled, in bfloat16. Results are compared with eager torch before they are timed. Times are medians of CUDA
graph replays in turns, of eight inputs one after the other. For the largest M, `matmul` is the 8-bit matmul that reads
the codes, and `share` is what the quantization adds to float and matmul. Of a split, `plain` is the kernel without it.
Writes results/quantize_rows.json, or FILE.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import triton
from result_files import RESULTS, device, write_result
from torch import Tensor
from triton_kernels import captured, in_turns

from qcompile.backends.fx import ops
from qcompile.backends.fx.kernels import Problem, choose
from qcompile.backends.fx.rows import QUANTIZE_ROWS
from qcompile.numerics import QParams, dequantize, fake_quantize, find_qparams, quantize
from qcompile.spec import parse_spec

SPECS = ("int8/token/asym", "fp8_e4m3/token")
ROWS = (1, 16, 64, 2048, 8192)
COPIES, ROUNDS, EPS = 8, 15, 1e-5
DTYPE = torch.bfloat16
# relative to the row: floats of another last bit may have the next code, which in fp8 is 6 % away, and some have in the
# worst of 8192 rows; other codes altogether are 4e-2 away
LIMITS = {"int8": 1e-2, "fp8_e4m3": 2.5e-2}
# rows compared to the bit
CHECKED = 64


@dataclass(frozen=True, kw_only=True)
class Case:
    """x [M, K]; second: of the same shape; joined: both are halves of one matrix. N: of the linear that follows.

    split: one channel in a hundred stays out of the codes.  factor: channels are multiplied with a vector, at the end.
    """

    before: str
    K: int
    N: int
    second: bool = False
    joined: bool = False
    bias: bool = False
    split: bool = False
    factor: bool = False

    def channels(self) -> Tensor:
        """Those that are split off."""
        count = round(0.01 * self.K) if self.split else 0
        return torch.arange(count, device="cuda", dtype=torch.int32) * self.K // max(count, 1)


CASES = {
    "nothing": Case(before="nothing", K=4096, N=4096),
    "nothing, wide": Case(before="nothing", K=14336, N=4096),
    "norm": Case(before="rms_norm", K=4096, N=28672),
    "add, norm": Case(before="rms_norm", K=4096, N=28672, second=True),
    "add, layer norm": Case(before="layer_norm", K=4096, N=28672, second=True, bias=True),
    "silu times gate": Case(before="silu", K=14336, N=4096, second=True, joined=True),
    "gelu": Case(before="gelu", K=14336, N=4096),
    "gelu, tanh": Case(before="gelu_tanh", K=14336, N=4096),
    "gelu, tanh, times gate": Case(before="gelu_tanh", K=14336, N=4096, second=True, joined=True),
}
SPLIT = ("nothing", "nothing, wide", "norm", "add, norm", "add, layer norm", "silu times gate")
FACTOR = ("nothing", "silu times gate", "gelu", "gelu, tanh")
CASES |= {f"{name}, split": replace(CASES[name], split=True) for name in SPLIT}
CASES |= {f"{name}, factor": replace(CASES[name], factor=True) for name in FACTOR}


def inputs(case: Case, M: int) -> list[tuple[Tensor, Tensor | None]]:
    found = []
    for _ in range(COPIES):
        if case.joined:
            both = torch.randn(M, 2 * case.K, device="cuda", dtype=DTYPE)
            found.append((both[:, : case.K], both[:, case.K :]))
        else:
            x, second = (torch.randn(M, case.K, device="cuda", dtype=DTYPE) for _ in range(2))
            found.append((x, second if case.second else None))
    return found


def floats(case: Case, x: Tensor, second: Tensor | None, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor | None]:
    """What is quantized, and the sum that other ops read, in plain torch."""
    if "norm" in case.before:
        total = x if second is None else x + second
        if case.before == "layer_norm":
            return F.layer_norm(total, (case.K,), weight, bias, EPS), None if second is None else total
        return F.rms_norm(total, (case.K,), weight, EPS), None if second is None else total
    match case.before:
        case "silu":
            x = F.silu(x)
        case "gelu" | "gelu_tanh":
            x = F.gelu(x, approximate="tanh" if case.before == "gelu_tanh" else "none")
    x = x if second is None else x * second
    return (x * weight if case.factor else x), None


def masked(case: Case, value: Tensor) -> Tensor:
    """The value without the channels that are split off, as the passes write it."""
    return value * keep_of(case) if case.split else value


def keep_of(case: Case) -> Tensor:
    return torch.ones(case.K, device="cuda", dtype=DTYPE).index_fill(0, case.channels().long(), 0)


def check(case: Case, spec: str, found: Sequence[Tensor], value: Tensor, total: Tensor | None) -> float:
    """Relative difference from what eager torch quantizes; raises SystemExit if last bits do not explain it."""
    parsed = parse_spec(spec)
    if case.split:
        *found, tail = found
        channels = case.channels()
        off = float((tail[:, : len(channels)].float() - value[:, channels].float()).norm() / value.float().norm())
        if not (off < LIMITS[parsed.format.name] and (tail[:, len(channels) :] == 0).all()):
            raise SystemExit(f"{case} {spec}: outliers are {off:.2g} away")
        value = masked(case, value)
    zero = None if parsed.symmetric else found[2]
    y = dequantize(found[0], QParams(spec=parsed, scale=found[1], zero=zero))
    expected = fake_quantize(value.float(), parsed)
    wrong = float(((y - expected).norm(dim=1) / expected.norm(dim=1)).max())
    kept = total is None or torch.equal(found[-1], total)
    # the oracle on the CPU: on a GPU eager torch divides by a number by multiplying with its inverse
    few = value[:CHECKED].cpu()
    exact = case.before != "nothing" or torch.equal(found[0][:CHECKED].cpu(), quantize(few, find_qparams(few, parsed)))
    if not (wrong < LIMITS[parsed.format.name] and kept and exact):
        raise SystemExit(f"{case} {spec}: {wrong:.2g} away, sum equal: {kept}, codes equal where they must be: {exact}")
    return wrong


def matmul(spec: str, N: int, K: int, M: int) -> Callable[[int], Tensor]:
    """The matmul of codes that the recipe of this spec runs."""
    given = parse_spec(spec)
    weight_spec = parse_spec("fp8_e4m3/channel" if given.format.name == "fp8_e4m3" else "int8/channel")
    problem = Problem(
        N=N,
        K=K,
        weight=weight_spec,
        input=given,
        dtype=DTYPE,
        device="cuda",
        capability=torch.cuda.get_device_capability(),
    )
    kernel, _ = choose(problem)
    weight = torch.randn(N, K, device="cuda")
    qparams = find_qparams(weight, weight_spec)
    packed = kernel.pack(quantize(weight, qparams), qparams, DTYPE)
    offset = 0 if given.symmetric else 128
    x = torch.randn(M, K, device="cuda", dtype=DTYPE)
    codes, scale, *zero = QUANTIZE_ROWS(x, None, None, None, "nothing", 0.0, spec, offset, False)
    arguments = kernel.arguments(problem, (codes, scale, zero[0] if zero else None), packed, None)
    return lambda _: kernel.op(*arguments)


def measure(name: str, spec: str, M: int) -> dict[str, Any]:
    case = CASES[name]
    weight, bias = (torch.randn(case.K, device="cuda", dtype=DTYPE) for _ in range(2))
    given = inputs(case, M)
    norm, keep_total = "norm" in case.before, case.second and not case.joined
    keep, channels = (keep_of(case), case.channels()) if case.split else (None, None)

    def alone(x: Tensor, second: Tensor | None) -> tuple[Tensor | None, ...]:
        return floats(case, x, second, weight, bias)

    def plain(x: Tensor, second: Tensor | None) -> list[Tensor | None]:
        value, total = floats(case, x, second, weight, bias)
        if keep is None or channels is None:
            return [*ops.QUANTIZE_DYNAMIC(value, spec), total]
        return [*ops.QUANTIZE_DYNAMIC(value * keep, spec), total, value.index_select(-1, channels)]

    def fused(i: int, *split: Tensor | None) -> list[Tensor]:
        made: list[Tensor] = QUANTIZE_ROWS(
            *given[i],
            weight if norm or case.factor else None,
            bias if case.bias else None,
            case.before,
            EPS if norm else 0.0,
            spec,
            0,
            keep_total,
            None,
            *split,
        )
        return made

    torch._dynamo.reset()
    made = torch.compile(plain, dynamic=False)
    calls: dict[str, Callable[[int], Any]] = {
        "fused": lambda i: fused(i, keep, channels),
        "inductor": lambda i: made(*given[i]),
    }
    if case.split:
        calls["plain"] = fused
    if case.before != "nothing":
        before = torch.compile(alone, dynamic=False)
        calls["float"] = lambda i: before(*given[i])
    if max(ROWS) == M and not case.split:
        calls["matmul"] = matmul(spec, case.N, case.K, M)
    difference = check(case, spec, fused(0, keep, channels), *floats(case, *given[0], weight, bias))
    times = in_turns([captured(call, COPIES) for call in calls.values()], ROUNDS)
    row: dict[str, Any] = {"case": name, "spec": spec, "K": case.K, "M": M, "difference": float(f"{difference:.2g}")}
    row |= {f"{kind}_us": round(us, 2) for kind, us in zip(calls, times, strict=True)}
    row["speedup"] = round(row["inductor_us"] / row["fused_us"], 2)
    if "matmul_us" in row:
        row["share"] = round((row["fused_us"] - row.get("float_us", 0.0)) / row["matmul_us"], 3)
    print({k: v for k, v in row.items() if k not in ("K", "difference")}, flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--specs", nargs="+", default=list(SPECS))
    parser.add_argument("--rows", nargs="+", type=int, default=list(ROWS))
    parser.add_argument("--result", type=Path, default=RESULTS / "quantize_rows.json")
    given = parser.parse_args()
    torch.manual_seed(0)
    with torch.no_grad():
        rows = [measure(name, spec, M) for name in given.cases for spec in given.specs for M in given.rows]
    result = {
        "command": "python examples/benchmarks/quantize_rows.py",
        "machine": device("cuda") | {"triton": triton.__version__},
        "rows": rows,
    }
    write_result(given.result, result)


if __name__ == "__main__":
    main()
