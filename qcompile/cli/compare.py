"""`qcompile compare`: what two ONNX files make of the same batches."""

from collections import defaultdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from qcompile.cli.batches import read_batches
from qcompile.cli.quantize import files_module
from qcompile.errors import CalibrationError, ModelError
from qcompile.report.comparison import Differences
from qcompile.report.table import errors
from qcompile.watch import mask_of


def compare(
    first: Annotated[Path, typer.Argument(help="An .onnx file, the one to measure against.")],
    second: Annotated[Path, typer.Argument(help="Another one with the same inputs and outputs.")],
    data: Annotated[Path, typer.Option(help="Batches of inputs: .npz, a folder of .npz, or .jsonl (a batch a line).")],
) -> None:
    """How far the outputs of two ONNX files are from each other, in onnxruntime on the CPU."""
    files = files_module()
    from qcompile.backends.onnx.files import size_on_disk

    console = Console()
    sums: dict[str, Differences] = defaultdict(Differences)
    with console.status("running ..."):
        results = (files.run_onnx(path, read_batches(data)) for path in (first, second))
        for batch, wanted, found in zip(read_batches(data), *results, strict=True):
            if wanted.keys() != found.keys():
                raise ModelError(f"{first} gives {', '.join(wanted)}, and {second} gives {', '.join(found)}")
            for name, x in wanted.items():
                sums[name].add(x, found[name], mask_of(batch))
    if not sums:
        raise CalibrationError(f"{data} holds no batch")
    console.print(errors([one.error(name) for name, one in sums.items()], f"{second.name} beside {first.name}"))
    sizes = ", ".join(f"{path.name} {size_on_disk(path) / 1e6:.1f} MB" for path in (first, second))
    console.print(sizes, markup=False)
