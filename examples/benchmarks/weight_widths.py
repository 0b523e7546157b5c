"""Microseconds of linears whose weights alone are quantized, for each width, beside the library's float matmul.

    python examples/benchmarks/weight_widths.py [--formats NAME ...] [--shapes NxK ...] [--rows M ...]

Each result is checked against float32 before it is timed. Times are medians of CUDA graph replays, the widths and the
float matmul in turns, so that all meet the same clocks; weights rotate over copies that no cache holds. The floor is
the larger of bytes over the measured rate of reading and operations over that of a large product.
Writes examples/benchmarks/results/weight_widths.json.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
from result_files import RESULTS, device, write_result
from torch import Tensor
from triton_kernels import DTYPE, LIMIT, ROTATED, Ceilings, captured, ceilings, error, in_turns

from qcompile.backends.fx.kernels import Problem, choose
from qcompile.numerics import dequantize, find_qparams, quantize
from qcompile.spec import parse_spec

FORMATS = {
    "int8": "int8/channel",
    "int4": "int4/g128/asym/bf16",
    "nf4": "nf4/g64",
    "int3": "int3/g128/asym/bf16",
    "int2": "int2/g64/asym/bf16",
    "fp8": "fp8_e4m3/channel",
    "fp6": "fp6_e3m2/g128",
}
# of Llama-3.1-8B: gate and up, down, q and o
SHAPES = ((28672, 4096), (4096, 14336), (4096, 4096))
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 2048, 8192)
FLOAT = "bf16"
# products that take long enough for two weights
LARGE = 256


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A packed weight. call: from x and the number of a copy to y; weight: the oracle's floats."""

    kernel: str
    call: Callable[[Tensor, int], Tensor]
    weight: Tensor
    copies: int
    nbytes: int


def candidate(name: str, weight: Tensor) -> Candidate:
    """A weight [N, K] under the format of that name."""
    N, K = weight.shape
    if name == FLOAT:
        copies = [weight.to(DTYPE) for _ in range(max(2, round(ROTATED / (2 * N * K))))]
        held = copies[0].float()
        return Candidate(
            kernel="library",
            call=lambda x, copy: torch.nn.functional.linear(x, copies[copy]),
            weight=held,
            copies=len(copies),
            nbytes=2 * N * K,
        )
    spec, capability = parse_spec(FORMATS[name]), torch.cuda.get_device_capability()
    problem = Problem(N=N, K=K, weight=spec, input=None, dtype=DTYPE, device="cuda", capability=capability)
    kernel, _ = choose(problem)
    qparams = find_qparams(weight, spec)
    codes = quantize(weight, qparams)
    packed = kernel.pack(codes, qparams, DTYPE)
    nbytes = sum(t.nbytes for t in packed.values())
    packs = [{part: t.clone() for part, t in packed.items()} for _ in range(max(2, round(ROTATED / nbytes)))]

    def call(x: Tensor, copy: int) -> Tensor:
        y: Tensor = kernel.op(*kernel.arguments(problem, (x,), packs[copy], None))
        return y

    floats = dequantize(codes, qparams)
    return Candidate(kernel=kernel.name, call=call, weight=floats, copies=len(packs), nbytes=nbytes)


def measure(names: Sequence[str], N: int, K: int, rows: Sequence[int], limits: Ceilings) -> list[dict[str, Any]]:
    """One result for each format and number of rows; raises SystemExit where a result is wrong."""
    weight = torch.randn(N, K, device="cuda") * K**-0.5
    found = {name: candidate(name, weight) for name in (*names, FLOAT)}
    results = []
    for M in rows:
        x = torch.randn(M, K, device="cuda", dtype=DTYPE)
        graphs = []
        for name, c in found.items():
            # freed at once: what the allocator hands out next holds NaN
            torch.full((M, N), torch.nan, device="cuda", dtype=DTYPE)
            wrong = error(c.call(x, 0), x, c.weight)
            if not wrong < LIMIT:
                raise SystemExit(f"{name}, M={M}, N={N}, K={K}: relative error {wrong:.2g} is above {LIMIT}")
            graphs.append(captured(lambda i, c=c, x=x: c.call(x, i), 2 if M > LARGE else min(c.copies, 20)))
            entry = {"format": name, "spec": FORMATS.get(name, FLOAT), "kernel": c.kernel, "N": N, "K": K, "M": M}
            floor = limits.floor(c.nbytes + 2 * M * (N + K), 2 * M * N * K)
            results.append(entry | {"floor_us": round(floor, 2), "error": float(f"{wrong:.2g}")})
        times = in_turns(graphs, 25 if M <= LARGE else 8)
        for result, us in zip(results[-len(times) :], times, strict=True):
            result |= {"us": round(us, 2), "speedup": round(times[-1] / us, 3)}
        shown = "  ".join(f"{name} {us:.1f} ({times[-1] / us:.2f}x)" for name, us in zip(found, times, strict=True))
        print(f"{N:6} x {K:5} M={M:5}  {shown}", flush=True)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=list(FORMATS))
    parser.add_argument("--shapes", nargs="+", default=[f"{N}x{K}" for N, K in SHAPES])
    parser.add_argument("--rows", nargs="+", type=int, default=list(ROWS))
    given = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("this benchmark needs a CUDA device")
    torch.manual_seed(0)
    limits = ceilings()
    print(f"{torch.cuda.get_device_name()}: {limits.bytes / 1e6:.2f} TB/s, {limits.operations / 1e6:.0f} TFLOP/s")
    results = []
    for shape in given.shapes:
        N, K = map(int, shape.split("x"))
        results += measure(given.formats, N, K, given.rows, limits)
        torch.cuda.empty_cache()
    write_result(
        RESULTS / "weight_widths.json",
        {
            **device("cuda"),
            "triton": triton.__version__,
            "read_tb_s": round(limits.bytes / 1e6, 3),
            "bf16_tflop_s": round(limits.operations / 1e6, 1),
            "results": results,
        },
    )


if __name__ == "__main__":
    main()
