"""Test matrix: the fast tests on the oldest and the newest versions that pyproject.toml admits.

    python tests/matrix.py [lowest] [image] [newest]

Makes an environment for each in build/matrix and prints a table. When all of them ran and passed, the table is written
into CONTRIBUTING.md. uv finds the interpreters, or downloads them where it may.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "matrix"
CONTRIBUTING = ROOT / "CONTRIBUTING.md"
BEGIN, END = "<!-- made by `make test-matrix`: begin -->", "<!-- made by `make test-matrix`: end -->"
SHOWN = ("torch", "torchvision", "numpy", "timm", "accelerate", "nvidia-dali-cuda130")


@dataclass(frozen=True, kw_only=True)
class Environment:
    """Versions that are tested together."""

    name: str
    python: str
    resolution: str
    """uv's: `lowest-direct` takes the lower bounds of pyproject.toml, `highest` the newest versions."""
    constraints: tuple[str, ...] = ()


ENVIRONMENTS = (
    Environment(name="lowest", python="3.11", resolution="lowest-direct"),
    # What NVIDIA's image 26.09 brings, and so what the Dockerfile builds on.
    Environment(name="image", python="3.12", resolution="highest", constraints=("torch==2.14.*",)),
    Environment(name="newest", python="3.14", resolution="highest"),
)


@dataclass(frozen=True, kw_only=True)
class EnvironmentOutcome:
    """What happened in one environment."""

    environment: Environment
    versions: dict[str, str]
    closing_line: str
    passed: bool


def make(environment: Environment) -> Path:
    """Install an environment and return its interpreter. Raises CalledProcessError if uv fails."""
    home = BUILD / environment.name
    python = home / "bin" / "python"
    constraints = BUILD / f"{environment.name}.txt"
    BUILD.mkdir(parents=True, exist_ok=True)
    constraints.write_text("".join(f"{line}\n" for line in environment.constraints))
    _uv("venv", "--quiet", "--clear", "--python", environment.python, str(home))
    install = ("pip", "install", "--quiet", "--python", str(python))
    versions = ("--resolution", environment.resolution, "--constraint", str(constraints))
    # FFCV is built here. Its build names every library of OpenCV, of which it uses two.
    link = {"LDFLAGS": f"-Wl,--as-needed {os.environ.get('LDFLAGS', '')}"}
    _uv(*install, *versions, "--requirement", "pyproject.toml", "--all-extras", "--group", "dev", **link)
    editable = ("--no-deps", "--no-build-isolation", "--config-settings", "editable_mode=compat", "--editable", ".")
    _uv(*install, *editable)
    return python


def test(environment: Environment, python: Path) -> EnvironmentOutcome:
    """Run the fast tests."""
    words = ("-m", "pytest", "-m", "not slow and not long", "--numprocesses", "auto", "--dist", "loadfile")
    variables = {"PATH": f"{python.parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1", "DEVICE": "cpu"}
    run = subprocess.Popen(
        [python, *words, "--timeout", "600"],
        cwd=ROOT,
        env=os.environ | variables,
        stdout=subprocess.PIPE,
        text=True,
        bufsize=1,
    )
    assert run.stdout is not None
    line = ""
    for line in run.stdout:
        print(line, end="", flush=True)
    passed = run.wait() == 0
    return EnvironmentOutcome(
        environment=environment, versions=_versions(python), closing_line=line.strip("= \n"), passed=passed
    )


def table(outcomes: Sequence[EnvironmentOutcome], day: str) -> str:
    """Markdown: a row for each environment."""
    rows = [
        f"| {outcome.environment.name} | {' | '.join(outcome.versions.values())} | {outcome.closing_line} |"
        for outcome in outcomes
    ]
    names = list(outcomes[0].versions)
    return "\n".join((f"| {day} | {' | '.join(names)} | fast tests |", "|---" * (len(names) + 2) + "|", *rows))


def write_table(document: Path, text: str) -> None:
    """Put a table between the marks of a document."""
    before, begin, rest = document.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    assert begin, f"{document} lacks {BEGIN}"
    assert end, f"{document} lacks {END}"
    document.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}")


def main(names: Sequence[str]) -> int:
    """Test the named environments, or all; return the exit code."""
    known = [each.name for each in ENVIRONMENTS]
    if unknown := set(names) - set(known):
        print(f"there is no environment {', '.join(sorted(unknown))}: choose {', '.join(known)}", file=sys.stderr)
        return 2
    outcomes = []
    for environment in ENVIRONMENTS:
        if names and environment.name not in names:
            continue
        print(f"{environment.name}: Python {environment.python}, {environment.resolution}", flush=True)
        try:
            python = make(environment)
        except subprocess.CalledProcessError as error:
            print(f"{environment.name}: not installed, uv ended with {error.returncode}", file=sys.stderr)
            return 1
        outcomes.append(test(environment, python))
    text = table(outcomes, datetime.now(UTC).date().isoformat())
    print(text)
    passed = all(outcome.passed for outcome in outcomes)
    if passed and len(outcomes) == len(ENVIRONMENTS):
        write_table(CONTRIBUTING, text)
    return 0 if passed else 1


def _uv(*words: str, **variables: str) -> None:
    # `make setup` leaves uv here where the machine has none.
    uv = shutil.which("uv") or str(ROOT / ".uv" / "bin" / "uv")
    subprocess.run([uv, *words], cwd=ROOT, env=os.environ | variables, check=True)


def _versions(python: Path) -> dict[str, str]:
    code = (
        "import platform; from importlib.metadata import version; print(platform.python_version(), "
        f"*(version(name).partition('+')[0] for name in {SHOWN}))"
    )
    answer = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout
    names = ("Python", *(name.removeprefix("nvidia-").partition("-")[0] for name in SHOWN))
    return dict(zip(names, answer.split(), strict=True))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
