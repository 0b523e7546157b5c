"""Microseconds of quantized linears on this GPU, beside bfloat16, other libraries, and the floor of the chip.

    python examples/benchmarks/triton_kernels.py [--formats NAME ...] [--shapes NxK ...] [--rows M ...] [--no-peers]
        [--check]

Each result is checked before it is timed. Times are medians of CUDA graph replays, one of each candidate in turn, so
that all meet the same clocks; weights rotate over copies that no cache holds. The floor is the larger of bytes over
the highest rate of reading that was measured, and operations over the rate of 8-bit products on the data sheet or the
measured one of bfloat16. What no graph can hold runs as it is called, gaps and all. --check times nothing; what it
compiles, later runs find in caches, so several such runs at once, of a shape each, save time. Formats stand in
linears.py, peers in linear_peers.py. Writes examples/benchmarks/results/triton_kernels.json.
"""

import argparse
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from linear_peers import peers, versions
from linears import DTYPE, FORMATS, Linear, Weight, floats, ours, random_weight
from result_files import RESULTS, command, device, write_result
from torch import Tensor

from qcompile.backends.triton.graphs import called, captured, in_turns

# of Llama-3.1-8B: gate and up, down, q and o, q and k and v
SHAPES = ((28672, 4096), (4096, 14336), (4096, 4096), (6144, 4096))
ROWS = (1, 16, 64, 128, 2048, 8192)
# rows from which on a product takes long enough for two weights and few rounds, and its weight is a small part of it
MANY = 256
ROUNDS, FEW_ROUNDS = 25, 8


@dataclass(frozen=True, kw_only=True)
class Ceilings:
    """Bytes and operations of bfloat16 a microsecond, as measured."""

    bytes: float
    operations: float

    def floor(self, name: str, M: int, N: int, K: int, nbytes: int) -> float:
        """Microseconds that the linear takes at least: x, y and the weight are moved once."""
        moved = nbytes + M * (N + K) * DTYPE.itemsize
        return max(moved / self.bytes, 2 * M * N * K / (FORMATS[name].rate or self.operations))


def ceilings() -> Ceilings:
    """What this GPU moves and multiplies."""
    source = torch.randn(2**15, 2**15, device="cuda", dtype=DTYPE)
    square, row = source[:8192, :8192].contiguous(), source[:1].clone()

    def read(_: int) -> Tensor:
        return source.amax()

    # the library reads a weight faster than torch reduces it
    def read_for_a_row(_: int) -> Tensor:
        return torch.nn.functional.linear(row, source)

    def multiply(_: int) -> Tensor:
        return square @ square

    *moved, multiplied = in_turns([captured(call, 4) for call in (read, read_for_a_row, multiply)], ROUNDS)
    return Ceilings(bytes=source.nbytes / min(moved), operations=2 * 8192**3 / multiplied)


def candidates(weight: Weight, most: int, *, with_peers: bool) -> dict[str, tuple[Linear, range]]:
    """What is measured, and for which numbers of rows."""
    every = range(1, most + 1)
    found = {"ours": (ours(weight), every), "bf16": (floats(weight), every)}
    if with_peers:
        found |= {title: (peer.make(weight), peer.rows) for title, peer in peers(weight.format)}
    return found


def errors(running: Mapping[str, Linear], x: Tensor, N: int) -> dict[str, float]:
    """Of each linear; raises SystemExit where a result is wrong."""
    found = {}
    for title, linear in running.items():
        # freed at once: what the allocator hands out next holds NaN
        torch.full((x.shape[0], N), torch.nan, device="cuda", dtype=DTYPE)
        found[title] = linear.error(x)
    return found


def check(name: str, N: int, K: int, rows: Sequence[int], *, with_peers: bool) -> None:
    weight = random_weight(name, N, K)
    linears = candidates(weight, max(rows), with_peers=with_peers)
    for M in rows:
        running = {title: linear for title, (linear, takes) in linears.items() if M in takes}
        print(name, N, K, M, errors(running, weight.example(M), N), flush=True)


