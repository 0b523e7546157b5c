"""GGUF files: their tensors in a torch model, with a plan that holds their very codes; and a plan's weights in a file.

    plan = load_gguf("model.gguf", model)
    fast = torch.compile(model, backend="qcompile", options={"plan": plan})

Tensors are called as the model calls its parameters, or as llama.cpp does for the architectures of `ARCHITECTURES`.
Source: the GGUF specification (ggml, docs/gguf.md) and llama.cpp's convert_hf_to_gguf.py, through the package `gguf`.
"""

import logging
import os
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qcompile.errors import PlanError, SpecError, UnsupportedError, nearest
from qcompile.ggml import TYPES, from_blocks, require_type, to_blocks, type_of
from qcompile.graph import Op
from qcompile.numerics import QParams, dequantize, quantize
from qcompile.plan import Decision, Plan
from qcompile.recipe import Recipe, Rule
from qcompile.solved import solved

try:
    import gguf
    import numpy as np
except ImportError as e:
    raise UnsupportedError("GGUF files need the package gguf: pip install 'qcompile[gguf]'") from e

_LOG = logging.getLogger(__name__)

# Those whose tensors llama.cpp stores as the model has them, save for rows of the named projections, which it puts into
# another order; numbers of heads are in the file
ARCHITECTURES: Mapping[str, Mapping[str, str]] = {
    "llama": {"attn_q": "attention.head_count", "attn_k": "attention.head_count_kv"},
    "qwen2": {},
    "qwen3": {},
}
# what a model computes itself
_COMPUTED = ("rope_freqs.weight",)
# of a file whose tensors have the names of the model
_OURS = "qcompile"
_FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# keys of a file and attributes of the models' configs; source: docs/gguf.md, "LLM"
_CONFIG = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.value_length": "head_dim",
    "vocab_size": "vocab_size",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
}


@dataclass(frozen=True, kw_only=True)
class _Names:
    """How a file calls a model's parameters, and what order it gives their rows.

    heads: by name of a tensor without number, how many heads its rows are, whose halves stand by turns.
    """

    call: Callable[[str], str]
    heads: Mapping[str, int]

    def order(self, name: str, rows: int) -> Tensor | None:
        """Which row of the parameter each row of the tensor called `name` is; None for the same."""
        heads = next((count for part, count in self.heads.items() if f".{part}." in name), None)
        return None if heads is None else torch.arange(rows).view(heads, 2, -1).transpose(1, 2).flatten()


def load_gguf(path: str | Path, model: nn.Module, device: str | torch.device | None = None) -> Plan:
    """Give `model` the numbers of a GGUF file, and return a plan bound to it that holds the file's codes.

    path: of a file whose tensors are floats, or blocks of the types in `qcompile.ggml.TYPES`.  model: its parameters
    keep their dtype.  device: that it goes to; None: it stays.  Nothing is quantized: codes and scales are the file's.
    Raises PlanError if the file is none, or lacks a parameter of the model, or has another shape or further tensors, or
    several for one parameter; SpecError for other types of blocks; UnsupportedError for an architecture whose tensors
    are not the model's own.  The model is as it was then.
    """
    model = getattr(model, "_orig_mod", model)
    if not isinstance(model, nn.Module):
        raise PlanError(f"the tensors of {str(path)!r} go into a model: give one, qcompile.load({str(path)!r}, model)")
    reader = _opened(path)
    tensors = {one.name: one for one in reader.tensors if one.name not in _COMPUTED}
    names = _names_in(reader, path)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    calls = {name: name if name in tensors else names.call(name) for name in parameters}
    filled = {id(p) for name, p in parameters.items() if calls[name] in tensors}
    if missing := [name for name, p in parameters.items() if id(p) not in filled]:
        raise PlanError(
            f"{str(path)!r} has no tensor for {missing[0]!r} (nearest: {nearest(calls[missing[0]], tensors)})"
            f"{_and_more(missing)}; give the model that the file was made of"
        )
    if more := sorted(tensors.keys() - set(calls.values())):
        raise PlanError(f"{str(path)!r} has a tensor {more[0]!r} that the model lacks{_and_more(more)}")
    given = {name: p for name, p in parameters.items() if calls[name] in tensors}
    # before anything is changed
    orders = {name: _fitting_order(p, name, tensors[calls[name]], names) for name, p in given.items()}
    _require_alike({name: tensors[calls[name]] for name in given}, given)
    if device is not None:
        model.to(device)
    held: dict[int, QParams] = {}
    for name, parameter in given.items():
        found = _fill(parameter, tensors[calls[name]], orders[name])
        if found is not None:
            held[id(parameter)] = found
    sites = {name.removesuffix(".weight"): p for name, p in parameters.items() if id(p) in held}
    decisions = {name: _decision(model, name, p, held[id(p)]) for name, p in sites.items()}
    recipe = Recipe(name=Path(path).stem, rules=tuple(_rules(decisions.values())), summary="as its GGUF file has it")
    return Plan(recipe=recipe, decisions=decisions).bind(model)


