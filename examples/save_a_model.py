"""A quantized model on disk, loaded by a process that never sees its float weights, nor data: compile, save, load.

python examples/save_a_model.py
"""

import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn

import qcompile


def build() -> nn.Module:
    """Any model; on meta it has shapes and no numbers."""
    return nn.Sequential(nn.Linear(512, 1024), nn.ReLU(), nn.Linear(1024, 512)).eval()


def run(model: nn.Module, x: Tensor, **options: object) -> tuple[nn.Module, Tensor]:
    """The compiled model, and what it makes of x."""
    fast = torch.compile(model, backend="qcompile", options=options)
    with torch.no_grad():
        return fast, fast(x)


torch.manual_seed(0)
x = torch.randn(4, 512)
fast, expected = run(build(), x, recipe="int4-weight")

with tempfile.TemporaryDirectory() as folder:
    qcompile.save(fast, Path(folder) / "model")
    size = sum(path.stat().st_size for path in (Path(folder) / "model").iterdir())
    with torch.device("meta"):
        empty = build()
    # weights stay in the files until the model is compiled; each is read then, and never as floats
    plan = qcompile.load(Path(folder) / "model", empty)
    _, found = run(empty, x, plan=plan)

print(f"{size} bytes on disk, {sum(p.nbytes for p in build().parameters())} in float")
print(f"the same numbers: {torch.equal(found, expected)}")
