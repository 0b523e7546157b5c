"""A quantized tensor as it is stored: in packs of kernels that read nothing else, in plans, and in files."""

from collections.abc import Mapping

import torch
from torch import Tensor

from qcompile.numerics import QParams, code_dtype
from qcompile.packing import pack, unpack
from qcompile.scales import stored_minimum, stored_scale
from qcompile.spec import Spec, Zero

_SCALE = "scale_"


def store(codes: Tensor, qparams: QParams) -> dict[str, Tensor]:
    """Dense bytes of the codes [..., K] as "weight", and of their qparams what they are found from.

    What is kept of scales and minima is called "scale_" and its name in `qcompile.scales`; zero points are bytes.
    """
    stored = {"weight": pack(codes, qparams.spec.format.bits)}
    stored |= {f"{_SCALE}{name}": tensor.contiguous() for name, tensor in qparams.stored.items()}
    if qparams.zero is not None and qparams.spec.zero is Zero.CODE:
        stored["zero"] = qparams.zero.to(torch.uint8)
    return stored | ({} if qparams.levels is None else {"levels": qparams.levels})


def restore(stored: Mapping[str, Tensor], spec: Spec, length: int) -> tuple[Tensor, QParams]:
    """The codes and their qparams that `store` stored.  length: K."""
    kept = {name.removeprefix(_SCALE): tensor for name, tensor in stored.items() if name.startswith(_SCALE)}
    codes = unpack(stored["weight"], spec.format.bits, length, code_dtype(spec) is torch.int8)
    groups = length // (spec.granularity.columns or length)
    scale = stored_scale(kept, spec.scale, groups)
    zero = stored["zero"].float() if "zero" in stored else None
    if spec.zero is Zero.MINIMUM:
        zero = stored_minimum(kept, spec.scale, groups)
    return codes, QParams(spec=spec, scale=scale, zero=zero, levels=stored.get("levels"), stored=kept)
