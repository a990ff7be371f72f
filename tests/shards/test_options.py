import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import pytest
import tyro

from shards.cli import main
from shards.ground.options import ending_quietly, parse_words, word_for

ROOT_COMMANDS = ("make-shards", "moco-fast", "moco-fast train demo", "moco-fast train", "moco-fast bench demo")
ROOT_COMMANDS += ("moco_fast.bench", "moco_fast.demo")
MODULES = {"make-shards": "shards.cli", "moco-fast": "moco_fast.cli"}


@dataclass(frozen=True, kw_only=True)
class Form:
    """Some options."""

    place: Annotated[str, tyro.conf.arg(metavar="PLACE")] = "x"
    """Said by the type."""
    out: str = "x"
    """A sentence of which a line (of the source
    of this test) begins with a sign: 1 of 2
    `such` lines, at most."""
    num_threads: int | None = None
    """By the end of the name."""
    std: tuple[float, float, float] = field(default=(1, 1, 1), metadata={"metavar": "R G B"})
    """By the metadata."""
    kind: Literal["a", "b"] = "a"
    """By the parser."""


def shown(call: Callable[[], Any], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit, match="0"):
        call()
    return capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "hint", "word"),
    [
        ("run_steps", int, "STEPS"),
        ("batch_size", int | None, "SAMPLES"),
        ("view_size", int, "PIXELS"),
        ("ways", int, "N"),
        ("trust", float, "NUMBER"),
        ("clip_norm", float | None, "NUMBER"),
        ("lr", tuple[float, ...], "RATE..."),
        ("pair", tuple[float, float], "NUMBER NUMBER"),
        ("crop_scale", tuple[float, float], "MIN MAX"),
        ("some_name", str, "SOME-NAME"),
        ("tags", tuple[str, ...], "TAGS..."),
        ("flag", bool, None),
        ("kind", Literal["a", "b"], None),
        ("either", int | str, None),
    ],
)
def test_a_value_is_called_by_what_it_is(name: str, hint: Any, word: str | None) -> None:
    assert word_for(name, hint) == word
    assert word_for(name, hint, {"metavar": "THING"}) == "THING"


def test_help_has_these_words_and_whole_lines(capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    text = shown(lambda: parse_words(Form, ["--help"], prog="x"), capsys)
    for words in ("--place PLACE", "--out FOLDER", "--num-threads THREADS", "--std R G B", "--kind {a,b}"):
        assert words in text
    assert "A sentence of which a line (of the source of this test) begins with a sign: 1 of 2 `such` lines" in text


def test_options_reach_the_dataclass() -> None:
    words = ["--out", "there", "--num-threads", "3", "--std", "1", "2", "3", "--kind", "b"]
    assert parse_words(Form, words, prog="x") == Form(out="there", num_threads=3, std=(1, 2, 3), kind="b")


@pytest.mark.parametrize("command", ["pack", "verify", "index", "inspect", "beton", "finish"])
def test_no_command_of_the_packer_shows_a_bare_type(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(lambda: main([command, "--help"]), capsys)
    assert not {"STR", "INT", "FLOAT", "PATH"} & set(text.replace("|", " ").replace("[", " ").split())


@pytest.mark.parametrize("command", ROOT_COMMANDS)
def test_without_a_reader_a_command_ends_quietly(command: str) -> None:
    name, *words = command.split()
    reading, writing = os.pipe()
    os.close(reading)
    # Like a terminal's: SIGPIPE is ignored by Python itself.
    done = subprocess.run(
        [sys.executable, "-m", MODULES.get(name, name), *words, "--help"],
        stdout=writing,
        stderr=subprocess.PIPE,
        text=True,
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, "")


def test_a_pipe_that_breaks_elsewhere_is_an_error(capfd: pytest.CaptureFixture[str]) -> None:
    def broken() -> int:
        raise BrokenPipeError("a child has ended")

    with pytest.raises(BrokenPipeError, match="a child has ended"):
        ending_quietly(broken)


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_completion_is_a_script_that_knows_the_options(shell: str) -> None:
    words = [sys.executable, "-m", "shards.cli", "--tyro-print-completion", shell]
    script = subprocess.run(words, check=True, capture_output=True, text=True).stdout
    assert "--val-fraction" in script
    assert "make-shards" in script
