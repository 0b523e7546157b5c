"""What one process saves, another loads: the same tokens, in little more memory than the folder has bytes."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qcompile
from tests.trained import MODEL, first_windows, language_model, needs_model
from tests.variants import variants

ROOT = Path(__file__).resolve().parents[2]


def in_new_process(code: str, *arguments: object) -> Any:
    """What the code prints last, as JSON."""
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


class Stack(nn.Module):
    """A table that two ops read, and linears."""

    def __init__(self, width: int = 2048, layers: int = 32) -> None:
        super().__init__()
        self.table = nn.Embedding(4001, width)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        self.head = nn.Linear(width, 4001, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return self.head(x)


# the most memory that the process held from `before` on: after loading, and after all packs were made
_MEASURE = """
import json, sys, torch, qcompile, qcompile.checkpoint
from qcompile.backends.fx import inductor
from tests.compile.test_new_process import Stack
def peak():
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))
def packed(self, module):
    peaks.append(peak())
    raise KeyboardInterrupt
inductor.Inductor.compile = packed
def compiled(model, **options):
    fast = torch.compile(model, backend="qcompile", options={"free_weights": True, **options}, dynamic=False)
    try:
        fast(torch.zeros(1, 3, dtype=torch.int64))
    except KeyboardInterrupt:
        torch._dynamo.reset()
peaks = []
with torch.device("meta"):
    model = Stack().eval()
with torch.no_grad():
    # what importing and tracing take does not grow with the weights
    compiled(Stack(width=128).eval(), recipe=sys.argv[2])
    open("/proc/self/clear_refs", "w").write("5")
    before = peak()
    plan = qcompile.load(sys.argv[1], model)
    loaded = peak()
    compiled(model, plan=plan)
print(json.dumps([before, loaded, peaks[1]]))
"""


@pytest.mark.usefixtures("graphs_only")
@pytest.mark.skipif(sys.platform != "linux", reason="reads how much memory a process held from /proc")
@pytest.mark.parametrize(
    "recipe", variants(("int4-weight+embeddings", "int8+embeddings"), quick=("int4-weight+embeddings",))
)
def test_loading_takes_little_more_memory_than_the_folder(recipe: str, tmp_path: Path) -> None:
    model = Stack().eval()
    fast = torch.compile(model, backend="qcompile", options={"recipe": recipe}, dynamic=False)
    fast(torch.zeros(1, 3, dtype=torch.int64))
    qcompile.save(fast, tmp_path / "m")
    size, floats = folder_bytes(tmp_path / "m"), sum(p.nbytes for p in model.parameters())
    assert size < 0.3 * floats
    before, loaded, packed = in_new_process(_MEASURE, tmp_path / "m", recipe)
    assert loaded - before < 0.3 * size
    # every code was read, and every kernel has its pack
    assert packed - before < 1.3 * size


# greedy tokens by a model that this process never saw in float
_GENERATE = """
import json, sys, torch, transformers, qcompile
torch.set_grad_enabled(False)
config = transformers.AutoConfig.from_pretrained(sys.argv[2])
with torch.device("meta"):
    model = transformers.LlamaForCausalLM(config).eval()
plan = qcompile.load(sys.argv[1], model)
model.compile(backend="qcompile", options={"plan": plan})
prompt = torch.tensor(json.loads(sys.argv[3]))
print(json.dumps(model.generate(prompt, max_new_tokens=24, do_sample=False).tolist()))
"""


@pytest.mark.slow
@needs_model
@pytest.mark.parametrize(
    "recipe", ["int8+embeddings", "int4-weight", "gptq4", "awq4", "mixed/3", "nf4", "q4_k", "fp8", "fp4"]
)
def test_another_process_generates_the_same_tokens(recipe: str, tmp_path: Path) -> None:
    plan = qcompile.calibrate(language_model(), list(first_windows(4).split(1)), recipe, progress=False)
    model = language_model()
    model.compile(backend="qcompile", options={"plan": plan.bind(model)})
    prompt = first_windows(6)[5:, :40]
    with torch.no_grad():
        expected = model.generate(prompt, max_new_tokens=24, do_sample=False).tolist()
    qcompile.save(model, tmp_path / "m")
    assert in_new_process(_GENERATE, tmp_path / "m", MODEL, json.dumps(prompt.tolist())) == expected
