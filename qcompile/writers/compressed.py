"""Models as compressed-tensors checkpoints in a Hugging Face folder, which its library, transformers and vLLM load.

Layouts are those of `qcompile.readers.compressed`: weights of integers that run under floats are packed, int8 and E4M3
weights are tensors of these dtypes.
Source: compressed-tensors 0.20.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from qcompile.artifact import write_tensors
from qcompile.binding import tensors_of
from qcompile.errors import UnsupportedError
from qcompile.formats import Integer
from qcompile.graph import Op
from qcompile.packing import pack
from qcompile.plan import Decision, Plan
from qcompile.readers import CONFIG, SINGLE
from qcompile.readers.compressed import INPUTS
from qcompile.readers.integers import KINDS
from qcompile.spec import ALL, Spec, Zero

WRITTEN = (CONFIG, SINGLE)
PACKED, INTEGERS, FLOATS = "pack-quantized", "int-quantized", "float-quantized"
_E4M3 = "fp8_e4m3"
_BYTE = 8


def write_compressed(
    folder: Path, plan: Plan, model: nn.Module, coded: frozenset[int], folded: Mapping[str, Tensor]
) -> None:
    """The files of a checkpoint, into a folder that is there.

    coded: identities of parameters that have no float values.
    folded: what folds made of tensors that stay float, by name.
    Raises UnsupportedError for what compressed-tensors does not describe; OSError or SafetensorError.
    """
    quantized = [d for d in plan.decisions.values() if d.weight is not None]
    modules = dict(model.named_modules())
    _require_folds(plan, modules)
    for decision in quantized:
        _require_plain(decision, modules.get(decision.name))
    held, saved = {f"{d.name}.weight" for d in quantized}, model.state_dict(keep_vars=True).keys()
    tensors: dict[str, Tensor] = {}
    for tensor, names in tensors_of(model):
        written = [name for name in names if name in saved and name not in held]
        if written and id(tensor) not in coded:
            tensors[written[0]] = folded.get(written[0], tensor)
    for decision in quantized:
        tensors |= {
            f"{decision.name}.{part}": tensor
            for part, tensor in _parts(decision, modules[decision.name].weight.dtype).items()
        }
    write_tensors(folder / SINGLE, tensors)
    tied = any(len(names) > 1 and held & set(names) for _, names in tensors_of(model))
    table = _model_config(model) | ({"tie_word_embeddings": False} if tied else {})
    table["quantization_config"] = _config(quantized, modules)
    (folder / CONFIG).write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")


def _require_folds(plan: Plan, modules: Mapping[str, nn.Module]) -> None:
    for fold in plan.folds:
        taker = modules.get(fold.into)
        if not fold.into or getattr(taker, "weight", None) is None:
            raise UnsupportedError(
                f"a multiplication stays in front of {fold.sites[0]!r}, which compressed-tensors does not describe; "
                "take a recipe without smoothing, or one whose folds go into norms"
            )


def _require_plain(decision: Decision, module: nn.Module | None) -> None:
    """Raise UnsupportedError for what compressed-tensors does not describe."""
    solved, why = decision.solved, ""
    if decision.op is not Op.LINEAR or not isinstance(module, nn.Linear):
        why = f"it is {'an embedding' if decision.op is Op.EMBEDDING else 'no torch.nn.Linear'}"
    elif decision.outliers or decision.threshold is not None or decision.shift:
        why = "its outliers are kept apart" if not decision.shift else "its exponents are shifted"
    elif solved is None or solved.order is not None:
        why = "its columns have an order of their own" if solved else "no graph took its weight"
    elif decision.input is not None and _given_name(decision.input) not in INPUTS.values():
        why = f"its input is {decision.input}; known: {', '.join(INPUTS.values())}"
    elif _layout(decision) is None:
        why = f"its weight is {decision.weight}, which has no layout there"
    if why:
        raise UnsupportedError(
            f"{decision.name!r} cannot be written as compressed-tensors: {why}. Take another recipe, or save the model "
            "in qcompile's own format"
        )


def _given_name(spec: Spec) -> str:
    return f"{spec.format.name}/{spec.granularity.name}"


def _layout(decision: Decision) -> str | None:
    """The format that holds a site's weight; None if there is none."""
    spec = decision.weight
    assert spec is not None
    tile = spec.granularity
    # theirs have zero points, which are codes
    if spec.zero is Zero.MINIMUM or f"/{spec.scale}".removesuffix("/fp32") not in KINDS.values():
        return None
    if isinstance(spec.format, Integer) and tile.rows == 1 and decision.input is None:
        return PACKED
    if isinstance(spec.format, Integer) and spec.format.bits == _BYTE and tile.columns == ALL and tile.rows == 1:
        return INTEGERS
    return FLOATS if spec.format.name == _E4M3 and (tile.columns == ALL or tile.rows != 1) else None


