"""Checkpoints of others in Hugging Face folders: their quantized weights as a plan, the rest as it is."""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from qcompile.errors import PlanError, UnsupportedError
from qcompile.graph import Op
from qcompile.plan import Decision, Plan
from qcompile.readers import awq, compressed, gptq
from qcompile.recipe import Recipe, Rule
from qcompile.solved import Solved
from qcompile.spec import Spec

CONFIG, INDEX, SINGLE = "config.json", "model.safetensors.index.json", "model.safetensors"


@dataclass(frozen=True, kw_only=True)
class Reader:
    """How one kind of checkpoint is read.

    mark: last name of a tensor that only quantized modules have.  parts: last names of all that they have.
    scheme: what the configuration says of a module.  read: its weight, of its tensors by last name and its scheme.
    given: the spec of its input.
    """

    mark: str
    parts: tuple[str, ...]
    read: Callable[[Mapping[str, Tensor], Mapping[str, Any]], Solved]
    scheme: Callable[[str, Mapping[str, Any]], Mapping[str, Any]] = lambda module, config: config
    given: Callable[[Mapping[str, Any], str], Spec | None] = lambda scheme, module: None


_GPTQ = ("qweight", "qzeros", "scales", "g_idx")
_COMPRESSED = ("weight", "weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx")
READERS: dict[str, Reader] = {
    "gptq": Reader(mark="qweight", parts=_GPTQ, read=gptq.read),
    "awq": Reader(mark="qweight", parts=_GPTQ, read=awq.read),
    "compressed-tensors": Reader(
        mark="weight_scale",
        parts=_COMPRESSED,
        read=compressed.read,
        scheme=compressed.scheme_of,
        given=compressed.input_of,
    ),
}


def is_checkpoint(folder: Path) -> bool:
    """Whether the folder is one of Hugging Face that says that its weights are quantized."""
    return (folder / CONFIG).is_file() and "quantization_config" in _json(folder / CONFIG)


def read_checkpoint(folder: Path) -> tuple[Plan, dict[str, Tensor]]:
    """The plan that a checkpoint's quantized weights are, and its other tensors by name, mapped from the files.

    Raises PlanError if files are missing or broken, UnsupportedError if the kind of quantization is not read.
    """
    config = _json(folder / CONFIG)["quantization_config"]
    method = str(config.get("quant_method"))
    if method not in READERS:
        raise UnsupportedError(
            f"the checkpoint in {str(folder)!r} is quantized by {method!r}, which is not read; known: "
            f"{', '.join(READERS)}. Quantize the float model"
        )
    reader, tensors = READERS[method], _tensors(folder)
    modules = [name.rpartition(".")[0] for name in tensors if name.rpartition(".")[2] == reader.mark]
    decisions: dict[str, Decision] = {}
    for module in modules:
        own = {part: tensors.pop(f"{module}.{part}") for part in reader.parts if f"{module}.{part}" in tensors}
        decisions[module] = _decision(module, own, reader, config, folder)
    return Plan(recipe=_recipe(method, decisions.values()), decisions=decisions), tensors


def _decision(
    module: str, own: Mapping[str, Tensor], reader: Reader, config: Mapping[str, Any], folder: Path
) -> Decision:
    try:
        scheme = reader.scheme(module, config)
        weight, given = reader.read(own, scheme), reader.given(scheme, module)
    except (KeyError, TypeError, ValueError, IndexError, RuntimeError) as e:
        raise PlanError(
            f"the tensors of {module!r} in {str(folder)!r} do not fit their configuration ({type(e).__name__}: {e}); "
            "check that the files are of one checkpoint"
        ) from e
    return Decision(name=module, op=Op.LINEAR, shape=weight.shape, weight=weight.spec, input=given, solved=weight)


def _recipe(method: str, decisions: Iterable[Decision]) -> Recipe:
    pairs = dict.fromkeys((d.weight, d.input) for d in decisions)
    rules = tuple(Rule(weight=weight, input=given) for weight, given in pairs)
    return Recipe(name=method, rules=rules or (Rule(),), summary=f"as a checkpoint of {method} has it")


def _tensors(folder: Path) -> dict[str, Tensor]:
    index = folder / INDEX
    names = dict.fromkeys(_json(index)["weight_map"].values()) if index.is_file() else (SINGLE,)
    found: dict[str, Tensor] = {}
    for name in names:
        try:
            found |= load_file(folder / name)
        except (OSError, SafetensorError) as e:
            reason = getattr(e, "strerror", None) or e
            raise PlanError(f"cannot read {str(folder / name)!r}: {reason}; download the checkpoint again") from e
    return found


def _json(path: Path) -> dict[str, Any]:
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise PlanError(f"cannot read {str(path)!r}: {e}; download the checkpoint again") from e
    return table if isinstance(table, dict) else {}
