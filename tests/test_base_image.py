"""What the Dockerfile adds to a base image leaves what the base brings as it is."""

import hashlib
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.scripts import DEPLOY, ROOT, load

base_image = load("base_image", DEPLOY / "docker")
Package, Pin = base_image.Package, base_image.Pin

# Versions as 26.09 has them where they are public; its metadata contradicts itself, as a base's may.
NGC = {
    "apex": Package(version="0.1"),
    "numpy": Package(version="2.1.0"),
    "nvidia-dali-cuda130": Package(version="2.5.0", requires=("astunparse<=1.6.3",)),
    "opencv": Package(version="4.11.0"),
    "packaging": Package(version="23.2"),
    "pillow": Package(version="12.3.0"),
    "torch": Package(version="2.14.0a0+b2c75dd062.nv26.9.68203377", requires=("sympy>=1.13.3",)),
    "torchvision": Package(
        version="0.29.0a0+0fba2e84.nv26.9.68203377", requires=("torch==2.14.0", "numpy", "pillow!=8.3.*")
    ),
    "tqdm": Package(version="4.60.0", has_record=False),
}
DEPENDENCIES = [
    "numpy>=2.1",
    "nvidia-dali-cuda130>=2.4,<3",
    "opencv-python-headless>=4.10",
    "pillow>=11",
    "timm>=1.0.31,<2",
    "torch>=2.11",
    "torchvision>=0.26",
    "tqdm>=4.66",
]
# What the packages of the lock say of themselves once they are installed.
INDEX = {
    "timm": Package(version="1.0.31", requires=("torch>=2.0", "torchvision", "safetensors", "huggingface-hub[cli]>=1")),
    "tqdm": Package(version="4.70.1"),
    "safetensors": Package(version="0.8.0", requires=("packaging>=20", "jax>=0.4; extra == 'jax'")),
    "huggingface-hub": Package(version="1.2.0", requires=("tqdm>=4.42", "shellingham; extra == 'cli'")),
    "shellingham": Package(version="1.5.4"),
    "sympy": Package(version="1.14.0"),
}


class Machine:
    """An environment in memory, and a pip that adds what INDEX has."""

    def __init__(self, base, index=INDEX):
        self.packages = dict(base)
        self.index = index
        self.added = []
        self.beneath = []

    def add(self, pins, beneath):
        names = [pin.lines for pin in pins]
        self.added += names
        self.beneath += names if beneath else []
        self.packages |= {name: self.index[name] for name in names}

    def complete(self, dependencies=DEPENDENCIES):
        pins = {name: Pin(version=package.version, lines=name) for name, package in self.index.items()}
        base_image.complete(dependencies, pins, lambda: dict(self.packages), self.add)


def test_adds_what_is_missing_or_too_old_and_what_that_needs_in_turn():
    machine = Machine(NGC)
    machine.complete()
    assert sorted(machine.added) == ["huggingface-hub", "safetensors", "shellingham", "timm", "tqdm"]
    assert {name: machine.packages[name] for name in NGC if name != "tqdm"} == {
        name: package for name, package in NGC.items() if name != "tqdm"
    }


def test_what_the_system_installed_is_laid_over_and_not_removed():
    machine = Machine(NGC)
    machine.complete()
    assert machine.beneath == ["tqdm"], "pip cannot remove what has no list of its files"


def test_a_second_run_adds_nothing():
    machine = Machine(NGC)
    machine.complete()
    machine.added.clear()
    machine.complete()
    assert machine.added == []


@pytest.mark.parametrize("dali", ["nvidia-dali-cuda140", "nvidia-dali-cuda130"])
def test_the_dali_of_the_base_stays_whichever_it_is(dali):
    base = {name: package for name, package in NGC.items() if "dali" not in name} | {dali: Package(version="2.2.0")}
    machine = Machine(base)
    machine.complete()
    assert not any("dali" in name for name in machine.added)


@pytest.mark.parametrize(
    ("name", "version", "message"),
    [
        ("torch", "2.10.0a0+a36e1d39eb.nv26.1", r"torch>=2.11 is needed, and torch is 2.10.*build from another BASE"),
        ("torch", None, r"torch is missing.*build from another BASE"),
        ("nvidia-dali-cuda130", None, r"nvidia-dali-cuda130 is missing.*build from another BASE"),
        ("numpy", "1.26.4", r"numpy>=2.1 is needed, and numpy is 1.26.4.*build from another BASE"),
        ("opencv", "4.8.0", r"opencv-python-headless>=4.10 is needed.*is 4.8.0"),
    ],
)
def test_refuses_a_base_that_does_not_fit(name, version, message):
    base = {key: package for key, package in NGC.items() if key != name}
    if version:
        base[name] = Package(version=version)
    machine = Machine(base)
    with pytest.raises(ValueError, match=message):
        machine.complete()
    assert not {"torch", "numpy"} & set(machine.added)


