"""Jobs as every scheduler has to be told of them: training on nodes with GPUs, packing in parts. Free of torch."""

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = [
    "GRACE_S",
    "PORT",
    "ClusterJob",
    "PackingJob",
    "commented",
    "multi_line",
    "network_variables",
    "node_script",
    "quoted",
    "words_of",
]

GRACE_S = 120
"""Seconds from a scheduler's signal to its kill. torch's launcher gives its ranks 30 s of these to save."""
PORT = 29500
"""On which the first node is met; as in moco_fast/launch/multi-node.yaml."""
_VARIABLE = re.compile(r"\$([A-Za-z_]|\{[A-Za-z_][^{}]*\})")
_NOT_PLAIN = re.compile(rf'["`\\]|(?!{_VARIABLE.pattern})\$')
"""What a backslash is needed before, between double quotes."""


@dataclass(frozen=True, kw_only=True)
class ClusterJob:
    """What is to be trained, and where."""

    name: str
    """Of letters, digits and hyphens."""
    words: tuple[str, ...]
    """A recipe and its options, as after `moco-fast train`, with a folder of the run."""
    nodes: int
    gpus: int
    """Per node."""
    restarts: int
    """How often the launcher starts the ranks again by itself after one has died."""
    interface: str | None = None
    """Network interface that the nodes share; None: it is found."""
    file: str
    """Name that the text is written to, for its first lines."""
    made_by: str
    """Command that writes it, for the same."""


@dataclass(frozen=True, kw_only=True)
class PackingJob:
    """What is to be packed, and by how many."""

    name: str
    words: tuple[str, ...]
    """Sources and options, as after `make-shards pack`."""
    out: str
    """What --out among them says."""
    nodes: int
    """How many work at a time."""
    cpus: int
    """Per node."""
    parts: int
    """Parts of the set, each written by one node."""
    file: str
    made_by: str

    def command(self, part: str) -> str:
        """Return the command of a part, in several lines of shell; `part`: shell expression for its number."""
        return multi_line([["make-shards", "pack"], *_lines(self.words), ["--part", f'"{part}/{self.parts}"']])

    @property
    def finish(self) -> str:
        """The command that is left to do when all parts are written."""
        return f"make-shards finish {quoted(self.out)}"


def node_script(job: ClusterJob, *, rank: str, first: str, port: str = str(PORT)) -> str:
    """Return the shell script of one node: the network's interface, if it is named, and one launcher.

    Args:
        job: to run.
        rank: shell expression for this node's number, from 0.
        first: shell expression for the first node's name or address.
        port: shell expression for the port there.
    """
    name = "multi-node" if job.nodes > 1 else "gpu-8"
    launch = [["accelerate", "launch", "--config_file", f'"$(moco-fast config-path {name})"']]
    launch.append(["--num_processes", str(job.nodes * job.gpus)])
    if job.nodes > 1:
        launch.append(["--num_machines", str(job.nodes), "--machine_rank", rank, "--main_process_ip", first])
        if port != str(PORT):
            launch[-1] += ["--main_process_port", port]
    if job.restarts:
        launch.append(["--max_restarts", str(job.restarts)])
        if job.nodes > 1:
            # The static rendezvous cannot bring restarted nodes together again.
            launch[-1] += ["--rdzv_backend", "c10d"]
    launch.append(["-m", "moco_fast.train"])
    exports = f"export {variables}\n" if (variables := network_variables(job)) else ""
    return exports + f"exec {multi_line([*launch[:-1], *words_of(job, launch[-1])])}\n"


def words_of(job: ClusterJob, program: list[str]) -> list[list[str]]:
    """Return lines of the program with the recipe, and of one option and its values each."""
    return [[*program, *map(quoted, job.words[:1])], *_lines(job.words[1:])]


def network_variables(job: ClusterJob) -> str:
    """Return the assignments that name the nodes' network; empty if it is to be found."""
    if job.interface is None:
        return ""
    # NCCL takes a name as the beginning of one unless it has a sign of equality before it; gloo does not know the sign.
    return f"GLOO_SOCKET_IFNAME={quoted(job.interface)} NCCL_SOCKET_IFNAME={quoted('=' + job.interface)}"


def multi_line(lines: Sequence[Sequence[str]]) -> str:
    """Return words of shell as one command in several lines."""
    return " \\\n    ".join(" ".join(line) for line in lines)


def _lines(words: Sequence[str]) -> list[list[str]]:
    """Return lines of one option and its values each."""
    lines: list[list[str]] = []
    for word in words:
        if word.startswith("--") or not lines:
            lines.append([])
        lines[-1].append(quoted(word))
    return lines


def quoted(word: str) -> str:
    """Return a word as the shell reads it; $NAME and ${NAME} are variables of the scheduler's, which it is to fill in.

    Any other $, as of a command, stays what it is.
    """
    if _VARIABLE.search(word) is None:
        return shlex.quote(word)
    return '"' + _NOT_PLAIN.sub(r"\\\g<0>", word) + '"'


def commented(job: ClusterJob | PackingJob, *lines: str) -> str:
    """Return the first lines of a file, as comments: what made it, and what to do with it."""
    text = "\n".join((f"Made by: {job.made_by}", *lines))
    return "".join(f"# {line}\n" for line in text.splitlines())
