"""What smoothing and splitting do for quantized activations, on a language model with and without injected outliers.

    python examples/benchmarks/outliers.py --model DIR --tokens FILE [--device cuda] [--windows 128]

Six channels of every norm are made 20 to 60 times larger, and the columns of the weights that read them smaller by
as much: the function stays, and what per-tensor and per-token scales see gets far worse. Each cell is a recipe made of
an input spec (static per tensor, dynamic per token, fp8 static) and of nothing, smoothing, splitting or both. It is
calibrated on windows of 512 tokens of the first half of the file, and measured on windows of the second half, with the
quantized graph as the passes leave it. KL in nats a token, to the float model. The float model's logits are compared
before and after the injection, and before and after folding by powers of two alone, which changes no bit.
Writes examples/benchmarks/results/outliers_<device>.json.
"""

import copy
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from language_data import arguments, language
from result_files import RESULTS, write_result
from torch import Tensor, nn

import qcompile
from qcompile.formats import Float
from qcompile.recipe import Recipe, Rule
from qcompile.report.quality import LanguageQuality
from qcompile.smooth import parse_smooth
from qcompile.spec import parse_spec

CHANNELS, SMALLEST, LARGEST = 6, 20.0, 60.0

# weight, its solver, input, and the input of sites where that stays poor, whose weights are of its kind
INPUTS = {
    "static per tensor": ("int8/channel", "round", "int8/tensor/asym", None),
    "static per tensor, dynamic where it stays poor": ("int8/channel", "round", "int8/tensor/asym", "int8/token/asym"),
    "static per tensor, 8-bit floats where it stays poor": (
        "int8/channel",
        "round",
        "int8/tensor/asym",
        "fp8_e4m3/tensor",
    ),
    "dynamic per token": ("int8/channel", "round", "int8/token/asym", None),
    "fp8 static": ("fp8_e4m3/channel", "mse", "fp8_e4m3/tensor", None),
}
METHODS: dict[str, dict[str, Any]] = {
    "none": {},
    "smooth": {"smooth": parse_smooth("search")},
    "split": {"split": 0.01},
    "both": {"smooth": parse_smooth("search"), "split": 0.01},
}
# a float's error follows each number's own size: many channels carry a little each
SPLIT_OF_FLOATS = 0.03


