"""One line on an unmodified model, and what it did.

python examples/compile_a_model.py
"""

import torch
from torch import nn

import qcompile

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(256, 1024), nn.GELU(), nn.Linear(1024, 256), nn.LayerNorm(256)).eval()
x = torch.randn(32, 256)

fast = torch.compile(model, backend="qcompile", options={"recipe": "int8"})
with torch.no_grad():
    expected, found = model(x), fast(x)

print(qcompile.report(fast))
print(f"largest difference from float: {float((found - expected).abs().max()):.4f}")
