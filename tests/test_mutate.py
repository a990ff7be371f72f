"""tests/mutate.py changes what has an effect, one place at a time, and survives what its mutants do."""

import ast
import os
import signal
import time
from pathlib import Path

from tests.mutate import LineFirst, Recorder, in_fork, mutants

SOURCE = '''"""Text of 1 module."""
__all__ = ["half"]

def half(a: int = 3, *, up: bool = False) -> int:
    """Return 1 half."""
    if a < 0:
        raise ValueError(f"{a + 1} is not positive")
    print("1", a)
    self.kept = not up
    return max(a, 0) // 2 if up and a else -a
'''
RAISED = "raise ValueError(f'{a + 1} is not positive')"
EXPECTED = {
    "3 -> 4",
    "False -> True",
    "a < 0 -> a <= 0",
    f"if a < 0:     {RAISED} -> if not a < 0:     {RAISED}",
    "0 -> 1",
    f"{RAISED} -> pass",
    "print('1', a) -> pass",
    "print('1', a) -> print(a, '1')",
    "self.kept = not up -> pass",
    "not up -> up",
    "max(a, 0) // 2 if up and a else -a -> max(a, 0) // 2 if not (up and a) else -a",
    "max(a, 0) // 2 -> max(a, 0) * 2",
    "2 -> 3",
    "up and a -> up or a",
    "-a -> a",
}


def test_what_has_an_effect_is_changed_and_texts_are_not() -> None:
    made = list(mutants(SOURCE))
    assert {each.what for each in made} == EXPECTED
    assert len({each.source for each in made}) == len(made)
    original = ast.unparse(ast.parse(SOURCE)).splitlines()
    for each in made:
        ast.parse(each.source)
        assert 0 < each.line <= len(SOURCE.splitlines())
        assert sum(a != b for a, b in zip(original, each.source.splitlines(), strict=False)) > 0


def test_a_mutant_that_hangs_or_dies_is_ended_with_all_that_it_started(tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert in_fork(lambda: os.getpid(), log, 60) != os.getpid()
    assert in_fork(lambda: os.kill(os.getpid(), signal.SIGKILL), log, 60) is None
    assert in_fork(lambda: 1 / 0, log, 60) is None
    assert "ZeroDivisionError" in log.read_text()

    def hang() -> None:
        if os.fork():
            (tmp_path / "parent").touch()
        time.sleep(600)

    assert in_fork(hang, log, 0.2) is None


class Item:
    """What is asked of a test that pytest has collected."""

    def __init__(self, nodeid: str) -> None:
        self.nodeid = nodeid


def test_tests_that_ran_the_line_come_first_and_quick_ones_before_slow_ones() -> None:
    recorder = Recorder("file.py", lines={"a": {1}, "b": {1, 2}, "c": {2}}, seconds={"a": 0.1, "b": 3.0, "c": 0.2})
    items = [Item(name) for name in "abc"]
    LineFirst(recorder, 2).pytest_collection_modifyitems(items)  # pyright: ignore[reportArgumentType] - an item's stand-in
    assert [item.nodeid for item in items] == ["c", "b", "a"]


def test_lines_are_recorded_while_a_test_runs(tmp_path: Path) -> None:
    file = tmp_path / "module.py"
    file.write_text("def f(x):\n    if x:\n        return 1\n    return 2\n")
    names: dict[str, object] = {}
    exec(compile(file.read_text(), str(file), "exec"), names)
    recorder = Recorder(str(file))
    recorder.pytest_runtest_logstart("test")
    names["f"](0)  # pyright: ignore[reportCallIssue] - the function above
    recorder.pytest_runtest_logfinish("test")
    assert recorder.lines == {"test": {2, 4}}
    assert recorder.seconds["test"] > 0
