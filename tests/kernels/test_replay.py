"""A step that replays copies nothing as large as a weight, on a CUDA device."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import qcompile

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:The CUDA Graph is empty:UserWarning"),
    # what the profiler says of any second use
    pytest.mark.filterwarnings("ignore:Warning. Profiler clears events:UserWarning"),
]

K, LAYERS = 2048, 4
RECIPES = ["int4-weight", "nf4", "int8", "fp8", "w4a8", "fp4-token", "int8-split"]
# of a weight of 2 bits
SMALLEST = K * K // 4


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(K, K, bias=False) for _ in range(LAYERS))
        self.norm = nn.RMSNorm(K)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(self.norm(x))
        return x


def copied(call: Callable[[], Any], folder: Path) -> list[int]:
    """Bytes of each copy that one call has the GPU make."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    path = folder / "trace.json"
    profiler.export_chrome_trace(str(path))
    events = json.loads(path.read_text())["traceEvents"]
    assert any(event.get("cat") == "kernel" for event in events), "the profiler saw nothing"
    return [event["args"]["bytes"] for event in events if event.get("cat") == "gpu_memcpy"]


def fast(recipe: str, x: Tensor, **options: Any) -> Callable[[Tensor], Tensor]:
    torch._dynamo.reset()
    model = Stack().cuda().bfloat16().eval()
    plan = qcompile.calibrate(model, [x], recipe=recipe, progress=False)
    return torch.compile(model, backend="qcompile", fullgraph=True, options={"plan": plan, **options})


def test_copies_are_seen(tmp_path: Path) -> None:
    a, b = (torch.zeros(SMALLEST, dtype=torch.uint8, device="cuda") for _ in range(2))

    def call() -> None:
        b.copy_(a)
        a.add_(1)

    assert copied(call, tmp_path) == [SMALLEST]


@pytest.mark.parametrize("M", [1, 40])
@pytest.mark.parametrize("recipe", RECIPES)
def test_graphs_of_inductor(recipe: str, M: int, tmp_path: Path) -> None:
    x = torch.randn(M, K, device="cuda").bfloat16()
    with torch.no_grad():
        call = fast(recipe, x, mode="reduce-overhead")
        for _ in range(3):
            call(x)
        assert sum(copied(lambda: call(x), tmp_path)) < SMALLEST


@pytest.mark.parametrize("M", [1, 40])
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_graph_around_the_step(recipe: str, M: int, tmp_path: Path) -> None:
    x = torch.randn(M, K, device="cuda").bfloat16()
    with torch.no_grad():
        call = fast(recipe, x)
        call(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = call(x)
        assert sum(copied(graph.replay, tmp_path)) < SMALLEST
        x.normal_()
        graph.replay()
        assert torch.equal(y, call(x))
