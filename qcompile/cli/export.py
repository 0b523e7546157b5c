"""`qcompile export`: a Hugging Face folder or a file of torch.export in, a quantized ONNX file out."""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from torch.export import ExportedProgram

from qcompile.cli.models import load_model
from qcompile.cli.quantize import CoverageOption, HtmlOption, JsonOption, TargetOption, files_module, finish, waiting
from qcompile.cli.subjects import Batch, is_causal, open_subject
from qcompile.errors import UnsupportedError

# long enough that no dimension is mistaken for a batch of one token
TOKENS = 8


class Dtype(StrEnum):
    """Of a float model."""

    FLOAT32 = "float32"
    FLOAT16 = "float16"


# of what is not quantized, where nobody says: onnxruntime's CUDA kernels are made for 16 bits, its CPU's for 32
_DTYPES = {"ort-cuda": Dtype.FLOAT16}


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
    dtype: Annotated[
        Dtype | None,
        typer.Option(help="Of what stays float; without it float16 for ort-cuda, else float32; not of a .pt2 file."),
    ] = None,
    opset: Annotated[int, typer.Option(help="The opset to export at.")] = 21,
    min_coverage: CoverageOption = 0.0,
    html: HtmlOption = None,
    json: JsonOption = None,
) -> None:
    """Export a PyTorch model to a quantized ONNX file.

    The float export is checked against the model first, and the quantized file against the same plan in PyTorch.
    """
    quantize_onnx = files_module().quantize_onnx
    from qcompile.backends.onnx.export import export_model

    console = Console()
    opened = _opened(model, data, windows, dtype, target)
    with tempfile.TemporaryDirectory() as folder:
        source = output if recipe == "float" else Path(folder) / "float.onnx"
        with console.status(f"exporting {model} ..."):
            # a program knows by itself what it was exported with
            known = isinstance(opened.model, ExportedProgram)
            export_model(opened.model, None if known else opened.example, source, opset=opset)
        if recipe == "float":
            console.print(f"wrote {output}", markup=False)
            return
        with waiting(console, "quantizing ...", bar=data is not None):
            report = quantize_onnx(
                source,
                output,
                recipe,
                batches=opened.calibrate,
                held_out=opened.held_out,
                model=opened.model,
                example=opened.example,
                target=target,
                min_coverage=min_coverage,
            )
        finish(console, report, source, output, html, json)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Opened:
    """A model with an example of its inputs; with data, batches to calibrate on, and others to compare outputs on."""

    model: Any
    example: Batch
    calibrate: Sequence[Batch] | None = None
    held_out: Sequence[Batch] | None = None


def _opened(path: Path, data: Path | None, windows: int, dtype: Dtype | None, target: str) -> _Opened:
    if path.suffix == ".pt2":
        if dtype is not None:
            raise UnsupportedError("--dtype is for model folders: a .pt2 file has the dtype that it was exported with")
        if data is not None:
            raise UnsupportedError(
                "--data of a .pt2 file is not known to be tokens: export with --recipe float, then give batches of its "
                "inputs to `qcompile quantize`"
            )
        program = torch.export.load(path)
        return _Opened(model=program, example=_example(program))
    chosen = getattr(torch, _DTYPES.get(target, Dtype.FLOAT32) if dtype is None else dtype)
    if data is None:
        model = load_model(path, chosen)
        tokens = torch.arange(2 * TOKENS).view(2, TOKENS) % int(model.config.vocab_size)
        masked = {} if is_causal(model) else {"attention_mask": torch.ones_like(tokens)}
        return _Opened(model=model, example={"input_ids": tokens, **masked})
    subject = open_subject(str(path), data, windows, chosen)
    return _Opened(
        model=subject.model, example=subject.calibrate[0], calibrate=subject.calibrate, held_out=subject.measure
    )


def _example(program: ExportedProgram) -> Batch:
    """The inputs that a program was exported with, by name."""
    args, kwargs = program.example_inputs or ((), {})
    names = [str(name) for name in program.graph_signature.user_inputs]
    return dict(zip(kwargs or names, (*args, *kwargs.values()), strict=True))
