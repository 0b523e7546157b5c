"""`qcompile show`: a model's graph as text, as passes see it, before or after a recipe."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch.fx import GraphModule

from qcompile import pipeline
from qcompile.backends.fx.door import open_dynamo, open_exported
from qcompile.backends.fx.dynamo import parameters
from qcompile.cli.models import load_model
from qcompile.cli.quantize import files_module
from qcompile.errors import UnsupportedError
from qcompile.graph import Graph, graph_text
from qcompile.presets import default_recipe, parse_recipe
from qcompile.recipe import Recipe

# long enough that no dimension is mistaken for a batch of one token
TOKENS = 8


@dataclass(kw_only=True)
class Shown:
    """Texts of graphs, quantized first if there is a recipe or a folder to dump to."""

    recipe: Recipe | None
    dump: Path | None
    texts: list[str] = field(default_factory=list)

    def add(self, graph: Graph[Any]) -> None:
        """A further graph of the same model; it dumps to a folder of its own."""
        if self.recipe is not None or self.dump is not None:
            folder = self.dump / f"graph_{len(self.texts) + 1}" if self.dump and self.texts else self.dump
            pipeline.quantize(graph, self.recipe or default_recipe("cpu"), dump=folder)
        self.texts.append(graph_text(graph))


def show(
    model: Annotated[Path, typer.Argument(help="A Hugging Face model folder, a .pt2 file of torch.export, or .onnx.")],
    recipe: Annotated[str | None, typer.Option(help="Quantize by this recipe first.")] = None,
    dump: Annotated[Path | None, typer.Option(help="Folder that gets the text after every pass, numbered.")] = None,
) -> None:
    """A model's graph as text: what quantization sees of it."""
    seen = Shown(recipe=None if recipe is None else parse_recipe(recipe), dump=dump)
    with torch.no_grad():
        _see(model, seen)
    for text in seen.texts:
        typer.echo(text)


def _see(path: Path, seen: Shown) -> None:
    if path.suffix == ".pt2":
        seen.add(open_exported(torch.export.load(path)))
    elif path.suffix == ".onnx":
        files = files_module()
        only_shown = seen.recipe is None and seen.dump is None
        seen.add(files.open_onnx(files.read_model(path, quantized=only_shown)))
    elif path.is_dir():
        capture(load_model(path), seen)
    else:
        raise UnsupportedError(
            f"{path} is neither a Hugging Face model folder nor a .pt2 file of torch.export nor an .onnx file"
        )


def capture(model: Any, seen: Shown) -> None:
    """Adds every graph that torch.compile makes of a language model, called with a few tokens."""

    def keep(gm: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        weights = {p.placeholder: (p.name, inputs[p.position]) for p in parameters(gm, inputs)}
        seen.add(open_dynamo(gm, weights))
        return gm.forward

    tokens = torch.arange(TOKENS).unsqueeze(0) % int(model.config.vocab_size)  # [1, T]
    torch.compile(model, backend=keep)(input_ids=tokens)
