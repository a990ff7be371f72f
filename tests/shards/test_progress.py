import re
import sys

import pytest

from shards.ground.progress import ProgressBars


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def test_a_log_gets_a_line_an_interval_with_images_bytes_and_the_time_left(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    bars = ProgressBars(interval_s=30, clock=clock)
    with bars.stage("packing", unit=" images", total=10_000, done=1000, done_bytes=100_000_000) as tick:
        for _ in range(90):
            clock.now_s += 1
            tick(50, 5_000_000)
    assert capsys.readouterr().err.splitlines() == [
        "packing: 2,500 of 10,000 images (25%), 50/s, 250 MB, 5 MB/s, 2 min 30 s left",
        "packing: 4,000 of 10,000 images (40%), 50/s, 400 MB, 5 MB/s, 2 min 0 s left",
        "packing: 5,500 of 10,000 images (55%), 50/s, 550 MB, 5 MB/s, 1 min 30 s left",
        "packing: 5,500 of 10,000 images (55%), 50/s, 550 MB, 5 MB/s, 1 min 30 s left",
    ]


def test_what_ends_within_the_interval_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    with ProgressBars(interval_s=30, clock=clock).stage("listing", unit=" inputs") as tick:
        clock.now_s = 29
        tick(1_000_000)
    assert capsys.readouterr() == ("", "")


def test_without_a_total_a_line_has_no_time_left_and_long_silence_is_one_line(
    capsys: pytest.CaptureFixture[str],
) -> None:
    clock = Clock()
    with ProgressBars(interval_s=30, clock=clock).stage("listing", unit=" inputs") as tick:
        clock.now_s = 200
        tick(300)
        tick(100)
    assert capsys.readouterr().err.splitlines() == [
        "listing: 300 inputs, 1.5/s, after 3 min 20 s",
        "listing: 400 inputs, 2/s, after 3 min 20 s",
    ]


def test_a_terminal_gets_one_line_that_is_drawn_again(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with ProgressBars().stage("packing", unit=" images", total=20, done=5, done_bytes=1000) as tick:
        tick(15, 4000)
    drawn = capsys.readouterr().err
    assert drawn.count("\n") == 1
    last = re.split(r"[\r\n]", drawn.strip())[-1]
    assert re.search(r"packing: 100%.*20\.0/20\.0 .*5 kB, .*B/s", last)
