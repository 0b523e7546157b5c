"""Plans on disk: plan.json for people and tools, plan.safetensors for the tensors that it names."""

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Collection, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from qcompile.errors import PlanError
from qcompile.folds import Fold
from qcompile.graph import Op
from qcompile.numerics import QParams, code_dtype
from qcompile.outliers import Outliers
from qcompile.packing import as_bytes, unpack
from qcompile.plan import Decision, Plan
from qcompile.recipe import recipe_from_table, recipe_to_table
from qcompile.solved import Solved, stored_as
from qcompile.spec import Spec, parse_spec
from qcompile.stored import store
from qcompile.verify import Failure

SCHEMA = 3
PLAN_FILES = _JSON, _TENSORS = "plan.json", "plan.safetensors"
# of a model, see `qcompile.manifest`
MODEL_FILES = MANIFEST, FLOATS = "manifest.json", "floats.safetensors"
_KIND = "qcompile.plan"


def save(plan: Plan, folder: str | Path) -> None:
    """Write a plan to a folder, whole or not at all. A plan that is there already is replaced.

    Raises PlanError for anything but a plan, or if the folder holds anything else, or cannot be written.
    """
    if not isinstance(plan, Plan):
        raise PlanError(f"save takes a plan, from qcompile.calibrate or qcompile.load, got {type(plan).__name__}")
    write_folder(folder, partial(write_plan, plan))


def write_folder(folder: str | Path, write: Callable[[Path], None], ours: Collection[str] = ()) -> None:
    """Let `write` fill a new folder, which takes this place only when it is whole.

    ours: files that may be there already beside a plan's, and are replaced.  Raises PlanError if the folder holds
    anything else, or cannot be written; then what was there is as it was.
    """
    # a link is followed, so that what it points to is replaced and not the link
    folder = Path(folder).resolve()
    new = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
    try:
        _require_ours(folder, {*PLAN_FILES, *ours})
        folder.parent.mkdir(parents=True, exist_ok=True)
        new.mkdir()
        write(new)
        _put(new, folder)
    except (OSError, SafetensorError) as e:
        reason = getattr(e, "strerror", None) or str(e)
        raise PlanError(f"cannot write the plan to {str(folder)!r}: {reason}; choose a folder you may write to") from e
    finally:
        shutil.rmtree(new, ignore_errors=True)


def schema_of(folder: str | Path) -> int:
    """Of a plan that can be loaded."""
    return int(json.loads((Path(folder) / _JSON).read_text(encoding="utf-8"))["schema"])


def load(folder: str | Path, model: nn.Module | None = None) -> Plan:
    """The plan in a folder, bound to `model` if one is given.

    Raises PlanError if there is none, it is broken or of a newer schema, or does not fit the model.
    """
    folder = Path(folder)
    try:
        data = json.loads((folder / _JSON).read_text(encoding="utf-8"))
        require_kind(data, _KIND, SCHEMA, folder / _JSON)
        tensors = load_file(folder / _TENSORS)
        plan = _plan(data, tensors)
    except OSError as e:
        raise PlanError(f"no plan in {str(folder)!r}: {_instead(folder, e)}") from e
    except (KeyError, TypeError, AttributeError, ValueError, SafetensorError) as e:
        raise PlanError(
            f"the plan in {str(folder)!r} is broken ({type(e).__name__}: {e}); save it again with qcompile.save"
        ) from e
    return plan if model is None else plan.bind(model)


def _instead(folder: Path, error: OSError) -> str:
    """What is there in place of a plan, and what to do."""
    if folder.is_file():
        return (
            "that is a file; give the folder that qcompile.save wrote, or a .gguf file and its model to qcompile.load"
        )
    if (folder / "config.json").exists():
        return (
            "that is a model in float; compile it, torch.compile(model, backend='qcompile'), call it once, and write "
            "it with qcompile.save"
        )
    return f"{error.strerror or error}; give the folder that qcompile.save wrote"