def save_gguf(plan: Plan, model: nn.Module, path: str | Path, *, architecture: str | None = None) -> None:
    """Write the parameters of `model` to a GGUF file, quantized as the plan says, all others as they are.

    architecture: one of `ARCHITECTURES`, to name and order tensors as llama.cpp does; None: as the model does.
    The file holds tensors and the numbers of the model's config, no vocabulary. It appears whole or not at all.
    A weight of several names is one tensor, as llama.cpp has it, under the first: a tied head has the table's type, and
    the log warns where the plan says another.
    Raises SpecError for a spec that no type of block holds, UnsupportedError for another architecture.
    """
    path = Path(path)
    names = _names_of(model, architecture)
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    writer = gguf.GGUFWriter(new, architecture or _OURS)
    try:
        for key, attribute in _CONFIG.items():
            if architecture is not None and (value := getattr(_config(model), attribute, None)) is not None:
                add = writer.add_float32 if isinstance(value, float) else writer.add_uint32
                add(f"{architecture}.{key}", value)
        if architecture is not None and (theta := _rope_theta(model)) is not None:
            writer.add_float32(f"{architecture}.rope.freq_base", theta)
        for note in _as_others(plan, model):
            _LOG.warning("%s", note)
        for name, parameter in model.named_parameters():
            data, kind = _data(plan.decisions.get(name.removesuffix(".weight")), name, parameter.detach().cpu())
            called = names.call(name)
            order = names.order(called, len(parameter))
            array = (data if order is None else data[order]).contiguous().numpy()
            writer.add_tensor(called, array, raw_dtype=gguf.GGMLQuantizationType[kind])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        os.replace(new, path)
    finally:
        new.unlink(missing_ok=True)


def _as_others(plan: Plan, model: nn.Module) -> Iterator[str]:
    """A note for each site that reads a tensor which is written as another site's spec says."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name.removesuffix(".weight"))
    for first, *others in names.values():
        written = _spec_text(plan, first)
        for name in others:
            if name in plan.decisions and _spec_text(plan, name) != written:
                yield (
                    f"{name!r} shares the weight of {first!r}, and files hold it once: it is written as {written}, not "
                    f"as {_spec_text(plan, name)}; give both one spec"
                )


def _spec_text(plan: Plan, site: str) -> str:
    decision = plan.decisions.get(site)
    return "float" if decision is None or decision.weight is None else str(decision.weight)


def _opened(path: str | Path) -> Any:
    try:
        return gguf.GGUFReader(path)
    except (OSError, ValueError, IndexError) as e:
        raise PlanError(f"{str(path)!r} is no GGUF file that can be read: {e}; give the path of one") from e


def _names_in(reader: Any, path: str | Path) -> _Names:
    field = reader.get_field("general.architecture")
    architecture = _OURS if field is None else str(field.contents())

    def number(key: str) -> int:
        found = reader.get_field(f"{architecture}.{key}")
        if found is None:
            raise PlanError(f"{str(path)!r} does not say {architecture}.{key}, which the order of its rows depends on")
        return int(found.contents())

    return _names(architecture, number)


def _names_of(model: nn.Module, architecture: str | None) -> _Names:
    return _names(architecture or _OURS, lambda key: int(getattr(_config(model), _CONFIG[key])))


def _config(model: nn.Module) -> Any:
    config = getattr(model, "config", None)
    if config is None:
        raise UnsupportedError(
            "llama.cpp's files hold the numbers of a model's config, and this model has none: leave out the "
            "architecture, or give a model of transformers"
        )
    return config


def _rope_theta(model: nn.Module) -> float | None:
    """The base of a model's rotary embeddings, None if it has none.  Raises UnsupportedError where they are scaled."""
    config = _config(model)
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise UnsupportedError(
            f"rotary embeddings of type {kind!r} are not written to GGUF files: leave out architecture"
        )
    theta = rope.get("rope_theta", getattr(config, "rope_theta", None))
    return None if theta is None else float(theta)


def _names(architecture: str, number: Callable[[str], int]) -> _Names:
    if architecture == _OURS:
        return _Names(call=lambda name: name, heads={})
    if architecture not in ARCHITECTURES:
        raise UnsupportedError(
            f"tensors of architecture {architecture!r} may not be those of a torch model, and are not read or written; "
            f"known: {', '.join(ARCHITECTURES)}"
        )
    kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    table = gguf.get_tensor_name_map(kinds[architecture], number("block_count"))
    return _Names(
        call=lambda name: table.get_name(name, try_suffixes=(".weight", ".bias")) or name,
        heads={part: number(key) for part, key in ARCHITECTURES[architecture].items()},
    )


