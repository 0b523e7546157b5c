"""Scales and minima that are integers under float16 of several groups, as kernels of `widths` read them."""

import torch
from torch import Tensor
from torch.nn.functional import pad

from qcompile.numerics import QParams
from qcompile.packing import unpack
from qcompile.spec import SCALES, Spec

# columns of a group
GROUPS = (16, 32, 64, 128)


def groups_of_integers(spec: Spec, columns: int) -> int:
    """Groups of a block of so many columns whose scales stay integers under one float16; 0 if they do not."""
    group, shared = spec.granularity.columns, SCALES[spec.scale].shared
    return columns // group if shared and group in GROUPS and group * shared % columns == 0 else 0


def pack_integers(qparams: QParams, K: int, rows: int, columns: int) -> Tensor:
    """Words as `widths` states, of what qparams of a weight [N, K] store.  rows, columns: of a block."""
    kind, stored, group = SCALES[qparams.spec.scale], qparams.stored, qparams.spec.granularity.columns
    blocks = -(-K // columns)
    above = torch.arange(blocks, device=qparams.scale.device) * columns // (group * kind.shared)

    def fours(name: str, count: int) -> Tensor:
        """[N, blocks, words]"""
        found = unpack(stored[name], kind.code_bits, count * kind.shared, kind.signed)
        groups = found[:, : blocks * columns // group].to(torch.int32) & 0xFF
        groups = pad(groups, (0, blocks * columns // group - groups.shape[1])).unflatten(1, (blocks, -1))
        parts = pad(groups, (0, -groups.shape[2] % 4)).unflatten(2, (-1, 4))
        # the fields do not overlap: their sum is their union
        return (parts << torch.arange(0, 32, 8, device=parts.device, dtype=torch.int32)).sum(-1, dtype=torch.int32)

    def half(name: str) -> Tensor:
        return stored[name][:, above].contiguous().view(torch.int16).to(torch.int32) & 0xFFFF

    outer = half("outer")
    planes = [fours("code", stored["outer"].shape[1])]
    if qparams.zero is not None:
        outer = outer | (half("minimum_outer") << 16)
        planes.append(fours("minimum_code", stored["outer"].shape[1]))
    words = torch.cat([outer[..., None], *planes], -1)  # [N, blocks, P]
    words = pad(words, (0, 0, 0, 0, 0, -len(words) % rows))
    return words.view(-1, rows, *words.shape[1:]).permute(0, 2, 3, 1).contiguous()
