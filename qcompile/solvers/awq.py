"""AWQ's clip: each tile ends where the outputs lose least, as far as the columns of the tile make them.

Its scales are a fold, chosen before (`qcompile.smooth`). Where the original tries ten clips on sampled rows, ours are
those of `mse`, weighed by the second moments of all rows.
Source: Lin 2023 (AWQ), and its code for the clip.
"""

from dataclasses import replace

import torch
from torch import Tensor

from qcompile.numerics import QParams, code_dtype, quantize, tiles
from qcompile.solvers.moments import Moments
from qcompile.solvers.mse import solve_mse
from qcompile.solvers.round import solve_round
from qcompile.spec import Spec


def solve_awq(weight: Tensor, spec: Spec, importance: Tensor | Moments | None = None) -> QParams:
    """Scales (and zero points) whose clip costs the outputs least, tile by tile, and the nearest codes.

    weight: [N, K]; on meta, shapes only.  importance: what errors of two columns cost together; of [K] what each costs
        alone, None for all alike.  Raises SpecError if the spec's tiles do not divide the weight.
    """
    if weight.is_meta:
        return replace(solve_round(weight, spec), codes=torch.empty_like(weight, dtype=code_dtype(spec)))
    # refuses what the tiles do not divide
    tiles(weight, spec.granularity)
    blocks = Moments.of(importance, weight).blocks(spec.granularity.columns or weight.shape[1])
    found = solve_mse(weight, spec, blocks.to(weight.device))
    return replace(found, codes=quantize(weight, found))
