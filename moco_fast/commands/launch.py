"""Command `moco-fast launch`."""

import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from moco_fast.clusters.job import ClusterJob, Scheduler
from moco_fast.clusters.kubernetes import Kubernetes
from moco_fast.clusters.slurm import Container, Slurm
from moco_fast.commands.common import positive

if TYPE_CHECKING:
    from moco_fast.config import Config

__all__ = ["Launch"]

_CHOICE = tyro.conf.create_mutex_group(required=True)
_Flag = Annotated[bool, tyro.conf.FlagCreatePairsOff, _CHOICE]
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

        config = parse(self._with_folder(), prog="moco-fast launch", here=False)
        self._check_config(config)
        scheduler = self._scheduler()
        job = ClusterJob(
            name=self.name, words=self._with_folder(), nodes=self.nodes, gpus=self.gpus, restarts=self.restarts
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

    def _with_folder(self) -> tuple[str, ...]:
        """Return the options with a folder for the run, by which a job that starts again finds it."""
        if any(word == "--run.out" or word.startswith("--run.out=") for word in self.words):
            return self.words
        return (*self.words, "--run.out", "runs/$SLURM_JOB_ID" if self.slurm else f"runs/{self.name}")

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
