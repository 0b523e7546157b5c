"""4 bits on both sides: what integers, 4-bit floats, blocks, and LLM-FP4's shifted exponents keep of a language model.

    python examples/benchmarks/fp4.py --model DIR --tokens FILE [--device cuda] [--windows 128]
        [--rows '*per token*']

All linears but the logits' with 4-bit weights and 4-bit inputs, without and with outliers injected as `outliers.py`
does; and the levels of LLM-FP4's tables: embeddings, weights and inputs of so many bits each, logits included.
Calibrated on windows of 512 tokens of the first half of the file, measured on windows of the second half, with the
quantized graph as the passes leave it; KL in nats a token, to the float model.
Writes examples/benchmarks/results/fp4_<device>.json, part by part; rows that are there already are kept if they are of
the same data and machine, so that some may be measured at a time: --rows takes globs, parted by "|".
"""

import copy
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from language_data import arguments, language
from outliers import inject, rows
from result_files import RESULTS, write_result

import qcompile
from qcompile.graph import Op
from qcompile.presets import PRESETS
from qcompile.recipe import FISHER, FLOAT, MOST_SHIFTED, WEIGHT, Recipe, Rule
from qcompile.smooth import parse_smooth
from qcompile.spec import parse_spec

# the most octaves of the paper for E2M1: 2**e - 1
PAPER = 3
E2M1, MXFP4, NVFP4 = "fp4_e2m1/channel", "fp4_e2m1/b32/e8m0", "fp4_e2m1/b16/fp8_e4m3"
_FREE: dict[str, Any] = {"format": FLOAT}
_SHIFT: dict[str, Any] = {"shift": MOST_SHIFTED}
# weight, input, solver, and what else the rule says
RECIPES: dict[str, tuple[str, str, str, dict[str, Any]]] = {
    "int4, static, smallest to largest": ("int4/channel", "int4/tensor", "round", {"observer": "minmax"}),
    "int4, per token": ("int4/channel", "int4/token", "round", {}),
    "int4, per token, smoothed": ("int4/channel", "int4/token", "round", {"smooth": parse_smooth("search")}),
    "e2m1, static, smallest to largest": (E2M1, "fp4_e2m1/tensor", "round", {"observer": "minmax"}),
    "e2m1, per token": (E2M1, "fp4_e2m1/token", "mse", {}),
    "e2m1, static": (E2M1, "fp4_e2m1/tensor", "mse", {}),
    "e2m1, static, shifted as far as in the paper": (E2M1, "fp4_e2m1/tensor", "imatrix", {"shift": PAPER}),
    "any float, static (FPQ without shift)": (E2M1, "fp4_e2m1/tensor", "imatrix", _FREE),
    "any float, static, shifted as far as in the paper": (
        E2M1,
        "fp4_e2m1/tensor",
        "imatrix",
        {**_FREE, "shift": PAPER},
    ),
    "fp4: any float, static, shifted": (E2M1, "fp4_e2m1/tensor", "imatrix", _FREE | _SHIFT),
    "fp4, formats of weights by their own error": (
        E2M1,
        "fp4_e2m1/tensor",
        "imatrix",
        {**_FREE, **_SHIFT, "objective": WEIGHT},
    ),
    "fp4, by Fisher information": (E2M1, "fp4_e2m1/tensor", "imatrix", {**_FREE, **_SHIFT, "objective": FISHER}),
    "fp4-token: any float, per token, shifted": (E2M1, "fp4_e2m1/token", "imatrix", _FREE | _SHIFT),
    "mxfp4": (MXFP4, MXFP4, "round", {}),
    "mxfp4-shift": (MXFP4, MXFP4, "imatrix", _SHIFT),
    "nvfp4": (NVFP4, NVFP4, "round", {}),
    "nvfp4-shift": (NVFP4, NVFP4, "imatrix", _SHIFT),
}
# rows that are measured with a wider or narrower search: of which row, and what is set to what
SEARCHES: dict[str, tuple[str, dict[str, Any]]] = {
    "fp4, three rounds": ("fp4: any float, static, shifted", {"qcompile.rounds.ROUNDS": 3}),
    "fp4, ranges by the inputs' own error": ("fp4: any float, static, shifted", {"qcompile.choose.CLIPS": ()}),
}
# bits of embeddings, weights and inputs: embedding, weight, input, solver, and what else the rule of linears says
LEVELS: dict[str, tuple[str, str, str | None, str, dict[str, Any]]] = {
    "8/8/8: int8, smallest to largest": (
        "int8/channel",
        "int8/channel",
        "int8/tensor",
        "round",
        {"observer": "minmax"},
    ),
    "8/8/8: e4m3, smallest to largest": (
        "fp8_e4m3/channel",
        "fp8_e4m3/channel",
        "fp8_e4m3/tensor",
        "round",
        {"observer": "minmax"},
    ),
    "8/8/8: int8, smoothed": (
        "int8/channel",
        "int8/channel",
        "int8/tensor",
        "round",
        {"smooth": parse_smooth("search")},
    ),
    "8/8/8: any float": ("fp8_e4m3/channel", "fp8_e4m3/channel", "fp8_e4m3/tensor", "imatrix", _FREE),
    "8/8/8: any float, shifted": ("fp8_e4m3/channel", "fp8_e4m3/channel", "fp8_e4m3/tensor", "imatrix", _FREE | _SHIFT),
    "6/6/6: int6, smallest to largest": (
        "int6/channel",
        "int6/channel",
        "int6/tensor",
        "round",
        {"observer": "minmax"},
    ),
    "6/6/6: e3m2, smallest to largest": (
        "fp6_e3m2/channel",
        "fp6_e3m2/channel",
        "fp6_e3m2/tensor",
        "round",
        {"observer": "minmax"},
    ),
    "6/6/6: any float": ("fp6_e3m2/channel", "fp6_e3m2/channel", "fp6_e3m2/tensor", "imatrix", _FREE),
    "6/6/6: any float, shifted": ("fp6_e3m2/channel", "fp6_e3m2/channel", "fp6_e3m2/tensor", "imatrix", _FREE | _SHIFT),
    "4/4/16: int4": ("int4/channel", "int4/channel", None, "round", {}),
    "4/4/16: int4, gptq": ("int4/channel", "int4/channel", None, "gptq", {}),
    "4/4/16: e2m1": (E2M1, E2M1, None, "round", {}),
    "4/4/16: any float": (E2M1, E2M1, None, "imatrix", _FREE),
    "4/4/16: any float, shifted": (E2M1, E2M1, None, "imatrix", _FREE | _SHIFT),
    "4/4/8: int4 and int8, smallest to largest": (
        "int4/channel",
        "int4/channel",
        "int8/tensor",
        "round",
        {"observer": "minmax"},
    ),
    "4/4/8: e2m1 and e4m3, smallest to largest": (E2M1, E2M1, "fp8_e4m3/tensor", "round", {"observer": "minmax"}),
    "4/4/8: any float": (E2M1, E2M1, "fp8_e4m3/tensor", "imatrix", _FREE),
    "4/4/8: any float, shifted": (E2M1, E2M1, "fp8_e4m3/tensor", "imatrix", _FREE | _SHIFT),
    "4/4/4: any float": (E2M1, E2M1, "fp4_e2m1/tensor", "imatrix", _FREE),
    "4/4/4: any float, shifted": (E2M1, E2M1, "fp4_e2m1/tensor", "imatrix", _FREE | _SHIFT),
}

