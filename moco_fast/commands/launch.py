"""Command `moco-fast launch`."""

import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from moco_fast import __version__
from moco_fast.clusters.compose import Compose
from moco_fast.clusters.job import ClusterJob, PackingJob
from moco_fast.clusters.kubernetes import Kubernetes
from moco_fast.clusters.pod import PodPlan
from moco_fast.clusters.ray import RayCluster
from moco_fast.clusters.registry import check_meaning
from moco_fast.clusters.skypilot import SkyPilot
from moco_fast.clusters.slurm import Container, Slurm
from moco_fast.clusters.torchrun import Torchrun
from moco_fast.clusters.trainjob import TrainJob
from moco_fast.commands.common import positive
from moco_fast.presets import PRESETS

if TYPE_CHECKING:
    from moco_fast.config import Config

__all__ = ["Launch", "refuse_unseparated"]

_CHOICE = tyro.conf.create_mutex_group(required=True)
_Flag = Annotated[bool, tyro.conf.FlagCreatePairsOff, _CHOICE]
_SCHEDULERS = ("slurm", "kubernetes", "trainjob", "sky", "compose", "torchrun", "ray")
_ENDINGS = {"slurm": "sbatch", "torchrun": "sh"}
_SLURM_TIME = re.compile(r"\d+(:\d+){0,2}|\d+-\d+(:\d+){0,2}|infinite|unlimited", re.IGNORECASE)
_DNS_NAME = re.compile(r"[a-z]([-a-z0-9]{0,50}[a-z0-9])?")
_PACK = ("make-shards", "pack")
_DECIDED_HERE = ("part", "executor", "ray_address")


