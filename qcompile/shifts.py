"""Octaves by which channels of an activation are raised before it is quantized, and the weights' exponents lowered.

    Q(x[:, k] * 2**shift[k]) * 2**-shift[k]: the grid of channel k is finer by shift[k] octaves

so that all channels reach about as far into a grid that one scale serves. Multiplying by powers of two is exact, so the
factor moves into what makes the activation, and its inverse into the exponents of the weight's numbers, after these
were chosen: nothing is left to do while the model runs.
Source: LLM-FP4 (Liu 2023), section 3.3, pre-shifted exponent bias; the paper's limit is 2**e - 1 octaves.
"""

from torch import Tensor

from qcompile.channels import tied

# octaves by which the largest channels are left out of account: how hard they may be clipped, and around the best
COARSE = (0.0, 1.0, 2.0, 3.0, 4.0, 5.0)
FINE = (-0.5, -0.25, 0.25, 0.5)


def shift_of(amax: Tensor, channels: Tensor | None, most: int, left_out: float) -> Tensor:
    """Octaves by which channels are raised to reach as far as one `left_out` octaves below the largest; int64 [K].

    amax: float32 [K], largest magnitude of each channel.  channels: int64 [K], what must share a shift; None if nothing
    must.  Shifts are from 0 to `most`; a channel in which nothing was seen has none, as other data may be large there.
    """
    reach = amax if channels is None else tied(amax, channels)
    below = (reach.amax() / reach).double().log2()
    return below.nan_to_num(nan=0.0, posinf=0.0).sub(left_out).clamp(0, most).round().long()
