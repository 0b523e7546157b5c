"""Narrow weights in onnxruntime on CUDA beside its float16 and float32, on the MLP shapes of Llama-3.1-8B.

    python examples/benchmarks/onnx_cuda.py

Two SwiGLU layers (4096, 14336) of random weights, exported in float32 and float16; the float16 file quantized for
`ort-cuda`. All weights together are larger than the card's second-level cache. Each file's outputs are compared with
those of torch in float32 under the same rounded weights before anything is timed, and each session has to run all of
its nodes on CUDA. Times are those of replayed CUDA graphs, all files in turns.
Writes examples/benchmarks/results/onnx_cuda.json.
"""

import argparse
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from result_files import RESULTS, device, write_result
from torch import Tensor, nn
from torch.nn.functional import silu

# after torch, whose CUDA libraries it then finds
import onnxruntime  # isort: skip

import qcompile
from qcompile.backends.onnx.export import export_model
from qcompile.backends.onnx.runtime import CUDA, start
from qcompile.numerics import fake_quantize
from qcompile.recipe import Recipe, Rule
from qcompile.report.timing import time_in_turns
from qcompile.spec import parse_spec

HIDDEN, INNER, LAYERS = 4096, 14336, 2
TOKENS = (1, 16, 128, 2048)
# weight, and input
FORMS = {
    "int4, groups of 128": ("int4/g128", None),
    "int8, groups of 128": ("int8/g128", None),
    "fp8": ("fp8_e4m3/channel", None),
    "fp8, static inputs": ("fp8_e4m3/channel", "fp8_e4m3/tensor"),
    "nvfp4": ("fp4_e2m1/b16/fp8_e4m3", None),
}
# relative errors beyond which a file is broken, and nothing is timed: of float16 sums, and of fp8 inputs
ROUNDED, INPUTS_ROUNDED = 5e-3, 6e-2
# calls between two readings of the clock: one call is a few dozen microseconds
REPEATS = 20


class Layers(nn.Module):
    """x + down(silu(gate(x)) * up(x)), twice."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = (
            nn.ModuleList(nn.Linear(HIDDEN, INNER, bias=False) for _ in range(LAYERS)) for _ in range(2)
        )
        self.down = nn.ModuleList(nn.Linear(INNER, HIDDEN, bias=False) for _ in range(LAYERS))

    def forward(self, x: Tensor) -> Tensor:
        for gate, up, down in zip(self.gate, self.up, self.down, strict=True):
            x = x + down(silu(gate(x)) * up(x))
        return x


def rounded(model: Layers, weight: str | None) -> Layers:
    """A float32 copy on the GPU whose weights went through the spec."""
    copied = Layers().cuda()
    with torch.no_grad():
        for mine, source in zip(copied.parameters(), model.parameters(), strict=True):
            x = source.cuda().float()
            mine.copy_(x if weight is None else fake_quantize(x, parse_spec(weight)))
    return copied


class Running:
    """A file's session on CUDA, with bound inputs and outputs, so that graphs of its work can be replayed."""

    def __init__(self, path: Path, dtype: torch.dtype) -> None:
        self._session = start(path, path.name, provider=CUDA, provider_settings={"enable_cuda_graph": "1"})
        self._dtype = dtype
        self._inputs: list[Tensor] = []
        self._kind = np.float16 if dtype == torch.float16 else np.float32

    def bound(self, x: Tensor, number: int) -> tuple[Callable[[], None], Tensor]:
        """A call that computes on x and does not wait, and where its result lies.  number: of the graph, from 1."""
        x = x.to(self._dtype).contiguous()
        y = torch.full_like(x, torch.nan)
        binding = self._session.io_binding()
        (given,), (made,) = self._session.get_inputs(), self._session.get_outputs()
        binding.bind_input(given.name, "cuda", 0, self._kind, tuple(x.shape), x.data_ptr())
        binding.bind_output(made.name, "cuda", 0, self._kind, tuple(y.shape), y.data_ptr())
        options = onnxruntime.RunOptions()
        options.add_run_config_entry("gpu_graph_id", str(number))
        options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        # the binding knows its address alone
        self._inputs.append(x)
        return partial(self._session.run_with_iobinding, binding, options), y


