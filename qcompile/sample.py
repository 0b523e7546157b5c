"""A few rows of an activation, the same whatever the order of the data: those of smallest hash of their content.

Source: bottom-k sampling (Cohen and Kaplan 2007).
"""

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import pad

ROWS = 256
# of all rows together, so that very wide activations keep fewer
ELEMENTS = 2**20


@dataclass(frozen=True, kw_only=True, eq=False)
class Sample:
    """Distinct rows, each with how often it came.

    rows: float32 [r, K]. counts: int64 [r]. hashes: int64 [r], ascending; of two rows with one hash the first is kept.
    """

    rows: Tensor
    counts: Tensor
    hashes: Tensor


def sample_size(k: int) -> int:
    """Most rows that a sample of K channels keeps."""
    return max(1, min(ROWS, ELEMENTS // k))


def sample_rows(rows: Tensor, hashes: Tensor, *, beside: Sample | None = None) -> Sample:
    """Sample of rows [R, K] with these hashes [R].  beside: what it will be merged with, which may leave few in it."""
    size = sample_size(rows.shape[1])
    if beside is not None and len(beside.hashes) == size:
        small = (hashes <= beside.hashes[-1]).nonzero().flatten()
        rows, hashes = rows[small], hashes[small]
    place, counts = _smallest(hashes, torch.ones_like(hashes), size)
    return Sample(rows=rows.index_select(0, place).float(), counts=counts, hashes=hashes[place])


def merge_samples(a: Sample, b: Sample) -> Sample:
    """Sample of the rows of both.  a, b: of the same K."""
    if len(b.hashes) == 0:
        return a
    hashes = torch.cat([a.hashes, b.hashes])
    place, counts = _smallest(hashes, torch.cat([a.counts, b.counts]), sample_size(a.rows.shape[1]))
    rows = torch.cat([a.rows, b.rows]).index_select(0, place)
    return Sample(rows=rows, counts=counts, hashes=hashes[place])


def row_hashes(rows: Tensor) -> Tensor:
    """A hash of each row's bits.  rows: float32 [R, K].  Returns int64 [R], the same wherever the row stands."""
    if rows.shape[1] % 2:
        rows = pad(rows, (0, 1))
    # pairs of floats begin at even places only; a single row counts as contiguous whatever its stride is
    paired = rows.storage_offset() % 2 == 0 and rows.stride(0) % 2 == 0
    rows = rows.contiguous() if paired else rows.clone(memory_format=torch.contiguous_format)
    words = rows.view(torch.int64)
    # a product keeps what is low of a factor, and the bits of round numbers are high
    low = words >> 32
    low ^= words
    low *= _factors(words.shape[1], words.device)
    mixed = low.sum(1)
    # the finalizer of splitmix64 (Steele 2014): it is a bijection, and brings the high bits, which are mixed, low
    for right, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
        mixed = (mixed ^ _shifted(mixed, right)) * factor
    return mixed ^ _shifted(mixed, 31)


def _shifted(x: Tensor, right: int) -> Tensor:
    """Logical shift to the right of int64."""
    return (x >> right) & ((1 << (64 - right)) - 1)


@cache
def _factors(count: int, device: torch.device) -> Tensor:
    """Odd int64 factors that look random: multiples of the golden ratio, squared and mixed.  Source: splitmix64."""
    x = (torch.arange(count, dtype=torch.int64) + 1) * -0x61C8864680B583EB
    for right, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
        x = (x ^ _shifted(x, right)) * factor
    return ((x ^ _shifted(x, 31)) | 1).to(device)


def _smallest(hashes: Tensor, counts: Tensor, limit: int) -> tuple[Tensor, Tensor]:
    """Where the `limit` smallest distinct hashes stand first, ascending, and the sums of their counts."""
    ordered, order = hashes.sort(stable=True)
    first = torch.ones_like(ordered, dtype=torch.bool)
    first[1:] = ordered[1:] != ordered[:-1]
    starts = first.nonzero().flatten()
    ends = torch.cat([starts[1:], starts.new_tensor([len(hashes)])])
    below = pad(counts[order].cumsum(0), (1, 0))
    return order[starts[:limit]], (below[ends] - below[starts])[:limit]
