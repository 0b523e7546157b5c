"""`qcompile tune`: the fastest configurations of the Triton kernels for a model's linears, measured on this GPU."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from qcompile.backends.triton.ready import missing
from qcompile.cli.embedding import minilm_folder
from qcompile.cli.models import load_model
from qcompile.cli.subjects import DEMO
from qcompile.errors import OptionsError, UnsupportedError

# tokens of the run that shows which linears read the same input
TOKENS = 4
Shape = tuple[int, int]


def tune(
    model: Annotated[str | None, typer.Argument(help=f"A Hugging Face model folder, or {DEMO!r}.")] = None,
    shape: Annotated[list[str] | None, typer.Option(help="A weight, as NxK; may be repeated.")] = None,
    formats: Annotated[
        str | None, typer.Option(help="As int8,w4a8,int4-weight; all formats that this GPU multiplies, if left out.")
    ] = None,
    rows: Annotated[str | None, typer.Option(help="Numbers of rows of x, separated by commas.")] = None,
) -> None:
    """Measure the fastest configurations of the Triton kernels for a model's linears on this GPU, and keep them.

    They are kept in the user's cache folder, under the device, Triton's version and the kernels' sources. Programs that
    start after that use them in place of the shipped tables'.
    """
    shapes = [_shape(text) for text in shape or ()]
    if model is None and not shapes:
        raise OptionsError("nothing to tune: name a model, or a weight as --shape 4096x14336")
    if not torch.cuda.is_available():
        raise UnsupportedError("tuning measures kernels on a CUDA device, and there is none")
    if (reason := missing("tuning")) is not None:
        raise UnsupportedError(reason)
    console = Console()
    if model is not None:
        with console.status(f"looking at the linears of {model} ..."):
            shapes += linear_shapes(load_model(minilm_folder() if model == DEMO else Path(model), torch.bfloat16))
    _measure(list(dict.fromkeys(shapes)), formats, rows, console)


def _measure(shapes: Sequence[Shape], formats: str | None, rows: str | None, console: Console) -> None:
    from qcompile.backends.triton.families import families_on, why_not
    from qcompile.backends.triton.table import capability_of
    from qcompile.backends.triton.tuned import ROWS, key_of, path_for, write_tuning
    from qcompile.backends.triton.tuning import tune

    device = torch.device("cuda", torch.cuda.current_device())
    names = families_on(capability_of(device))
    chosen = names if formats is None else formats.split(",")
    if unknown := sorted(set(chosen) - set(names)):
        raise OptionsError(f"no kernels on this GPU for {', '.join(unknown)}: there are {', '.join(names)}")
    numbers = ROWS if rows is None else _numbers(rows)
    table = Table(title=f"Fastest on {torch.cuda.get_device_name(device)}", box=SIMPLE_HEAD, pad_edge=False)
    for column in ("format", "weight", "rows", "us", "table's", "bf16", "tried", "configuration"):
        table.add_column(column, justify="right" if column in ("rows", "us", "table's", "bf16", "tried") else "left")
    for N, K in shapes:
        for name in chosen:
            if reason := why_not(name, N, K):
                console.print(f"{name}, {N} x {K} is left out: {reason}", markup=False)
                continue
            with console.status(f"measuring {name}, {N} x {K} ..."):
                outcomes = list(tune(name, N, K, numbers))
            # what is measured stays, should a later shape fail
            write_tuning(key_of(device), [outcome.best for outcome in outcomes])
            for o in outcomes:
                times = (f"{us:.1f}" for us in (o.best.us, o.table_us, o.best.bf16_us))
                count = f"{o.tried} of {o.tried + len(o.refused)}"
                table.add_row(name, f"{N} x {K}", str(o.best.rows), *times, count, o.changes)
    console.print(table)
    console.print(f"tuned for this GPU: {path_for(key_of(device).device)}", style="dim", markup=False)


def linear_shapes(model: nn.Module) -> list[Shape]:
    """Of the linears of a model, and of those that run as one because they are of one module and read one input.

    The model runs on a few tokens, to see what reads what.
    """
    shapes: list[Shape] = []
    readers: dict[tuple[str, int], list[Shape]] = {}
    held: list[Tensor] = []

    def note(name: str, linear: nn.Linear, x: Tensor) -> None:
        # as long as it is held, no other tensor gets its place
        held.append(x)
        found = (linear.out_features, linear.in_features)
        shapes.append(found)
        readers.setdefault((name.rpartition(".")[0], id(x)), []).append(found)

    hooks = [
        module.register_forward_pre_hook(lambda module, given, name=name: note(name, module, given[0]))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    ]
    try:
        with torch.no_grad():
            model(input_ids=torch.ones(1, TOKENS, dtype=torch.int64))
    finally:
        for hook in hooks:
            hook.remove()
    joined = [(sum(N for N, _ in group), group[0][1]) for group in readers.values() if len(group) > 1]
    return list(dict.fromkeys([*joined, *shapes]))


def _shape(text: str) -> Shape:
    parts = text.lower().split("x")
    if len(parts) != 2 or not all(part.isdigit() and int(part) for part in parts):
        raise OptionsError(f"{text!r} is no weight: write N and K as 4096x14336")
    return int(parts[0]), int(parts[1])


def _numbers(text: str) -> list[int]:
    parts = text.split(",")
    if not all(part.isdigit() and int(part) for part in parts):
        raise OptionsError(f"{text!r} are no numbers of rows: write them as 1,16,64")
    return sorted({int(part) for part in parts})