FLOAT_ROW = "float"
PARTS: dict[str, tuple[str, ...]] = {
    "plain": (FLOAT_ROW, *RECIPES, *SEARCHES),
    "injected": (FLOAT_ROW, *RECIPES, *SEARCHES),
    "levels": (FLOAT_ROW, *LEVELS),
}


def recipe(name: str) -> Recipe:
    """The recipe of one row; logits keep 8 bits, as in the presets."""
    weight, given, solver, more = RECIPES[SEARCHES[name][0] if name in SEARCHES else name]
    head, *_ = PRESETS["fp4"].rules
    rule = Rule(weight=parse_spec(weight), input=parse_spec(given), solver=solver, **more)
    return Recipe(name=name, rules=(head, rule))


def level(name: str) -> Recipe:
    """The recipe of one level, of which nothing is left out."""
    table, weight, given, solver, more = LEVELS[name]
    rows = Rule(
        ops=(Op.EMBEDDING,),
        weight=parse_spec(table),
        solver="round" if solver == "round" else "mse",
        format=more.get("format"),
    )
    given_spec = None if given is None else parse_spec(given)
    return Recipe(name=name, rules=(rows, Rule(weight=parse_spec(weight), input=given_spec, solver=solver, **more)))


def by_settings(names: Iterable[str]) -> list[tuple[dict[str, Any], list[str]]]:
    """Rows that are measured under the same settings."""
    found: list[tuple[dict[str, Any], list[str]]] = []
    for name in names:
        settings = SEARCHES[name][1] if name in SEARCHES else {}
        if not found or found[-1][0] != settings:
            found.append((settings, []))
        found[-1][1].append(name)
    return found