def holds_model(folder: str | Path) -> bool:
    """Whether the folder holds a model's weights, too, or what is left of them: see `qcompile.manifest`."""
    return any((Path(folder) / name).exists() for name in MODEL_FILES)


def save_failure(failure: Failure, folder: Path, name: str) -> Path:
    """Write what shows a broken promise of a pass to a new folder in `folder`; returns it.

    It gets graph.txt, and tensors.safetensors with what the part of the graph reads, made before and makes now.
    Raises PlanError if it cannot be written.
    """
    place = folder / "".join(c if c.isalnum() or c in "-_." else "_" for c in name)
    try:
        place.mkdir(parents=True, exist_ok=True)
        (place / "graph.txt").write_text(failure.text, encoding="utf-8")
        write_tensors(place / "tensors.safetensors", failure.tensors)
    except (OSError, SafetensorError) as e:
        raise PlanError(
            f"cannot write the failing part to {str(place)!r}: {e}; choose a folder you may write to"
        ) from e
    return place


def _require_ours(folder: Path, ours: Collection[str]) -> None:
    if file := next((place for place in (folder, *folder.parents) if place.is_file()), None):
        raise PlanError(f"{str(file)!r} is a file; a plan is saved to a folder, so choose another name")
    if not folder.exists():
        return
    others = sorted(entry.name for entry in folder.iterdir() if entry.name not in ours)
    if others:
        raise PlanError(
            f"{str(folder)!r} holds something else ({', '.join(others[:3])}), which is left as it is; "
            "choose a new or empty folder"
        )


def _put(new: Path, folder: Path) -> None:
    """Give a written folder its final name; what had that name goes only when the new one stands."""
    if not folder.exists():
        os.rename(new, folder)
        return
    old = new.with_name(f"{new.name}.old")
    os.rename(folder, old)
    try:
        os.rename(new, folder)
    except OSError:
        os.rename(old, folder)
        raise
    shutil.rmtree(old)


def write_plan(plan: Plan, folder: Path) -> None:
    """The two files of a plan, into a folder that is there.  Raises OSError or SafetensorError."""
    tensors: dict[str, Tensor] = {}
    # by digest, the site under whose name a weight is stored: a table that two sites read is stored once
    stored: dict[str, str] = {}
    decisions = [_decision_table(decision, tensors, stored) for decision in plan.decisions.values()]
    head = {
        "kind": _KIND,
        "schema": SCHEMA,
        "recipe": recipe_to_table(plan.recipe),
        "notes": list(plan.notes),
        "shared": [list(names) for names in plan.shared],
        "folds": [_fold_table(fold, number, tensors) for number, fold in enumerate(plan.folds)],
        "outliers": None if plan.outliers is None else plan.outliers.to_table(),
        "beside": _sum_beside(decisions, tensors),
    }
    (folder / _JSON).write_text(_json(head, decisions), encoding="utf-8")
    write_tensors(folder / _TENSORS, tensors)


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """A safetensors file.  Raises OSError or SafetensorError."""
    held: dict[str, Tensor] = {}
    places: set[int] = set()
    for name, tensor in tensors.items():
        here = tensor.detach().cpu().contiguous()
        # safetensors refuses memory that stands under two names
        held[name] = here.clone() if here.untyped_storage().data_ptr() in places else here
        places.add(held[name].untyped_storage().data_ptr())
    save_file(held, path)


