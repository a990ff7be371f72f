"""What a base image brings, and what is left to install on top of it so that what it brings stays as it is.

    python deploy/base_image.py plan FOLDER     before: writes kept.txt, constraints.txt and requirements.txt to FOLDER
    python deploy/base_image.py check FOLDER    after: what was kept has its old version, and imports

NVIDIA builds the torch, torchvision, DALI and apex of an NGC image for each other. pip knows nothing of that: a
dependency that asks for another torch would replace it, and apex would fail when it is first used.
"""

import importlib
import re
import sys
import tomllib
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from packaging.markers import Marker
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
KEPT = re.compile(r"torch|torchvision|apex|numpy|triton|pytorch-triton|nvidia-.*")
EXTRAS = ("demo", "parquet")
DALI = re.compile(r"nvidia-dali-cuda\d+")
IMPORTS = ("torch", "torchvision", "nvidia.dali", "apex.optimizers")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What to do to a base image."""

    kept: dict[str, str]
    """Distribution -> version of what must not change."""
    requirements: list[str]
    """What pip has to install: our dependencies that the base lacks, as locked."""
    constraints: list[str]
    """What pip must not change, and the locked versions of what the base lacks."""
    notes: list[str]
    """What a person should know."""


def installed() -> dict[str, str]:
    """Distribution -> version of this interpreter, names in canonical form."""
    return {canonicalize_name(d.name): d.version for d in metadata.distributions()}


def locked(lock: str) -> dict[str, str]:
    """Distribution -> version of the lines of a requirements.lock that hold on this machine."""
    pins: dict[str, str] = {}
    for name, version, marker in re.findall(r"^([\w.-]+)==(\S+)(?: ; (.+?))? \\$", lock, flags=re.MULTILINE):
        if not marker or Marker(marker).evaluate():
            pins[canonicalize_name(name)] = version
    return pins


def make_plan(base: dict[str, str], dependencies: list[str], pins: dict[str, str]) -> Plan:
    """Divide our dependencies into what the base has and what pip must add.

    Raises:
        ValueError: the base lacks one of the packages to keep, or has a version of it that we do not support.
    """
    kept = {name: version for name, version in sorted(base.items()) if KEPT.fullmatch(name)}
    base_dali = next((name for name in kept if DALI.fullmatch(name)), None)
    requirements: list[str] = []
    notes: list[str] = []
    for requirement in map(Requirement, dependencies):
        name = canonicalize_name(requirement.name)
        is_dali = DALI.fullmatch(name) is not None
        have = base.get(base_dali or name) if is_dali else base.get(name)
        if have is not None and requirement.specifier.contains(have, prereleases=True):
            continue
        if is_dali and have is not None:
            notes.append(f"{base_dali} {have} of the base image stays; this project is tested with {requirement}")
        elif is_dali or name in ("torch", "torchvision"):
            raise ValueError(
                f"the base image has {name} {have or '(none)'}, but {requirement} is needed: build from another BASE"
            )
        else:
            requirements.append(f"{name}=={pins[name]}")
    missing = {name: version for name, version in pins.items() if name not in base and not DALI.fullmatch(name)}
    constraints = [f"{name}=={version}" for name, version in sorted((missing | kept).items())]
    return Plan(kept=kept, requirements=requirements, constraints=constraints, notes=notes)


def plan(folder: Path) -> None:
    """Write the plan for this interpreter's packages to `folder`."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pins = locked((ROOT / "requirements.lock").read_text())
    dependencies = sum((project["optional-dependencies"][extra] for extra in EXTRAS), project["dependencies"])
    result = make_plan(installed(), dependencies, pins)
    folder.mkdir(parents=True, exist_ok=True)
    kept = [f"{name}=={version}" for name, version in result.kept.items()]
    for name, lines in (("kept", kept), ("requirements", result.requirements), ("constraints", result.constraints)):
        (folder / f"{name}.txt").write_text("".join(f"{line}\n" for line in lines))
    for note in result.notes:
        print(f"note: {note}", file=sys.stderr)


def check(folder: Path) -> None:
    """Compare this interpreter's packages with the plan in `folder`, and import what must work.

    Raises:
        ValueError: a kept package has changed, or one of the imports fails.
    """
    now = installed()
    for line in (folder / "kept.txt").read_text().split():
        name, version = line.split("==")
        if now.get(name) != version:
            raise ValueError(f"{name} {version} of the base image has become {now.get(name, '(none)')}")
    for module in IMPORTS:
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise ValueError(f"{module} does not import: {error}") from error


if __name__ == "__main__":
    try:
        {"plan": plan, "check": check}[sys.argv[1]](Path(sys.argv[2]))
    except ValueError as error:
        sys.exit(f"base_image: {error}")
