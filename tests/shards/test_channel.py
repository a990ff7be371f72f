import threading

import pytest

from shards.ground.channel import Channel, ChannelClosed


def in_thread(function) -> tuple[threading.Thread, list]:
    results = []

    def run():
        try:
            results.append(function())
        except BaseException as error:
            results.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, results


def test_items_arrive_in_order_through_a_small_buffer():
    channel = Channel(2)
    thread, _ = in_thread(lambda: [channel.put(number) for number in range(100)])
    assert [channel.get() for _ in range(100)] == list(range(100))
    thread.join()


def test_the_error_comes_after_the_items_before_it_and_again_ever_after():
    channel = Channel(3)
    channel.put(1)
    channel.fail(KeyError("lost"))
    assert channel.get() == 1
    for _ in range(2):
        with pytest.raises(KeyError, match="lost"):
            channel.get()


@pytest.mark.parametrize("full", [True, False])
def test_closing_wakes_whoever_waits(full):
    channel = Channel(1)
    if full:
        channel.put(1)
    thread, results = in_thread((lambda: channel.put(2)) if full else channel.get)
    channel.close()
    thread.join(timeout=10)
    assert isinstance(results[0], ChannelClosed)
    with pytest.raises(ChannelClosed):
        channel.get()
    with pytest.raises(ChannelClosed):
        channel.put(3)
