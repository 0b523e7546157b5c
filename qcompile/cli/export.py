"""`qcompile export`: a Hugging Face folder or a file of torch.export in, a quantized ONNX file out."""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from qcompile.cli.models import load_model
from qcompile.cli.quantize import CoverageOption, HtmlOption, JsonOption, TargetOption, files_module, finish
from qcompile.cli.subjects import Batch, is_causal, open_subject
from qcompile.errors import UnsupportedError

# long enough that no dimension is mistaken for a batch of one token
TOKENS = 8


def export(
    model: Annotated[Path, typer.Argument(help="A Hugging Face model folder, or a .pt2 file of torch.export.")],
    output: Annotated[Path, typer.Argument(help="The .onnx file to write.")],
    recipe: Annotated[str, typer.Option(help="A name, a TOML file, or 'float' to leave it as it is.")] = "int8",
    data: Annotated[
        Path | None, typer.Option(help="Tokens or .txt (a line is a sentence, to an encoder), or a folder of them.")
    ] = None,
    windows: Annotated[
        int, typer.Option(min=1, help="Windows of tokens, or batches of sentences, to calibrate on.")
    ] = 16,
    target: TargetOption = "ort-cpu",
    opset: Annotated[int, typer.Option(help="The opset to export at.")] = 21,
    min_coverage: CoverageOption = 0.0,
    html: HtmlOption = None,
    json: JsonOption = None,
) -> None:
    """Export a PyTorch model to a quantized ONNX file; the float export is checked against the model first."""
    quantize_onnx = files_module().quantize_onnx
    from qcompile.backends.onnx.export import export_model

    console = Console()
    opened, example, batches = _opened(model, data, windows)
    with tempfile.TemporaryDirectory() as folder:
        source = output if recipe == "float" else Path(folder) / "float.onnx"
        with console.status(f"exporting {model} ..."):
            export_model(opened, example, source, opset=opset)
        if recipe == "float":
            console.print(f"wrote {output}", markup=False)
            return
        with console.status("quantizing ..."):
            report = quantize_onnx(source, output, recipe, batches=batches, target=target, min_coverage=min_coverage)
        finish(console, report, source, output, html, json)


def _opened(path: Path, data: Path | None, windows: int) -> tuple[Any, Any, Sequence[Batch] | None]:
    """The model, an example of its inputs, and batches to calibrate on if there is data."""
    if path.suffix == ".pt2":
        if data is not None:
            raise UnsupportedError(
                "--data of a .pt2 file is not known to be tokens: export with --recipe float, then give batches of its "
                "inputs to `qcompile quantize`"
            )
        return torch.export.load(path), None, None
    if data is None:
        model = load_model(path)
        tokens = torch.arange(2 * TOKENS).view(2, TOKENS) % int(model.config.vocab_size)
        masked = {} if is_causal(model) else {"attention_mask": torch.ones_like(tokens)}
        return model, {"input_ids": tokens, **masked}, None
    subject = open_subject(str(path), data, windows)
    return subject.model, subject.calibrate[0], subject.calibrate