@dataclass(frozen=True, kw_only=True)
class Launch:
    """Write the file that starts a run, or `make-shards pack`, on a cluster, for several nodes if asked for.

    For example: moco-fast launch --slurm --nodes 4 --out run.sbatch -- moco-v2 --data.shards shards/train
    """

    words: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="-- RECIPE OPTIONS")]
    """After `--`: a recipe and its options, as of `moco-fast train`, or `make-shards pack` and what it is given."""
    slurm: _Flag = False
    """A batch script for Slurm's `sbatch`; for packing, of an array job."""
    kubernetes: _Flag = False
    """An indexed Job for `kubectl apply`, with a Service where nodes have to meet."""
    trainjob: _Flag = False
    """A TrainJob of Kubeflow Trainer v2 for `kubectl apply`."""
    sky: _Flag = False
    """A task for SkyPilot's `sky jobs launch`."""
    compose: _Flag = False
    """A file for `docker compose` on one machine."""
    torchrun: _Flag = False
    """A script to be started on each host, where there is no scheduler."""
    ray: _Flag = False
    """A cluster for `ray up`, on which `make-shards pack` hands out its shards."""
    nodes: int = 1
    """Machines; for packing, parts that are written at a time."""
    gpus: int = 8
    """GPUs per machine."""
    name: str = "moco-fast"
    """Name of the job: lowercase letters, digits, hyphens."""
    out: Annotated[str | None, tyro.conf.arg(metavar="FILE")] = None
    """File to write; unset: it is printed."""
    restarts: int = 0
    """How often a launcher starts its ranks again by itself when one dies."""
    interface: str | None = None
    """Network interface that the nodes share, such as eth0, for gloo and NCCL; unset: it is found."""
    parts: int | None = None
    """For packing: parts that the work is cut into; unset: one per machine."""
    cpus: int = 16
    """For packing: CPUs per machine."""
    image: Annotated[str | None, tyro.conf.arg(metavar="IMAGE")] = None
    """Image that the work is done in; --slurm, --sky: unset, what is installed on the machines."""
    container: Container = "pyxis"
    """--slurm: what runs the image there."""
    time: Annotated[str, tyro.conf.arg(metavar="TIME")] = "24:00:00"
    """--slurm: time limit, after which the job is queued again and goes on."""
    partition: str | None = None
    """--slurm: partition."""
    account: str | None = None
    """--slurm: account."""
    claim: str | None = None
    """--kubernetes, --trainjob: volume claim, on storage that all nodes share, with the shards and the runs. --sky: the
    same as a volume of SkyPilot's."""
    mount: str = "/data"
    """Where --claim, or the folder of --compose, is mounted; relative paths of the options begin there."""
    namespace: str | None = None
    """--kubernetes, --trainjob: namespace."""
    secret: str | None = None
    """--kubernetes, --trainjob: secret whose keys become environment variables, such as a bucket's credentials."""
    gpu: str = "H100"
    """--sky: kind of GPU, as SkyPilot calls it."""
    spot: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """--sky: rent what may be taken away, at a lower price."""
    infra: str | None = None
    """--sky: cloud, or CLOUD/REGION; unset: the cheapest. --ray: aws/REGION."""
    instance: str | None = None
    """--ray: type of the machines that are rented, such as m7i.8xlarge."""
    hosts: tuple[str, ...] = ()
    """--ray: own machines in place of rented ones; the first is the head."""
    first_node: Annotated[str | None, tyro.conf.arg(metavar="HOST")] = None
    """--torchrun: name or address by which all hosts reach the first one."""

    def execute(self) -> int:
        """Check the options and write the file; return the exit code.

        Raises:
            ValueError: training or packing would refuse its options, or the scheduler needs another of these.
        """
        self._check()
        text = self._packing() if self._packs else self._training()
        if self.out is None:
            print(text, end="")
        else:
            Path(self.out).write_text(text)
            print(f"written to {self.out}", file=sys.stderr)
        return 0

    @property
    def _scheduler(self) -> str:
        return next(name for name in _SCHEDULERS if getattr(self, name))

    @property
    def _packs(self) -> bool:
        return self.words[:1] == _PACK[:1]

    def _given(self) -> list[str]:
        """Return the options that have a value of their own."""
        defaults = {field.name: field.default for field in fields(self)}
        return [name for name, default in defaults.items() if name != "words" and getattr(self, name) != default]

    def _made_by(self) -> str:
        """Return the command that this is, as one would type it."""
        words = ["moco-fast", "launch"]
        for name in self._given():
            value = getattr(self, name)
            values = [] if value is True else map(str, value) if isinstance(value, tuple) else [str(value)]
            words += [f"--{name.replace('_', '-')}", *values]
        return shlex.join([*words, "--", *self.words])

    def _check(self) -> None:
        for name in ("nodes", "gpus", "cpus", "parts"):
            if getattr(self, name) is not None:
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
        of_scheduler = [name for name in self._given() if name not in ("name", "out", *_SCHEDULERS)]
        check_meaning(self._scheduler, of_scheduler, packs=self._packs)
        if not _SLURM_TIME.fullmatch(self.time):
            raise ValueError(
                f"--time {self.time}: give it as Slurm does, such as 24:00:00, 2-12:00:00 or minutes alone"
            )
        for name in of_scheduler:
            if any(re.search(r"\s", str(value)) for value in _values(getattr(self, name))):
                raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)}: there can be no space in it")

    @property
    def _file(self) -> str:
        return self.out or f"{self.name}.{_ENDINGS.get(self._scheduler, 'yaml')}"

    def _training(self) -> str:
        from moco_fast.commandline import parse

        words = self._with_folder()
        self._check_config(parse(words, prog="moco-fast launch", here=False))
        job = ClusterJob(
            name=self.name,
            words=words,
            nodes=self.nodes,
            gpus=self.gpus,
            restarts=self.restarts,
            interface=self.interface,
            file=self._file,
            made_by=self._made_by(),
        )
        write = {
            "slurm": lambda: self._of_slurm().text(job),
            "kubernetes": lambda: Kubernetes(pods=self._pods()).text(job),
            "trainjob": lambda: TrainJob(pods=self._pods()).text(job),
            "sky": lambda: self._of_sky().text(job),
            "compose": lambda: Compose(image=self._needed("image"), mount=self.mount).text(job),
            "torchrun": lambda: Torchrun(first_node=self._needed("first_node")).text(job),
        }
        return write[self._scheduler]()

    def _packing(self) -> str:
        if self.words[:2] != _PACK:
            raise ValueError(f"{' '.join(self.words[:2])}: of make-shards, pack alone is launched on clusters")
        from shards.cli import parse_pack

        words = self.words[2:]
        options = parse_pack(words)
        for name in _DECIDED_HERE:
            if getattr(options, name) not in (None, "local", "auto"):
                raise ValueError(f"--{name.replace('_', '-')} is what this command writes: leave it out")
        if options.dry_run:
            raise ValueError("--dry-run writes nothing: run it without `moco-fast launch`")
        job = PackingJob(
            name=self.name,
            words=words,
            out=options.out,
            nodes=self.nodes,
            cpus=self.cpus,
            parts=self.parts or self.nodes,
            file=self._file,
            made_by=self._made_by(),
        )
        write = {
            "slurm": lambda: self._of_slurm().packing(job),
            "kubernetes": lambda: Kubernetes(pods=self._pods()).packing(job),
            "ray": lambda: self._of_ray().packing(job),
        }
        return write[self._scheduler]()

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
        if self.sky and self.claim is None:
            self._check_own_disks(config)

    def _check_own_disks(self, config: "Config") -> None:
        if self.nodes > 1:
            raise ValueError(
                "--claim is missing: several machines need a folder of the run that they share, which is a volume of "
                "SkyPilot's (on one machine, --checkpoint.mirror does)"
            )
        if config.checkpoint.mirror is None:
            raise ValueError(
                "the run would be lost with its machine: give --checkpoint.mirror s3://... among the options of the "
                "recipe, or --claim"
            )

    def _needed(self, name: str) -> str:
        """Return an option that the scheduler cannot do without. Raises ValueError: it is missing."""
        what = {
            "image": "the image of docs/docker.md, as your registry calls it",
            "claim": "the volume claim with the shards, on storage that all nodes share",
            "first_node": "the name or address by which all hosts reach the first one",
            "instance": "the type of the machines to rent, such as m7i.8xlarge",
        }
        if (value := getattr(self, name)) is None:
            raise ValueError(f"--{name.replace('_', '-')} is missing: {what[name]}")
        return value

    def _of_slurm(self) -> Slurm:
        return Slurm(
            time=self.time,
            partition=self.partition,
            account=self.account,
            image=self.image,
            container=self.container,
        )

    def _pods(self) -> PodPlan:
        image = self._needed("image")
        # What is packed may lie in buckets alone; the folder of a run cannot.
        claim = self.claim if self._packs else self._needed("claim")
        return PodPlan(image=image, claim=claim, mount=self.mount, secret=self.secret, namespace=self.namespace)

    def _of_sky(self) -> SkyPilot:
        return SkyPilot(
            gpu=self.gpu,
            spot=self.spot,
            infra=self.infra,
            image=self.image,
            volume=self.claim,
            mount=self.mount,
            version=__version__,
        )

    def _of_ray(self) -> RayCluster:
        if self.hosts:
            if {"infra", "instance", "nodes"} & set(self._given()):
                raise ValueError("--hosts are own machines: leave --infra, --instance and --nodes out")
            return RayCluster(hosts=self.hosts, version=__version__)
        cloud, _, region = (self.infra or "").partition("/")
        if cloud != "aws" or not region:
            raise ValueError("--ray needs machines: give --infra aws/REGION and --instance, or own ones as --hosts")
        return RayCluster(region=region, instance=self._needed("instance"), version=__version__)


def _values(value: object) -> tuple[object, ...]:
    return value if isinstance(value, tuple) else (value,)


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
    what = next((word for word in words if word in PRESETS or word == _PACK[0]), None)
    if what is not None and "--" not in words:
        raise ValueError(
            f"{what} and its options are read after `--`: moco-fast launch OPTIONS -- {what} "
            + ("pack SOURCE --out ..." if what == _PACK[0] else "--data.shards ...")
        )
