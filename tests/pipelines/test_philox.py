import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.plan.philox import philox4x64, stream_words, uniform

WORD = st.integers(0, 2**64 - 1)
MASK = 2**64 - 1

# Known answers of the authors' own test suite (Random123, kat_vectors, philox4x64 10).
GOLDEN = [
    ((0, 0, 0, 0), (0, 0), (0x16554D9ECA36314C, 0xDB20FE9D672D0FDC, 0xD7E772CEE186176B, 0x7E68B68AEC7BA23B)),
    (
        (MASK, MASK, MASK, MASK),
        (MASK, MASK),
        (0x87B092C3013FE90B, 0x438C3C67BE8D0224, 0x9CC7D7C69CD777B6, 0xA09CAEBF594F0BA0),
    ),
    (
        (0x243F6A8885A308D3, 0x13198A2E03707344, 0xA4093822299F31D0, 0x082EFA98EC4E6C89),
        (0x452821E638D01377, 0xBE5466CF34E90C6C),
        (0xA528F45403E61D95, 0x38C72DBD566E9788, 0xA5A1610E72FD18B5, 0x57BD43B5E52B7FE6),
    ),
]


def numpy_words(counter, key) -> np.ndarray:
    whole = (sum(word << 64 * place for place, word in enumerate(counter)) - 1) % (1 << 256)
    start = np.array([whole >> shift & MASK for shift in (0, 64, 128, 192)], dtype=np.uint64)
    return np.random.Philox(key=np.array(key, dtype=np.uint64), counter=start).random_raw(4)


@pytest.mark.parametrize(("counter", "key", "words"), GOLDEN)
def test_the_known_answers(counter, key, words):
    assert philox4x64(counter, key).tolist() == list(words)


@settings(deadline=None)
@given(st.tuples(WORD, WORD, WORD, WORD), st.tuples(WORD, WORD))
def test_equal_to_numpys_own(counter, key):
    assert philox4x64(counter, key).tolist() == numpy_words(counter, key).tolist()


def test_counters_broadcast():
    blocks, views = np.arange(5)[:, None], np.arange(3)
    table = philox4x64((blocks, 7, views, 0), (1, 2))
    assert table.shape == (5, 3, 4)
    for block in range(5):
        for view in range(3):
            assert table[block, view].tolist() == numpy_words((block, 7, view, 0), (1, 2)).tolist()


@given(st.integers(0, 50), st.tuples(WORD, WORD, WORD), st.tuples(WORD, WORD))
@settings(deadline=None)
def test_a_stream_is_the_blocks_in_a_row(num_words, counter, key):
    blocks = philox4x64((np.arange(-(-num_words // 4)), *counter), key)
    assert stream_words(num_words, counter=counter, key=key).tolist() == blocks.ravel()[:num_words].tolist()


def test_uniform_is_in_the_half_open_interval():
    edges = uniform(np.array([0, MASK], dtype=np.uint64))
    assert edges[0] == 0
    assert edges[1] == 1 - 2.0**-53
