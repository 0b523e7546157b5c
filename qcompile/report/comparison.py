"""How far a quantized model's outputs are from the float model's, and from those of the same plan elsewhere.

Sums are kept batch by batch, so that memory does not depend on how many there are.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from qcompile.watch import real_rows


@dataclass(frozen=True, kw_only=True)
class OutputError:
    """How far one output is from its reference; rows that are padding, and what is not finite there, do not count.

    snr_db: 10 log10(sum reference**2 / sum difference**2), inf where nothing differs.  relative: the square root of
    the inverse ratio.  lowest_cosine: of the rows along the last axis; those of zeros have none.
    largest: difference.  peak: the largest magnitude of the reference.
    """

    name: str
    snr_db: float
    relative: float
    lowest_cosine: float
    largest: float
    peak: float


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The outputs of a quantized file beside the float file's, on the same inputs.

    outputs: none where they could not be compared, and `reason` says why and what to do.  seen: calibration may have
    known the inputs.  runtime: what ran both, with its version.
    """

    outputs: tuple[OutputError, ...] = ()
    batches: int = 0
    seen: bool = False
    runtime: str = ""
    reason: str = ""

    def __str__(self) -> str:
        """A sentence on what was compared."""
        if not self.outputs:
            return f"outputs were not compared with the float model's: {self.reason}"
        known = "which calibration may have seen" if self.seen else "which calibration did not see"
        return f"compared with the float model on {_counted(self.batches)}, {known}, by {self.runtime}"

    @classmethod
    def from_table(cls, table: Mapping[str, Any]) -> "Comparison":
        """What `dataclasses.asdict` made of one."""
        return cls(
            **_known(cls, table) | {"outputs": tuple(OutputError(**_known(OutputError, t)) for t in table["outputs"])}
        )


@dataclass(frozen=True, kw_only=True)
class OutputAgreement:
    """One output of the same plan in PyTorch and in a file, both beside the float model's.

    largest: difference between the two, relative to the largest magnitude.  between_db: signal-to-noise ratio between
    the two.  torch_db, file_db: that of each against float.  distance: between the two, relative to the float output;
    bound: of it.
    """

    name: str
    largest: float
    between_db: float
    torch_db: float
    file_db: float
    distance: float
    bound: float

    @property
    def agrees(self) -> bool:
        return self.distance <= self.bound


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """A certificate: PyTorch and a runtime make the same of one plan, up to what the bound says, and why it may be so.

    runtimes: both, with their versions.  why: what the bound is.
    """

    outputs: tuple[OutputAgreement, ...]
    batches: int
    runtimes: str
    why: str

    @property
    def agrees(self) -> bool:
        return all(output.agrees for output in self.outputs)

    def __str__(self) -> str:
        """The verdict, as a sentence."""
        worst = max(self.outputs, key=lambda o: (not o.agrees, o.distance - o.bound))
        verdict = "agree" if self.agrees else "DISAGREE"
        return (
            f"{self.runtimes} {verdict} on {_counted(self.batches)}: they differ by {worst.distance:.2g} of "
            f"{worst.name!r} at most, {worst.bound:.2g} is allowed ({self.why})"
        )

    @classmethod
    def from_table(cls, table: Mapping[str, Any]) -> "Agreement":
        """What `dataclasses.asdict` made of one."""
        outputs = tuple(OutputAgreement(**_known(OutputAgreement, t)) for t in table["outputs"])
        return cls(**_known(cls, table) | {"outputs": outputs})


class Differences:
    """Sums over the batches of one output."""

    def __init__(self) -> None:
        self._signal = self._noise = self._largest = self._peak = 0.0
        self._cosine = 1.0

    def add(self, reference: Tensor, found: Tensor, mask: Tensor | None = None) -> None:
        """Both: of any shape, the same.  mask: see `qcompile.watch.mask_of`."""
        a, b = (real_rows(x, mask)[0].double() for x in (reference, found))
        known = a.isfinite()
        if not bool(known.all()):
            # what both leave open, as masks of -inf do, says nothing
            a, b = torch.where(known, a, 0), torch.where(known, b, 0)
        if not a.numel():
            return
        difference = a - b
        self._signal += float(a.square().sum())
        self._noise += float(difference.square().sum())
        self._largest = max(self._largest, float(difference.abs().max()))
        self._peak = max(self._peak, float(a.abs().max()))
        rows = a.abs().amax(-1) > 0
        if bool(rows.any()):
            self._cosine = min(self._cosine, float(F.cosine_similarity(a[rows], b[rows], dim=-1).min()))

    def error(self, name: str) -> OutputError:
        """The sums so far, of the output of this name."""
        # NaN has no order: without this, one in the result would pass for no difference
        lost = not math.isfinite(self._noise) or (self._noise > 0 and self._signal == 0)
        ratio = math.inf if lost else self._noise / self._signal if self._noise > 0 else 0.0
        return OutputError(
            name=name,
            snr_db=-math.inf if lost else -10 * math.log10(ratio) if ratio else math.inf,
            relative=math.sqrt(ratio),
            lowest_cosine=self._cosine,
            largest=self._largest,
            peak=self._peak,
        )


def _counted(batches: int) -> str:
    return f"{batches} batch{'es' if batches != 1 else ''}"


def _known(kind: type, table: Mapping[str, Any]) -> dict[str, Any]:
    # a later minor version may have written more
    names = {f.name for f in fields(kind)}
    return {name: value for name, value in table.items() if name in names}
