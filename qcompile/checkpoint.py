"""Compiled models to and from folders: the weights' codes in place of the weights."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qcompile import artifact, pipeline
from qcompile.backends.fx.door import open_dynamo
from qcompile.backends.fx.dynamo import Parameter, is_whole
from qcompile.backends.fx.kernels import Problem, embedding
from qcompile.backends.fx.packs import freed_error
from qcompile.backends.fx.sources import weight_source
from qcompile.binding import Binding, tensors_of
from qcompile.compile import bounds_of
from qcompile.errors import OptionsError, PlanError, nearest
from qcompile.folds import FOLDED
from qcompile.frame import Bound, Frame
from qcompile.graph import Op
from qcompile.manifest import put, read_floats, read_manifest, require_fit, require_unchanged, write_model
from qcompile.plan import Decision, Plan
from qcompile.quantized import PACKS, decided, target_of
from qcompile.readers import read_checkpoint
from qcompile.shifts import folds_octaves
from qcompile.sites import find_sites
from qcompile.solved import Solved
from qcompile.writers.compressed import WRITTEN, write_compressed

OWN = "qcompile"
LAYOUTS = (OWN, "compressed-tensors")


@dataclass(frozen=True, kw_only=True)
class _Taken:
    """What one graph says: its plan, and identities of the parameters that became codes and that it reads as floats.

    folded: what folds made of tensors that stay float, by the name of what they were before.
    """

    plan: Plan
    coded: frozenset[int]
    floats: frozenset[int]
    folded: Mapping[str, Tensor]


def save_model(compiled: Any, folder: str | Path, layout: str = OWN) -> None:
    """Write a compiled model to a folder, whole or not at all: codes of its weights, and in float what else it keeps.

    compiled: what torch.compile returned, or a model compiled in place, after its first call.
    layout: one of `LAYOUTS`.
    Weights that the graphs read in float too, or that none of them quantizes, stay float.
    Raises PlanError if the folder holds anything else, or cannot be written; UnsupportedError if nothing was compiled,
    or what was has no place in the layout; WeightError if weights were freed.
    """
    if layout not in LAYOUTS:
        raise OptionsError(f"unknown layout {layout!r}; nearest: {nearest(layout, LAYOUTS)}")
    model = getattr(compiled, "_orig_mod", compiled)
    if not isinstance(model, nn.Module):
        raise PlanError(
            f"save takes a plan, or a model that torch.compile compiled and that was called, got {type(model).__name__}"
        )
    taken: dict[str, Solved] = {}
    binding = Binding(model)
    with torch.no_grad():
        graphs = [_take(frame, bound, binding, taken) for frame, bound in bounds_of(compiled)]
    floats = frozenset[int]().union(*(graph.floats for graph in graphs))
    coded = frozenset[int]().union(*(graph.coded for graph in graphs)) - floats
    plan = _joined([graph.plan for graph in graphs])
    decisions = {name: _coded(decision, taken.get(name)) for name, decision in plan.decisions.items()}
    plan = replace(plan, decisions=decisions, binding=None)
    if layout == OWN:
        artifact.write_folder(folder, partial(write_model, plan=plan, model=model, coded=coded), artifact.MODEL_FILES)
        return
    folded = {name: tensor for graph in graphs for name, tensor in graph.folded.items()}
    write = partial(write_compressed, plan=plan, model=model, coded=coded, folded=folded)
    artifact.write_folder(folder, write, WRITTEN)


def _coded(decision: Decision, found: Solved | None) -> Decision:
    """With what its weight became; what its columns cost is not asked for again, and budgets do not count it."""
    stored = decision.solved if found is None else found
    return replace(decision, solved=stored, importance=decision.importance if stored is None else None)


def load_model(folder: str | Path, model: nn.Module, device: str | torch.device = "cpu") -> Plan:
    """Put the tensors of a folder in place of those of `model`, which may be on meta; returns the plan, bound to it.

    device: where tensors go.  Quantized weights get no memory: their codes are read from the file, which is mapped into
    memory, when the model is compiled with the plan.  Raises PlanError if files are missing, broken, cut short, not as
    they were saved or of a newer schema, or the model is not the one that was saved; then it is as it was.
    Codes are compared with what was saved when they are read first, which is then an error of compiling; everything
    else here, and so what stays float is read once.
    """
    folder, device = Path(folder), _present(device)
    model = getattr(model, "_orig_mod", model)
    manifest = read_manifest(folder)
    require_fit(manifest, model, folder)
    plan, floats = artifact.load(folder), read_floats(folder)
    # the largest of the files is left: its codes have digests
    require_unchanged(manifest, folder, (artifact.PLAN_FILES[0], artifact.FLOATS))
    if missing := [e.names[0] for e in manifest.entries if not e.coded and e.names[0] not in floats]:
        raise PlanError(
            f"the files in {str(folder)!r} lack {missing[0]!r}: they are of several models; save it again with "
            "qcompile.save"
        )
    for entry in manifest.entries:
        if entry.coded:
            put(model, entry.names, PACKS.stand_in(entry.shape, entry.dtype, device))
            continue
        tensor = floats[entry.names[0]].to(device)
        put(model, entry.names, nn.Parameter(tensor, requires_grad=False) if entry.parameter else tensor)
    return plan.bind(model)


def _present(device: str | torch.device) -> torch.device:
    """The device.  Raises OptionsError if it is a CUDA device and there is none."""
    found = torch.device(device)
    if found.type == "cuda" and not torch.cuda.is_available():
        raise OptionsError(
            f"device={str(device)!r}, and this torch sees no CUDA device: load to the CPU, or see what "
            "`qcompile doctor` says of the driver"
        )
    return found


def load_checkpoint(folder: str | Path, model: nn.Module, device: str | torch.device = "cpu") -> Plan:
    """As `load_model`, of a checkpoint of others, see `qcompile.readers`; tensors take the dtypes that the model has.

    Its tensors go to the model's by name. What a model makes of itself when it is built, as the frequencies of rotary
    embeddings, such a checkpoint does not hold: only parameters may be on meta, and buffers that are saved.
    """
    folder, device = Path(folder), _present(device)
    model = getattr(model, "_orig_mod", model)
    plan, floats = read_checkpoint(folder)
    found: list[tuple[Tensor, tuple[str, ...], Tensor | None]] = []
    kept: list[tuple[Tensor, tuple[str, ...]]] = []
    for own, names in tensors_of(model):
        coded = any(name.removesuffix(".weight") in plan.decisions for name in names)
        stored = _one_of({name: floats.pop(name) for name in names if name in floats}, folder)
        if stored is not None and stored.shape != own.shape:
            raise PlanError(
                f"{names[0]!r} is {list(own.shape)} in the model and {list(stored.shape)} in {str(folder)!r}"
            )
        if stored is None and not coded and (own.is_meta or isinstance(own, nn.Parameter)):
            raise PlanError(_missing(names[0], own, floats, plan, folder))
        if stored is not None or coded:
            found.append((own, names, stored))
        else:
            kept.append((own, names))
    # before anything is changed
    plan.bind(model)
    for own, names, stored in found:
        if stored is None:
            put(model, names, PACKS.stand_in(own.shape, own.dtype, device))
            continue
        tensor = stored.to(device, own.dtype if own.is_floating_point() else None)
        put(model, names, nn.Parameter(tensor, requires_grad=False) if isinstance(own, nn.Parameter) else tensor)
    for own, names in kept:
        put(model, names, own.to(device))
    unread = tuple(f"{name!r} of the checkpoint is not in the model" for name in floats)
    return replace(plan, notes=unread).bind(model)


def _one_of(stored: Mapping[str, Tensor], folder: Path) -> Tensor | None:
    """What a checkpoint holds of a tensor of the model, by its names: one, or several that are alike; or nothing."""
    if not stored:
        return None
    first, *others = stored
    one = stored[first]
    # a tensor is not compared with itself: all of the files would be read for it, and NaN is unequal to NaN
    if apart := [name for name in others if stored[name].dtype is not one.dtype or not torch.equal(stored[name], one)]:
        raise PlanError(
            f"{first!r} and {apart[0]!r} are one tensor in the model and two in {str(folder)!r} that differ: build the "
            "model without tying them (tie_word_embeddings=False, for a head that reads the table)"
        )
    return one


def _missing(name: str, own: Tensor, floats: Mapping[str, Tensor], plan: Plan, folder: Path) -> str:
    known = nearest(name, [*floats, *(f"{module}.weight" for module in plan.decisions)])
    hint = (
        "give the model that the checkpoint is of"
        if isinstance(own, nn.Parameter)
        else "build the model with its buffers, outside of torch.device('meta')"
    )
    return f"the model has {name!r} {list(own.shape)}, which {str(folder)!r} does not hold (nearest: {known}); {hint}"


def _take(frame: Frame, bound: Bound, binding: Binding, taken: dict[str, Solved]) -> _Taken:
    """What one graph makes of its weights, which goes to `taken` by site."""
    weights = frame.weights(bound)
    given: dict[Parameter, Tensor] = {}
    names: dict[Parameter, str] = {}
    for slot, weight in weights.items():
        gone = PACKS.freed(weight)
        given[slot] = torch.empty(weight.shape, dtype=weight.dtype, device="meta") if gone else weight
        names[slot] = next(iter(binding.name_of(weight)), slot.name)
    gm, options = frame.traced, frame.asked
    graph = open_dynamo(gm, {slot.placeholder: (names[slot], tensor) for slot, tensor in given.items()})
    sources = {found.site.name: weight_source(graph, found.value).name for found in find_sites(graph)}
    decide = decided(options, target_of(weights.values(), options))
    plan = pipeline.take(graph, decide, taken, storable=_is_storable, whole=is_whole(gm))
    read = {id(tensor) for tensor in graph.constants().values()}
    floats = frozenset(id(weights[slot]) for slot, tensor in given.items() if id(tensor) in read)
    became = {sources[name] for name in plan.decisions if name in taken and name in sources}
    kept = {slot for slot, weight in weights.items() if id(weight) in floats or names[slot] not in became}
    if lost := [names[slot] for slot in kept if given[slot].is_meta]:
        raise freed_error(lost[0])
    coded = frozenset(
        id(weight) for slot, weight in weights.items() if names[slot] in became and isinstance(weight, nn.Parameter)
    )
    named = [(graph.name(value), graph.constant(value)) for value in graph.values() if graph.op(value) is Op.CONSTANT]
    folded = {name.partition(FOLDED)[0]: t for name, t in named if FOLDED in name and t is not None}
    return _Taken(plan=plan, coded=coded, floats=floats, folded=folded)


def _is_storable(decision: Decision) -> bool:
    """Whether every device runs the site from codes: else it is stored in float, and quantized anew each time."""
    spec = decision.weight
    assert spec is not None
    if decision.op is not Op.EMBEDDING:
        return not decision.shift or folds_octaves(spec, max(decision.shift))
    N, K = decision.shape
    table = Problem(N=N, K=K, weight=spec, input=None, dtype=torch.get_default_dtype(), device="cpu")
    return embedding.why_not(table) is None


def _joined(plans: Iterable[Plan]) -> Plan:
    """One plan for the whole model, of plans for its parts."""
    first, *others = plans
    decisions = dict(first.decisions)
    for plan in others:
        if plan.recipe != first.recipe:
            raise PlanError(
                f"the model was compiled with recipes {first.recipe.name!r} and {plan.recipe.name!r}: save what "
                "torch.compile returned for one of them"
            )
        decisions |= {name: d for name, d in plan.decisions.items() if d.op is not Op.OTHER or name not in decisions}
    return replace(first, decisions=decisions)
