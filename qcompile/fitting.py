"""Whether a spec can be given to a weight, and what to take where it cannot."""

from dataclasses import replace
from math import gcd

import torch

from qcompile.errors import SpecError, WeightError
from qcompile.folds import is_finite
from qcompile.graph import Op
from qcompile.sites import Site
from qcompile.spec import ALL, SCALES, Spec, Zero, by_channel, parse_granularity

# in smaller groups, the scales of 4-bit codes take half as much as the codes or more
SMALLEST_GROUP = 16


def check_weight(site: Site) -> None:
    """Raise WeightError for a weight that is not of floats, or not finite."""
    weight = site.weight
    where = f"the weight of {site.name!r} {list(weight.shape)}"
    if not weight.is_floating_point():
        raise WeightError(
            f"{where} has dtype {str(weight.dtype).removeprefix('torch.')}, not a floating one: it is quantized "
            "already; exclude it with a rule without specs, or load the float model"
        )
    if not is_finite(weight):
        bad = weight.numel() - int(torch.isfinite(weight).sum())
        raise WeightError(
            f"{where} holds {bad} NaN or Inf among {weight.numel()} values: load the checkpoint again, "
            "or exclude the site with a rule without specs"
        )


def check_tiles(site: Site, spec: Spec, what: str) -> None:
    """Raise SpecError if the tiles of the spec do not divide the site's weight or input.  what: of both is meant."""
    if what == "input" and (spec.zero in (Zero.FULL, Zero.MINIMUM) or SCALES[spec.scale].code_bits):
        raise SpecError(
            f"{spec} is for weights, and was given to the input of {site.name!r}: take 'int8/token' or "
            "'int8/token/asym', or leave the input as it is"
        )
    n, k = site.weight.shape
    rows, columns = spec.granularity.rows, spec.granularity.columns
    if site.op is Op.CONV and columns != ALL:
        raise SpecError(
            f"{spec} has groups along K, got the {what} of convolution {site.name!r}, which has one scale a channel or "
            f"a tensor; {by_channel(spec)} fits: write a rule with it, or exclude the site with a rule without specs"
        )
    if (columns == ALL or k % columns == 0) and (rows in (ALL, 1) or n % rows == 0):
        return
    needs = f"K to divide by {columns}" if rows == 1 else f"N and K to divide by {rows} and {columns}"
    raise SpecError(
        f"{spec} needs {needs}, got [N, K] = {[n, k]} at the {what} of {site.name!r}; "
        f"{_fitting(spec, n, k)} fits: write a rule with it, or exclude the site with a rule without specs"
    )


def _fitting(spec: Spec, n: int, k: int) -> Spec:
    """The spec with the largest tile that divides [n, k] and the spec's own tile."""
    tile = spec.granularity
    rows, columns = gcd(n, tile.rows), gcd(k, tile.columns)
    if columns < SMALLEST_GROUP:
        return by_channel(spec)
    name = f"{tile.name[0]}{columns}" if tile.rows == 1 else f"b{rows}x{columns}"
    return replace(spec, granularity=parse_granularity(name))
