"""What a base image brings, and what requirements.lock adds to it without changing that.

    python deploy/docker/base_image.py install RECORD  write what the base has to RECORD, then add what it lacks
    python deploy/docker/base_image.py check RECORD  compare with RECORD: versions, requirements, imports

NVIDIA builds the torch, torchvision, DALI and apex of an NGC image for each other. pip knows nothing of that: asked to
resolve, it would replace them, or refuse a base whose packages already contradict each other's metadata. So each
package is added by itself (--no-deps), until nothing that we need is missing.
"""

import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from packaging.markers import Marker
from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion

ROOT = Path(__file__).resolve().parents[2]
EXTRAS = ("demo", "gpu", "parquet", "train")
KEPT = re.compile(r"torch|torchvision|apex|numpy|triton|pytorch-triton|nvidia-.*")
NEVER_ADDED = ("torch", "torchvision")
DALI = re.compile(r"nvidia-dali-cuda\d+")
# Distributions that bring one and the same module: any of them will do, and a second one would overwrite it.
SAME_MODULE = (DALI, re.compile(r"opencv(-contrib)?(-python)?(-headless)?"))
# Without these there is nothing to train with; the others are built against numpy or call torch.
NEEDED_IMPORTS = ("torch", "torchvision", "nvidia.dali")
ADDED_IMPORTS = ("accelerate", "cv2", "matplotlib.pyplot", "obstore", "pyarrow", "simplejpeg", "skimage", "timm")
OPTIONAL_IMPORTS = ("apex.optimizers",)


@dataclass(frozen=True, kw_only=True)
class Package:
    """An installed distribution."""

    version: str
    requires: tuple[str, ...] = ()
    """Its requirements, as its metadata has them."""
    has_record: bool = True
    """Whether pip knows its files and can replace it; the system's own packages have no such list."""


@dataclass(frozen=True, kw_only=True)
class Pin:
    """A package of requirements.lock."""

    version: str
    lines: str
    """What the lock says about it, with hashes."""


def installed() -> dict[str, Package]:
    """Return this interpreter's packages by canonical name; of two with one name, the one that Python imports."""
    importlib.invalidate_caches()
    found: dict[str, Package] = {}
    for distribution in metadata.distributions():
        try:
            told = distribution.metadata
        except FileNotFoundError:
            # So importlib-metadata says, which takes the place of Python's own where a package imports it.
            continue
        name, version = told.get("Name"), told.get("Version")
        if name and version:
            package = Package(
                version=version,
                requires=tuple(distribution.requires or ()),
                has_record=distribution.read_text("RECORD") is not None,
            )
            found.setdefault(canonicalize_name(name), package)
    return found


def locked(lock: str) -> dict[str, Pin]:
    """Return the packages of the text of a requirements.lock whose markers hold on this machine."""
    pins: dict[str, Pin] = {}
    entry = r"^([\w.-]+)(?:\[[\w,-]+\])?==(\S+)(?: ; (.+?))? \\\n(?:    --hash=\S+(?: \\)?\n)+"
    for found in re.finditer(entry, lock, flags=re.MULTILINE):
        name, version, marker = found.groups()
        if not marker or Marker(marker).evaluate():
            pins[canonicalize_name(name)] = Pin(version=version, lines=found.group())
    return pins


def requirements_of(lines: Iterable[str], extras: Iterable[str] = ()) -> Iterator[Requirement]:
    """Yield those requirements that hold on this machine with these extras; what cannot be read is left out."""
    for line in lines:
        try:
            requirement = Requirement(line)
        except InvalidRequirement:
            continue
        if requirement.marker is None or any(requirement.marker.evaluate({"extra": extra}) for extra in ("", *extras)):
            yield requirement


def stands_for(name: str, present: dict[str, Package]) -> str | None:
    """Return the installed package that brings what `name` would bring."""
    if name in present:
        return name
    family = next((family for family in SAME_MODULE if family.fullmatch(name)), None)
    return next((other for other in present if family and family.fullmatch(other)), None)


