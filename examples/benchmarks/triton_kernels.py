"""Microseconds of the Triton kernels on this GPU, beside the float matmul of the library and the floor of the chip.

    python examples/benchmarks/triton_kernels.py [--formats NAME ...] [--shapes NxK ...] [--rows M ...]

Each result is checked against float32 before it is timed. Times are medians of CUDA graph replays, one of the float
matmul after one of the kernel, so that both meet the same clocks; weights rotate over copies that no cache holds. The
floor is the larger of bytes over the measured rate of reading and operations over that of a large product.
To add a format, add a line to FORMATS. Writes examples/benchmarks/results/triton_kernels.json.
"""

import argparse
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
from result_files import RESULTS, device, write_result
from torch import Tensor

from qcompile.backends.fx.kernels import Problem, choose
from qcompile.numerics import dequantize, find_qparams, quantize
from qcompile.spec import parse_spec

# name: specs of the weight and of the input
FORMATS: dict[str, tuple[str, str | None]] = {
    "int4": ("int4/g128/asym/bf16", None),
}
# of Llama-3.1-8B: gate and up, down, q and o, q and k and v
SHAPES = ((28672, 4096), (4096, 14336), (4096, 4096), (6144, 4096))
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 8192)
DTYPE = torch.bfloat16
# what all copies of a weight fill, so that none is in the cache when its turn comes
ROTATED = 400e6
ROUNDS = 25
# relative error to float32 on the same codes that bfloat16 results may have
LIMIT = 4e-3


@dataclass(frozen=True, kw_only=True)
class Ceilings:
    """Bytes and operations a microsecond, as measured."""

    bytes: float
    operations: float

    def floor(self, moved: float, done: float) -> float:
        return max(moved / self.bytes, done / self.operations)


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A packed weight under a format. call: from x and the number of a copy to y; weight: the oracle's floats."""

    kernel: str
    call: Callable[[Tensor, int], Tensor]
    weight: Tensor
    copies: int
    nbytes: int


def candidate(name: str, N: int, K: int) -> Candidate:
    """A random weight under the format of that name."""
    weight_spec, input_spec = (None if text is None else parse_spec(text) for text in FORMATS[name])
    assert weight_spec is not None
    problem = Problem(
        N=N,
        K=K,
        weight=weight_spec,
        input=input_spec,
        dtype=DTYPE,
        device="cuda",
        capability=torch.cuda.get_device_capability(),
    )
    kernel, _ = choose(problem)
    weight = torch.randn(N, K, device="cuda") * K**-0.5
    qparams = find_qparams(weight, weight_spec)
    codes = quantize(weight, qparams)
    packed = kernel.pack(codes, qparams, DTYPE)
    nbytes = sum(t.nbytes for t in packed.values())
    copies = [{part: t.clone() for part, t in packed.items()} for _ in range(max(2, round(ROTATED / nbytes)))]

    def call(x: Tensor, copy: int) -> Tensor:
        given: tuple[Any, ...] = (x,)
        if kernel.takes_codes:
            assert input_spec is not None
            found = find_qparams(x, input_spec)
            given = (quantize(x, found), found.scale, found.zero)
        y: Tensor = kernel.op(*kernel.arguments(problem, given, copies[copy], None))
        return y

    return Candidate(
        kernel=kernel.name, call=call, weight=dequantize(codes, qparams), copies=len(copies), nbytes=nbytes
    )


def captured(call: Callable[[int], Tensor], copies: int) -> tuple[torch.cuda.CUDAGraph, int]:
    """A graph that calls once for each copy, and how many calls it holds."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        call(0)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for copy in range(copies):
            call(copy)
    return graph, copies


def in_turns(graphs: Sequence[tuple[torch.cuda.CUDAGraph, int]], rounds: int) -> list[float]:
    """Median microseconds of one call of each graph, replayed one after the other."""
    times: list[list[float]] = [[] for _ in graphs]
    for turn in range(rounds + 2):
        for (graph, calls), found in zip(graphs, times, strict=True):
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            graph.replay()
            end.record()
            torch.cuda.synchronize()
            # the first two turns warm up
            if turn > 1:
                found.append(begin.elapsed_time(end) * 1000 / calls)
    return [statistics.median(found) for found in times]


def ceilings() -> Ceilings:
    """What this GPU moves and multiplies."""
    source = torch.randn(2**30, device="cuda", dtype=DTYPE)
    square = torch.randn(8192, 8192, device="cuda", dtype=DTYPE)

    def read(_: int) -> Tensor:
        return source.amax()

    def multiply(_: int) -> Tensor:
        return square @ square

    moved, multiplied = in_turns([captured(read, 4), captured(multiply, 4)], ROUNDS)
    return Ceilings(bytes=source.nbytes / moved, operations=2 * 8192**3 / multiplied)


def error(y: Tensor, x: Tensor, weight: Tensor) -> float:
    """Relative to the product in float32, row by row at worst."""
    reference = x.float() @ weight.T
    return float(((y.float() - reference).norm(dim=1) / reference.norm(dim=1)).max())


def measure(name: str, N: int, K: int, rows: Sequence[int], limits: Ceilings) -> list[dict[str, Any]]:
    """One result for each number of rows; raises SystemExit where a result is wrong."""
    found = candidate(name, N, K)
    float_copies = max(2, round(ROTATED / (2 * N * K)))
    floats = [found.weight.to(DTYPE) for _ in range(float_copies)]
    results = []
    for M in rows:
        x = torch.randn(M, K, device="cuda", dtype=DTYPE)
        # freed at once: what the allocator hands out next holds NaN
        torch.full((M, N), torch.nan, device="cuda", dtype=DTYPE)
        wrong = error(found.call(x, 0), x, found.weight)
        if not wrong < LIMIT:
            raise SystemExit(f"{name}, M={M}, N={N}, K={K}: relative error {wrong:.2g} is above {LIMIT}")
        # large products take long enough for two weights, and their weights are a small part of what they read
        most = 2 if M > 256 else max(found.copies, float_copies)
        kernel = captured(lambda i, x=x: found.call(x, i), min(found.copies, most))
        plain = captured(lambda i, x=x: torch.nn.functional.linear(x, floats[i]), min(float_copies, most))
        us, plain_us = in_turns([kernel, plain], ROUNDS if M <= 256 else 8)
        floor = limits.floor(found.nbytes + 2 * M * (N + K), 2 * M * N * K)
        ratio, share = plain_us / us, floor / us
        print(f"{name:6} {N:6} x {K:5} M={M:5} {us:8.1f} us  bf16 {plain_us:8.1f}  {ratio:5.2f}x  floor {share:4.0%}")
        results.append(
            {
                "format": name,
                "kernel": found.kernel,
                "N": N,
                "K": K,
                "M": M,
                "us": round(us, 2),
                "bf16_us": round(plain_us, 2),
                "speedup": round(ratio, 3),
                "floor_us": round(floor, 2),
                "error": float(f"{wrong:.2g}"),
            }
        )
        del kernel, plain
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
    for name in given.formats:
        for shape in given.shapes:
            N, K = map(int, shape.split("x"))
            results += measure(name, N, K, given.rows, limits)
            torch.cuda.empty_cache()
    write_result(
        RESULTS / "triton_kernels.json",
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
