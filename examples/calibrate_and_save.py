"""Static input scales from data, kept on disk and used by another process: calibrate, save, load.

python examples/calibrate_and_save.py
"""

import tempfile
from pathlib import Path

import torch
from torch import nn

import qcompile

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(128, 256), nn.ReLU(), nn.Linear(256, 64)).eval()
batches = [torch.randn(16, 128) for _ in range(8)]

plan = qcompile.calibrate(model, batches, recipe="int8-static")
with tempfile.TemporaryDirectory() as folder:
    qcompile.save(plan, Path(folder) / "plan")
    loaded = qcompile.load(Path(folder) / "plan", model)

fast = torch.compile(model, backend="qcompile", options={"plan": loaded})
with torch.no_grad():
    expected, found = model(batches[0]), fast(batches[0])

print(qcompile.report(fast))
print(f"largest difference from float: {float((found - expected).abs().max()):.4f}")
