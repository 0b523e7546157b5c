"""Calibration that was interrupted goes on: what it solved is kept in a folder, as plans of a few sites each."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import qcompile.numerics
import qcompile.scales
import qcompile.solvers
from qcompile.artifact import load, save
from qcompile.errors import PlanError
from qcompile.plan import Decision, Plan
from qcompile.solved import Solved


class Unfinished:
    """What was solved so far of one model, plan and data; see `qcompile.sequential.Kept`.

    It stands in a folder of its own for each of these, so that nothing of another run is taken for this one's.
    """

    def __init__(self, folder: str | Path, model: nn.Module, plan: Plan, batches: Iterable[Any]) -> None:
        """plan: before anything is solved."""
        self._plan = plan
        self._folder = Path(folder) / _fingerprint(model, plan, batches)

    def known(self, names: Sequence[str]) -> Mapping[str, Solved]:
        """What an earlier run found for these sites, which read the same; empty if it did not come so far.

        Raises PlanError if it is broken.
        """
        place = self._place(names)
        try:
            decisions = load(place).decisions if place.exists() else {}
            known = {name: d.solved for name, d in decisions.items() if d.solved is not None}
            for name, solved in known.items():
                # a damaged one is found while it is known where it stands
                solved.tensors(torch.device("cpu"), name)
        except PlanError as e:
            raise PlanError(f"{e}; or remove {str(place)!r}, and {names[0]!r} is solved anew") from e
        return known

    def keep(self, decisions: Sequence[Decision]) -> None:
        """Write down that these are solved, whole or not at all.  Raises PlanError if it cannot be written."""
        names = [decision.name for decision in decisions]
        save(replace(self._plan, decisions={d.name: d for d in decisions}, folds=(), notes=()), self._place(names))

    def _place(self, names: Sequence[str]) -> Path:
        return self._folder / hashlib.sha256("\n".join(names).encode()).hexdigest()[:16]


def _fingerprint(model: nn.Module, plan: Plan, batches: Iterable[Any]) -> str:
    """Tells apart all that the codes depend on."""
    digest = hashlib.sha256(repr(plan.recipe).encode())
    # one version and the next may choose other codes
    solvers = sorted(Path(qcompile.solvers.__file__).parent.glob("*.py"))
    for source in (*solvers, Path(qcompile.numerics.__file__), Path(qcompile.scales.__file__)):
        digest.update(source.read_bytes())
    for decision in plan.decisions.values():
        # ranges and importance follow from the data
        digest.update(repr((decision.name, decision.weight, decision.input, decision.solver)).encode())
    for fold in plan.folds:
        digest.update(repr((fold.sites, fold.into)).encode())
        _add(digest, fold.scale)
    for held in (dict(model.named_parameters()), dict(model.named_buffers()), list(batches)):
        _add(digest, held)
    return digest.hexdigest()[:16]


def _add(digest: Any, value: Any) -> None:
    if isinstance(value, Tensor):
        digest.update(f"{value.dtype} {list(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    elif isinstance(value, Mapping):
        for key in value:
            digest.update(repr(key).encode())
            _add(digest, value[key])
    elif isinstance(value, list | tuple):
        for item in value:
            _add(digest, item)
    else:
        digest.update(repr(value).encode())
