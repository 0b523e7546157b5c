"""Solvers: how a weight's qparams are chosen, by name. A solver is a file here and a line in `SOLVERS`."""

from functools import partial
from typing import Protocol

from torch import Tensor

from qcompile.numerics import QParams
from qcompile.solvers.awq import solve_awq
from qcompile.solvers.gptq import DAMPING, solve_gptq
from qcompile.solvers.hqq import solve_hqq
from qcompile.solvers.imatrix import solve_imatrix
from qcompile.solvers.kquant import solve_kquant
from qcompile.solvers.moments import Moments
from qcompile.solvers.mse import solve_mse
from qcompile.solvers.refit import refitted
from qcompile.solvers.round import solve_round
from qcompile.spec import Spec


class Solver(Protocol):
    """The qparams of a weight [N, K].

    importance: float32 [K], what errors of each column cost; None for all alike.
    """

    def __call__(self, weight: Tensor, spec: Spec, importance: Tensor | None = None) -> QParams: ...


class InTurn(Protocol):
    """The qparams of a weight [N, K], with codes, by the second moments of what it multiplies."""

    def __call__(self, weight: Tensor, spec: Spec, importance: Tensor | Moments | None = None) -> QParams: ...


def solve_gptq_refitted(weight: Tensor, spec: Spec, importance: Tensor | Moments | None = None) -> QParams:
    """Codes of `solve_gptq`, and then the scales that fit these best."""
    moments = Moments.of(importance, weight)
    return refitted(weight, solve_gptq(weight, spec, moments), moments, DAMPING)


# those that are run while the model runs with the weights before quantized
IN_TURN: dict[str, InTurn] = {
    "awq": solve_awq,
    "gptq": solve_gptq_refitted,
    "gptq-unordered": partial(solve_gptq, ordered=False),
}
SOLVERS: dict[str, Solver] = {
    "round": solve_round,
    "mse": solve_mse,
    "imatrix": solve_imatrix,
    "hqq": solve_hqq,
    "kquant": solve_kquant,
    **IN_TURN,
}
# those that ask for the importance of columns, which calibration finds
WEIGHTED = frozenset({"imatrix"})
