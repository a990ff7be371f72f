"""The number of fetchers, against simulated stores whose connections and whose whole have a rate."""

from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.reading.pace import Pace


def simulate(pace: Pace, *, of_each: float, of_all: float, num_shards: int = 400) -> list[int]:
    """Fetchers after each of some shards of 1 to 2 units; connections share what the whole gives."""
    now, left, numbers = 0.0, [], []
    begun = 0
    while len(numbers) < num_shards:
        while len(left) < pace.num_fetchers:
            left.append([1 + begun % 7 / 6] * 2)
            begun += 1
        rate = min(of_each, of_all / len(left))
        first = min(range(len(left)), key=lambda place: left[place][0])
        seconds = left[first][0] / rate
        now += seconds
        for each in left:
            each[0] -= rate * seconds
        pace.note(int(1e6 * left.pop(first)[1]), now)
        numbers.append(pace.num_fetchers)
    return numbers


@settings(max_examples=60)
@given(st.floats(0.1, 100), st.floats(0.3, 100))
def test_fetchers_grow_with_what_the_store_gives_and_not_beyond(of_each, times):
    """`times` as much as one connection is what the whole store gives."""
    numbers = simulate(Pace(4, 32), of_each=of_each, of_all=times * of_each)
    assert set(numbers) <= {4, 8, 16, 32}
    settled = numbers[-1]
    assert settled == numbers[200]
    # Half as many would be slower by a fifth at least, unless they are the fewest; twice as many hardly faster.
    assert settled == 4 or min(times, settled) >= 1.1 * min(times, settled / 2)
    assert settled == 32 or min(times, 2 * settled) <= 1.45 * min(times, settled)


def test_fetchers_that_rest_are_not_measured():
    pace = Pace(4, 32)
    for number in range(100):
        pace.note(1, float(number))
        pace.rest()
    assert pace.num_fetchers == 4


def test_a_number_that_is_given_stays():
    pace = Pace(6, 6)
    assert set(simulate(pace, of_each=1.0, of_all=1000.0)) == {6}
