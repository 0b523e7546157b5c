"""How much of a tensor is worked on at once where several passes follow one another."""

from torch import Tensor

# elements: to launch a pass over less takes a GPU longer than the pass
LAUNCHED = 2**24


def step_size(x: Tensor, chunk: int) -> int:
    """Elements of one step over x; chunk: on the CPU, where they are to be found in a cache by the next pass."""
    return LAUNCHED if x.is_cuda else chunk
