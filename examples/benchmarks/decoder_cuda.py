"""A decoder on a GPU under each recipe, beside torch.compile of its bfloat16 original: decoding and prefill.

    python examples/benchmarks/decoder_cuda.py [--recipes NAME ...] [--steps NAME ...] [--layers N] [--result FILE]
        [--shifted] [--profile]

Layers of Llama-3.1-8B's shapes with random weights, without embeddings and logits. Decoding: one token for each of 1,
16 and 64 sequences that have 1024 tokens in their caches; prefill: one sequence of 2048 tokens. Recipes run without
what they find on data: shifts, formats, clipped scales; but budgets are spent as the prefill's data shows. Every
recipe's results are compared with those of its own Q/DQ graph, and both with the float model's, on two layers, before
anything is timed, in a process of each recipe's own. Times are those of replayed CUDA graphs, the candidates in turns;
weights are larger than the card's second-level cache by far.
--shifted: each recipe once more, with channels of every linear's input shifted by octaves, as calibration shifts them
where they differ: folded into norms and linears, or multiplied with where a cache keeps values. --profile: also what
runs on the GPU in one call of each, counted by torch.profiler.
Writes examples/benchmarks/results/decoder_cuda.json.
"""

import argparse
import json
import multiprocessing
import os
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from result_files import RESULTS, command, device, write_result
from torch import Tensor, nn
from torch.nn.functional import rms_norm, scaled_dot_product_attention, silu
from torch.profiler import ProfilerActivity, profile

import qcompile
from qcompile.backends.fx.capture import capture
from qcompile.channels import tied
from qcompile.edges import find_edges
from qcompile.folds import Fold
from qcompile.numerics import exact_exp2
from qcompile.plan import Plan, make_plan
from qcompile.presets import parse_recipe
from qcompile.recipe import Recipe
from qcompile.sites import find_sites

HIDDEN, INNER, HEADS, KV_HEADS, HEAD = 4096, 14336, 32, 8, 128
CONTEXT, PREFILL = 1024, 2048
BATCHES = (1, 16, 64)
STEPS = (*(f"decode {batch}" for batch in BATCHES), f"prefill {PREFILL}")
FLOAT = "bfloat16, torch.compile"
RECIPES = ("int4-weight", "fp8", "int8", "w4a8", "fp4-a8", "fp4-token", "mixed/3", "mixed/4.25")
# relative difference from the Q/DQ graph that bfloat16 and the order of sums explain in two layers; beyond it, as where
# floats of 8 bits differ by a step of 6 %, results must be as near to those of the float model as the Q/DQ graph's
ROUNDED, AS_NEAR = 3e-2, 1.05
CHECKED_LAYERS = 2
# behind a recipe's name: with channels shifted by up to so many octaves
SHIFTED, OCTAVES = ", channels shifted", 3
# what a trace calls that which runs on a GPU
ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
# of one function that torch compiles at most, before it runs it as it is
VARIANTS = 64


Cache = tuple[Tensor, Tensor]


@dataclass(frozen=True, kw_only=True, eq=False)
class Shape:
    """What a call gets: hidden states [B, T, HIDDEN], places [T], rotations [T, HEAD / 2], and keys and values.

    caches: for each layer two of [B, KV_HEADS, CONTEXT, HEAD], whose last place the token takes; none in prefill.
    """

    name: str
    x: Tensor
    places: Tensor
    cos: Tensor
    sin: Tensor
    caches: Sequence[Cache]

    @property
    def inputs(self) -> tuple[Any, ...]:
        return self.x, self.places, self.cos, self.sin, self.caches


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        wide = KV_HEADS * HEAD
        self.q, self.o = (nn.Linear(HIDDEN, HIDDEN, bias=False) for _ in range(2))
        self.k, self.v = (nn.Linear(HIDDEN, wide, bias=False) for _ in range(2))
        self.gate, self.up = (nn.Linear(HIDDEN, INNER, bias=False) for _ in range(2))
        self.down = nn.Linear(INNER, HIDDEN, bias=False)
        self.first, self.second = (nn.Parameter(torch.ones(HIDDEN)) for _ in range(2))

    def forward(self, x: Tensor, places: Tensor, cos: Tensor, sin: Tensor, cache: Cache | None) -> Tensor:
        batch, tokens, _ = x.shape
        h = rms_norm(x, (HIDDEN,), self.first, 1e-5)
        q, k, v = (y.view(batch, tokens, -1, HEAD).transpose(1, 2) for y in (self.q(h), self.k(h), self.v(h)))
        q, k = _rotated(q, cos, sin), _rotated(k, cos, sin)
        if cache is not None:
            # in place, as the static cache of transformers does it
            k, v = (held.index_copy_(2, places, new) for held, new in zip(cache, (k, v), strict=True))
        h = scaled_dot_product_attention(q, k, v, is_causal=cache is None, enable_gqa=True)
        x = x + self.o(h.transpose(1, 2).reshape(batch, tokens, HIDDEN))
        h = rms_norm(x, (HIDDEN,), self.second, 1e-5)
        return x + self.down(silu(self.gate(h)) * self.up(h))


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


