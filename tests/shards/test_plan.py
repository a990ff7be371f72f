import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shards.packing import shuffle
from shards.packing.plan import difference
from shards.packing.shuffle import rows_at, shuffle_keys


def splitmix64(state):
    """The generator as its authors wrote it, one number at a time."""
    mask = (1 << 64) - 1
    z = (state + 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return z ^ (z >> 31)


def shuffled(num_rows, seed):
    """The whole shuffle, as every version has made it."""
    mask, gamma = (1 << 64) - 1, 0x9E3779B97F4A7C15
    start = splitmix64(seed * gamma & mask)
    keys = [splitmix64((start + row) * gamma & mask) for row in range(num_rows)]
    return sorted(range(num_rows), key=keys.__getitem__)


@given(st.data())
def test_the_shuffle_is_that_of_splitmix64_at_any_of_its_positions(data):
    num_rows, seed = data.draw(st.integers(1, 200)), data.draw(st.integers(0, 2**63))
    positions = data.draw(st.lists(st.integers(0, num_rows - 1)))
    whole = shuffled(num_rows, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shuffle, "_CHUNK_ROWS", data.draw(st.integers(1, 60)))
        # Few bins, so that some hold several rows.
        patch.setattr(shuffle, "_BIN_BITS", data.draw(st.sampled_from([1, 3, 16])))
        found = rows_at(np.array(positions, dtype=np.int64), num_rows, seed)
    assert found.tolist() == [whole[position] for position in positions]


@given(rows=st.lists(st.integers(0, 2**40), unique=True), seed=st.integers(0, 2**63))
def test_no_two_rows_have_one_key(rows, seed):
    keys = shuffle_keys(np.array(rows, dtype=np.uint64), seed)
    assert len(set(keys.tolist())) == len(rows)


def test_the_shuffle_never_changes():
    assert rows_at(np.arange(10), 10, 0).tolist() == [6, 2, 0, 5, 1, 9, 8, 4, 7, 3]
    assert rows_at(np.arange(10), 10, 1).tolist() == [7, 8, 6, 4, 3, 0, 9, 5, 1, 2]


@pytest.mark.parametrize("seed", range(5))
def test_the_shuffle_is_uniform_enough(seed):
    order = rows_at(np.arange(20_000), 20_000, seed)
    assert sorted(order.tolist()) == list(range(20_000))
    # Displacements and neighbors of a random permutation: both correlations are within five standard errors of 0.
    rows = np.arange(20_000)
    assert abs(np.corrcoef(rows, order)[0, 1]) < 5 / np.sqrt(20_000)
    assert abs(np.corrcoef(order[1:], order[:-1])[0, 1]) < 5 / np.sqrt(20_000)


def test_differences_are_told_by_option():
    assert difference({"seed": 1, "sources": ["a"]}, {"seed": 1, "sources": ("a",)}) == ""
    assert difference({"min_size": 1}, {"min_size": 2, "new": 3}) == "--min-size was 1, is 2, --new was unset, is 3"
