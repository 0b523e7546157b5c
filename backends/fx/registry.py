"""Where the ops of graphs and kernels are registered: torch.ops.qcompile."""

from torch import library

REGISTRY = library.Library("qcompile", "FRAGMENT")
