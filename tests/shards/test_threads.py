import threading

import pytest

from shards.ground.threads import mapped


def test_results_come_in_order_whichever_is_done_first():
    later = threading.Event()

    def slow_first(number):
        if number == 0:
            assert later.wait(20)
        later.set()
        return number * number

    assert list(mapped(slow_first, range(20), threads=2, ahead=4)) == [(n, n * n) for n in range(20)]


def test_items_are_taken_as_results_are():
    # Those of other tests may be idle still.
    before, taken = set(threading.enumerate()), []

    def items():
        for number in range(100):
            taken.append(number)
            yield number

    results = mapped(str, items(), threads=2, ahead=5)
    assert [next(results) for _ in range(3)] == [(0, "0"), (1, "1"), (2, "2")]
    assert len(taken) == 3 + 5
    results.close()
    assert not set(threading.enumerate()) - before


def test_what_a_function_raises_is_raised():
    results = mapped(lambda number: 1 // number, [1, 0, 1], threads=2, ahead=5)
    with pytest.raises(ZeroDivisionError):
        list(results)
