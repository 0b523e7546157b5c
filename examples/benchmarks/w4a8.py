"""Microseconds of linears with 4-bit weights and 8-bit inputs on this GPU, beside bfloat16 and 4-bit weights alone.

    python examples/benchmarks/w4a8.py [--shapes NxK ...] [--rows M ...]

Each result is checked against float32 before it is timed. Times are medians of CUDA graph replays, taken in turns, so
that all meet the same clocks; weights rotate over copies that no cache holds. `us` is the matmul of codes alone, and
`groups_us` the same without a weight of int8; triton_kernels.py times it with the quantization of its input. Writes
examples/benchmarks/results/w4a8.json.
"""

import argparse
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import triton
from result_files import RESULTS, device, write_result
from torch import Tensor

from qcompile.backends.fx.kernels import int4_int8, weight_triton
from qcompile.backends.fx.kernels.problem import Problem
from qcompile.backends.triton.graphs import captured, in_turns
from qcompile.numerics import dequantize, find_qparams, quantize
from qcompile.spec import parse_spec

WEIGHT, INPUT = parse_spec("int4/g128/asym/u4row"), parse_spec("int8/token/asym")
# of Llama-3.1-8B: gate and up, down, q and o, q and k and v
SHAPES = ((28672, 4096), (4096, 14336), (4096, 4096), (6144, 4096))
ROWS = (1, 8, 16, 32, 64, 128, 256, 512, 768, 1024, 2048, 8192)
DTYPE = torch.bfloat16
# what all copies of a weight fill, so that none is in the cache when its turn comes
ROTATED = 300e6
# relative error to float32 on the same codes that bfloat16 results may have
LIMIT = 4e-3


def check(name: str, y: Tensor, x: Tensor, weight: Tensor) -> float:
    """Error relative to the product in float32, of the worst row; raises SystemExit if it is too large."""
    reference = x.float() @ weight.T
    wrong = float(((y.float() - reference).norm(dim=1) / reference.norm(dim=1)).max())
    if not wrong < LIMIT:
        raise SystemExit(f"{name}: relative error {wrong:.2g} is above {LIMIT}")
    return wrong


def measure(N: int, K: int, rows: Sequence[int]) -> list[dict[str, Any]]:
    """One result for each number of rows."""
    made = torch.randn(N, K, device="cuda") * K**-0.5
    found = find_qparams(made, WEIGHT)
    codes = quantize(made, found)
    weight = dequantize(codes, found)
    copies = max(2, round(ROTATED / (N * K / 2)))
    capability = torch.cuda.get_device_capability()
    problem = Problem(N=N, K=K, weight=WEIGHT, input=None, dtype=DTYPE, device="cuda", capability=capability)
    alone, beside = (module.KERNEL.pack(codes, found, DTYPE) for module in (weight_triton, int4_int8))
    w4a16 = [{name: t.clone() for name, t in alone.items()} for _ in range(copies)]
    w4a8 = [{name: t.clone() for name, t in beside.items()} for _ in range(copies)]
    floats = [weight.to(DTYPE) for _ in range(max(2, round(ROTATED / (N * K * 2))))]
    results = []

    for M in rows:
        x = torch.randn(M, K, device="cuda", dtype=DTYPE)
        given = find_qparams(x, INPUT)
        stored = quantize(x, given)
        signed = (stored.float() - 128).to(torch.int8)

        def product(
            i: int, of_row: bool = True, signed: Tensor = signed, scale: Tensor = given.scale, zero: Any = given.zero
        ) -> Tensor:
            packed = w4a8[i % copies]
            pack = (packed["words"], packed["scales"], packed["sums"])
            rows = (packed["row"], packed["totals"]) if of_row else (None, None)
            y: Tensor = torch.ops.qcompile.int4_int8_mm(signed, scale, zero, *pack, *rows, None, DTYPE)
            return y

        def narrow(i: int, x: Tensor = x) -> Tensor:
            packed = w4a16[i % copies]
            y: Tensor = weight_triton.KERNEL.op(*weight_triton.KERNEL.arguments(problem, (x,), packed, None))
            return y

        # freed at once: what the allocator hands out next holds NaN
        torch.full((8 * M, N), torch.nan, device="cuda", dtype=DTYPE)
        wrong = check(f"M={M}, N={N}, K={K}", product(0), dequantize(stored, given), weight)
        calls = copies if M <= 256 else 2
        graphs = {
            "bf16_us": captured(lambda i, x=x: torch.nn.functional.linear(x, floats[i % len(floats)]), calls),
            "w4a16_us": captured(narrow, calls),
            "groups_us": captured(partial(product, of_row=False), calls),
            "us": captured(product, calls),
        }
        times = dict(zip(graphs, in_turns(list(graphs.values()), 20 if M <= 256 else 8), strict=True))
        print(
            f"{N:6} x {K:5} M={M:5} "
            + "  ".join(f"{name} {us:8.1f}" for name, us in times.items())
            + f"  {times['bf16_us'] / times['us']:5.2f}x of bf16, "
            f"{times['us'] / times['w4a16_us']:5.2f} of W4A16's time"
        )
        times = {name: round(us, 2) for name, us in times.items()}
        results.append({"N": N, "K": K, "M": M, **times, "error": float(f"{wrong:.2g}")})
        del graphs
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=[f"{N}x{K}" for N, K in SHAPES])
    parser.add_argument("--rows", nargs="+", type=int, default=list(ROWS))
    given = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("this benchmark needs a CUDA device")
    torch.manual_seed(0)
    results = []
    for shape in given.shapes:
        N, K = map(int, shape.split("x"))
        results += measure(N, K, given.rows)
        torch.cuda.empty_cache()
    write_result(RESULTS / "w4a8.json", {**device("cuda"), "triton": triton.__version__, "results": results})


if __name__ == "__main__":
    main()