class Decoder(nn.Module):
    def __init__(self, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(layers))

    def forward(self, x: Tensor, places: Tensor, cos: Tensor, sin: Tensor, caches: Sequence[Cache]) -> Tensor:
        for i, layer in enumerate(self.layers):
            x = layer(x, places, cos, sin, caches[i] if caches else None)
        return x


def decoder(layers: int, place: str = "cuda") -> Decoder:
    """On that device, the same weights every time."""
    torch.manual_seed(0)
    with torch.device(place):
        made = Decoder(layers).bfloat16().eval()
        for p in made.parameters():
            if p.dim() == 2:
                nn.init.normal_(p, std=0.02)
    return made


def shapes(layers: int, steps: Sequence[str]) -> list[Shape]:
    found = []
    for batch in BATCHES:
        kept = torch.randn(layers, 2, batch, KV_HEADS, CONTEXT, HEAD, device="cuda").bfloat16()
        caches = [(layer[0].clone(), layer[1].clone()) for layer in kept]
        found.append(_shape(f"decode {batch}", batch, 1, CONTEXT - 1, caches))
    found.append(_shape(STEPS[-1], 1, PREFILL, 0, []))
    return [shape for shape in found if shape.name in steps]


def _shape(
    name: str, batch: int, tokens: int, start: int, caches: Sequence[Cache], place: torch.device | str = "cuda"
) -> Shape:
    places = torch.arange(start, start + tokens, device=place)
    cos, sin = rotations(places)
    return Shape(
        name=name,
        x=torch.randn(batch, tokens, HIDDEN, device=place).bfloat16(),
        places=places,
        cos=cos,
        sin=sin,
        caches=caches,
    )


