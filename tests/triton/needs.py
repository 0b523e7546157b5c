"""What tests of Triton kernels need, and skip without."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


# of the tests of a kernel for Hopper
hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="the kernel is for sm_90"
)


def require_fp8() -> None:
    """Skip the test on GPUs whose tensor cores and casts know no fp8."""
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("fp8 begins with sm_89")


def run_interpreted(program: str, *, loops: bool) -> None:
    """Run a program that prints "equal" at its end under Triton's interpreter, which is chosen at the import.

    loops: its kernels have some, whose ends the interpreter of Triton 3.6 makes of arrays that numpy 2.4 refuses.
    """
    numpy = pytest.importorskip("numpy")
    if loops and tuple(map(int, numpy.__version__.split(".")[:2])) >= (2, 4):
        pytest.skip("Triton's interpreter runs loops with numpy<2.4 only")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program],
        cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.strip() == "equal", done.stderr[-2000:]
