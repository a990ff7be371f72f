import pytest

from shards.ground.units import counted, format_bytes, format_duration, gib


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.4, "0 s"), (59.4, "59 s"), (151, "2 min 31 s"), (3600, "1 h 0 min"), (7 * 86400, "7 d 0 h")],
)
def test_durations_are_written_in_two_units_at_most(seconds, words):
    assert format_duration(seconds) == words


@pytest.mark.parametrize(
    ("num_bytes", "words"),
    [(0, "0 bytes"), (999, "999 bytes"), (1000, "1 kB"), (999_499, "999 kB"), (999_500, "1 MB"), (1.5e15, "1,500 TB")],
)
def test_sizes_are_written_in_powers_of_a_thousand(num_bytes, words):
    assert format_bytes(num_bytes) == words


def test_one_thing_is_counted_in_the_singular():
    assert [counted(num, "shard") for num in (0, 1, 2, 1_000_000)] == [
        "0 shards",
        "1 shard",
        "2 shards",
        "1,000,000 shards",
    ]
    assert [counted(num, "class", plural="classes") for num in (1, 2)] == ["1 class", "2 classes"]


def test_sizes_beside_options_in_gib_are_in_gib():
    assert gib(3 << 29) == "1.5 GiB"