def _and_more(names: list[str]) -> str:
    return f", and {len(names) - 1} more" if len(names) > 1 else ""


def _fitting_order(parameter: Tensor, name: str, tensor: Any, names: _Names) -> Tensor | None:
    """Which row of a tensor each row of its parameter is, None for the same.  Raises if it does not fit."""
    kind, shape = tensor.tensor_type.name, _shape(tensor)
    if parameter.is_meta:
        raise PlanError(f"{name!r} has no memory for the file's numbers: give a model that is not on meta")
    if shape != list(parameter.shape):
        raise PlanError(f"{name!r} is {list(parameter.shape)} in the model and {shape} in the file")
    if kind not in _FLOATS:
        require_type(kind, f"{name!r}: ")
    if kind not in _FLOATS and len(shape) != 2:
        raise SpecError(f"{name!r} has blocks of type {kind} and shape {shape}: those of matrices are read")
    order = names.order(tensor.name, len(parameter))
    return None if order is None else order.argsort()


def _require_alike(tensors: Mapping[str, Any], parameters: Mapping[str, Tensor]) -> None:
    """Raise PlanError if a parameter of several names is several tensors that are not alike.  Both by those names."""
    first: dict[int, str] = {}
    for name, tensor in tensors.items():
        other = first.setdefault(id(parameters[name]), name)
        if other == name:
            # a tensor is not compared with itself: all of the file would be read for it, and NaN is unequal to NaN
            continue
        known = tensors[other]
        if known.tensor_type != tensor.tensor_type or not np.array_equal(known.data, tensor.data):
            raise PlanError(
                f"{other!r} and {name!r} are one parameter in the model and two tensors in the file that differ: build "
                "the model without tying them (tie_word_embeddings=False, for a head that reads the table)"
            )


def _shape(tensor: Any) -> list[int]:
    return [int(size) for size in reversed(tensor.shape)]


def _fill(parameter: Tensor, tensor: Any, order: Tensor | None) -> QParams | None:
    """Copy a tensor to a parameter.  Returns its qparams with codes, None if it is of floats.  order: of its rows."""
    kind, shape = tensor.tensor_type.name, _shape(tensor)
    raw = torch.from_numpy(np.array(tensor.data))
    if kind in _FLOATS:
        values = raw.view(torch.uint8).view(_FLOATS[kind]).reshape(shape)
        with torch.no_grad():
            parameter.copy_(values if order is None else values[order])
        return None
    raw = raw.reshape(shape[0], -1)
    qparams = from_blocks(raw if order is None else raw[order], kind)
    assert qparams.codes is not None
    with torch.no_grad():
        parameter.copy_(dequantize(qparams.codes, qparams))
    return qparams


def _decision(model: nn.Module, site: str, parameter: Tensor, qparams: QParams) -> Decision:
    lookup = isinstance(model.get_submodule(site), nn.Embedding) if site else False
    return Decision(
        name=site,
        op=Op.EMBEDDING if lookup else Op.LINEAR,
        shape=tuple(parameter.shape),
        weight=qparams.spec,
        solved=solved(parameter.detach().cpu(), qparams),
    )


def _rules(decisions: Iterable[Decision]) -> Iterable[Rule]:
    """The recipe that such decisions follow: a rule for each spec and op."""
    matches: dict[tuple[Any, Op], list[str]] = {}
    for decision in decisions:
        matches.setdefault((decision.weight, decision.op), []).append(decision.name)
    for (weight, op), sites in matches.items():
        yield Rule(match="|".join(sites), ops=(op,), weight=weight)


def _data(decision: Decision | None, name: str, weight: Tensor) -> tuple[Tensor, str]:
    """What a file holds of a weight: bytes of blocks or floats, and the name of the type."""
    if not bool(weight.isfinite().all()):
        raise PlanError(
            f"{name!r} holds NaN or Inf, as a weight that was freed does: give the model that has its values"
        )
    if decision is not None and (decision.outliers or decision.shift):
        raise UnsupportedError(f"{name!r} has columns that are split off or lowered, for which blocks have no place")
    if decision is None or decision.weight is None:
        kinds = {dtype: kind for kind, dtype in _FLOATS.items()}
        kind = "F32" if weight.dim() < 2 else kinds[weight.dtype]
        values = weight.to(_FLOATS[kind]).contiguous()
        return (values.view(torch.uint8) if kind == "BF16" else values), kind
    kind_of_block = type_of(decision.weight)
    if kind_of_block is None:
        raise SpecError(
            f"no type of block holds {decision.weight} of {name!r}: take one of "
            f"{', '.join(str(one.spec) for one in TYPES.values())}"
        )
    qparams = decision.qparams_of(weight)
    try:
        return to_blocks(quantize(weight, qparams), replace(qparams, codes=None)), kind_of_block.name
    except SpecError as e:
        raise SpecError(f"{name!r}: {e}") from e
