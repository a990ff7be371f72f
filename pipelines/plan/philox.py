"""Philox4x64-10 in numpy: random words by position instead of by history.

Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011). A word is a pure function of a 128-bit key and a
256-bit counter, so the words of any sample can be had without those of the samples before it.
"""

import numpy as np
import numpy.typing as npt

__all__ = ["philox4x64", "stream_words", "uniform"]

Words = npt.NDArray[np.uint64]

_ROUNDS = 10
_MULTIPLIERS = (0xD2E7470EE14C6C93, 0xCA5A826395121157)
_KEY_STEPS = (0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B)
_WORD_MASK = (1 << 64) - 1
_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)
_MANTISSA_SHIFT = np.uint64(11)


def philox4x64(
    counter: tuple[npt.ArrayLike, npt.ArrayLike, npt.ArrayLike, npt.ArrayLike], key: tuple[int, int]
) -> Words:
    """Encrypt counters into random words.

    Args:
        counter: four words of the 256-bit counter, lowest first: unsigned integers, or arrays of them that broadcast.
        key: two words of the key.

    Returns:
        (..., 4) uint64, where `...` is the broadcast shape of the counters.

    `numpy.random.Philox(key=key, counter=c).random_raw(4)` gives the words of counter c + 1: numpy counts before it
    encrypts.
    """
    # At least one dimension: numpy warns of wrap-around, which is wanted here, for scalars only.
    words = np.broadcast_arrays(*(np.asarray(word, dtype=np.uint64) for word in counter))
    shape = words[0].shape
    c0, c1, c2, c3 = (np.atleast_1d(word) for word in words)
    k0, k1 = key
    for _ in range(_ROUNDS):
        high0, low0 = _multiply(c0, _MULTIPLIERS[0])
        high1, low1 = _multiply(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ np.uint64(k0), low1, high0 ^ c3 ^ np.uint64(k1), low0
        k0, k1 = (k0 + _KEY_STEPS[0]) & _WORD_MASK, (k1 + _KEY_STEPS[1]) & _WORD_MASK
    return np.stack((c0, c1, c2, c3), axis=-1).reshape(*shape, 4)


def stream_words(num_words: int, *, counter: tuple[int, int, int], key: tuple[int, int]) -> Words:
    """Give the first words of a stream of its own: blocks 0, 1, 2, ... under three fixed counter words.

    Args:
        num_words: how many.
        counter: counter words 1, 2 and 3; word 0 counts the blocks.
        key: two words of the key.

    Returns:
        (num_words,) uint64: `philox4x64((block, *counter), key)`, flattened. numpy's generator does the work: it is
        several times faster where the blocks follow each other.
    """
    # One less than (0, *counter), since numpy counts up before the first block.
    whole = (counter[0] << 64 | counter[1] << 128 | counter[2] << 192) - 1
    start = [(whole >> shift) & _WORD_MASK for shift in (0, 64, 128, 192)]
    generator = np.random.Philox(key=np.array(key, dtype=np.uint64), counter=np.array(start, dtype=np.uint64))
    return generator.random_raw(num_words)


def uniform(words: Words) -> npt.NDArray[np.float64]:
    """Map words to [0, 1) in steps of 2**-53 (float64, same shape)."""
    return (words >> _MANTISSA_SHIFT).astype(np.float64) * 2.0**-53


def _multiply(a: Words, multiplier: int) -> tuple[Words, Words]:
    """Multiply into the high and low halves of the 128-bit products."""
    low_factor, high_factor = np.uint64(multiplier & 0xFFFFFFFF), np.uint64(multiplier >> 32)
    a_low, a_high = a & _LOW, a >> _HALF
    middle = a_high * low_factor + (a_low * low_factor >> _HALF)
    carry = (middle & _LOW) + a_low * high_factor
    high = a_high * high_factor + (middle >> _HALF) + (carry >> _HALF)
    return high, a * np.uint64(multiplier)