def test_refuses_what_the_lock_cannot_satisfy():
    with pytest.raises(ValueError, match=r"needs-newer>=2 is needed.*requirements.lock has no needs-newer"):
        Machine(NGC).complete(["needs-newer>=2"])
    with pytest.raises(ValueError, match=r"tqdm is 4.70.1, as requirements.lock has it"):
        Machine(NGC | {"tqdm": INDEX["tqdm"]}).complete(["tqdm>=5"])


def test_an_addition_that_python_does_not_find_is_an_error():
    machine = Machine(NGC)
    machine.packages = NGC
    machine.add = lambda pins, beneath: None
    with pytest.raises(ValueError, match=r"timm 1.0.31 was installed, and Python still does not find it"):
        machine.complete(["timm"])


NAMES = ["a", "b", "c", "d", "e"]
VERSIONS = st.integers(1, 3)


@given(
    needs=st.fixed_dictionaries({name: st.lists(st.tuples(st.sampled_from(NAMES), VERSIONS)) for name in NAMES}),
    base=st.dictionaries(st.sampled_from(NAMES), VERSIONS),
    wanted=st.lists(st.tuples(st.sampled_from(NAMES), VERSIONS)),
)
def test_whatever_the_base_lacks_it_ends_complete_and_new_packages_contradict_nothing(needs, base, wanted):
    def package(name, version):
        return Package(version=str(version), requires=tuple(f"{other}>={least}" for other, least in needs[name]))

    # The lock has the newest of each, so it satisfies every requirement.
    machine = Machine(
        {name: package(name, version) for name, version in base.items()}, {name: package(name, 3) for name in NAMES}
    )
    before = base_image.contradictions(machine.packages)
    dependencies = [f"{name}>={least}" for name, least in wanted]
    machine.complete(dependencies)
    assert not any(base_image.unmet(base_image.Requirement(line), machine.packages) for line in dependencies)
    assert base_image.contradictions(machine.packages).keys() <= before.keys()
    assert len(set(machine.added)) == len(machine.added)


def test_only_new_contradictions_count():
    assert base_image.contradictions(NGC) == {
        "nvidia-dali-cuda130 needs astunparse<=1.6.3": "is missing",
        "torch needs sympy>=1.13.3": "is missing",
        "torchvision needs torch==2.14.0": "is 2.14.0a0+b2c75dd062.nv26.9.68203377",
    }


@pytest.mark.parametrize("line", ["torch (>=1.x)", "a b c", ""])
def test_metadata_that_cannot_be_read_contradicts_nothing(line):
    assert base_image.contradictions({"old": Package(version="not a version", requires=(line,))}) == {}


def test_a_version_that_is_none_satisfies_nothing():
    packages = {"old": Package(version="unknown"), "user": Package(version="1", requires=("old>=1",))}
    assert base_image.contradictions(packages) == {"user needs old>=1": "is unknown"}


def test_reads_the_whole_lock_with_its_hashes():
    lock = (ROOT / "requirements.lock").read_text()
    pins = base_image.locked(lock)
    lines = [line.removesuffix(" \\") for line in lock.splitlines() if re.match(r"\w", line)]
    assert {name: pin.version for name, pin in pins.items()} == {
        base_image.canonicalize_name(requirement.name): str(requirement.specifier).removeprefix("==")
        for requirement in base_image.requirements_of(lines)
    }
    dependencies = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    assert {base_image.canonicalize_name(base_image.Requirement(line).name) for line in dependencies} <= pins.keys()
    for name, pin in pins.items():
        assert re.fullmatch(r"[^\n]+ \\\n(    --hash=sha256:[0-9a-f]{64}( \\)?\n)+", pin.lines), name
        assert pin.lines.rstrip()[-1] != "\\", name


def write_package(site, name, version, *, module=None, requires=(), record=True):
    info = site / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    needs = "".join(f"Requires-Dist: {line}\n" for line in requires)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{needs}")
    if record:
        (info / "RECORD").touch()
    if module is not None:
        path = site / Path(*module.split("."))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_suffix(".py").touch()


def test_of_two_with_one_name_the_first_on_the_path_counts(tmp_path, monkeypatch):
    write_package(tmp_path / "first", "in-both", "2.0")
    write_package(tmp_path / "second", "In_Both", "1.0", record=False)
    (tmp_path / "second" / "broken.dist-info").mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path / "first"), str(tmp_path / "second")])
    assert base_image.installed() == {"in-both": Package(version="2.0")}


