import os
import re
import subprocess
import sys
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moco_fast.training import startup
from moco_fast.training.startup import StartUp


class Clock:
    """Seconds that grow when they are told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@given(
    ages=st.lists(st.floats(0, 50), max_size=3).map(lambda found: sorted(found, reverse=True)),
    laps=st.lists(st.tuples(st.sampled_from("abc"), st.floats(0, 50)), max_size=6),
)
def test_what_was_spent_adds_up_to_the_whole(ages, laps):
    clock = Clock()
    start_up = StartUp({f"part {number}": age for number, age in enumerate(ages)}, clock=clock)
    for what, seconds in laps:
        clock.now += seconds
        start_up.lap(what)
    total, *parts = (float(found) for found in re.findall(r"\d+\.\d", start_up.describe("ready")))
    assert total == pytest.approx(max(ages, default=0.0) + sum(seconds for _, seconds in laps), abs=0.051)
    assert sum(parts) == pytest.approx(total, abs=0.05 * (len(parts) + 1) + 1e-6)


def test_laps_are_told_in_their_order():
    clock = Clock()
    start_up = StartUp({"launcher": 5.5, "imports": 3.7}, clock=clock)
    clock.now += 0.5
    start_up.lap("sets and model")
    assert start_up.describe("ready") == "start-up: ready after 6.0 s (launcher 1.8, imports 3.7, sets and model 0.5)"
    clock.now += 1.25
    start_up.lap("first step")
    assert start_up.describe("first step").startswith("start-up: first step after 7.2 s (launcher 1.8, ")


def test_a_command_began_when_its_process_did():
    code = (
        "import time; time.sleep(0.5)\nfrom moco_fast.training.startup import StartUp\n"
        "start_up = StartUp.of_command(); start_up.lap('rest'); print(start_up.describe('ready'))"
    )
    began = time.perf_counter()
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    most = time.perf_counter() - began
    total = float(re.search(r"after ([\d.]+) s \(imports", found)[1])
    assert 0.4 <= total <= most + 0.1


@pytest.mark.parametrize(("restarts", "told"), [("0", True), ("3", False)])
def test_a_launcher_counts_unless_it_starts_its_ranks_again(monkeypatch, restarts, told):
    monkeypatch.setattr(startup, "command_of", lambda pid: ["python", "/bin/accelerate", "launch"])
    start_up = StartUp.of_command({"TORCHELASTIC_RESTART_COUNT": restarts})
    start_up.lap("rest")
    assert ("launcher" in start_up.describe("ready")) == told


def test_where_the_system_does_not_say_the_clock_begins_now(monkeypatch, tmp_path):
    monkeypatch.setattr(startup, "Path", lambda path: tmp_path / "nothing")
    start_up = StartUp.of_command({})
    start_up.lap("rest")
    assert re.fullmatch(r"start-up: ready after 0\.\d s \(rest 0\.\d\)", start_up.describe("ready"))
    assert startup._age(os.getpid()) is None