@contextmanager
def set_to(settings: Mapping[str, Any]) -> Iterator[None]:
    """Constants of the search, by their full names, set while rows are measured."""
    with ExitStack() as stack:
        for name, value in settings.items():
            stack.enter_context(patch(name, value))
        yield


def about_plan(name: str, plan: qcompile.Plan) -> dict[str, Any]:
    """Which formats tables and linears got, how many have shifted columns, and where a multiplication remains."""
    tables, linears = ([d for d in plan.decisions.values() if d.op is op] for op in (Op.EMBEDDING, Op.LINEAR))
    return {
        "embeddings": Counter(d.weight.format.name for d in tables if d.weight is not None),
        "weights": Counter(d.weight.format.name for d in linears if d.weight is not None),
        "inputs": Counter(d.input.format.name for d in linears if d.input is not None),
        "shifted_sites": sum(bool(d.shift) for d in linears),
        "multiplications_left": sum(not fold.into for fold in plan.folds),
    }


def merged(path: Path, about: Mapping[str, Any], found: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The result with rows that were measured before, in the order of the tables above."""
    old = json.loads(path.read_text()) if path.exists() else {}
    parts = {part: old.pop(part, {}) for part in PARTS}
    kept = parts if old == about else {}
    rows = {part: kept.get(part, {}) | found.get(part, {}) for part in PARTS}
    return {**about, **{part: {name: rows[part][name] for name in PARTS[part] if name in rows[part]} for part in rows}}


def main() -> None:
    parser = arguments(__doc__, windows=32, calibration=32)
    parser.add_argument("--rows", default="*", help="globs, parted by |")
    parser.add_argument("--result", type=Path)
    given = parser.parse_args()
    data = language(given)
    injected = copy.deepcopy(data.model)
    channels = inject(injected)
    about = {
        "command": "python examples/benchmarks/fp4.py --model DIR --tokens FILE",
        **data.about,
        "injected_channels": channels,
    }
    path = given.result or RESULTS / f"fp4_{given.device}.json"
    wanted = {
        part: [name for name in names if any(fnmatchcase(name, glob) for glob in given.rows.split("|"))]
        for part, names in PARTS.items()
    }
    if not any(wanted.values()):
        raise SystemExit(f"no row is called {given.rows!r}; there are {', '.join([*RECIPES, *SEARCHES, *LEVELS])}")
    for part, names in wanted.items():
        model = injected if part == "injected" else data.model
        for settings, together in by_settings(name for name in names if name != FLOAT_ROW):
            recipes = {name: level(name) if part == "levels" else recipe(name) for name in together}
            with torch.no_grad(), set_to(settings):
                found = rows(model, data.calibration, data.batches, recipes, about_plan)
            write_result(path, merged(path, about, {part: found}))


if __name__ == "__main__":
    main()