def rotations(places: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines [T, HEAD / 2] of tokens at those places [T]."""
    angles = places[:, None] / 500000.0 ** (torch.arange(0, HEAD, 2, device=places.device) / HEAD)
    return angles.cos().bfloat16(), angles.sin().bfloat16()


def compiled(model: Decoder, name: str, **options: Any) -> Callable[..., Tensor]:
    """The model under a recipe.  Dynamo must not be reset while graphs of it replay: they read the code's constants."""
    if name == FLOAT:
        return torch.compile(model, dynamic=False)
    recipe = parse_recipe(name.removesuffix(SHIFTED))
    # what is found on data takes long, and has no part in the time of a step but for an operand where channels shift
    rules = tuple(replace(rule, smooth=None, shift=None, format=None, solver="round") for rule in recipe.rules)
    bare = replace(recipe, rules=rules)
    if name.endswith(SHIFTED):
        options |= {"plan": shifted(model, bare)}
    elif bare.budgets:
        # the same data every time, so that the fast graph and its reference follow one plan
        with torch.random.fork_rng(devices=[torch.cuda.current_device()]):
            torch.manual_seed(0)
            prefill = _shape("prefill", 1, PREFILL, 0, [])
        options |= {"plan": qcompile.calibrate(model, [prefill.inputs], bare, progress=False)}
    else:
        options |= {"recipe": bare}
    return torch.compile(model, dynamic=False, backend="qcompile", options=options)


def shifted(model: Decoder, recipe: Recipe) -> Plan:
    """The recipe's plan with other octaves for each channel, as calibration writes them, but not found on data."""
    shape = _shape("prefill", 1, 16, 0, [], next(model.parameters()).device)
    (captured,) = capture(model, lambda call: call(*shape.inputs))
    graph = captured.open()
    plan = make_plan([found.site for found in find_sites(graph)], recipe, whole=False)
    decisions, folds = dict(plan.decisions), []
    generator = torch.Generator().manual_seed(0)
    for edge in find_edges(graph):
        names = tuple(found.site.name for found in edge.consumers)
        octaves = torch.randint(0, OCTAVES + 1, (edge.consumers[0].site.weight.shape[1],), generator=generator)
        octaves = tied(octaves, edge.channels)
        folds.append(Fold(sites=names, scale=exact_exp2(-octaves), into=edge.into, method="exponent shift"))
        decisions |= {site: replace(decisions[site], shift=tuple(octaves.tolist())) for site in names}
    return replace(plan, decisions=decisions, folds=tuple(folds)).bind(model)


@torch.no_grad()
def check(name: str, steps: Sequence[str]) -> dict[str, float]:
    """The largest relative differences from the recipe's Q/DQ graph and, of both, from the float model.

    steps: names of those to look at.  Raises SystemExit where rounding explains neither.
    """
    torch._dynamo.config.recompile_limit = VARIANTS
    model, worst = decoder(CHECKED_LAYERS), {"difference": 0.0, "error": 0.0, "error_of_qdq": 0.0}
    fast, reference = compiled(model, name), compiled(model, name, lower=False)
    for shape in shapes(CHECKED_LAYERS, steps):
        exact, expected, found = (call(*shape.inputs).float() for call in (model, reference, fast))
        off, error, of_qdq = _distance(found, expected), _distance(found, exact), _distance(expected, exact)
        if not (off < ROUNDED or error < AS_NEAR * of_qdq):
            raise SystemExit(
                f"{name}, {shape.name}: {off:.2g} away from its Q/DQ graph and {error:.2g} from the float model, from "
                f"which that is {of_qdq:.2g} away; at most {ROUNDED} or {AS_NEAR} times that is rounding"
            )
        print(name, shape.name, round(off, 5), round(error, 5), round(of_qdq, 5), flush=True)
        now = {"difference": off, "error": error, "error_of_qdq": of_qdq}
        worst = {key: max(worst[key], round(value, 5)) for key, value in now.items()}
    return worst


def _told(name: str, steps: Sequence[str]) -> dict[str, float]:
    """`check`, whose errors another process can read: those of compilers hold modules, which cannot be sent."""
    try:
        return check(name, steps)
    except Exception as error:
        raise SystemExit(f"{name}: {''.join(traceback.format_exception(error))}") from None


def checks(names: Sequence[str], steps: Sequence[str]) -> dict[str, dict[str, Any]]:
    """`check` of each recipe by name, side by side, as most of it is compiling."""
    workers = max(1, min(len(names), (os.cpu_count() or 1) // 2))
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        found = pool.map(partial(_told, steps=steps), names)
        return {name: dict(worst) for name, worst in zip(names, found, strict=True)}


def _distance(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def recorded(call: Callable[..., Tensor], shape: Shape) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    """A graph of the call, and where its result lies."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            call(*shape.inputs)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = call(*shape.inputs)
    return graph, y


def launches(call: Callable[..., Tensor], shape: Shape) -> Counter[str]:
    """What one call has the GPU do, by name: kernels, copies and fills.  Raises SystemExit if the profiler saw none."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        call(*shape.inputs)
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    found = Counter(event["name"] for event in events if event.get("cat") in ON_DEVICE)
    if not found:
        raise SystemExit(f"{shape.name}: torch.profiler saw nothing on the GPU; end what else profiles it")
    return found


def milliseconds(graphs: Sequence[torch.cuda.CUDAGraph], rounds: int) -> list[float]:
    """The median of each graph's replays, in turns."""
    times: list[list[float]] = [[] for _ in graphs]
    for turn in range(rounds + 2):
        for graph, found in zip(graphs, times, strict=True):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            torch.cuda.synchronize()
            if turn >= 2:
                found.append(start.elapsed_time(end))
    return [median(found) for found in times]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--recipes", nargs="+", default=RECIPES)
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=STEPS)
    parser.add_argument("--shifted", action="store_true")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--result", type=Path, default=RESULTS / "decoder_cuda.json")
    given = parser.parse_args()
    torch._dynamo.config.recompile_limit = VARIANTS
    rows: dict[str, dict[str, Any]] = {FLOAT: {}}
    names = [name + more for name in given.recipes for more in (("", SHIFTED) if given.shifted else ("",))]
    rows |= checks(names, given.steps)
    with torch.no_grad():
        calls: dict[str, Callable[..., Tensor]] = {}
        given_shapes = shapes(given.layers, given.steps)
        graphs: dict[str, list[torch.cuda.CUDAGraph]] = {shape.name: [] for shape in given_shapes}
        for name, row in rows.items():
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            model = decoder(given.layers)
            # with shifted channels, what makes the values of a cache has other codes in a step without one
            calls[name] = compiled(model, name, **({} if name == FLOAT else {"free_weights": not given.shifted}))
            start = time.perf_counter()
            calls[name](*given_shapes[0].inputs)
            torch.cuda.synchronize()
            row["compile_seconds"] = round(time.perf_counter() - start, 1)
            row["gigabytes"] = round((torch.cuda.memory_allocated() - before) / 1e9, 3)
            for shape in given_shapes:
                graph, y = recorded(calls[name], shape)
                graph.replay()
                torch.cuda.synchronize()
                assert bool(torch.isfinite(y).all()), (name, shape.name)
                graphs[shape.name].append(graph)
                row[shape.name] = {}
                if given.profile:
                    ran = launches(calls[name], shape)
                    row[shape.name] = {"kernels": ran.total()}
                    print(shape.name, name, *(f"\n  {count} {kernel}" for kernel, count in ran.items()), flush=True)
            print(name, row, flush=True)
        for shape in given_shapes:
            times = milliseconds(graphs[shape.name], given.rounds)
            for (name, row), ms in zip(rows.items(), times, strict=True):
                row[shape.name] |= {"ms": round(ms, 4), "speedup": round(times[0] / ms, 3)}
                print(shape.name, name, row[shape.name], flush=True)
    result = {
        "command": command(),
        "shapes": {"layers": given.layers, "hidden": HIDDEN, "inner": INNER, "context": CONTEXT},
        "machine": device("cuda"),
        "rows": rows,
    }
    write_result(given.result, result)


if __name__ == "__main__":
    main()
