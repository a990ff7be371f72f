import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shards.packing.plan import difference, shuffled


def splitmix64(state):
    """The generator as its authors wrote it, one number at a time."""
    mask = (1 << 64) - 1
    z = (state + 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return z ^ (z >> 31)


@given(num_rows=st.integers(0, 200), seed=st.integers(0, 2**63))
def test_the_shuffle_is_that_of_splitmix64(num_rows, seed):
    mask, gamma = (1 << 64) - 1, 0x9E3779B97F4A7C15
    start = splitmix64(seed * gamma & mask)
    keys = [splitmix64((start + row) * gamma & mask) for row in range(num_rows)]
    assert shuffled(num_rows, seed).tolist() == sorted(range(num_rows), key=keys.__getitem__)


def test_the_shuffle_never_changes():
    assert shuffled(10, 0).tolist() == [6, 2, 0, 5, 1, 9, 8, 4, 7, 3]
    assert shuffled(10, 1).tolist() == [7, 8, 6, 4, 3, 0, 9, 5, 1, 2]


@pytest.mark.parametrize("seed", range(5))
def test_the_shuffle_is_uniform_enough(seed):
    order = shuffled(20_000, seed).astype(np.int64)
    assert sorted(order.tolist()) == list(range(20_000))
    # Displacements and neighbors of a random permutation: both correlations are within five standard errors of 0.
    rows = np.arange(20_000)
    assert abs(np.corrcoef(rows, order)[0, 1]) < 5 / np.sqrt(20_000)
    assert abs(np.corrcoef(order[1:], order[:-1])[0, 1]) < 5 / np.sqrt(20_000)


def test_differences_are_told_by_option():
    assert difference({"seed": 1, "sources": ["a"]}, {"seed": 1, "sources": ("a",)}) == ""
    assert difference({"min_size": 1}, {"min_size": 2, "new": 3}) == "--min-size was 1, is 2, --new was unset, is 3"
