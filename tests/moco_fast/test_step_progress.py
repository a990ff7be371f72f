import sys

import pytest

from moco_fast.evaluation.progress import StepProgress


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_outside_a_terminal_there_is_a_line_now_and_then(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    progress = StepProgress(2000, shown=True, clock=clock)
    progress.begin("random seed 0")
    progress.skip(1000)  # took no time here
    for step in range(100):
        clock.now += 0.5
        progress.step()
        if step == 20:
            progress.note("loss 1.234")
    progress.close()
    said = capsys.readouterr().err
    assert said == "random seed 0: step 1,060 of 2,000: loss 1.234, 2 steps/s, 7 min 50 s left\n"


def test_other_ranks_show_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    progress = StepProgress(10, shown=False, clock=clock)
    clock.now += 60
    progress.step()
    progress.say("a line")
    assert capsys.readouterr().err == ""


def test_on_a_terminal_there_is_a_bar(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    progress = StepProgress(10, shown=True)
    assert not progress._bar.disable
    progress.begin("random seed 0")
    progress.skip(4)
    progress.note("loss 1.234")
    progress.step()
    assert (progress._bar.n, progress._bar.initial) == (5, 4)
    progress._bar.refresh()
    progress.close()
    said = capsys.readouterr().err
    assert "random seed 0" in said
    assert "loss 1.234" in said