def _parts(decision: Decision, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of a site's weight, by last name.  dtype: of the weight in the model."""
    solved, layout = decision.solved, _layout(decision)
    assert solved is not None
    # the library computes in the dtype of scales, and rounds to it
    scale = solved.stored["scale_scale"]
    scale = scale.to(torch.promote_types(scale.dtype, dtype))
    qparams = solved.qparams
    codes, half = qparams.codes, 2 ** (solved.spec.format.bits - 1)
    assert codes is not None
    if layout == FLOATS:
        values = codes.view(torch.float8_e4m3fn)
        return {"weight": values, "weight_scale": scale.reshape(1) if scale.dim() == 0 else scale}
    # in two's complement, as theirs all are
    middle = 0 if qparams.zero is None else half
    if layout == INTEGERS:
        parts = {"weight": (codes.to(torch.int16) - middle).to(torch.int8), "weight_scale": scale}
        zero = None if qparams.zero is None else (qparams.zero - half).to(torch.int8)
        return parts if zero is None else parts | {"weight_zero_point": zero}
    bits = solved.spec.format.bits
    unsigned = codes if qparams.zero is not None else (codes.to(torch.int16) + half).to(torch.uint8)
    parts = {"weight_packed": _words(unsigned, bits), "weight_scale": scale, "weight_shape": torch.tensor(solved.shape)}
    if qparams.zero is None:
        return parts
    return parts | {"weight_zero_point": _words(qparams.zero.to(torch.uint8).t(), bits).t().contiguous()}


def _words(numbers: Tensor, bits: int) -> Tensor:
    """int32 [N, words] of uint8 [N, K], low bits first."""
    packed = pack(numbers.contiguous(), bits)
    padded = pad(packed, (0, -packed.shape[1] % 4))
    # a single row may be contiguous whatever its strides, which the view looks at
    return padded.flatten().view(torch.int32).view(len(padded), -1)


def _config(quantized: Sequence[Decision], modules: Mapping[str, nn.Module]) -> dict[str, Any]:
    """Groups of sites of equal specs: one alone is all linears, several go by name, as not all readers rank targets."""
    groups: dict[tuple[Spec | None, Spec | None], list[Decision]] = {}
    for decision in quantized:
        groups.setdefault((decision.weight, decision.input), []).append(decision)
    ordered = list(groups.values())
    names = {d.name for d in quantized}
    layouts = dict.fromkeys(_layout(members[0]) for members in ordered)
    return {
        "quant_method": "compressed-tensors",
        "format": next(iter(layouts)) if len(layouts) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": {f"group_{i}": _group(members, whole=len(ordered) == 1) for i, members in enumerate(ordered)},
        "ignore": [n for n, module in modules.items() if isinstance(module, nn.Linear) and n not in names],
        "kv_cache_scheme": None,
    }


def _group(members: Sequence[Decision], *, whole: bool) -> dict[str, Any]:
    first = members[0]
    given = first.input
    return {
        "targets": ["Linear"] if whole else [d.name for d in members],
        "weights": _weights(first),
        "input_activations": None if given is None else _input(given),
        "output_activations": None,
        "format": _layout(first),
    }


def _weights(decision: Decision) -> dict[str, Any]:
    spec = decision.weight
    assert spec is not None
    tile = spec.granularity
    table = {
        "num_bits": spec.format.bits,
        "type": "int" if isinstance(spec.format, Integer) else "float",
        "symmetric": spec.symmetric,
        "dynamic": False,
    }
    if tile.columns == ALL:
        return table | {"strategy": "tensor" if tile.rows == ALL else "channel"}
    if tile.rows == 1:
        return table | {"strategy": "group", "group_size": tile.columns}
    return table | {"strategy": "block", "block_structure": [tile.rows, tile.columns]}


def _input(spec: Spec) -> dict[str, Any]:
    kind = "int" if isinstance(spec.format, Integer) else "float"
    bits = spec.format.bits
    return {"num_bits": bits, "type": kind, "symmetric": spec.symmetric, "strategy": "token", "dynamic": True}


def _model_config(model: nn.Module) -> dict[str, Any]:
    """What transformers asks of config.json, if the model is one of its."""
    known: Any = getattr(model, "config", None)
    if not hasattr(known, "to_json_string"):
        return {}
    table: dict[str, Any] = json.loads(known.to_json_string(use_diff=False))
    return table | {"architectures": [type(model).__name__]}