@pytest.fixture
def pip(tmp_path, monkeypatch):
    """A pip that notes its arguments, the file of requirements and the constraints; `make(code)` sets how it ends."""
    package = tmp_path / "fake" / "pip"
    package.mkdir(parents=True)
    notes = tmp_path / "notes.json"
    monkeypatch.setenv("PYTHONPATH", str(package.parent))
    monkeypatch.setenv("PIP_CONSTRAINT", "base.txt")

    def make(code=0):
        (package / "__main__.py").write_text(
            "import json, os, pathlib, sys\n"
            "noted = sys.argv[1:-1], pathlib.Path(sys.argv[-1]).read_text(), os.environ['PIP_CONSTRAINT']\n"
            f"pathlib.Path({str(notes)!r}).write_text(json.dumps(noted))\n"
            f"sys.exit({code})\n"
        )
        return lambda: json.loads(notes.read_text())

    return make


@pytest.mark.parametrize("beneath", [False, True])
def test_pip_resolves_nothing_and_checks_hashes(pip, beneath):
    noted = pip()
    digest = hashlib.sha256(b"").hexdigest()
    base_image.pip_install([Pin(version="1", lines=f"a==1 \\\n    --hash=sha256:{digest}\n")], beneath)
    arguments, text, constraint = noted()
    assert arguments[0] == "install"
    assert {"--no-deps", "--require-hashes", "--break-system-packages"} <= set(arguments)
    assert ("--ignore-installed" in arguments) == beneath
    assert digest in text
    assert constraint == ""


def test_a_pip_that_fails_is_an_error_that_names_the_package(pip):
    pip(code=1)
    with pytest.raises(ValueError, match="pip could not add a==1"):
        base_image.pip_install([Pin(version="1", lines="a==1 \\\n")], False)


def test_a_module_that_ends_python_is_an_error(tmp_path, monkeypatch):
    (tmp_path / "crashes.py").write_text("import os\nos._exit(3)\n")
    (tmp_path / "raises.py").write_text("raise OSError('no libcuda')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert base_image.failing_imports(["json", "raises"]) == {"raises": "OSError: no libcuda"}
    with pytest.raises(ValueError, match="importing json, crashes ended Python with 3"):
        base_image.failing_imports(["json", "crashes"])


def run(command, record, **environment):
    return subprocess.run(
        [sys.executable, str(DEPLOY / "docker" / "base_image.py"), command, str(record)],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_check_names_everything_that_does_not_go_together(tmp_path, monkeypatch):
    record = tmp_path / "base.json"
    before = {"versions": {"torch": "2.14.0a0+nv", "gone-gpu": "1"}, "contradictions": [], "imports": []}
    before["versions"]["nvidia-gone"] = "3"
    record.write_text(json.dumps(before))
    monkeypatch.setattr(base_image, "installed", lambda: NGC)
    monkeypatch.setattr(base_image, "failing_imports", lambda modules: {"cv2": "ImportError: libGL.so.1"})
    with pytest.raises(ValueError, match="do not go together") as raised:
        base_image.check(record)
    lines = str(raised.value).splitlines()[1:]
    assert lines == [
        "  torch 2.14.0a0+nv of the base image has become 2.14.0a0+b2c75dd062.nv26.9.68203377",
        "  nvidia-gone 3 of the base image has become (none)",
        "  nvidia-dali-cuda130 needs astunparse<=1.6.3, and it is missing",
        "  torch needs sympy>=1.13.3, and it is missing",
        "  torchvision needs torch==2.14.0, and it is 2.14.0a0+b2c75dd062.nv26.9.68203377",
        "  cv2 does not import: ImportError: libGL.so.1",
    ]


@pytest.mark.slow
@pytest.mark.parametrize("apex", ["nvidia", "another", "none"])
def test_this_environment_lacks_nothing_and_apex_is_optional(tmp_path, apex):
    site = tmp_path / "site"
    site.mkdir()
    if apex != "none":
        write_package(site, "apex", "0.1", module="apex.optimizers" if apex == "nvidia" else "apex.other")
    record = tmp_path / "base.json"
    result = run("install", record, PYTHONPATH=str(site))
    assert result.returncode == 0, result.stderr
    assert ("no apex.optimizers in this base" in result.stdout) == (apex != "nvidia")
    assert json.loads(record.read_text())["imports"] == (["apex.optimizers"] if apex == "nvidia" else [])
    if apex == "none":
        assert run("check", record, PYTHONPATH=str(site)).returncode == 0
    if apex == "nvidia":
        (site / "apex" / "optimizers.py").unlink()
        result = run("check", record, PYTHONPATH=str(site))
        assert result.returncode == 1
        assert "apex.optimizers does not import" in result.stderr