def _sum_beside(decisions: Iterable[Mapping[str, Any]], tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of all tensors but codes and their scales, which have digests of their own, looked at when they are read.

    These few are small.
    """
    solved = [table["solved"] for table in decisions if "solved" in table]
    digested = {f"{held['of']}.solved.{part}" for held in solved for part in held["parts"]}
    found = hashlib.sha256()
    for name in sorted(tensors.keys() - digested):
        tensor = tensors[name].detach().cpu()
        found.update(f"{name} {tensor.dtype} {list(tensor.shape)} ".encode())
        found.update(as_bytes(tensor.reshape(1, -1)).numpy().tobytes())
    return found.hexdigest()


def _json(head: Mapping[str, Any], decisions: list[dict[str, Any]]) -> str:
    """JSON in which every decision is one line, to be read, searched and compared."""
    opened = json.dumps(head, indent=2, ensure_ascii=False).removesuffix("\n}")
    lines = ",\n".join(f"    {json.dumps(decision, ensure_ascii=False)}" for decision in decisions)
    return f'{opened},\n  "decisions": [\n{lines}\n  ]\n}}\n'


def _decision_table(decision: Decision, tensors: dict[str, Tensor], stored: dict[str, str]) -> dict[str, Any]:
    table: dict[str, Any] = {"name": decision.name, "op": decision.op.value, "shape": list(decision.shape)}
    if decision.weight is not None:
        table |= {"weight": str(decision.weight), "solver": decision.solver}
    if decision.input is not None:
        table["input"] = str(decision.input)
    if decision.input_qparams is not None:
        held = _tensors_of(decision.input_qparams)
        table["input_qparams"] = sorted(held)
        tensors |= {f"{decision.name}.input.{part}": tensor for part, tensor in held.items()}
    if decision.output is not None:
        held = _tensors_of(decision.output)
        table |= {"output": str(decision.output.spec), "output_qparams": sorted(held)}
        tensors |= {f"{decision.name}.output.{part}": tensor for part, tensor in held.items()}
    if decision.importance is not None:
        table["importance"] = True
        tensors[_importance_name(decision.name)] = decision.importance
    if decision.solved is not None:
        table["solved"] = _solved_table(decision.name, decision.solved, tensors, stored)
    plain = {
        "outliers": list(decision.outliers),
        "shift": list(decision.shift),
        "threshold": decision.threshold,
        "reason": decision.reason,
    }
    return table | {key: value for key, value in plain.items() if value not in ([], None, "")}


def _solved_table(site: str, solved: Solved, tensors: dict[str, Tensor], stored: dict[str, str]) -> dict[str, Any]:
    owner = stored.setdefault(f"{solved.spec} {solved.digest}", site)
    own = {
        name: tensor for name, tensor in (("columns", solved.columns), ("order", solved.order)) if tensor is not None
    }
    if owner == site:
        tensors |= {f"{site}.solved.{part}": tensor for part, tensor in solved.stored.items()}
    tensors |= {f"{site}.solved.{part}": tensor for part, tensor in own.items()}
    table: dict[str, Any] = {
        "parts": sorted(solved.stored),
        "of": owner,
        "digest": solved.digest,
        "shape": list(solved.shape),
    }
    table |= {"own": sorted(own), "spec": str(solved.spec), "source": solved.source, "snr_db": solved.snr_db}
    return table


def _importance_name(site: str) -> str:
    return f"{site}.importance"


def _fold_table(fold: Fold, number: int, tensors: dict[str, Tensor]) -> dict[str, Any]:
    tensors[_fold_name(number)] = fold.scale
    return {"sites": list(fold.sites), "into": fold.into, "method": fold.method}


def _fold_name(number: int) -> str:
    return f"fold.{number}.scale"


def _tensors_of(qparams: QParams) -> dict[str, Tensor]:
    parts = {"scale": qparams.scale, "zero": qparams.zero, "levels": qparams.levels}
    stored = {f"stored.{name}": tensor for name, tensor in qparams.stored.items()}
    return {name: tensor for name, tensor in parts.items() if tensor is not None} | stored


def require_kind(data: Any, kind: str, schema: int, path: Path) -> None:
    """Raise PlanError unless `path` held a table of this kind, of a schema up to the one that this version knows."""
    if not isinstance(data, dict) or data.get("kind") != kind:
        what = kind.removeprefix("qcompile.")
        raise PlanError(f"{str(path)!r} is no {what} of qcompile; give the folder that qcompile.save wrote")
    if not isinstance(data["schema"], int) or data["schema"] > schema:
        raise PlanError(
            f"{str(path)!r} has schema {data['schema']!r}, and this version of qcompile reads up to {schema}; upgrade "
            "qcompile, or save it again with this version"
        )


def _plan(data: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Plan:
    decisions = [_decision(table, tensors) for table in data["decisions"]]
    # plans of earlier versions have neither folds nor notes
    folds = [
        Fold(sites=tuple(t["sites"]), scale=tensors[_fold_name(number)], into=t["into"], method=t["method"])
        for number, t in enumerate(data.get("folds", ()))
    ]
    # nor do some say what they hold beside codes
    if "beside" in data and data["beside"] != (found := _sum_beside(data["decisions"], tensors)):
        raise ValueError(f"what it holds beside codes has SHA-256 {found}, and {data['beside']} when it was saved")
    outliers = data.get("outliers")
    return Plan(
        recipe=recipe_from_table(data["recipe"]),
        decisions={d.name: d for d in decisions},
        folds=tuple(folds),
        notes=tuple(data.get("notes", ())),
        shared=tuple(tuple(names) for names in data.get("shared", ())),
        outliers=None if outliers is None else Outliers.from_table(outliers),
    )


def _decision(table: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Decision:
    name = table["name"]
    return Decision(
        name=name,
        op=Op(table["op"]),
        shape=tuple(table["shape"]),
        weight=parse_spec(table["weight"]) if "weight" in table else None,
        input=parse_spec(table["input"]) if "input" in table else None,
        solver=table.get("solver", "round"),
        reason=table.get("reason", ""),
        outliers=tuple(table.get("outliers", ())),
        shift=tuple(table.get("shift", ())),
        threshold=table.get("threshold"),
        importance=tensors[_importance_name(name)] if table.get("importance") else None,
        input_qparams=_stored_qparams(name, "input", table, tensors),
        output=_stored_qparams(name, "output", table, tensors),
        solved=_solved(name, table, tensors),
    )


def _solved(site: str, table: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Solved | None:
    if "weight_qparams" in table:
        return _solved_before(site, table, tensors)
    if (held := table.get("solved")) is None:
        return None
    own = {name: tensors[f"{site}.solved.{name}"] for name in held["own"]}
    return Solved(
        spec=parse_spec(held["spec"]),
        shape=tuple(held["shape"]),
        stored={part: tensors[f"{held['of']}.solved.{part}"] for part in held["parts"]},
        digest=held["digest"],
        snr_db=held["snr_db"],
        columns=own.get("columns"),
        order=own.get("order"),
        source=held["source"],
    )


def _solved_before(site: str, table: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Solved:
    """As schema 2 has it."""
    held = {part: tensors[f"{site}.weight.{part}"] for part in table["weight_qparams"]}
    spec, shape = parse_spec(table["weight"]), tuple(table["shape"])
    qparams = _qparams(spec, held)
    codes = unpack(held["codes"], spec.format.bits, shape[-1], code_dtype(spec) is torch.int8)
    return stored_as(store(codes, qparams), spec, shape, snr_db=table["solved_db"])


def _stored_qparams(site: str, side: str, table: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> QParams | None:
    if f"{side}_qparams" not in table:
        return None
    held = {part: tensors[f"{site}.{side}.{part}"] for part in table[f"{side}_qparams"]}
    return _qparams(parse_spec(table[side]), held)


def _qparams(spec: Spec, held: Mapping[str, Tensor]) -> QParams:
    stored = {name.removeprefix("stored."): t for name, t in held.items() if name.startswith("stored.")}
    return QParams(spec=spec, scale=held["scale"], zero=held.get("zero"), levels=held.get("levels"), stored=stored)
