import json
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from shards.cli import main
from shards.ground.option_files import changed, describe_type, fitted, read_option_file, take_option


@dataclass(frozen=True, kw_only=True)
class Inner:
    rate: float = 0.5
    sizes: tuple[int, ...] = ()
    range: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        if self.rate < 0:
            raise ValueError("rate is negative")


@dataclass(frozen=True, kw_only=True)
class Outer:
    name: str = "x"
    kind: Literal["a", "b"] = "a"
    num_steps: int | None = None
    is_on: bool = False
    inner: Inner = field(default_factory=Inner)


def read(folder: Path, text: str, name: str = "options.yaml") -> Outer:
    path = folder / name
    path.write_text(text)
    file = read_option_file(str(path))
    return changed(Outer(), file.values, file)


def test_what_a_file_says_is_used_and_the_rest_stays(tmp_path: Path) -> None:
    text = "num-steps: 3\ninner:\n  rate: 1e-3\n  sizes: [1, 2]\n"
    assert read(tmp_path, text) == Outer(num_steps=3, inner=Inner(rate=0.001, sizes=(1, 2)))
    assert read(tmp_path, "") == read(tmp_path, "{}", "options.json") == Outer()
    found = read(tmp_path, '{"inner": {"rate": 2}, "num_steps": null}', "options.json")
    assert found == Outer(inner=Inner(rate=2.0))
    assert type(found.inner.rate) is float


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("num_step: 3", "options.yaml, line 1: there is no option num_step: did you mean num_steps?"),
        ("name: y\nrate: 3", "line 2: there is no option rate: did you mean inner.rate?"),
        ("inner:\n  kind: a", "line 2: there is no option inner.kind"),
        ("name: y\n\nname: z", "line 3: name is there twice, first in line 1"),
        ("num-steps: 1\nnum_steps: 2", "line 2: num_steps is there twice"),
        ("num_steps: 1.5", "line 1: num_steps is 1.5, but must be a whole number or null"),
        ("is_on: 1", "is_on is 1, but must be true or false"),
        ("num_steps: true", "num_steps is True, but must be a whole number"),
        ("kind: c", "kind is 'c', but must be 'a' or 'b'"),
        ("name: 2024-01-01", "but must be text"),
        ("inner: 3", "inner is 3, but must be a section"),
        ("inner: {range: [1, 2, 3]}", "must be a list of 2, each a number"),
        ("inner: {sizes: [1, x]}", "must be a list, each a whole number"),
        ("inner:\n  rate: -1", "options.yaml: rate is negative"),
        ("- a\n- b", "holds no options"),
        ("name: [1", "options.yaml, line 1: "),
        ("name: !!python/object:os.system x", "could not determine a constructor"),
        ("a: &x {b: *x}", "found unconstructable recursive node"),
    ],
)
def test_what_is_wrong_in_a_file_is_named_with_its_line(text: str, says: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError) as refused:  # noqa: PT011 - compared below
        read(tmp_path, text)
    assert says in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"name": "y", "name": "z"}', "'name' is there twice"),
        ('{"name": "y",\n}', "options.json, line 2"),
        ('{"nam": 1}', "options.json: there is no option nam: did you mean name?"),
        ("[]", "holds no options"),
    ],
)
def test_what_is_wrong_in_json_is_named(text: str, says: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError) as refused:  # noqa: PT011 - compared below
        read(tmp_path, text, "options.json")
    assert says in str(refused.value)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe")
    for name, reason in (("nowhere.yaml", "No such file"), ("binary.yaml", "not UTF-8")):
        with pytest.raises(ValueError, match=f"{name} cannot be read: .*{reason}"):
            read_option_file(str(tmp_path / name))


@pytest.mark.parametrize(
    ("words", "rest", "path"),
    [
        (["a", "--config", "f", "b"], ["a", "b"], "f"),
        (["--config=f=g"], [], "f=g"),
        (["--configure", "f"], ["--configure", "f"], None),
        ([], [], None),
    ],
)
def test_the_option_is_taken_out_of_the_words(words: list[str], rest: list[str], path: str | None) -> None:
    assert take_option(words) == (rest, path)


@pytest.mark.parametrize("words", [["--config"], ["--config", "--x"], ["--config="], ["--config", "a", "--config=b"]])
def test_one_file_is_named(words: list[str]) -> None:
    with pytest.raises(ValueError, match=r"needs the name of a file|is given twice"):
        take_option(words)


OUTER = st.builds(
    Outer,
    # PyYAML writes these line breaks of Unicode as they are, and reads them as spaces.
    name=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x85\u2028\u2029"), max_size=8),
    kind=st.sampled_from(["a", "b"]),
    num_steps=st.none() | st.integers(-(10**20), 10**20),
    is_on=st.booleans(),
    inner=st.builds(
        Inner,
        rate=st.floats(0, allow_nan=False),
        sizes=st.lists(st.integers(), max_size=3).map(tuple),
        range=st.tuples(st.floats(allow_nan=False), st.floats(allow_nan=False)),
    ),
)


@given(OUTER)
def test_what_is_written_is_read_back(tmp_path_factory: pytest.TempPathFactory, outer: Outer) -> None:
    from dataclasses import asdict

    folder = tmp_path_factory.getbasetemp()
    values: dict[str, Any] = json.loads(json.dumps(asdict(outer)))
    assert read(folder, json.dumps(values), "options.json") == outer
    assert read(folder, yaml.safe_dump(values, allow_unicode=True)) == outer


@pytest.mark.parametrize(
    ("value", "hint", "expected"),
    [(1, float, 1.0), ([1, 2], tuple[float, float], (1.0, 2.0)), ("a", Literal["a"], "a"), (None, int | None, None)],
)
def test_a_value_gets_its_type(value: object, hint: Any, expected: object) -> None:
    assert repr(fitted(value, hint)) == repr(expected)


def test_a_type_is_described() -> None:
    assert describe_type(tuple[int, ...] | None) == "a list, each a whole number or null"


def test_pack_reads_a_file_and_options_override_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from PIL import Image

    for number in range(3):
        (tmp_path / "in").mkdir(exist_ok=True)
        Image.new("RGB", (9 + number, 9)).save(tmp_path / "in" / f"{number}.jpg")
    file = tmp_path / "pack.yaml"
    file.write_text(f"sources: [{tmp_path}/in]\nout: {tmp_path}/by-file\nworkers: 1\nshuffle: false\nmin-size: 50\n")
    for out in ("by-file", "by-words"):
        words = ["pack", "--config", str(file), "--out", str(tmp_path / out), "--min-size", "1", "--workers", "1"]
        done = subprocess.run([sys.executable, "-m", "shards.cli", *words], capture_output=True, text=True, check=True)
        assert "3" in done.stdout
    settings = [
        json.loads((tmp_path / out / "manifest.json").read_text())["settings"] for out in ("by-file", "by-words")
    ]
    assert settings[0] == settings[1]
    assert (settings[0]["shuffle"], settings[0]["min_size"]) == (False, 1)
    assert "config" not in settings[0]
    file.write_text("workerss: 1")
    assert main(["pack", "--config", str(file)]) == 2
    assert "line 1: there is no option workerss: did you mean workers?" in capsys.readouterr().err
