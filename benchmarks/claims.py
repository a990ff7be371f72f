"""What a benchmark claims, in a form that a program can check, and the header of its table."""

import json
import os
import platform
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Claim:
    """One line of a result. Without a goal there is nothing to hold: a number that is told."""

    claim: str
    """What was measured, with its unit."""
    ours: float
    theirs: float | None
    """What ours stands beside: another library, or a limit. None: nothing."""
    ratio: float | None
    """As the claim says; None where a difference is what counts."""
    goal: str | None
    holds: bool | None


def write_claims(claims: Sequence[Claim], path: Path | None) -> None:
    """Write the claims as a JSON list, if a file is asked for."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps([asdict(claim) for claim in claims], indent=2) + "\n")


def header(title: str, *packages: str) -> str:
    """Markdown: a title, the day, the machine, versions and the command that this process was started with."""
    script = Path(sys.argv[0])
    command = shlex.join(["python", f"{script.parent.name}/{script.name}", *sys.argv[1:]])
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("torch", *packages))
    cpus = f"{_cpu_model()}, {len(os.sched_getaffinity(0))} CPUs"
    return (
        f"# {title}\n\n{datetime.now(UTC):%Y-%m-%d}; {cpus}{_gpu_model()}; Python {platform.python_version()}, "
        f"{versions}\n\n    {command}\n\n"
    )


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _gpu_model() -> str:
    import torch

    return f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
