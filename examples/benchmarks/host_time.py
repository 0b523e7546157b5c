"""Microseconds of the host for one call of each Triton kernel's op on one row, beside the float linear.

    python examples/benchmarks/host_time.py [--profile]

Where no CUDA graph holds the calls, a decoder of small layers waits for this. The weight is so small that the GPU is
done first. --profile: what the host does in the op of each format. Writes examples/benchmarks/results/host_time.json.
"""

import argparse
import cProfile
import pstats
import time
from collections.abc import Callable
from pathlib import Path

import torch
from linears import FORMATS, call_on_codes, random_weight
from result_files import RESULTS, device, write_result
from torch import Tensor

N, K = 256, 256
CALLS, ROUNDS = 500, 6


def host_time(call: Callable[[], Tensor]) -> float:
    """The least of some rounds of calls that are not waited for."""
    times = []
    for _ in range(ROUNDS):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(CALLS):
            call()
        times.append((time.perf_counter() - start) / CALLS * 1e6)
    torch.cuda.synchronize()
    return min(times[1:])


def profile(call: Callable[[], Tensor]) -> None:
    with cProfile.Profile() as profiler:
        for _ in range(CALLS):
            call()
    torch.cuda.synchronize()
    pstats.Stats(profiler).sort_stats("tottime").print_stats(14)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--out", type=Path, default=RESULTS / "host_time.json")
    given = parser.parse_args()
    weight, x = torch.randn(N, K, device="cuda").bfloat16(), torch.randn(1, K, device="cuda").bfloat16()
    calls = {"bf16": lambda: torch.nn.functional.linear(x, weight)}
    calls |= {name: call_on_codes(random_weight(name, N, K)) for name in FORMATS}
    found = {name: round(host_time(call), 2) for name, call in calls.items()}
    print(found)
    if given.profile:
        for name, call in calls.items():
            print(name)
            profile(call)
    write_result(
        given.out,
        {"command": "python examples/benchmarks/host_time.py", **device("cuda"), "shape": [N, K], "us": found},
    )


if __name__ == "__main__":
    main()
