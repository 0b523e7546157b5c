"""Result files of the benchmarks: what the numbers depend on, and how they are written."""

import json
import os
import platform
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


def machine() -> dict[str, Any]:
    """What times on the CPU depend on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    flags = next((line.split() for line in lines if line.startswith("flags")), [])
    return {
        "processor": next((line.split(": ")[1] for line in lines if line.startswith("model name")), platform.machine()),
        "features": sorted(set(flags) & {"avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16"}),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def device(name: str) -> dict[str, Any]:
    """What quality, and times on a GPU, depend on.  name: "cpu" or "cuda"."""
    return {
        "device": torch.cuda.get_device_name() if name == "cuda" else platform.machine(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def command() -> str:
    """What was called, but for where its result goes."""
    given = list(sys.argv[1:])
    for option in ("--result", "--out"):
        if option in given:
            place = given.index(option)
            del given[place : place + 2]
    return shlex.join(["python", f"examples/benchmarks/{Path(sys.argv[0]).name}", *given])


def write_result(path: Path, result: Mapping[str, Any]) -> None:
    """Write a result beside its place and rename it, so that an old one is whole until the new one is."""
    beside = path.with_suffix(".tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    beside.write_text(json.dumps(result, indent=1) + "\n")
    os.replace(beside, path)
    print(f"wrote {path}")