def unmet(requirement: Requirement, present: dict[str, Package]) -> str:
    """Return how `present` fails `requirement`, or nothing where it does not.

    Any DALI will do: which one a base has goes with its CUDA and its torch.
    """
    name = stands_for(canonicalize_name(requirement.name), present)
    if name is None:
        return "is missing"
    version = present[name].version
    try:
        met = DALI.fullmatch(name) or requirement.specifier.contains(version, prereleases=True)
    except InvalidVersion:
        met = False
    return "" if met else f"is {version}"


def contradictions(present: dict[str, Package]) -> dict[str, str]:
    """Return the requirements of installed packages that are not met, each with the reason."""
    return {
        f"{name} needs {requirement}": reason
        for name, package in present.items()
        for requirement in requirements_of(package.requires)
        if (reason := unmet(requirement, present))
    }


def lacking(dependencies: list[str], present: dict[str, Package], base: dict[str, str]) -> dict[str, str]:
    """Return the names of packages to add, each with the reason.

    What the base's own packages need of each other is left as it was; what was added on top of `base` (name ->
    version) brings needs of its own.
    """
    result: dict[str, str] = {}
    queue = list(requirements_of(dependencies))
    seen: set[tuple[str, frozenset[str]]] = set()
    while queue:
        requirement = queue.pop()
        name = canonicalize_name(requirement.name)
        visit = (name, frozenset(requirement.extras))
        if reason := unmet(requirement, present):
            result[name] = f"{requirement} is needed, and {name} {reason}"
        elif visit not in seen and name in present and base.get(name) != present[name].version:
            seen.add(visit)
            queue += requirements_of(present[name].requires, requirement.extras)
    return result


def complete(
    dependencies: list[str],
    pins: dict[str, Pin],
    look: Callable[[], dict[str, Package]],
    add: Callable[[list[Pin], bool], None],
) -> None:
    """Add what is lacking until nothing is.

    Args:
        dependencies: our requirements.
        pins: what may be added.
        look: returns what is installed.
        add: installs packages; the flag says that a package of the system lies beneath, which stays where it is.

    Raises:
        ValueError: a package that must stay does not fit, or the lock has none that does.
    """
    base = {name: package.version for name, package in look().items()}
    while lack := lacking(dependencies, present := look(), base):
        for name, reason in sorted(lack.items()):
            if name in NEVER_ADDED or DALI.fullmatch(name) or (name in base and KEPT.fullmatch(name)):
                raise ValueError(f"{reason}; it stays as the base image has it: build from another BASE")
            if name not in pins:
                raise ValueError(f"{reason}, and requirements.lock has no {name} for this Python: run make lock")
            if name in present and present[name].version == pins[name].version:
                raise ValueError(f"{reason}, as requirements.lock has it: run make lock, or build from another BASE")
        for beneath in (False, True):
            chosen = [
                pins[name] for name in sorted(lack) if (name in present and not present[name].has_record) == beneath
            ]
            if chosen:
                add(chosen, beneath)
        for name in lack:
            if name not in (now := look()) or now[name].version != pins[name].version:
                raise ValueError(f"{name} {pins[name].version} was installed, and Python still does not find it")


def pip_install(pins: list[Pin], beneath: bool) -> None:
    """Install the pins, and nothing else, with pip, and print them.

    Raises:
        ValueError: pip could not.
    """
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.writelines(pin.lines for pin in pins)
        file.flush()
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--root-user-action", "ignore", "--no-cache-dir"]
        command += ["--break-system-packages", "--no-deps", *(["--ignore-installed"] if beneath else [])]
        # The base may name constraints of its own, which hold no hashes.
        environment = os.environ | {"PIP_CONSTRAINT": ""}
        command += ["--require-hashes", "--requirement", file.name]
        result = subprocess.run(command, env=environment)  # noqa: S603 (pip, with words of our own)
    names = " ".join(pin.lines.split()[0] for pin in pins)
    if result.returncode:
        raise ValueError(f"pip could not add {names}; its reasons stand above")
    print(f"added: {names}", flush=True)


