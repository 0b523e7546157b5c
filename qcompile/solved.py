"""Qparams as a plan keeps them: alike or not, on a device, and of the very weight that they were chosen for."""

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.functional import pad

from qcompile.errors import PlanError
from qcompile.numerics import QParams, dequantize, on_device, snr_db
from qcompile.sample import row_hashes
from qcompile.spec import Spec

# in dB, what codes may lose on a weight: it may have moved by a third of what rounding it to them cost, so that a
# model may change its dtype
SLACK = 0.5


@dataclass(frozen=True, kw_only=True, eq=False)
class Solved:
    """What a solver made of a weight and of data together, which cannot be found from the weight alone.

    qparams: on the CPU, with codes [N, K].  snr_db: signal-to-noise ratio of what they stand for, to the weight.
    """

    qparams: QParams
    snr_db: float

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Solved):
            return NotImplemented
        return self.snr_db == other.snr_db and equal_qparams(self.qparams, other.qparams)

    @cached_property
    def digest(self) -> str:
        """Tells apart what was made of one weight by several data."""
        codes = self.qparams.codes
        assert codes is not None
        # four codes are read as one float
        flat = codes.view(torch.uint8).flatten()
        words = pad(flat, (0, -len(flat) % 4)).view(torch.float32)
        hashes = [row_hashes(part[None].float()) for part in (words, self.qparams.scale.flatten())]
        return "".join(f"{int(found) & (2**64 - 1):016x}" for found in hashes)

    def of_weight(self, weight: Tensor, name: str) -> QParams:
        """The qparams for `weight` [N, K], the weight that they were made for; of shapes only where it is on meta.

        name: of the site, for messages.  Raises PlanError for any other weight.
        """
        qparams = on_device(self.qparams, weight.device)
        if weight.is_meta:
            return qparams
        assert qparams.codes is not None
        found = float("-inf")
        if qparams.codes.shape == weight.shape:
            found = snr_db(weight, dequantize(qparams.codes.to(weight.device), qparams))
        # NaN is no number that is large enough
        if not found >= self.snr_db - SLACK:
            raise PlanError(
                f"the plan holds codes for the weight of {name!r} {list(qparams.codes.shape)} that are {found:.1f} dB "
                f"from the one {list(weight.shape)} it has now, and were {self.snr_db:.1f} dB from the one they were "
                "chosen for: it changed since; calibrate again with qcompile.calibrate"
            )
        return qparams


def solved(weight: Tensor, qparams: QParams) -> Solved:
    """The qparams, which hold codes, as those of this weight."""
    assert qparams.codes is not None
    found = snr_db(weight, dequantize(qparams.codes, qparams))
    qparams = replace(on_device(qparams, torch.device("cpu")), codes=qparams.codes.cpu())
    return Solved(qparams=qparams, snr_db=found)


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
