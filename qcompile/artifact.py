"""Plans on disk: plan.json for people and tools, plan.safetensors for the tensors that it names."""

import json
import os
import shutil
import uuid
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as serialize
from torch import Tensor, nn

from qcompile.errors import PlanError
from qcompile.folds import Fold
from qcompile.graph import Op
from qcompile.numerics import QParams, code_dtype
from qcompile.outliers import Outliers
from qcompile.packing import pack, unpack
from qcompile.plan import Decision, Plan
from qcompile.recipe import recipe_from_table, recipe_to_table
from qcompile.solved import Solved
from qcompile.spec import Spec, parse_spec
from qcompile.verify import Failure

SCHEMA = 2
_JSON, _TENSORS = "plan.json", "plan.safetensors"
_KIND = "qcompile.plan"


def save(plan: Plan, folder: str | Path) -> None:
    """Write a plan to a folder, whole or not at all. A plan that is there already is replaced.

    Raises PlanError for anything but a plan, or if the folder holds anything else, or cannot be written.
    """
    if not isinstance(plan, Plan):
        raise PlanError(f"save takes a plan, from qcompile.calibrate or qcompile.load, got {type(plan).__name__}")
    # a link is followed, so that what it points to is replaced and not the link
    folder = Path(folder).resolve()
    new = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
    try:
        _require_ours(folder)
        folder.parent.mkdir(parents=True, exist_ok=True)
        new.mkdir()
        _write(plan, new)
        _put(new, folder)
    except (OSError, SafetensorError) as e:
        reason = getattr(e, "strerror", None) or str(e)
        raise PlanError(f"cannot write the plan to {str(folder)!r}: {reason}; choose a folder you may write to") from e
    finally:
        shutil.rmtree(new, ignore_errors=True)


def load(folder: str | Path, model: nn.Module | None = None) -> Plan:
    """The plan in a folder, bound to `model` if one is given.

    Raises PlanError if there is none, it is broken or of a newer schema, or does not fit the model.
    """
    folder = Path(folder)
    try:
        data = json.loads((folder / _JSON).read_text(encoding="utf-8"))
        _require_schema(data, folder)
        tensors = load_file(folder / _TENSORS)
        plan = _plan(data, tensors)
    except OSError as e:
        raise PlanError(
            f"no plan in {str(folder)!r}: {e.strerror or e}; give the folder that qcompile.save wrote"
        ) from e
    except (KeyError, TypeError, AttributeError, ValueError, SafetensorError) as e:
        raise PlanError(
            f"the plan in {str(folder)!r} is broken ({type(e).__name__}: {e}); save it again with qcompile.save"
        ) from e
    return plan if model is None else plan.bind(model)


def save_failure(failure: Failure, folder: Path, name: str) -> Path:
    """Write what shows a broken promise of a pass to a new folder in `folder`; returns it.

    It gets graph.txt, and tensors.safetensors with what the part of the graph reads, made before and makes now.
    Raises PlanError if it cannot be written.
    """
    place = folder / "".join(c if c.isalnum() or c in "-_." else "_" for c in name)
    try:
        place.mkdir(parents=True, exist_ok=True)
        (place / "graph.txt").write_text(failure.text, encoding="utf-8")
        held = {key: tensor.detach().cpu().contiguous().clone() for key, tensor in failure.tensors.items()}
        (place / "tensors.safetensors").write_bytes(serialize(held))
    except (OSError, SafetensorError) as e:
        raise PlanError(
            f"cannot write the failing part to {str(place)!r}: {e}; choose a folder you may write to"
        ) from e
    return place


def _require_ours(folder: Path) -> None:
    if file := next((place for place in (folder, *folder.parents) if place.is_file()), None):
        raise PlanError(f"{str(file)!r} is a file; a plan is saved to a folder, so choose another name")
    if not folder.exists():
        return
    others = sorted(entry.name for entry in folder.iterdir() if entry.name not in (_JSON, _TENSORS))
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


def _write(plan: Plan, folder: Path) -> None:
    tensors: dict[str, Tensor] = {}
    decisions = [_decision_table(decision, tensors) for decision in plan.decisions.values()]
    head = {
        "kind": _KIND,
        "schema": SCHEMA,
        "recipe": recipe_to_table(plan.recipe),
        "notes": list(plan.notes),
        "folds": [_fold_table(fold, number, tensors) for number, fold in enumerate(plan.folds)],
        "outliers": None if plan.outliers is None else plan.outliers.to_table(),
    }
    (folder / _JSON).write_text(_json(head, decisions), encoding="utf-8")
    # cloned, because safetensors refuses a tensor that stands under two names
    held = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    (folder / _TENSORS).write_bytes(serialize(held))


