"""The test matrix covers what pyproject.toml promises, and the workflow runs all of it."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from tests import matrix

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PYTHONS = [
    line.rpartition(" ")[2]
    for line in PROJECT["classifiers"]
    if line.startswith("Programming Language :: Python :: 3.")
]


def outcome(name, *, passed=True):
    (environment,) = (each for each in matrix.ENVIRONMENTS if each.name == name)
    versions = {"Python": f"{environment.python}.1", "torch": "2.11.0"}
    return matrix.EnvironmentOutcome(
        environment=environment, versions=versions, closing_line="7 passed in 3s", passed=passed
    )


def test_the_lowest_and_the_newest_python_are_tested():
    tested = {each.name: (each.python, each.resolution) for each in matrix.ENVIRONMENTS}
    assert tested["lowest"] == (PYTHONS[0], "lowest-direct")
    assert tested["newest"] == (PYTHONS[-1], "highest")
    assert PROJECT["requires-python"].startswith(f">={PYTHONS[0]},")


def test_the_workflow_runs_every_python_and_every_environment():
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "test.yml").read_text())["jobs"]
    assert jobs["locked"]["strategy"]["matrix"]["python"] == PYTHONS
    assert jobs["matrix"]["strategy"]["matrix"]["environment"] == [each.name for each in matrix.ENVIRONMENTS]


def test_the_table_has_a_row_per_environment_and_replaces_the_last_one(tmp_path):
    document = tmp_path / "page.md"
    document.write_text(f"before\n{matrix.BEGIN}\nold\n{matrix.END}\nafter\n")
    text = matrix.table([outcome("lowest"), outcome("newest")], "2026-01-31")
    matrix.write_table(document, text)
    written = document.read_text()
    assert written.startswith("before\n")
    assert written.endswith("after\n")
    assert "old" not in written
    assert "| 2026-01-31 | Python | torch | fast tests |\n|---|---|---|---|\n| lowest | 3.11.1 | 2.11.0 |" in written
    assert "| newest | 3.14.1 | 2.11.0 | 7 passed in 3s |" in written


@pytest.mark.parametrize(("passed", "code"), [(True, 0), (False, 1)])
def test_only_a_whole_run_that_passed_is_written_down(monkeypatch, tmp_path, passed, code):
    document = tmp_path / "page.md"
    document.write_text(f"{matrix.BEGIN}\nold\n{matrix.END}\n")
    monkeypatch.setattr(matrix, "CONTRIBUTING", document)
    monkeypatch.setattr(matrix, "make", lambda environment: Path(environment.name))
    monkeypatch.setattr(matrix, "test", lambda environment, _python: outcome(environment.name, passed=passed))
    assert matrix.main(["lowest"]) == code
    assert "old" in document.read_text()
    assert matrix.main([]) == code
    assert ("old" in document.read_text()) is not passed


def test_an_unknown_environment_and_a_missing_interpreter_are_named(monkeypatch, tmp_path, capsys):
    assert matrix.main(["oldest"]) == 2
    assert "no environment oldest: choose lowest, image, newest" in capsys.readouterr().err
    failing = matrix.Environment(name="none", python="3.1", resolution="highest")
    monkeypatch.setattr(matrix, "ENVIRONMENTS", (failing,))
    monkeypatch.setattr(matrix, "BUILD", tmp_path)

    def refuse(*_words, **_variables):
        raise subprocess.CalledProcessError(2, "uv")

    monkeypatch.setattr(matrix, "_uv", refuse)
    assert matrix.main([]) == 1
    assert "none: not installed, uv ended with 2" in capsys.readouterr().err


def test_versions_are_those_of_the_environment():
    versions = matrix._versions(Path(sys.executable))
    assert versions["Python"] == ".".join(map(str, sys.version_info[:3]))
    assert list(versions) == ["Python", "torch", "torchvision", "numpy", "timm", "accelerate", "dali"]
