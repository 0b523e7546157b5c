"""What tests of Triton kernels need, and skip without."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


def require_fp8() -> None:
    """Skip the test on GPUs whose tensor cores and casts know no fp8."""
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("fp8 begins with sm_89")


def run_interpreted(program: str) -> None:
    """Run a program that prints "equal" at its end under Triton's interpreter, which is chosen at the import."""
    numpy = pytest.importorskip("numpy")
    if tuple(map(int, numpy.__version__.split(".")[:2])) >= (2, 4):
        pytest.skip("Triton's interpreter needs numpy<2.4")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program],
        cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.strip() == "equal", done.stderr[-2000:]