def _json(head: Mapping[str, Any], decisions: list[dict[str, Any]]) -> str:
    """JSON in which every decision is one line, to be read, searched and compared."""
    opened = json.dumps(head, indent=2, ensure_ascii=False).removesuffix("\n}")
    lines = ",\n".join(f"    {json.dumps(decision, ensure_ascii=False)}" for decision in decisions)
    return f'{opened},\n  "decisions": [\n{lines}\n  ]\n}}\n'


def _decision_table(decision: Decision, tensors: dict[str, Tensor]) -> dict[str, Any]:
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
        held = _tensors_of(decision.solved.qparams)
        table |= {"weight_qparams": sorted(held), "solved_db": decision.solved.snr_db}
        tensors |= {f"{decision.name}.weight.{part}": tensor for part, tensor in held.items()}
    plain = {
        "outliers": list(decision.outliers),
        "shift": list(decision.shift),
        "threshold": decision.threshold,
        "reason": decision.reason,
    }
    return table | {key: value for key, value in plain.items() if value not in ([], None, "")}


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
    packed = {} if qparams.codes is None else {"codes": pack(qparams.codes, qparams.spec.format.bits)}
    return {name: tensor for name, tensor in parts.items() if tensor is not None} | stored | packed


def _require_schema(data: Any, folder: Path) -> None:
    if not isinstance(data, dict) or data.get("kind") != _KIND:
        raise PlanError(f"{str(folder / _JSON)!r} is no plan of qcompile; give the folder that qcompile.save wrote")
    if not isinstance(data["schema"], int) or data["schema"] > SCHEMA:
        raise PlanError(
            f"the plan in {str(folder)!r} has schema {data['schema']!r}, and this version of qcompile reads up to "
            f"{SCHEMA}; upgrade qcompile, or save the plan again with this version"
        )


def _plan(data: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Plan:
    decisions = [_decision(table, tensors) for table in data["decisions"]]
    # plans of earlier versions have neither folds nor notes
    folds = [
        Fold(sites=tuple(t["sites"]), scale=tensors[_fold_name(number)], into=t["into"], method=t["method"])
        for number, t in enumerate(data.get("folds", ()))
    ]
    outliers = data.get("outliers")
    return Plan(
        recipe=recipe_from_table(data["recipe"]),
        decisions={d.name: d for d in decisions},
        folds=tuple(folds),
        notes=tuple(data.get("notes", ())),
        outliers=None if outliers is None else Outliers.from_table(outliers),
    )


def _decision(table: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Decision:
    decision = Decision(
        name=table["name"],
        op=Op(table["op"]),
        shape=tuple(table["shape"]),
        weight=parse_spec(table["weight"]) if "weight" in table else None,
        input=parse_spec(table["input"]) if "input" in table else None,
        solver=table.get("solver", "round"),
        reason=table.get("reason", ""),
        outliers=tuple(table.get("outliers", ())),
        shift=tuple(table.get("shift", ())),
        threshold=table.get("threshold"),
        importance=tensors[_importance_name(table["name"])] if table.get("importance") else None,
    )
    return replace(
        decision,
        input_qparams=_stored_qparams(decision.name, "input", table, tensors),
        output=_stored_qparams(decision.name, "output", table, tensors),
        solved=_solved(decision.name, table, tensors),
    )


def _solved(site: str, table: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Solved | None:
    qparams = _stored_qparams(site, "weight", table, tensors)
    if qparams is None:
        return None
    packed, signed = tensors[f"{site}.weight.codes"], code_dtype(qparams.spec) is torch.int8
    codes = unpack(packed, qparams.spec.format.bits, table["shape"][-1], signed)
    return Solved(qparams=replace(qparams, codes=codes), snr_db=table["solved_db"])


def _stored_qparams(site: str, side: str, table: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> QParams | None:
    if f"{side}_qparams" not in table:
        return None
    held = {part: tensors[f"{site}.{side}.{part}"] for part in table[f"{side}_qparams"]}
    return _qparams(parse_spec(table[side]), held)


def _qparams(spec: Spec, held: Mapping[str, Tensor]) -> QParams:
    stored = {name.removeprefix("stored."): t for name, t in held.items() if name.startswith("stored.")}
    return QParams(spec=spec, scale=held["scale"], zero=held.get("zero"), levels=held.get("levels"), stored=stored)
