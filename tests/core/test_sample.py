"""The sample of rows: the same whatever the order and the cut, with true multiplicities."""

import pytest
import torch
from torch import Tensor

from qcompile.sample import ELEMENTS, ROWS, Sample, merge_samples, row_hashes, sample_rows, sample_size


def sample(x: Tensor) -> Sample:
    return sample_rows(x, row_hashes(x.float()))


def assert_equal(a: Sample, b: Sample) -> None:
    assert torch.equal(a.hashes, b.hashes)
    assert torch.equal(a.rows, b.rows)
    assert torch.equal(a.counts, b.counts)


def repeated(seed: int, k: int = 5) -> Tensor:
    """700 rows, of which about 400 are distinct."""
    g = torch.Generator().manual_seed(seed)
    return torch.randn(600, k, generator=g)[torch.randint(600, (700,), generator=g)]


@pytest.mark.parametrize("k", [1, 2, 5, 64])
@pytest.mark.parametrize("seed", range(3))
def test_any_cut_in_any_order_gives_the_sample_of_the_whole(seed: int, k: int) -> None:
    x = repeated(seed, k)
    g = torch.Generator().manual_seed(seed)
    whole = sample(x)
    assert len(whole.rows) == ROWS
    for size in (1, 7, 300):
        parts = [sample(part) for part in x[torch.randperm(len(x), generator=g)].split(size)]
        found = parts[0]
        for part in parts[1:]:
            found = merge_samples(part, found)
        assert_equal(found, whole)


def test_few_rows_are_all_kept_with_how_often_they_came() -> None:
    x = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0], [1.0, 2.0, 3.0], [0.0, 0.0, 0.0], [1.0, 2.0, 3.0]])
    found = sample(x)
    seen = {tuple(row): int(n) for row, n in zip(found.rows.tolist(), found.counts, strict=True)}
    assert seen == {(1.0, 2.0, 3.0): 3, (4.0, 5.0, 6.0): 1, (0.0, 0.0, 0.0): 1}


def test_counts_are_those_of_the_whole_data() -> None:
    x = repeated(7)
    found = sample(x)
    assert bool((found.hashes[1:] > found.hashes[:-1]).all())
    for row, n in zip(found.rows, found.counts, strict=True):
        assert int((x == row).all(1).sum()) == int(n)


def test_rows_that_differ_only_in_order_or_place_differ_in_hash() -> None:
    x = torch.cat([torch.eye(97), -torch.eye(97), torch.zeros(1, 97), torch.full((1, 97), 1.0)])
    assert row_hashes(x).unique().numel() == len(x)
    # a narrow float leaves the low half of a word zero
    x = torch.arange(2.0**12).bfloat16().float().unique()[:, None]
    assert row_hashes(x).unique().numel() == len(x)


def test_the_sample_is_a_fair_one() -> None:
    x = torch.randn(20000, 3, generator=torch.Generator().manual_seed(0))
    x[:, 0] = torch.arange(20000) / 20000
    rows = sample(x).rows
    # 256 draws: means of a uniform and of normal variables within four deviations
    assert float(rows[:, 0].mean()) == pytest.approx(0.5, abs=4 * 12**-0.5 / 16)
    assert float(rows[:, 1].mean()) == pytest.approx(0.0, abs=4 / 16)


@pytest.mark.parametrize("offset", [0, 1])
def test_a_hash_does_not_depend_on_memory(offset: int) -> None:
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    buffer = torch.zeros(40)
    shifted = buffer[offset : offset + 24].view(6, 4).copy_(x)
    assert torch.equal(row_hashes(shifted), row_hashes(x))
    assert torch.equal(row_hashes(x.T.contiguous().T), row_hashes(x))
    assert torch.equal(row_hashes(x[2:3]), row_hashes(x)[2:3])


def test_wide_rows_are_fewer() -> None:
    assert sample_size(1) == sample_size(4096) == ROWS
    assert sample_size(14336) == ELEMENTS // 14336
    assert sample_size(2**22) == 1


def test_a_single_row_of_any_stride_has_its_hash() -> None:
    x = torch.randn(7, 5, generator=torch.Generator().manual_seed(0))
    assert torch.equal(row_hashes(x[6:, :4]), row_hashes(x[6:, :4].clone()))
