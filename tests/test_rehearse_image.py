"""The rehearsal reads the Dockerfile as Docker does. Executing it takes minutes, and root: make image-rehearsal."""

from pathlib import PurePosixPath

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.scripts import DEPLOY, ROOT, load

rehearsal = load("rehearse_image", DEPLOY / "docker")


def test_joins_lines_and_leaves_comments_out():
    text = "# first\nFROM a\n\nRUN one \\\n    # between\n    && two\n  env A=1 \\\n  B=2\n"
    assert [(found.name, found.text) for found in rehearsal.instructions(text)] == [
        ("FROM", "a"),
        ("RUN", "one     && two"),
        ("ENV", "A=1   B=2"),
    ]


@given(st.lists(st.tuples(st.sampled_from(["RUN", "ENV", "COPY"]), st.lists(st.text("ab=", min_size=1), min_size=1))))
def test_where_lines_are_broken_makes_no_difference(written):
    broken = "\n".join(f"{name} x" + "".join(f"\\\n{part}" for part in parts) for name, parts in written)
    whole = "\n".join(f"{name} x" + "".join(parts) for name, parts in written)
    assert rehearsal.instructions(broken) == rehearsal.instructions(whole)


def test_variables_are_those_set_before():
    assert rehearsal.expand("$A/${B}c", {"A": "1", "B": "2"}) == "1/2c"
    for text in ("$C", "${A:-x}"):
        with pytest.raises(ValueError, match="which no ARG or ENV before it sets"):
            rehearsal.expand(text, {"A": "1"})


@pytest.mark.parametrize(
    ("path", "patterns", "left_out"),
    [
        ("a/b", ["a"], True),
        ("a/b", ["*"], True),
        ("a/b", ["*", "!a"], False),
        ("a/b", ["*", "!a/b"], False),
        ("a/c", ["*", "!a/b"], True),
        ("a/b", ["!a", "*"], True),
        ("a/__pycache__/b", ["*", "!a", "**/__pycache__"], True),
        ("__pycache__/b", ["**/__pycache__"], True),
        ("ab", ["a"], False),
        ("a", ["# a", "", "b"], False),
    ],
)
def test_dockerignore_as_docker_reads_it(path, patterns, left_out):
    assert rehearsal.ignored(PurePosixPath(path), patterns) == left_out


def copies():
    text = (ROOT / "Dockerfile").read_text()
    found = [step.text.split() for step in rehearsal.instructions(text) if step.name == "COPY"]
    return [word for words in found for word in words[:-1] if not word.startswith("--")]


@pytest.mark.parametrize("pattern", copies())
def test_what_the_dockerfile_copies_is_there(pattern):
    found = dict(rehearsal.sources(ROOT, pattern))
    assert found
    assert not any("__pycache__" in path.parts for path in found)


def test_what_dockerignore_hides_cannot_be_copied():
    with pytest.raises(ValueError, match=r"COPY Makefile: no such file, or .dockerignore leaves it out"):
        list(rehearsal.sources(ROOT, "Makefile"))


@pytest.fixture
def steps(monkeypatch, tmp_path):
    """What the instructions would execute: (instruction, folder, user, environment) without executing it."""
    done = []

    def note(name):
        return lambda folders, image, text: done.append((name, image.folder, image.user, dict(image.variables), text))

    for name in ("run_instruction", "copy_instruction", "run_as_root"):
        monkeypatch.setattr(rehearsal, name, note(name))

    def build(text):
        return rehearsal.build(rehearsal.Folders(top=tmp_path), text), done

    return build


def test_instructions_change_what_later_ones_see(steps):
    image, done = steps(
        "ARG BASE=a:1\nFROM ${BASE}\nARG ONE=1\nRUN x\nWORKDIR /b\nWORKDIR c\nENV TWO=${ONE}2 PATH=/p\nUSER 7\nRUN y\n"
        'LABEL z="${TWO} w"\nSHELL ["/bin/bash", "-c"]\nCMD ["d", "e"]\n'
    )
    assert image.base == "a:1"
    assert (image.folder, image.user, image.shell, image.command) == ("/b/c", "7", ["/bin/bash", "-c"], ["d", "e"])
    assert image.labels == {"z": "12 w"}
    runs = [entry for entry in done if entry[0] == "run_instruction"]
    assert runs == [
        ("run_instruction", "/", "0", rehearsal.BASE_ENVIRONMENT | {"ONE": "1"}, "x"),
        ("run_instruction", "/b/c", "7", rehearsal.BASE_ENVIRONMENT | {"PATH": "/p", "ONE": "1", "TWO": "12"}, "y"),
    ]


@pytest.mark.parametrize("text", ["FROM a\nADD b c\n", "FROM a\nHEALTHCHECK NONE\n"])
def test_an_instruction_that_it_does_not_know_is_refused(steps, text):
    with pytest.raises(ValueError, match=r"the rehearsal does not know (ADD|HEALTHCHECK)"):
        steps(text)


def test_it_knows_every_instruction_of_the_dockerfile(steps):
    image, done = steps((ROOT / "Dockerfile").read_text())
    assert image.user == "10001"
    assert image.environment["NVIDIA_DRIVER_CAPABILITIES"] == "compute,utility,video"
    assert image.environment["TORCHINDUCTOR_CACHE_DIR"].startswith(image.environment["HOME"] + "/")
    assert sum(name == "copy_instruction" for name, *_ in done) == 7
    # A user that cannot write would leave folders of root's behind, or fail.
    assert {user for name, _, user, *_ in done if name != "run_as_root"} == {"0"}


def test_the_user_is_found_by_name_and_by_number(tmp_path):
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc" / "passwd").write_text("root:x:0:0:::\nmoco:x:10001:10002:::\n")
    assert rehearsal.identity(tmp_path, "moco") == rehearsal.identity(tmp_path, "10001") == "10001:10002"
    assert rehearsal.identity(tmp_path, "5") == "5:0"


def test_constraints_are_the_lock_without_hashes_and_one_package():
    lock = (ROOT / "requirements.lock").read_text()
    pins = rehearsal.pins_of(lock, but="numpy")
    assert len(pins) > 100
    assert not any(pin.startswith("numpy==") or "\\" in pin for pin in pins)
    assert sum(pin.startswith("torch==") for pin in pins) == 1


def test_it_needs_root_and_debootstrap(monkeypatch):
    monkeypatch.setattr(rehearsal.os, "geteuid", lambda: 1000)
    with pytest.raises(ValueError, match="need root"):
        rehearsal.refuse_what_cannot_work()
    monkeypatch.setattr(rehearsal.os, "geteuid", lambda: 0)
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ValueError, match="debootstrap is missing"):
        rehearsal.refuse_what_cannot_work()


def test_metadata_is_renumbered_and_uvs_cache_stays(tmp_path):
    cached = tmp_path / "cached"
    cached.write_text("Metadata-Version: 2.4\nName: x\nVersion: 2.15.0\nDescription: Version: 2.15.0\n")
    for name in rehearsal.NUMBERED:
        info = tmp_path / "site" / f"{name}-2.15.0.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").hardlink_to(cached)
    rehearsal.number_as_nvidia_does(tmp_path / "site")
    assert "Version: 2.15.0\n" in cached.read_text()
    for name, version in rehearsal.NUMBERED.items():
        text = (tmp_path / "site" / f"{name}-{version}.dist-info" / "METADATA").read_text()
        assert text.splitlines()[2:] == [f"Version: {version}", "Description: Version: 2.15.0"]
