"""Scales that move between an activation and the weights that read it, channel by channel: SmoothQuant's and AWQ's.

Sources: Xiao 2023 (SmoothQuant), section 4, equation 4, and the strengths in `STRENGTHS` as its authors publish them;
Lin 2023 (AWQ), section 3.2: weights that multiply large inputs are made large, so that rounding costs them less.
"""

from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import PurePath

import torch
from torch import Tensor

from qcompile.errors import RecipeError
from qcompile.numerics import exact_exp2

# of a float16 norm weight, a larger factor could leave the range
LARGEST = 2.0**10
SEARCH, MODEL, AWQ = "search", "model", "awq"
_POWERS_OF_TWO = "pow2"

# strength by the name of a model; the first that matches
STRENGTHS: dict[str, float] = {
    "*llama-2-70b*": 0.9,
    "*llama-2*": 0.85,
    "*llama-3*": 0.85,
    "*mixtral*": 0.8,
    "*mistral*": 0.8,
    "*falcon-40b*": 0.7,
    "*falcon*": 0.6,
    "*glm-130b*": 0.75,
    "opt-*": 0.5,
    "bloom*": 0.5,
}


@dataclass(frozen=True, kw_only=True)
class Smooth:
    """How strongly to smooth.  Written "0.5", "search", "model" or "awq", each with "/pow2"; see `parse_smooth`.

    strength: alpha, from 0 (nothing moves but what levels the weights) to 1 (all of the range); "search" takes for each
        activation what gives its readers' outputs the least error, "model" what is known for the model's name; "awq"
        searches likewise among powers of the channels' mean magnitudes, whatever the weights are.
    powers_of_two: scales are powers of two, so that folding changes no bit of the float model.
    """

    strength: float | str = SEARCH
    powers_of_two: bool = False

    def __str__(self) -> str:
        strength = self.strength if isinstance(self.strength, str) else f"{self.strength:g}"
        return f"{strength}/{_POWERS_OF_TWO}" if self.powers_of_two else strength


def parse_smooth(text: str) -> Smooth:
    """The Smooth written as `text`.  Raises RecipeError that says what can be written."""
    strength, *rest = text.split("/")
    if rest not in ([], [_POWERS_OF_TWO]):
        raise RecipeError(f"smooth = {text!r}: after the strength only '/{_POWERS_OF_TWO}' can stand")
    if strength in (SEARCH, MODEL, AWQ):
        return Smooth(strength=strength, powers_of_two=bool(rest))
    try:
        number = float(strength)
    except ValueError:
        number = -1.0
    if not 0 <= number <= 1:
        raise RecipeError(f"smooth = {text!r}: write a strength from 0 to 1, '{SEARCH}', '{MODEL}' or '{AWQ}'")
    return Smooth(strength=number, powers_of_two=bool(rest))


def strength_of(model: str) -> float:
    """The strength known for a model of that name, or of that name in a folder.  Raises RecipeError if none is."""
    for glob, strength in STRENGTHS.items():
        if fnmatchcase(PurePath(model).name.lower(), glob):
            return strength
    raise RecipeError(
        f"smooth = '{MODEL}' knows no strength for {model!r}; it knows {', '.join(STRENGTHS)}: "
        f"write smooth = '{SEARCH}', or a number from 0 to 1"
    )


def smooth_scale(activation: Tensor, weight: Tensor, strength: float, *, powers_of_two: bool = False) -> Tensor:
    """What to divide each channel of an activation by, and multiply the weights' columns with.

    activation: float32 [..., K], largest magnitude of each channel.  weight: float32 [K], largest magnitude of each
        column over all weights that read the activation.
    Returns float32 [..., K], within 1 / LARGEST and LARGEST; 1 for a channel that is dead on either side.
    """
    dead = (activation == 0) | (weight == 0)
    scale = activation.double().pow(strength) / weight.double().pow(1 - strength)
    scale = torch.where(dead, 1.0, scale).clamp(1 / LARGEST, LARGEST)
    return _kept(scale, powers_of_two)


def awq_scale(magnitude: Tensor, power: float, *, powers_of_two: bool = False) -> Tensor:
    """What to divide each channel of an activation by: a power of its magnitude, from 0 (nothing moves) to 1.

    magnitude: float32 [K], the mean of each channel's.
    Returns float32 [K] around 1, within 1 / LARGEST and LARGEST; 1 for a dead channel.
    """
    dead = magnitude == 0
    scale = torch.where(dead, 1.0, magnitude.double()).pow(power)
    alive = scale[~dead] if not bool(dead.all()) else scale
    scale = torch.where(dead, 1.0, scale / (alive.amax() * alive.amin()).sqrt()).clamp(1 / LARGEST, LARGEST)
    return _kept(scale, powers_of_two)


def _kept(scale: Tensor, powers_of_two: bool) -> Tensor:
    return (exact_exp2(scale.log2().round()) if powers_of_two else scale).float()