def measure(
    name: str, N: int, K: int, rows: Sequence[int], limits: Ceilings, *, with_peers: bool
) -> list[dict[str, Any]]:
    """One result for each number of rows; raises SystemExit where a result is wrong."""
    weight = random_weight(name, N, K)
    linears = candidates(weight, max(rows), with_peers=with_peers)
    results = []
    for M in rows:
        x = weight.example(M)
        running = {title: linear for title, (linear, takes) in linears.items() if M in takes}
        found = errors(running, x, N)
        us = times(running, x)
        results.append(
            {
                "format": name,
                "kernel": running["ours"].kernel,
                "N": N,
                "K": K,
                "M": M,
                "us": round(us["ours"], 2),
                "bf16_us": round(us["bf16"], 2),
                "speedup": round(us["bf16"] / us["ours"], 3),
                "floor_us": round(limits.floor(name, M, N, K, running["ours"].nbytes), 2),
                "error": float(f"{found['ours']:.2g}"),
                "error_to_floats": float(f"{against_floats(running['ours'], weight.floats, x):.2g}"),
                "peers": {title: round(t, 2) for title, t in us.items() if title not in ("ours", "bf16")},
            }
        )
        show(results[-1])
    return results


def times(running: Mapping[str, Linear], x: Tensor) -> dict[str, float]:
    """Microseconds of each linear: of those that graphs hold, and then of the others, behind which graphs are slow."""
    M = x.shape[0]
    found: dict[str, float] = {}
    for graphed, made in ((True, captured), (False, called)):
        timed = {title: linear for title, linear in running.items() if linear.graphed is graphed}
        calls = [
            made(lambda i, run=linear.call: run(x, i), min(linear.copies, 2) if M > MANY else linear.copies)
            for linear in timed.values()
        ]
        found |= zip(timed, in_turns(calls, FEW_ROUNDS if M > MANY else ROUNDS), strict=True)
    return found


def against_floats(linear: Linear, weight: Tensor, x: Tensor) -> float:
    """What quantization costs: relative error to the product of x and the float weight."""
    exact = x.float() @ weight.T
    return float((linear.call(x, 0).float() - exact).norm() / exact.norm())


def show(row: Mapping[str, Any]) -> None:
    beside = "  ".join(f"{title} {us:.1f}" for title, us in row["peers"].items())
    print(
        f"{row['format']:10} {row['N']:6} x {row['K']:5} M={row['M']:5} {row['us']:8.1f} us  bf16 {row['bf16_us']:8.1f}"
        f"  {row['speedup']:5.2f}x  floor {row['floor_us'] / row['us']:4.0%}  {beside}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=list(FORMATS))
    parser.add_argument("--shapes", nargs="+", default=[f"{N}x{K}" for N, K in SHAPES])
    parser.add_argument("--rows", nargs="+", type=int, default=list(ROWS))
    parser.add_argument("--peers", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--out", type=Path, default=RESULTS / "triton_kernels.json")
    given = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("this benchmark needs a CUDA device")
    torch.manual_seed(0)
    # a variant for each number of rows, of all candidates, is compiled from one function
    torch._dynamo.config.recompile_limit = 64
    shapes = [tuple(map(int, shape.split("x"))) for shape in given.shapes]
    if given.check:
        for name, (N, K) in itertools.product(given.formats, shapes):
            check(name, N, K, given.rows, with_peers=given.peers)
        return
    limits = ceilings()
    result: dict[str, Any] = {
        "command": command(),
        **device("cuda"),
        "triton": triton.__version__,
        **(versions() if given.peers else {}),
        "read_tb_s": round(limits.bytes / 1e6, 3),
        "bf16_tflop_s": round(limits.operations / 1e6, 1),
        "results": [],
    }
    print({key: value for key, value in result.items() if key != "results"})
    for name in given.formats:
        for N, K in shapes:
            result["results"] += measure(name, N, K, given.rows, limits, with_peers=given.peers)
            torch.cuda.empty_cache()
        # what is measured stays, should a later format fail
        write_result(given.out, result)


if __name__ == "__main__":
    main()
