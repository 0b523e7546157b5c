import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from qcompile.channels import numbered, reshaped, shrunk, tied

SIZES = st.lists(st.sampled_from([1, 2, 3, 4]), min_size=1, max_size=4)


def same(found: Tensor, whole: Tensor) -> bool:
    return torch.equal(found.expand(whole.shape), whole)


@given(sizes=SIZES, order=st.randoms(use_true_random=False), varying=st.sets(st.integers(0, 3)))
def test_reshaped_is_reshape(sizes: list[int], order: object, varying: set[int]) -> None:
    """Of numbers that differ along some dimensions only, into any grouping of the same elements."""
    small = [size if d in varying else 1 for d, size in enumerate(sizes)]
    channels = torch.randint(9, small)
    whole = channels.expand(sizes)
    factors = [f for size in sizes for f in ((2, 2) if size == 4 else (size,))]
    after: list[int] = []
    for factor in factors:
        if after and order.random() < 0.5:
            after[-1] *= factor
        else:
            after.append(factor)
    after.insert(order.randrange(len(after) + 1), 1)
    found = reshaped(channels, sizes, after)
    assert same(found, whole.reshape(after))
    assert found.numel() <= whole.numel()


def test_what_stays_the_same_is_of_size_one() -> None:
    assert shrunk(torch.arange(3).expand(5, 1000, 3)).shape == (1, 1, 3)
    assert shrunk(torch.arange(3).repeat(5, 2, 1)).shape == (1, 1, 3)
    assert shrunk(torch.zeros(2, 3, dtype=torch.int64)).shape == (1, 1)
    assert shrunk(torch.zeros(2, 0, dtype=torch.int64)).shape == (1, 0)
    assert numbered(3, 4).shape == (1, 1, 4)


def test_a_tied_scale_is_the_smallest_that_covers() -> None:
    scale = torch.tensor([1.0, 5.0, 2.0, 3.0, 0.5, 4.0])
    channels = torch.tensor([0, 2, 0, 2, 7, 8])
    found = tied(scale, channels)
    assert found.tolist() == [2.0, 5.0, 2.0, 5.0, 0.5, 4.0]
    assert torch.equal(tied(found, channels), found)
    assert torch.equal(tied(scale, torch.arange(6)), scale)
    assert tied(scale[:0], channels[:0]).numel() == 0
