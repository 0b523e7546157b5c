"""Qparams as a plan keeps them: alike or not, and weights that became codes: of which weight, and how stored."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.functional import pad

from qcompile.errors import PlanError
from qcompile.numerics import QParams, dequantize, quantize, snr_db
from qcompile.packing import as_bytes
from qcompile.sample import row_hashes
from qcompile.spec import Spec
from qcompile.stored import restore, store

# in dB, what codes may lose on a weight: it may have moved by a third of what rounding it to them cost, so that a
# model may change its dtype
SLACK = 0.5
# bytes that are hashed at a time: a mapped table may be larger than what memory is left
HASHED = 2**22


@dataclass(frozen=True, kw_only=True, eq=False)
class Solved:
    """What a weight became, as it is stored: a solver that looks at data made it, or the weight itself is gone.

    spec: of the weight.  shape: [N, K].  stored: as by `qcompile.packing.store`, on the CPU, perhaps in a mapped file.
    digest: tells apart what one weight may become.
    snr_db: signal-to-noise ratio of what they stand for, to the weight; None where nobody saw it.
    columns: those of outlier channels [N, n], kept as they were.
    order: int64 [K], the channel of the input that each column multiplies; None as they are counted.
    source: name of the constant that was quantized: of the model's weight, or what passes had made of it before; "" if
        unknown.
    """

    spec: Spec
    shape: tuple[int, ...]
    stored: Mapping[str, Tensor]
    digest: str
    snr_db: float | None = None
    columns: Tensor | None = None
    order: Tensor | None = None
    source: str = ""

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Solved):
            return NotImplemented
        # digests stand for the tensors: torch compares plans often, and reading a whole model each time takes seconds
        ours, theirs = ((s.spec, s.shape, s.digest, s.snr_db) for s in (self, other))
        return ours == theirs

    @property
    def qparams(self) -> QParams:
        """With codes [N, K], on the CPU."""
        return self.read(torch.device("cpu"))

    @property
    def nbytes(self) -> int:
        """Of all that is stored."""
        return sum(t.nbytes for t in (*self.stored.values(), self.columns, self.order) if t is not None)

    def read(self, device: torch.device, site: str = "") -> QParams:
        """With codes [N, K], on that device; only shapes on meta.  Raises PlanError as `tensors` does."""
        codes, qparams = restore(self.tensors(device, site), self.spec, self.shape[-1])
        return replace(qparams, codes=codes)

    def tensors(self, device: torch.device, site: str = "") -> Mapping[str, Tensor]:
        """What is stored, on that device; only shapes on meta.  site: its name, for messages.

        Raises PlanError if it is not what was stored once: a file was damaged. That is looked at on the first read.
        """
        if device.type != "meta" and not self.digest.startswith(self._found):
            raise PlanError(
                f"the codes {list(self.shape)} of {self.source or site or 'a weight'!r} are not those that were "
                f"stored: their digest is {self._found}, and was {self.digest} then; copy the files again, or save it "
                "again with qcompile.save"
            )
        return {name: tensor.to(device) for name, tensor in self.stored.items()}

    @cached_property
    def _found(self) -> str:
        """What the digest of the tensors here begins with; that of the order, which is read without them, follows."""
        return _digest([self.stored[name] for name in sorted(self.stored)])

    def of_weight(self, weight: Tensor, name: str) -> QParams:
        """The qparams for `weight` [N, K], the weight that they were made for; of shapes only where it is on meta.

        name: of the site, for messages.  Raises PlanError for any other weight.
        """
        qparams = self.read(weight.device, name)
        if weight.is_meta:
            return qparams
        assert qparams.codes is not None
        found = float("-inf")
        if self.shape == tuple(weight.shape):
            found = snr_db(weight, dequantize(qparams.codes, qparams))
        if self.snr_db is not None and bool(weight.isnan().all()):
            raise PlanError(
                f"the weight of {name!r} holds nothing but NaN, as weights do whose values were given up: a model that "
                "was loaded or freed was moved or given another dtype since; load it where it is to be, "
                "qcompile.load(folder, model, device=...). What qcompile.save wrote keeps its dtypes: save it from a "
                "model of the dtype that you want"
            )
        # NaN is no number that is large enough
        if self.snr_db is not None and not found >= self.snr_db - SLACK:
            raise PlanError(
                f"the plan holds codes for the weight of {name!r} {list(self.shape)} that are {found:.1f} dB "
                f"from the one {list(weight.shape)} it has now, and were {self.snr_db:.1f} dB from the one they were "
                "chosen for: it changed since; calibrate again with qcompile.calibrate"
            )
        return qparams


def solved(weight: Tensor, qparams: QParams, *, source: str = "") -> Solved:
    """What the weight [N, K] becomes under these qparams: the codes that they hold, or else the nearest."""
    codes = quantize(weight, qparams)
    found = snr_db(weight, dequantize(codes, qparams))
    return stored_as(store(codes, qparams), qparams.spec, tuple(weight.shape), snr_db=found, source=source)


def require_source(site: str, constant: str, stored: Solved) -> None:
    """Raise PlanError if what is stored of a site was made of another constant than its graph asks for."""
    if stored.source not in ("", constant):
        raise PlanError(
            f"the plan stores the weight of {site!r} as made of {stored.source!r}, and the graph asks for "
            f"{constant!r}: passes could not do here what they did when it was saved. Compile the model as a whole, or "
            "in the parts in which it was compiled then; or save it again with qcompile.save"
        )


def stored_as(
    stored: Mapping[str, Tensor],
    spec: Spec,
    shape: tuple[int, ...],
    *,
    snr_db: float | None = None,
    order: Tensor | None = None,
    source: str = "",
) -> Solved:
    """What is stored like this, on any device, moved to the CPU, with its digest; see `Solved`."""
    held = {name: tensor.cpu() for name, tensor in stored.items()}
    digest = _digest([*(held[name] for name in sorted(held)), *([] if order is None else [order])])
    return Solved(spec=spec, shape=shape, stored=held, digest=digest, snr_db=snr_db, order=order, source=source)


def _digest(parts: Iterable[Tensor]) -> str:
    return "".join(f"{_hash(part) & (2**64 - 1):016x}" for part in parts)


def _hash(tensor: Tensor) -> int:
    rows = as_bytes(tensor.reshape(len(tensor) if tensor.dim() > 1 else 1, -1))
    hashes = [_hashes(part) for part in rows.split(max(HASHED // max(rows.shape[1], 1), 1))]
    return int(row_hashes(torch.cat(hashes).view(torch.float32)[None]))


def _hashes(rows: Tensor) -> Tensor:
    # eight bytes are read as two floats
    return row_hashes(pad(rows, (0, -rows.shape[1] % 8)).view(torch.float32))


def equal_qparams(a: QParams | Spec | None, b: QParams | Spec | None) -> bool:
    """Whether both quantize every tensor alike; a Spec alone finds its qparams from each tensor."""
    if not isinstance(a, QParams) or not isinstance(b, QParams):
        return a == b
    return a is b or (
        a.spec == b.spec
        and equal_tensors(a.scale, b.scale)
        and equal_tensors(a.zero, b.zero)
        and equal_tensors(a.levels, b.levels)
        and equal_tensors(a.codes, b.codes)
    )


def equal_tensors(a: Tensor | None, b: Tensor | None) -> bool:
    """Whether both are None, or hold equal values on one device."""
    if a is None or b is None:
        return a is b
    # tensors that are only shapes may hold different values
    return a is b or (not a.is_meta and a.device == b.device and torch.equal(a, b))
