"""What must hold for the repository as a whole."""

import os
import re
import subprocess
import sys
import tomllib
from functools import cache
from importlib import metadata
from pathlib import Path

import pytest

import moco_fast

ROOT = Path(__file__).parent.parent
COMMANDS = {
    "make-shards": ["shards.cli"],
    "moco-fast": ["moco_fast.cli"],
    "moco_fast.train": ["moco_fast.commandline"],
    "moco_fast.demo": ["moco_fast.demo"],
}


@cache
def tracked():
    # The checkout may belong to another user (a container, a mounted folder), which git refuses unless told otherwise.
    listing = subprocess.run(
        ["git", "-c", "safe.directory=*", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return [ROOT / name for name in listing.stdout.split("\0") if name and (ROOT / name).exists()]


@cache
def texts():
    found = {}
    for path in tracked():
        data = path.read_bytes()
        if b"\0" not in data:
            found[path.relative_to(ROOT).as_posix()] = data.decode()
    return found


def lines_with(pattern, *, but=()):
    return [
        f"{name}:{number}: {line.strip()}"
        for name, text in texts().items()
        if name not in but
        for number, line in enumerate(text.splitlines(), 1)
        if re.search(pattern, line)
    ]


def test_no_file_over_a_megabyte():
    assert [path for path in tracked() if path.stat().st_size > 1_000_000] == []


def test_no_address_of_a_package_registry():
    # pip and uv find their registry themselves; a mirror's address in a file would bind everyone to it.
    registries = r"(py[p]i|python[h]osted|np[m]js|registry\.|artifactory|/simple/?($|[\"' ]))"
    assert lines_with(rf"https?://[^\s\"')]*{registries}|--(extra-)?index-url", but=[own_name()]) == []


def test_no_path_of_somebodys_machine():
    assert lines_with(r"(?<![\w.$])/(home|root|Users|mnt|work)/\w", but=[own_name()]) == []


def test_every_check_that_a_line_turns_off_has_a_reason_on_it():
    explained = r"# (noqa: \w+(, \w+)*|pyright: ignore\[\w+(, \w+)*\])( - \w| \(\w)"
    turned_off = lines_with(r"# (noqa|pyright: ignore|type: ignore)", but=[own_name()])
    assert turned_off == lines_with(explained, but=[own_name()])


def test_lock_holds_hashes_and_no_address():
    lock = texts()["requirements.lock"] + texts()["requirements-ffcv.lock"]
    assert "://" not in lock
    pins = re.findall(r"^[\w.-]+(?:\[[\w,-]+\])?==\S+.*?(?=^\S|\Z)", lock, flags=re.MULTILINE | re.DOTALL)
    assert len(pins) > 50
    assert [pin.split()[0] for pin in pins if "--hash=sha256:" not in pin] == []


def test_lock_follows_pyproject():
    project = tomllib.loads(texts()["pyproject.toml"])
    extras = project["project"]["optional-dependencies"].values()
    wanted = sum(extras, project["project"]["dependencies"] + project["dependency-groups"]["dev"])
    names = {re.match(r"[\w.-]+", line)[0].lower() for line in wanted if not line.startswith("moco-fast[")}
    pinned, of_ffcv = (
        set(re.findall(r"^([\w.-]+)(?:\[[\w,-]+\])?==", texts()[name], flags=re.MULTILINE))
        for name in ("requirements.lock", "requirements-ffcv.lock")
    )
    assert names - pinned == {"ffcv"}, "run make lock"
    assert "ffcv" in of_ffcv
    assert not pinned & of_ffcv, "only what FFCV adds: run make lock"


def test_version_is_in_one_place():
    version = moco_fast.__version__
    assert metadata.version("moco-fast") == version, "run make setup"
    code = [
        name
        for name in texts()
        if name.endswith((".py", ".sh", ".yaml", ".toml")) or name in ("Dockerfile", "Makefile")
        # Written by a command (tests/moco_fast/clusters/test_launch_files.py).
        if not name.startswith("deploy/clusters/")
    ]
    repeated = [name for name in code if f'"{version}"' in texts()[name] or f"={version}" in texts()[name]]
    assert repeated == ["moco_fast/__init__.py"]


def test_imports_run_one_way():
    command = Path(sys.executable).with_name("lint-imports")
    result = subprocess.run([command], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("modules", COMMANDS.values(), ids=COMMANDS)
def test_help_does_not_pay_for_torch(modules):
    # What makes `--help` answer within two seconds on a machine that is not busy: no heavy import, and little work.
    code = (
        "import sys, time\n"
        f"from {modules[0]} import main\n"
        "try:\n    main(['--help'])\n"
        "except SystemExit as exit:\n    assert exit.code in (0, None), exit.code\n"
        "heavy = {'torch', 'torchvision', 'nvidia.dali', 'timm', 'accelerate', 'matplotlib'} & sys.modules.keys()\n"
        "assert not heavy, heavy\n"
        "assert time.process_time() < 2, time.process_time()\n"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    assert "usage" in result.stdout.lower()


def test_makefile_lists_every_target_that_a_person_calls():
    shown = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert re.findall(r"^  make ([a-z-]+)", shown, flags=re.MULTILINE)[:4] == ["help", "setup", "demo", "test"]


def test_documents_link_to_files_that_exist():
    links = [
        (ROOT / name, target)
        for name, text in texts().items()
        if name.endswith(".md")
        for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", text)
    ]
    assert [link for link in links if "://" not in link[1] and not (link[0].parent / link[1]).exists()] == []


def test_ci_runs_what_the_readme_says():
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    commands = [line for line in script.read_text().splitlines() if line and not line.startswith("#")]
    assert commands[-1] == "make test"
    assert "make test" in texts()["README.md"]


def own_name():
    return Path(__file__).relative_to(ROOT).as_posix()
