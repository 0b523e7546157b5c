"""A model on disk beside its plan: manifest.json says what every tensor is, floats.safetensors holds what stays float.

The numbers of quantized weights stand in plan.safetensors, which is mapped into memory: they are not read before they
are used. The other files are, once, to be compared with their checksums.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from qcompile.artifact import FLOATS, MANIFEST, PLAN_FILES, require_kind, write_plan, write_tensors
from qcompile.binding import tensors_of
from qcompile.errors import PlanError, nearest
from qcompile.plan import Plan

SCHEMA = 1
_KIND = "qcompile.model"
# tensors that a message names
NAMED = 3


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One tensor of a model.

    names: all that it has: tied weights are stored once.  parameter: or else a buffer, or a tensor that a module keeps
    as an attribute.  coded: its numbers are those that the plan stores; its float values are nowhere.
    """

    names: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype
    parameter: bool
    coded: bool


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a folder holds.  files: bytes and SHA-256 of each."""

    schema: int
    version: str
    recipe: str
    model: str
    entries: tuple[Entry, ...]
    files: Mapping[str, tuple[int, str]]


def write_model(folder: Path, plan: Plan, model: nn.Module, coded: frozenset[int]) -> None:
    """The files of a model and its plan, into a folder that is there.

    coded: identities of the parameters that only their codes are kept of.  Raises OSError or SafetensorError.
    """
    entries, floats = [], {}
    for tensor, names in tensors_of(model):
        entries.append(
            Entry(
                names=names,
                shape=tuple(tensor.shape),
                dtype=tensor.dtype,
                parameter=isinstance(tensor, nn.Parameter),
                coded=id(tensor) in coded,
            )
        )
        if id(tensor) not in coded:
            floats[names[0]] = tensor
    write_plan(plan, folder)
    write_tensors(folder / FLOATS, floats)
    files = {name: {"bytes": (folder / name).stat().st_size, "sha256": sha256(folder / name)} for name in _OTHERS}
    head = {
        "kind": _KIND,
        "schema": SCHEMA,
        "qcompile": version("qcompile"),
        "recipe": plan.recipe.name,
        "model": type(model).__name__,
        "files": files,
    }
    opened = json.dumps(head, indent=2, ensure_ascii=False).removesuffix("\n}")
    lines = ",\n".join(f"    {json.dumps(_entry_table(entry), ensure_ascii=False)}" for entry in entries)
    (folder / MANIFEST).write_text(f'{opened},\n  "tensors": [\n{lines}\n  ]\n}}\n', encoding="utf-8")


_OTHERS = (*PLAN_FILES, FLOATS)


def sha256(path: Path) -> str:
    """Of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_manifest(folder: Path) -> Manifest:
    """What the folder holds.  Raises PlanError if it holds no model, is of a newer schema, or files were cut short."""
    try:
        data = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        require_kind(data, _KIND, SCHEMA, folder / MANIFEST)
        manifest = Manifest(
            schema=data["schema"],
            version=data["qcompile"],
            recipe=data["recipe"],
            model=data["model"],
            entries=tuple(_entry(table) for table in data["tensors"]),
            files={name: (held["bytes"], held["sha256"]) for name, held in data["files"].items()},
        )
        sizes = {name: (folder / name).stat().st_size for name in manifest.files}
    except OSError as e:
        raise PlanError(
            f"no whole model in {str(folder)!r}: {e.strerror or e}; give the folder that qcompile.save wrote"
        ) from e
    except (KeyError, TypeError, AttributeError, ValueError) as e:
        raise PlanError(
            f"the manifest in {str(folder)!r} is broken ({type(e).__name__}: {e}); save the model again with "
            "qcompile.save"
        ) from e
    for name, (size, _) in manifest.files.items():
        if sizes[name] != size:
            raise PlanError(
                f"{str(folder / name)!r} has {sizes[name]} bytes, and {size} when it was saved: it was not copied "
                "whole; copy it again, or save the model again with qcompile.save"
            )
    return manifest


def require_unchanged(manifest: Manifest, folder: Path, names: Iterable[str]) -> None:
    """Raise PlanError if one of these files is not as it was saved; reads them whole."""
    for name in names:
        digest = manifest.files[name][1]
        if (found := sha256(folder / name)) != digest:
            raise PlanError(
                f"{str(folder / name)!r} has SHA-256 {found}, and {digest} when it was saved: it changed since; "
                "copy it again, or save the model again with qcompile.save"
            )


def read_floats(folder: Path) -> dict[str, Tensor]:
    """The tensors that stay float, by first name, mapped from the file.  Raises PlanError if it is broken."""
    try:
        return load_file(folder / FLOATS)
    except (OSError, SafetensorError) as e:
        raise PlanError(
            f"{str(folder / FLOATS)!r} is broken ({e}); copy it again, or save the model again with qcompile.save"
        ) from e


def require_fit(manifest: Manifest, model: nn.Module, folder: Path) -> None:
    """Raise PlanError if the model lacks a tensor that is stored, has another shape of it, or has one that is not."""
    own = {name: tensor for tensor, names in tensors_of(model) for name in names}
    # parameters first: people know their names
    entries = sorted(manifest.entries, key=lambda entry: not entry.parameter)
    stored = {name: entry for entry in entries for name in entry.names}
    found = [*_misfits(stored, own)]
    # what a model makes of itself when it is built is not missed
    found += [
        f"it has {name!r} {list(tensor.shape)}, which is not stored (nearest: {nearest(name, stored)})"
        for name, tensor in own.items()
        if name not in stored and (tensor.is_meta or isinstance(tensor, nn.Parameter))
    ]
    if found:
        more = f"; and {len(found) - NAMED} more" if len(found) > NAMED else ""
        raise PlanError(
            f"the {type(model).__name__} is not the {manifest.model} that {str(folder)!r} holds: "
            f"{'; '.join(found[:NAMED])}{more}. Build the model from the configuration that it was saved with"
        )


def _misfits(stored: Mapping[str, Entry], own: Mapping[str, Tensor]) -> Iterator[str]:
    for name, entry in stored.items():
        if name not in own:
            yield f"it has no {name!r} {list(entry.shape)} (nearest: {nearest(name, own)})"
        elif tuple(own[name].shape) != entry.shape:
            yield f"{name!r} is {list(own[name].shape)} in it and {list(entry.shape)} in the folder"


def put(model: nn.Module, names: Sequence[str], tensor: Tensor) -> None:
    """Give a model this tensor under all these names."""
    for name in names:
        owner, _, own = name.rpartition(".")
        setattr(model.get_submodule(owner), own, tensor)


def _entry_table(entry: Entry) -> dict[str, Any]:
    return {
        "names": list(entry.names),
        "shape": list(entry.shape),
        "dtype": str(entry.dtype).removeprefix("torch."),
        "parameter": entry.parameter,
        "coded": entry.coded,
    }


def _entry(table: Mapping[str, Any]) -> Entry:
    dtype = getattr(torch, table["dtype"])
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{table['dtype']!r} is no dtype")
    return Entry(
        names=tuple(table["names"]),
        shape=tuple(table["shape"]),
        dtype=dtype,
        parameter=table["parameter"],
        coded=table["coded"],
    )