def failing_imports(modules: Iterable[str]) -> dict[str, str]:
    """Return which of the modules do not import in a fresh interpreter, each with the error.

    Raises:
        ValueError: one of them ends the interpreter.
    """
    code = (
        "import importlib, json, sys\n"
        "failed = {}\n"
        "for name in sys.argv[1:]:\n"
        "    try:\n        importlib.import_module(name)\n"
        "    except Exception as error:\n        failed[name] = f'{type(error).__name__}: {error}'\n"
        "print(json.dumps(failed))\n"
    )
    result = subprocess.run([sys.executable, "-c", code, *modules], stdout=subprocess.PIPE, text=True)  # noqa: S603 (this interpreter)
    if result.returncode:
        raise ValueError(f"importing {', '.join(modules)} ended Python with {result.returncode}")
    return json.loads(result.stdout.splitlines()[-1])


def install(record: Path) -> None:
    """Write what the base has to `record`, and add what is lacking.

    Raises:
        ValueError: the base lacks what it must bring, or does not fit.
    """
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted: list[str] = sum((project["optional-dependencies"][extra] for extra in EXTRAS), project["dependencies"])
    # An extra that names another one of ours brings nothing of its own.
    dependencies = [line for line in wanted if not line.startswith(f"{project['name']}[")]
    base = installed()
    versions = {name: package.version for name, package in base.items()}
    failed = failing_imports((*NEEDED_IMPORTS, *OPTIONAL_IMPORTS))
    before = {
        "versions": versions,
        "contradictions": contradictions(base),
        "imports": [name for name in OPTIONAL_IMPORTS if name not in failed],
    }
    record.write_text(json.dumps(before, indent=1))
    for requirement, reason in contradictions(base).items():
        print(f"note: the base contradicts itself: {requirement}, and it {reason}")
    for name in OPTIONAL_IMPORTS:
        if name in failed:
            print(f"note: no {name} in this base ({failed[name]}): --optim.kernels apex will be refused")
    for requirement in requirements_of(dependencies):
        name = stands_for(canonicalize_name(requirement.name), base)
        fits = name is None or requirement.specifier.contains(versions[name], prereleases=True)
        if DALI.fullmatch(name or "") and not (fits and name == requirement.name):
            print(f"note: {name} {versions[name]} of the base stays; this project is tested with {requirement}")
    complete(dependencies, locked((ROOT / "requirements.lock").read_text()), installed, pip_install)


def check(record: Path) -> None:
    """Compare this interpreter's packages with the base's in `record`, and import what must work.

    Raises:
        ValueError: a package that must stay has changed, packages contradict each other that did not before, or an
            import fails.
    """
    before = json.loads(record.read_text())
    now = installed()
    wrong = [
        f"{name} {version} of the base image has become {now[name].version if name in now else '(none)'}"
        for name, version in before["versions"].items()
        if KEPT.fullmatch(name) and (name not in now or now[name].version != version)
    ]
    wrong += [
        f"{requirement}, and it {reason}"
        for requirement, reason in contradictions(now).items()
        if requirement not in before["contradictions"]
    ]
    failed = failing_imports((*NEEDED_IMPORTS, *ADDED_IMPORTS, *before["imports"]))
    wrong += [f"{name} does not import: {error}" for name, error in failed.items()]
    if wrong:
        raise ValueError("this base image and requirements.lock do not go together:\n  " + "\n  ".join(wrong))


if __name__ == "__main__":
    try:
        {"install": install, "check": check}[sys.argv[1]](Path(sys.argv[2]))
    except ValueError as error:
        sys.exit(f"base_image: {error}")
