"""Every example runs as a user would run it, from another folder, and says what it promises."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
# the least that a reader should see of each
SAYS = {
    "calibrate_and_save.py": "int8-static on cpu: 2 of 2 sites",
    "compile_a_model.py": "int8 on cpu: 2 of 2 sites",
    "save_a_model.py": "the same numbers: True",
    "own_recipe.py": "file and object give the same numbers: True",
}


def test_every_example_is_here() -> None:
    assert sorted(p.name for p in EXAMPLES.glob("*.py")) == sorted(SAYS)


@pytest.mark.slow
@pytest.mark.parametrize("name", SAYS)
def test_example(name: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, EXAMPLES / name], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert SAYS[name] in done.stdout
    assert done.stderr == ""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["triton_kernels", "triton_kernels_h200", "widths_h200"])
def test_a_result_is_drawn(name: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    benchmarks = EXAMPLES / "benchmarks"
    result = Path(shutil.copy(benchmarks / "results" / f"{name}.json", tmp_path))
    done = subprocess.run(
        [sys.executable, benchmarks / "triton_plot.py", result],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr == ""
    assert result.with_suffix(".png").read_bytes()[:4] == b"\x89PNG"