def inject(model: Any, seed: int = 0) -> dict[str, list[int]]:
    """Make channels of every norm before linears large, and their weights small; returns which, by norm."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for number, layer in enumerate(model.model.layers):
        attention, mlp = layer.self_attn, layer.mlp
        readers = {
            "input_layernorm": [attention.q_proj, attention.k_proj, attention.v_proj],
            "post_attention_layernorm": [mlp.gate_proj, mlp.up_proj],
        }
        for name, linears in readers.items():
            norm = getattr(layer, name)
            channels = torch.randperm(norm.weight.numel(), generator=generator)[:CHANNELS]
            scale = SMALLEST + (LARGEST - SMALLEST) * torch.rand(CHANNELS, generator=generator)
            channels, scale = channels.to(norm.weight.device), scale.to(norm.weight.device)
            with torch.no_grad():
                norm.weight[channels] *= scale
                for linear in linears:
                    linear.weight[:, channels] /= scale
            found[f"model.layers.{number}.{name}"] = sorted(channels.tolist())
    return found


def recipe(spec: str, method: str) -> Recipe:
    """The recipe of one cell."""
    weight, solver, given, rescue = INPUTS[spec]
    weight_spec = parse_spec(weight)
    rule = Rule(
        weight=weight_spec,
        solver=solver,
        input=parse_spec(given),
        rescue=None if rescue is None else parse_spec(rescue),
        **METHODS[method],
    )
    if rule.split is not None and isinstance(weight_spec.format, Float):
        rule = replace(rule, split=SPLIT_OF_FLOATS)
    return Recipe(name=f"{spec}, {method}", rules=(rule,))


def quantized(model: nn.Module, plan: qcompile.Plan) -> Callable[..., Any]:
    """The model under a plan, as the reference runs it."""
    torch._dynamo.reset()
    return torch.compile(model, dynamic=False, backend="qcompile", options={"plan": plan, "lower": False})  # type: ignore[arg-type]


def measure(run: Callable[..., Any], reference: list[Tensor], batches: list[Tensor]) -> dict[str, float]:
    """Perplexity and divergence; reference: logits of the float model, by batch."""
    quality = LanguageQuality()
    for logits, batch in zip(reference, batches, strict=True):
        quality.add(logits.to(batch.device).float(), run(batch, use_cache=False).logits, batch)
    return {"perplexity": quality.perplexity, "kl": quality.kl}


def identical_after_folding(model: nn.Module, calibration: list[Tensor], batch: Tensor) -> float:
    """Largest difference of float logits when only folds by powers of two are applied: 0 means the same bits."""
    rule = Rule(weight=parse_spec("int8/channel"), input=parse_spec("int8/token"), smooth=parse_smooth("search/pow2"))
    plan = qcompile.calibrate(model, calibration[:2], Recipe(name="fold", rules=(rule,)), progress=False)
    alone = replace(plan, decisions={n: replace(d, weight=None, input=None) for n, d in plan.decisions.items()})
    empty = replace(alone, folds=())
    folded, plain = (quantized(model, p)(batch, use_cache=False).logits for p in (alone, empty))
    return float((folded - plain).abs().max())


def rows(
    model: nn.Module,
    calibration: list[Tensor],
    batches: list[Tensor],
    recipes: Mapping[str, Recipe],
    about: Callable[[str, qcompile.Plan], dict[str, Any]],
) -> dict[str, Any]:
    """The quality of every recipe on one model, by name.  about: what else is told of a name's plan."""
    reference = [model(batch, use_cache=False).logits.half() for batch in batches]
    base = measure(lambda batch, use_cache: model(batch, use_cache=use_cache), reference, batches)["perplexity"]
    table: dict[str, Any] = {"float": {"perplexity": base}}
    for name, chosen in recipes.items():
        start = time.perf_counter()
        inputs = [{"input_ids": batch, "use_cache": False} for batch in calibration]
        plan = qcompile.calibrate(model, inputs, chosen, progress=False)
        taken = time.perf_counter() - start
        found = measure(quantized(model, plan), reference, batches)
        table[name] = {
            **found,
            "change": found["perplexity"] / base - 1,
            "calibration_seconds": taken,
            **about(name, plan),
            "notes": list(plan.notes),
        }
        print(name, {key: table[name][key] for key in ("change", "kl")}, flush=True)
    return table


def about_plan(name: str, plan: qcompile.Plan) -> dict[str, Any]:
    """What was folded and split, and how many sites that should be static are dynamic, or floats for integers."""
    decisions = plan.decisions.values()
    return {
        "folds": sorted({fold.method for fold in plan.folds}),
        "channels_in_16_bit": sorted({len(d.outliers) for d in decisions if d.outliers}),
        "dynamic_sites": sum(d.input is not None and d.input_qparams is None and "static" in name for d in decisions),
        "float_sites": sum(d.weight is not None and isinstance(d.weight.format, Float) for d in decisions),
    }


def main() -> None:
    parser = arguments(__doc__, windows=128, calibration=64)
    parser.add_argument("--specs", default="|".join(INPUTS), help="parted by |")
    given = parser.parse_args()
    data = language(given)
    plain, batches, calibration = data.model, data.batches, data.calibration
    recipes = {f"{spec}, {method}": recipe(spec, method) for spec in given.specs.split("|") for method in METHODS}
    injected = copy.deepcopy(plain)
    channels = inject(injected)
    with torch.no_grad():
        before, after = (m(batches[0], use_cache=False).logits for m in (plain, injected))
        moved = float((before - after).norm() / before.norm())
        assert moved < 1e-4, f"the injection changed the function by {moved}"
        result = {
            "command": "python examples/benchmarks/outliers.py --model DIR --tokens FILE",
            **data.about,
            "injected_channels": channels,
            "difference_by_injection": moved,
            "difference_by_power_of_two_folds": identical_after_folding(injected, calibration, batches[0]),
            "injected": rows(injected, calibration, batches, recipes, about_plan),
            "plain": rows(plain, calibration, batches, recipes, about_plan),
        }
    write_result(RESULTS / f"outliers_{given.device}.json", result)


if __name__ == "__main__":
    main()
