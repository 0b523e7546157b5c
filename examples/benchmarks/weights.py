"""Weights alone: what solvers and formats of 2 to 6 bits keep of a language model, at how many bits a weight.

    python examples/benchmarks/weights.py --model DIR --tokens FILE [--device cuda] [--rows '*g128*']

All linears but the logits', whose weights keep 8 bits, as in the presets; inputs stay float. Calibrated on windows of
512 tokens of the first half of the file, measured on windows of the second half, with the quantized graph as the passes
leave it; KL in nats a token, to the float model. Bits a weight are those of the linears but the logits', scales and
zero points included. Seconds are those of calibrating, from the float model to the plan; recipes that need no data
take them while compiling, and have none.
Writes examples/benchmarks/results/weights_<device>.json, row by row; rows that are there already are kept if they are
of the same data and machine, so that a part may be measured at a time: --rows takes globs, parted by "|".
"""

import time
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from language_data import arguments, language
from language_quality import rows_before
from outliers import measure, quantized
from result_files import RESULTS, write_result

import qcompile
from qcompile.budget import Budget
from qcompile.ggml import TYPES
from qcompile.plan import Plan
from qcompile.presets import PRESETS
from qcompile.recipe import Recipe, Rule
from qcompile.smooth import parse_smooth
from qcompile.spec import parse_spec

HEAD = PRESETS["gptq4"].rules[0]
# what is done to weights, by name: fields of a rule
METHODS: dict[str, dict[str, Any]] = {
    "RTN": {"solver": "round"},
    "HQQ": {"solver": "hqq"},
    "AWQ": {"solver": "awq", "smooth": parse_smooth("awq")},
    "GPTQ": {"solver": "gptq-unordered"},
    "GPTQ, act-order": {"solver": "gptq"},
}
# measured under every method
SPECS = (
    *(f"int4/{group}/{kind}" for group in ("g128", "g64", "g32") for kind in ("bf16", "asym/bf16")),
    "int3/g64/asym/bf16",
    "int2/g64/asym/bf16",
    "nf4/g64/bf16",
)
# more rows, a line each: a name, and the rules of a recipe behind that of the head
OTHERS: dict[str, tuple[Rule, ...]] = {
    "nf4/g64/dq256, RTN": (Rule(weight=parse_spec("nf4/g64/dq256"), solver="round"),),
    "nf4/g64/dq256, least squares": (Rule(weight=parse_spec("nf4/g64/dq256"), solver="mse"),),
    "lloyd4/g64/bf16, RTN": (Rule(weight=parse_spec("lloyd4/g64/bf16"), solver="round"),),
    "lloyd4/g64/bf16, GPTQ, act-order": (Rule(weight=parse_spec("lloyd4/g64/bf16"), solver="gptq"),),
    **{
        f"{kind}, {method}": (Rule(weight=TYPES[kind].spec, solver=solver),)
        for kind in ("Q2_K", "Q3_K", "Q4_0", "IQ4_XS", "Q4_K", "Q5_K", "Q6_K")
        for method, solver in (("k-quants", "kquant"), ("weighted", "imatrix"), ("GPTQ, act-order", "gptq"))
    },
    **{
        f"{spec}, GPTQ, act-order": (Rule(weight=parse_spec(spec), solver="gptq"),)
        for spec in ("int2/g32/bf16", "int2/g32/asym/bf16", "lloyd2/g32/bf16", "int3/channel/asym")
    },
    **{
        f"mixed/{bits:g}, GPTQ, act-order": (
            Rule(weight=parse_spec("int4/g64/asym/bf16"), solver="gptq", budget=Budget(amount=bits)),
        )
        for bits in (2.5, 3, 4.25)
    },
}


def recipes() -> Iterator[Recipe]:
    """Of all rows, by their names."""
    for spec in SPECS:
        for method, fields in METHODS.items():
            yield Recipe(name=f"{spec}, {method}", rules=(HEAD, Rule(weight=parse_spec(spec), **fields)))
    for name, rules in OTHERS.items():
        yield Recipe(name=name, rules=(HEAD, *rules))


def bits(plan: Plan) -> float:
    """A weight, over all linears that the rule of the head does not name."""
    total = count = 0.0
    for decision in plan.decisions.values():
        if decision.weight is None or any(fnmatchcase(decision.name, glob) for glob in HEAD.match.split("|")):
            continue
        N, K = decision.shape
        total += decision.weight.bits_per_element(N, K) * N * K
        count += N * K
    return total / count


def main() -> None:
    parser = arguments(__doc__, windows=32, calibration=32)
    parser.add_argument("--first", type=int, default=0, help="first window to calibrate on")
    parser.add_argument("--rows", default="*", help="globs, parted by |")
    parser.add_argument("--result", type=Path)
    given = parser.parse_args()
    data = language(given, first=given.first)
    model, batches = data.model, data.batches
    inputs = [{"input_ids": batch, "use_cache": False} for batch in data.calibration]
    with torch.no_grad():
        reference = [model(batch, use_cache=False).logits.half() for batch in batches]
        base = measure(lambda batch, use_cache: model(batch, use_cache=use_cache), reference, batches)
    path = given.result or RESULTS / f"weights_{given.device}.json"
    about = {
        "command": "python examples/benchmarks/weights.py --model DIR --tokens FILE",
        **data.about,
        "first_window": given.first,
    }
    for recipe in recipes():
        rows = {"float": base, **rows_before(path, about)}
        if recipe.name in rows or not any(fnmatchcase(recipe.name, glob) for glob in given.rows.split("|")):
            continue
        start = time.perf_counter()
        with torch.no_grad():
            # without need of data, one batch shows the sites
            plan = qcompile.calibrate(model, inputs if recipe.needs_data else inputs[:1], recipe, progress=False)
            seconds = time.perf_counter() - start
            found = measure(quantized(model, plan), reference, batches)
        rows[recipe.name] = {
            "bits": bits(plan),
            **found,
            "change": found["perplexity"] / base["perplexity"] - 1,
            **({"seconds": seconds} if recipe.needs_data else {}),
            "notes": list(plan.notes),
        }
        print(recipe.name, {key: rows[recipe.name][key] for key in ("bits", "change", "kl")}, flush=True)
        write_result(path, about | {"rows": ordered(rows)})


def ordered(rows: dict[str, Any]) -> dict[str, Any]:
    """As they stand in the tables above."""
    names = ["float", *(recipe.name for recipe in recipes())]
    return {name: rows[name] for name in names if name in rows}


if __name__ == "__main__":
    main()
