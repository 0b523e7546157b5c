"""How kernels with one group of warps that copies and two that multiply share a multiprocessor of Hopper."""

from dataclasses import dataclass
from typing import Any

# units of 64 rows of the weight, a tile: groups of warps that multiply; the kernels name two
UNITS = 2
# of a group that multiplies
WARPS = 4


@dataclass(frozen=True, kw_only=True)
class Registers:
    """Of a thread: of the second group that multiplies, and of those that copy; the first group gets what is left.

    launched: of every thread until then, None for as many as there are.
    """

    multiplying: int
    copying: int
    launched: int | None = None

    @property
    def options(self) -> dict[str, Any]:
        """For Triton's compiler."""
        return {"num_warps": WARPS} | ({} if self.launched is None else {"maxnreg": self.launched})


# by the programs of a multiprocessor: 65536 registers, by 128 threads of each of three kinds
REGISTERS = {
    1: Registers(multiplying=232, copying=40),
    2: Registers(multiplying=104, copying=24, launched=80),
}