def error(found: Tensor, expected: Tensor) -> float:
    return float((found.float() - expected).norm() / expected.norm())


def repeated(call: Callable[[], None]) -> Callable[[], None]:
    def calls() -> None:
        for _ in range(REPEATS):
            call()

    return calls


def write_files(model: Layers, folder: Path) -> dict[str, tuple[Path, torch.dtype, str | None, float]]:
    """Files by name: path, dtype, the spec of its weights, and the error that it may have."""
    example = {"x": torch.randn(1, 3, HIDDEN, generator=torch.Generator().manual_seed(1))}
    files: dict[str, tuple[Path, torch.dtype, str | None, float]] = {}
    for dtype in (torch.float32, torch.float16):
        path = folder / f"{dtype}.onnx"
        export_model(model.to(dtype).eval(), {"x": example["x"].to(dtype)}, path)
        files[str(dtype).removeprefix("torch.")] = (path, dtype, None, ROUNDED)
    batches = [{"x": torch.randn(4, 32, HIDDEN, generator=torch.Generator().manual_seed(2)).half()}]
    for name, (weight, given) in FORMS.items():
        path = folder / f"{len(files)}.onnx"
        rule = Rule(weight=parse_spec(weight), input=None if given is None else parse_spec(given))
        recipe = Recipe(name=name, rules=(rule,))
        report = qcompile.quantize_onnx(
            files["float16"][0], path, recipe, batches=None if given is None else batches, target="ort-cuda"
        )
        assert report.coverage == 1.0, report
        files[name] = (path, torch.float16, weight, ROUNDED if given is None else INPUTS_ROUNDED)
    return files


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    given = parser.parse_args()
    torch.manual_seed(0)
    model = Layers().half()
    rows: dict[str, dict[str, Any]] = {}
    sessions: dict[str, Running] = {}
    with tempfile.TemporaryDirectory() as place, torch.no_grad():
        for name, (path, dtype, weight, allowed) in write_files(model, Path(place)).items():
            sessions[name] = Running(path, dtype)
            written = ir.load(path)
            size = sum(file.stat().st_size for file in Path(place).glob(f"{path.name}*"))
            kernels = sorted({node.op_type for node in written.graph if "MatMul" in node.op_type})
            reference = rounded(model, weight)
            x = torch.randn(1, 33, HIDDEN, device="cuda")
            call, y = sessions[name].bound(x, 1)
            call()
            torch.cuda.synchronize()
            off = error(y, reference(x.to(dtype).float()))
            rows[name] = {"megabytes": round(size / 1e6, 1), "kernels": kernels, "error": off}
            print(name, rows[name], flush=True)
            if not off < allowed:
                raise SystemExit(
                    f"{name}: outputs are {off:.2g} away from torch's, relative; at most {allowed} is rounding"
                )
            del reference
        for number, tokens in enumerate(TOKENS, start=2):
            x = torch.randn(1, tokens, HIDDEN, device="cuda")
            bound = {name: running.bound(x, number) for name, running in sessions.items()}
            timings = time_in_turns({n: repeated(call) for n, (call, _) in bound.items()}, rounds=given.rounds)
            for name, timing in timings.items():
                assert bool(torch.isfinite(bound[name][1]).all()), name
                rows[name][f"us_{tokens}"] = round(1e3 * timing.median / REPEATS, 1)
            print(tokens, {name: row[f"us_{tokens}"] for name, row in rows.items()}, flush=True)
    result = {
        "command": "python examples/benchmarks/onnx_cuda.py",
        "shapes": {"K": HIDDEN, "inner": INNER, "layers": LAYERS},
        "machine": device("cuda") | {"onnxruntime": onnxruntime.__version__},
        "rows": rows,
    }
    write_result(RESULTS / "onnx_cuda.json", result)


if __name__ == "__main__":
    main()
