"""`qcompile quantize`: an ONNX file in, a quantized ONNX file out, with the report."""

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import ModuleType
from typing import Annotated

import typer
from rich.console import Console

from qcompile.cli.batches import read_batches
from qcompile.errors import OptionsError
from qcompile.report import Report

# what commands that write a quantized file have in common
TargetOption = Annotated[str, typer.Option(help="ort-cpu, ort-cuda, tensorrt or portable.")]
HeldOutOption = Annotated[
    Path | None,
    typer.Option(help="Batches that calibration does not see, as --data: outputs are compared with the float model's."),
]
CoverageOption = Annotated[float, typer.Option(min=0.0, max=1.0, help="Fail if less of the weight bytes is quantized.")]
HtmlOption = Annotated[Path | None, typer.Option(help="Write the report as a page here.")]
JsonOption = Annotated[Path | None, typer.Option(help="Write the report as JSON here.")]


def quantize(
    source: Annotated[Path, typer.Argument(help="A float .onnx file; it is never changed.")],
    output: Annotated[Path, typer.Argument(help="The .onnx file to write.")],
    recipe: Annotated[str, typer.Option(help="A name, or a TOML file.")] = "int8",
    data: Annotated[
        Path | None, typer.Option(help="Batches of inputs: .npz, a folder of .npz, or .jsonl (a batch a line).")
    ] = None,
    held_out: HeldOutOption = None,
    target: TargetOption = "ort-cpu",
    min_coverage: CoverageOption = 0.0,
    html: HtmlOption = None,
    json: JsonOption = None,
) -> None:
    """Quantize an ONNX file into another one."""
    quantize_onnx = files_module().quantize_onnx
    console = Console()
    batches, held = (None if path is None else read_batches(path) for path in (data, held_out))
    with waiting(console, f"quantizing {source} ...", bar=data is not None):
        report = quantize_onnx(
            source, output, recipe, batches=batches, held_out=held, target=target, min_coverage=min_coverage
        )
    finish(console, report, source, output, html, json)


def waiting(console: Console, text: str, *, bar: bool) -> AbstractContextManager[object]:
    """A sign that something is done; a line of text where a progress bar will move: two signs disturb each other."""
    if not bar:
        return console.status(text)
    console.print(text, markup=False)
    return nullcontext()


def files_module() -> ModuleType:
    """`qcompile.files`.  Raises OptionsError if a library for ONNX is missing."""
    try:
        from qcompile import files
    except ImportError as e:
        raise OptionsError(f"ONNX files need more libraries ({e.name} is missing): pip install 'qcompile[onnx]'") from e
    return files


def finish(console: Console, report: Report, source: Path, output: Path, html: Path | None, json: Path | None) -> None:
    """Show what was written, and keep the report."""
    from qcompile.backends.onnx.files import size_on_disk

    console.print(report)
    before, after = (size_on_disk(path) / 1e6 for path in (source, output))
    console.print(f"wrote {output}: {after:.1f} MB, the float file is {before:.1f} MB", markup=False)
    if html is not None:
        report.to_html(html, title=output.name)
    if json is not None:
        report.to_json(json)
