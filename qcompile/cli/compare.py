"""`qcompile compare`: what two ONNX files make of the same batches."""

from collections import defaultdict
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import Tensor

from qcompile.cli.batches import read_batches
from qcompile.cli.quantize import files_module
from qcompile.errors import CalibrationError, ModelError
from qcompile.numerics import snr_db
from qcompile.report.quality import cosines


def compare(
    first: Annotated[Path, typer.Argument(help="An .onnx file, the one to measure against.")],
    second: Annotated[Path, typer.Argument(help="Another one with the same inputs and outputs.")],
    data: Annotated[Path, typer.Option(help="Batches of inputs: .npz, a folder of .npz, or .jsonl (a batch a line).")],
) -> None:
    """How far the outputs of two ONNX files are from each other, in onnxruntime on the CPU."""
    files = files_module()
    from qcompile.backends.onnx.files import size_on_disk

    console = Console()
    outputs: list[dict[str, list[Tensor]]] = []
    with console.status("running ..."):
        for path in (first, second):
            found: dict[str, list[Tensor]] = defaultdict(list)
            for result in files.run_onnx(path, read_batches(data)):
                for name, tensor in result.items():
                    found[name].append(tensor)
            outputs.append(found)
    if not outputs[0]:
        raise CalibrationError(f"{data} holds no batch")
    if outputs[0].keys() != outputs[1].keys():
        raise ModelError(f"{first} gives {', '.join(outputs[0])}, and {second} gives {', '.join(outputs[1])}")
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for column in ("output", "signal to noise, dB", "relative error", "lowest cosine", "largest difference"):
        table.add_column(column, justify="left" if column == "output" else "right")
    for name, tensors in outputs[0].items():
        a, b = (torch.cat([x.flatten(0, -2).float() for x in found]) for found in (tensors, outputs[1][name]))
        table.add_row(
            name,
            f"{snr_db(a, b):.1f}",
            f"{float((a - b).norm() / a.norm()):.3g}",
            f"{float(cosines(a, b).min()):.5f}",
            f"{float((a - b).abs().max()):.3g}",
        )
    console.print(table)
    sizes = ", ".join(f"{path.name} {size_on_disk(path) / 1e6:.1f} MB" for path in (first, second))
    console.print(sizes, markup=False)
