"""A training job as every scheduler has to be told of it. Does not import torch."""

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

__all__ = ["GRACE_S", "ClusterJob", "Scheduler", "quoted", "shell_command"]

GRACE_S = 120
"""Seconds from a scheduler's signal to its kill. torch's launcher gives its ranks 30 s of these to save."""


@dataclass(frozen=True, kw_only=True)
class ClusterJob:
    """What is to run, and where."""

    name: str
    """Of letters, digits and hyphens."""
    words: tuple[str, ...]
    """A recipe and its options, as after `moco-fast train`, with a folder of the run."""
    nodes: int
    gpus: int
    """Per node."""
    restarts: int
    """How often the launcher starts the ranks again by itself after one has died."""
    file: str | None = None
    """Where the text is written, for its first lines; None: to a file of the job's name."""


class Scheduler(Protocol):
    """What starts jobs from a file."""

    def text(self, job: ClusterJob, /) -> str:
        """Return the file's text."""
        ...


def shell_command(job: ClusterJob, *, rank: str, first: str) -> str:
    """Return the command of one node, in several lines of shell.

    Args:
        job: to run.
        rank: shell expression for this node's number, from 0.
        first: shell expression for the first node's name or address.
    """
    name = "multi-node" if job.nodes > 1 else "gpu-8"
    launch = [["accelerate", "launch", "--config_file", f'"$(moco-fast config-path {name})"']]
    launch.append(["--num_processes", str(job.nodes * job.gpus)])
    if job.nodes > 1:
        launch.append(["--num_machines", str(job.nodes), "--machine_rank", rank, "--main_process_ip", first])
    if job.restarts:
        launch.append(["--max_restarts", str(job.restarts)])
        if job.nodes > 1:
            # The static rendezvous cannot bring restarted nodes together again.
            launch[-1] += ["--rdzv_backend", "c10d"]
    launch.append(["-m", "moco_fast.train", *map(quoted, job.words[:1])])
    options = _grouped(job.words[1:])
    return " \\\n    ".join(" ".join(line) for line in [*launch, *options])


def _grouped(words: Sequence[str]) -> list[list[str]]:
    """Return lines of one option and its values each."""
    lines: list[list[str]] = []
    for word in words:
        if word.startswith("--") or not lines:
            lines.append([])
        lines[-1].append(quoted(word))
    return lines


def quoted(word: str) -> str:
    """Return a word as the shell reads it; what has a $ is a variable of the scheduler's, which it is to fill in."""
    if "$" not in word:
        return shlex.quote(word)
    return '"' + re.sub(r'(["`\\])', r"\\\1", word) + '"'
