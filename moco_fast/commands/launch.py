"""Command `moco-fast launch`."""

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from moco_fast.clusters.job import ClusterJob, Scheduler
from moco_fast.clusters.kubernetes import Kubernetes
from moco_fast.clusters.slurm import Container, Slurm
from moco_fast.commands.common import positive
from moco_fast.presets import PRESETS

if TYPE_CHECKING:
    from moco_fast.config import Config

__all__ = ["Launch", "refuse_unseparated"]

_CHOICE = tyro.conf.create_mutex_group(required=True)
_Flag = Annotated[bool, tyro.conf.FlagCreatePairsOff, _CHOICE]
_SLURM_TIME = re.compile(r"\d+(:\d+){0,2}|\d+-\d+(:\d+){0,2}|infinite|unlimited", re.IGNORECASE)
_DNS_NAME = re.compile(r"[a-z]([-a-z0-9]{0,50}[a-z0-9])?")


@dataclass(frozen=True, kw_only=True)
class Launch:
    """Write the file that starts a run on a cluster, for several nodes if asked for.

    For example: moco-fast launch --slurm --nodes 4 --out run.sbatch -- moco-v2 --data.shards shards/train
    """

    words: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="-- RECIPE OPTIONS")]
    """After `--`: a recipe and its options, as of `moco-fast train`."""
    slurm: _Flag = False
    """A batch script for Slurm's `sbatch`."""
    kubernetes: _Flag = False
    """An indexed Job and its Service for `kubectl apply`."""
    nodes: int = 1
    """Number of machines."""
    gpus: int = 8
    """GPUs per machine."""
    name: str = "moco-fast"
    """Name of the job: lowercase letters, digits, hyphens."""
    out: Annotated[str | None, tyro.conf.arg(metavar="FILE")] = None
    """File to write; unset: it is printed."""
    restarts: int = 0
    """How often a launcher starts its ranks again by itself when one dies."""
    image: Annotated[str | None, tyro.conf.arg(metavar="IMAGE")] = None
    """Image that the ranks run in; --slurm: unset, what is installed on the nodes."""
    container: Container = "pyxis"
    """--slurm: what runs the image there."""
    time: Annotated[str, tyro.conf.arg(metavar="TIME")] = "24:00:00"
    """--slurm: time limit, after which the job is queued again and goes on."""
    partition: str | None = None
    """--slurm: partition."""
    account: str | None = None
    """--slurm: account."""
    claim: str | None = None
    """--kubernetes: volume claim, on storage that all nodes share, with the shards and the runs."""
    mount: str = "/data"
    """--kubernetes: where it is mounted; relative paths of the options begin there."""
    namespace: str | None = None
    """--kubernetes: namespace."""

    def execute(self) -> int:
        """Check the options and write the file; return the exit code.

        Raises:
            ValueError: training would refuse its options, or the scheduler needs another of these.
        """
        self._check()
        from moco_fast.commandline import parse

        words = self._with_folder()
        self._check_config(parse(words, prog="moco-fast launch", here=False))
        scheduler = self._scheduler()
        job = ClusterJob(
            name=self.name, words=words, nodes=self.nodes, gpus=self.gpus, restarts=self.restarts, file=self.out
        )
        text = scheduler.text(job)
        if self.out is None:
            print(text, end="")
        else:
            Path(self.out).write_text(text)
            print(f"written to {self.out}", file=sys.stderr)
        return 0

    def _check(self) -> None:
        for name in ("nodes", "gpus"):
            positive(name, getattr(self, name))
        if self.restarts < 0:
            raise ValueError(f"--restarts is {self.restarts}, but must be 0 or above")
        if not _DNS_NAME.fullmatch(self.name):
            raise ValueError(f"--name {self.name}: use lowercase letters, digits and hyphens, at most 52")
        if not self.words:
            raise ValueError("there is nothing to launch: give a recipe and its options after `--`")
        if self.out is not None and not Path(self.out).resolve().parent.is_dir():
            raise ValueError(f"--out {self.out}: there is no such folder to write to")
        if self.out is not None and Path(self.out).is_dir():
            raise ValueError(f"--out {self.out} is a folder: give the name of a file in it")
        self._check_scheduler()

    def _check_scheduler(self) -> None:
        """Refuse options of the scheduler that is not written for, and what it would not read."""
        of_slurm, of_kubernetes = ("container", "time", "partition", "account"), ("claim", "mount", "namespace")
        defaults = {field.name: field.default for field in fields(self)}
        for name in of_kubernetes if self.slurm else of_slurm:
            if getattr(self, name) != defaults[name]:
                mine, other = ("slurm", "kubernetes") if self.slurm else ("kubernetes", "slurm")
                raise ValueError(f"--{name} is of --{other} and does nothing with --{mine}: leave it out")
        if self.slurm and not _SLURM_TIME.fullmatch(self.time):
            raise ValueError(
                f"--time {self.time}: give it as Slurm does, such as 24:00:00, 2-12:00:00 or minutes alone"
            )
        for name in ("partition", "account", "image", "claim", "namespace"):
            if re.search(r"\s", getattr(self, name) or ""):
                raise ValueError(f"--{name} {getattr(self, name)}: there can be no space in it")

    def _with_folder(self) -> tuple[str, ...]:
        """Return the options with a folder for the run as the last one, by which a job that starts again finds it."""
        from moco_fast.commandline import take_recipes
        from moco_fast.config import RunConfig

        rest, folder = _without_folder(self.words)
        if folder is None:
            _, recipes, path = take_recipes(rest)
            in_file = next(iter(recipes.values())).run.out
            if path is not None and in_file != RunConfig().out:
                folder = in_file
        default = "runs/$SLURM_JOB_ID" if self.slurm else f"runs/{self.name}"
        return (*rest, "--run.out", folder or default)

    def _check_config(self, config: "Config") -> None:
        ranks, batch_size = self.nodes * self.gpus, config.data.batch_size
        if batch_size % ranks:
            raise ValueError(
                f"--data.batch-size {batch_size} is not divisible by {ranks} ranks ({self.nodes} nodes of {self.gpus} "
                f"GPUs): use a multiple of {ranks}"
            )
        if config.run.device == "cpu":
            raise ValueError("--run.device cpu: what this writes asks for GPUs; leave --run.device out")

    def _scheduler(self) -> Scheduler:
        if self.slurm:
            return Slurm(
                time=self.time,
                partition=self.partition,
                account=self.account,
                image=self.image,
                container=self.container,
            )
        if self.image is None:
            raise ValueError("--image is missing: the image of docs/docker.md, as your registry calls it")
        if self.claim is None:
            raise ValueError("--claim is missing: the volume claim with the shards, on storage that all nodes share")
        return Kubernetes(image=self.image, claim=self.claim, mount=self.mount, namespace=self.namespace)


def _without_folder(words: Sequence[str]) -> tuple[list[str], str | None]:
    """Return options without the folder of the run, and that folder. Raises ValueError: its option has none."""
    rest: list[str] = []
    folder: str | None = None
    of_words = iter(words)
    for word in of_words:
        name, sign, value = word.partition("=")
        if name != "--run.out":
            rest.append(word)
            continue
        folder = value if sign else next(of_words, "--")
        if not folder or folder.startswith("--"):
            raise ValueError("--run.out needs a folder after it, in which the run is kept")
    return rest, folder


def refuse_unseparated(words: Sequence[str]) -> None:
    """Refuse a recipe without `--` before it, of whose options this command knows none. Raises ValueError."""
    recipe = next((word for word in words if word in PRESETS), None)
    if recipe is not None and "--" not in words:
        raise ValueError(
            f"{recipe} and its options are read after `--`: moco-fast launch OPTIONS -- {recipe} --data.shards ..."
        )
