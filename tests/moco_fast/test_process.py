import os

import pytest

from moco_fast.training import process


@pytest.mark.parametrize("chosen", [None, "ACTIVE"])
def test_idle_threads_sleep_unless_the_user_says_otherwise(monkeypatch, chosen):
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    if chosen:
        monkeypatch.setenv("OMP_WAIT_POLICY", chosen)
    process.prepare()
    assert os.environ["OMP_WAIT_POLICY"] == (chosen or "PASSIVE")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["python", "-m", "accelerate.commands.launch", "-m", "moco_fast.train"], True),
        (["python", "/somewhere/bin/accelerate", "launch", "-m", "moco_fast.train"], True),
        (["bash", "train.sh"], False),
        ([], False),
        (["python", "watch.py", "--config", "deploy/accelerate"], False),
    ],
)
def test_the_launcher_is_known_by_its_command(words, expected):
    assert process.is_launcher(words) == expected
