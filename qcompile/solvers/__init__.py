"""Solvers: how a weight's qparams are chosen, by name. A solver is a file here and a line in `SOLVERS`."""

from collections.abc import Callable

from torch import Tensor

from qcompile.numerics import QParams
from qcompile.solvers.mse import solve_mse
from qcompile.solvers.round import solve_round
from qcompile.spec import Spec

Solver = Callable[[Tensor, Spec], QParams]

SOLVERS: dict[str, Solver] = {
    "round": solve_round,
    "mse": solve_mse,
}
