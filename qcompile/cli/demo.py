"""`qcompile demo`: a real model under several recipes, beside the same model compiled in float."""

import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from qcompile.cli.embedding import embedding_demo
from qcompile.cli.language import language_demo
from qcompile.errors import OptionsError
from qcompile.presets import parse_recipe

EMBEDDING_RECIPES = "int8,int8-weight,int4-weight"
LANGUAGE_RECIPES = "int8,int8-weight,int4-weight,nf4"


def demo(
    model: Annotated[Path | None, typer.Option(help="Folder of a Hugging Face causal language model.")] = None,
    tokens: Annotated[
        Path | None, typer.Option(help="Its text: .txt, or uint16 token ids (.u32 for uint32), little endian.")
    ] = None,
    recipes: Annotated[str | None, typer.Option(help="Names or TOML files, separated by commas.")] = None,
    windows: Annotated[int, typer.Option(min=1, help="Windows of 512 tokens to measure, from the second half.")] = 16,
    rounds: Annotated[int, typer.Option(min=1, help="Timed calls of each candidate.")] = 20,
) -> None:
    """A real model, quantized and compiled, beside its float original.

    Without options: sentence embeddings of MiniLM. With --model and --tokens: perplexity of your language model.
    """
    console = Console()
    names = (recipes or (LANGUAGE_RECIPES if model else EMBEDDING_RECIPES)).split(",")
    for name in names:
        parse_recipe(name)
    started = time.perf_counter()
    # many candidates share the model's bytecode, and each is one compilation of it
    with torch.no_grad(), torch._dynamo.config.patch(recompile_limit=8 * (len(names) + 1)):
        if model is not None and tokens is not None:
            table = language_demo(model, tokens, names, windows=windows, rounds=rounds, console=console)
        elif model is None and tokens is None:
            table = embedding_demo(names, rounds=rounds, console=console)
        else:
            raise OptionsError("--model and --tokens go together: give both, or neither for the MiniLM demo")
    console.print(table)
    console.print(f"took {time.perf_counter() - started:.0f} s; the same in your code:", style="dim")
    console.print('  fast = torch.compile(model, backend="qcompile", options={"recipe": "int8"})', style="cyan")
