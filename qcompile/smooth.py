"""SmoothQuant's scales: how much of an activation's range moves into the weights that read it, channel by channel.

Source: Xiao 2023 (SmoothQuant), section 4, equation 4; the strengths in `STRENGTHS` are those that its authors publish.
"""

from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import PurePath

import torch
from torch import Tensor

from qcompile.errors import RecipeError

# of a float16 norm weight, a larger factor could leave the range
LARGEST = 2.0**10
SEARCH, MODEL = "search", "model"
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
    """How strongly to smooth.  Written "0.5", "search" or "model", each with "/pow2"; see `parse_smooth`.

    strength: alpha, from 0 (nothing moves but what levels the weights) to 1 (all of the range); "search" takes for each
        activation what gives its readers' outputs the least error, "model" what is known for the model's name.
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
    if strength in (SEARCH, MODEL):
        return Smooth(strength=strength, powers_of_two=bool(rest))
    try:
        number = float(strength)
    except ValueError:
        number = -1.0
    if not 0 <= number <= 1:
        raise RecipeError(f"smooth = {text!r}: write a strength from 0 to 1, '{SEARCH}' or '{MODEL}'")
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
    if powers_of_two:
        scale = torch.exp2(scale.log2().round())
    return scale.float()
