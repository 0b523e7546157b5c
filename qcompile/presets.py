"""Recipes that have a name, and the way from what a user wrote to a recipe. To add one, add a line to `PRESETS`.

What a user may add to one, as "int8+embeddings", is a line of `ADDITIONS`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from qcompile.budget import Budget, parse_budget
from qcompile.errors import RecipeError, nearest
from qcompile.ggml import TYPES
from qcompile.graph import Op
from qcompile.recipe import FLOAT, MOST_SHIFTED, Recipe, Rule, read_recipe, recipe_from_table
from qcompile.smooth import AWQ, Smooth
from qcompile.spec import SCALES, parse_spec

# the layer that makes logits, in the models of Hugging Face and others
_HEAD = "*lm_head|*embed_out|*output_layer"
_HEAD_SPEC = "int8/channel"


def _linears(
    name: str,
    weight: str,
    given: str | None,
    summary: str,
    solver: str = "round",
    *,
    head: str | None = None,
    convolutions: bool = False,
    **more: Any,
) -> Recipe:
    """All linears with these specs; of fewer bits than 8, logits layers keep 8, and `head` as input spec.

    convolutions: they get the specs too, and their results that of inputs.  more: further fields of the rule.
    """
    spec = None if given is None else parse_spec(given)
    rule = Rule(weight=parse_spec(weight), input=spec, solver=solver, **more)
    if parse_spec(weight).format.bits >= parse_spec(_HEAD_SPEC).format.bits:
        conv = Rule(ops=(Op.CONV,), optional=True, weight=rule.weight, input=spec, output=spec)
        return Recipe(name=name, summary=summary, rules=(conv, rule) if convolutions else (rule,))
    head_input = None if head is None else parse_spec(head)
    head_rule = Rule(match=_HEAD, optional=True, weight=parse_spec(_HEAD_SPEC), input=head_input)
    return Recipe(name=name, summary=summary, rules=(head_rule, rule))


# activations are skewed: a zero point halves their error, and costs one addition after the integer matmul
_INT8 = "int8/token/asym"
_STATIC = "int8/tensor/asym"
_FP8, _FP8_STATIC = "fp8_e4m3/token", "fp8_e4m3/tensor"
_MXFP4 = "fp4_e2m1/b32/e8m0"
_NVFP4 = "fp4_e2m1/b16/fp8_e4m3"

_FP4 = "fp4_e2m1/channel"
# each site takes of the 4-bit floats what fits it, and channels are raised so that one scale serves them
_LLM_FP4: dict[str, Any] = {"solver": "imatrix", "head": _INT8, "format": FLOAT, "shift": MOST_SHIFTED}

# in blocks a weight's column has no exponent of its own: it is multiplied before it is quantized
_BLOCKS: dict[str, Any] = {"solver": "imatrix", "head": _INT8, "shift": MOST_SHIFTED}

_SMOOTH: dict[str, Any] = {"smooth": Smooth()}
# one channel in a hundred: the thin float matmul then costs little beside the integer one
_SPLIT: dict[str, Any] = {"split": 0.01}
# of ONNX models: no kernel scales a convolution's inputs pixel by pixel, and none of a CPU has 8-bit floats for it
_CONV: dict[str, Any] = {"convolutions": True}

# "mse" for 4 bits without zero point under float32 scales: a clipped range gains most there
PRESETS: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        _linears("int8", "int8/channel", _INT8, "8-bit integers, inputs scaled token by token"),
        _linears("int8-weight", "int8/channel", None, "8-bit integer weights, inputs as they are", **_CONV),
        _linears("int4-weight", "int4/g128/asym/bf16", None, "4-bit integer weights in groups of 128"),
        _linears(
            "int4-imatrix",
            "int4/g32/asym/bf16",
            None,
            "4-bit integer weights in groups of 32, precise where inputs are large",
            "imatrix",
        ),
        _linears(
            "hqq4",
            "int4/g64/asym/bf16",
            None,
            "4-bit integer weights in groups of 64, many errors small and few large (HQQ)",
            "hqq",
        ),
        _linears(
            "gptq4",
            "int4/g128/asym/bf16",
            None,
            "4-bit integer weights in groups of 128, codes chosen together on data (GPTQ)",
            "gptq",
        ),
        _linears(
            "mixed",
            "int4/g64/asym/bf16",
            None,
            "4.25 bits a weight on average, of 2 to 8, where they matter most, and GPTQ (EXL2); mixed/3: 3 bits",
            "gptq",
            budget=Budget(amount=4.25),
        ),
        _linears(
            "awq4",
            "int4/g128/asym/bf16",
            None,
            "4-bit integer weights in groups of 128, those of large inputs made large before (AWQ)",
            "awq",
            smooth=Smooth(strength=AWQ),
        ),
        _linears("fp8", "fp8_e4m3/channel", _FP8, "8-bit floats, inputs scaled token by token"),
        _linears("nf4", "nf4/g64", None, "4-bit NormalFloat weights in groups of 64 (QLoRA)", solver="mse"),
        *(
            _linears(kind.name.lower(), str(kind.spec), None, f"weights in GGML's blocks {kind.name}", "kquant")
            for kind in TYPES.values()
            if SCALES[kind.spec.scale].minimum
        ),
        _linears("int4-token", "int4/channel", "int4/token/asym", "4-bit integers, inputs too", "mse", head=_INT8),
        _linears("w4a8", "int4/g128/asym/u4row", _INT8, "4-bit weights in groups of 128, 8-bit inputs", head=_INT8),
        _linears("mxfp4", _MXFP4, _MXFP4, "4-bit floats in blocks of 32 under powers of two (OCP MX)", head=_INT8),
        _linears("nvfp4", _NVFP4, _NVFP4, "4-bit floats in blocks of 16 under 8-bit scales (NVIDIA)", head=_INT8),
        _linears("mxfp4-shift", _MXFP4, _MXFP4, "mxfp4, outliers moved into weights by powers of two", **_BLOCKS),
        _linears("nvfp4-shift", _NVFP4, _NVFP4, "nvfp4, outliers moved into weights by powers of two", **_BLOCKS),
        _linears("fp4", _FP4, "fp4_e2m1/tensor", "4-bit floats (LLM-FP4), one calibrated scale an input", **_LLM_FP4),
        _linears(
            "fp4-token", _FP4, "fp4_e2m1/token", "4-bit floats (LLM-FP4), inputs scaled token by token", **_LLM_FP4
        ),
        _linears("fp4-a8", _FP4, _FP8, "4-bit float weights, inputs in 8-bit floats", "mse", head=_FP8),
        _linears("fp4-weight", _FP4, None, "4-bit float weights", "mse"),
        _linears(
            "llm-int8", "int8/channel", "int8/token", "8-bit integers, outliers found while running", threshold=6.0
        ),
        _linears("int8-smooth", "int8/channel", _INT8, "int8, outliers smoothed into the weights", **_SMOOTH),
        _linears("int8-split", "int8/channel", _INT8, "int8, outlier channels in 16 bit", **_SPLIT),
        _linears("int8-smooth-split", "int8/channel", _INT8, "int8, smoothed and split", **_SMOOTH, **_SPLIT),
        _linears("int8-static", "int8/channel", _STATIC, "8-bit integers, one calibrated scale an input", **_CONV),
        _linears("int8-smooth-static", "int8/channel", _STATIC, "int8-static, outliers smoothed", **_SMOOTH, **_CONV),
        _linears(
            "int8-smooth-split-static",
            "int8/channel",
            _STATIC,
            "int8-static, smoothed and split, and where one scale stays poor one for each token",
            **_SMOOTH,
            **_SPLIT,
            **_CONV,
            rescue=parse_spec(_INT8),
        ),
        _linears(
            "int8-fp8-static",
            "int8/channel",
            _STATIC,
            "int8-static, smoothed and split, and where one scale stays poor 8-bit floats, weights too, with one scale",
            **_SMOOTH,
            **_SPLIT,
            **_CONV,
            rescue=parse_spec(_FP8_STATIC),
        ),
        _linears("fp8-static", "fp8_e4m3/channel", _FP8_STATIC, "8-bit floats, one calibrated scale an input"),
        _linears(
            "fp8-smooth-split-static",
            "fp8_e4m3/channel",
            _FP8_STATIC,
            "fp8-static, smoothed and split where that helps",
            "mse",
            **_SMOOTH,
            # a float's error follows each number's own size: many channels carry a little each
            split=0.03,
        ),
        _linears(
            "fp8-delayed",
            "fp8_e4m3/channel",
            _FP8_STATIC,
            "fp8-static, scales as training would leave them (delayed scaling)",
            observer="delayed",
        ),
    )
}

# rules that stand before those of a preset; "embeddings" are looked up row by row, so that each has a scale of its own
ADDITIONS: dict[str, Rule] = {
    "embeddings": Rule(ops=(Op.EMBEDDING,), optional=True, weight=parse_spec("int8/channel")),
}

# first compute capability whose tensor cores multiply fp8 (CUDA programming guide, compute capability 8.9)
_FP8_CAPABILITY = (8, 9)


def parse_recipe(source: str | Path | Mapping[str, Any] | Recipe) -> Recipe:
    """The recipe that a user means: a preset's name, the path of a TOML file, a table of its content, or a Recipe.

    A preset's name may have "+" and the name of an addition behind it, as "int8+embeddings"; one with a budget "/" and
    its bits a weight, as "mixed/3.5".
    Raises RecipeError, for an unknown name with the nearest ones.
    """
    if isinstance(source, Recipe):
        return source
    if isinstance(source, Mapping):
        return recipe_from_table(source)
    if not isinstance(source, str | Path):
        raise RecipeError(f"a recipe is a preset's name, the path of a TOML file or a Recipe, got {source!r}")
    preset, *additions = dict.fromkeys(str(source).split("+"))
    preset, _, bits = preset.partition("/")
    if isinstance(source, str) and preset in PRESETS:
        return _with_additions(_with_bits(PRESETS[preset], bits), additions)
    path = Path(source)
    if isinstance(source, Path) or path.suffix == ".toml" or path.is_file():
        return read_recipe(path)
    raise RecipeError(
        f"unknown recipe {source!r}; nearest presets: {nearest(source, PRESETS)}; "
        f"the path of a TOML file (ending in .toml) or a Recipe works too; behind a preset may stand "
        f"{', '.join('+' + name for name in ADDITIONS)}"
    )


def _with_bits(preset: Recipe, bits: str) -> Recipe:
    """The preset with another number of bits a weight; as it is, if none is given."""
    if not bits:
        return preset
    if not preset.budgets:
        raise RecipeError(f"{bits!r} behind recipe {preset.name!r}, whose bits its specs fix: take 'mixed/{bits}'")
    budget = parse_budget(f"{bits} bits")
    rules = tuple(rule if rule.budget is None else replace(rule, budget=budget) for rule in preset.rules)
    return replace(preset, name=f"{preset.name}/{bits}", rules=rules)


def _with_additions(preset: Recipe, names: Sequence[str]) -> Recipe:
    unknown = next((name for name in names if name not in ADDITIONS), None)
    if unknown is not None:
        raise RecipeError(
            f"recipe {preset.name!r} is followed by the unknown addition {unknown!r}; nearest: "
            f"{nearest(unknown, ADDITIONS)}"
        )
    added = tuple(ADDITIONS[name] for name in names)
    return replace(preset, name="+".join([preset.name, *names]), rules=(*added, *preset.rules))


def default_recipe(device: str, capability: tuple[int, int] | None = None) -> Recipe:
    """The recipe for a device when the user named none; it needs no data.

    device: its type, as "cpu" or "cuda". capability: of a CUDA device.
    """
    fast_fp8 = device == "cuda" and capability is not None and capability >= _FP8_CAPABILITY
    return PRESETS["fp8" if fast_fp8 else "int8"]
