"""Executor on an existing Ray cluster. Same plan, same bytes, whichever node writes a shard."""

import shutil
import socket
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

from shards.config import EncodeConfig
from shards.ground.errors import PackError, portable
from shards.ground.locks import locked
from shards.ground.progress import Tick
from shards.packing.plan import ShardTask, cached_plan
from shards.packing.records import Finished
from shards.packing.write import WriteShard
from shards.storage.target import BucketTarget, LocalTarget

__all__ = ["NodeJob", "check_cluster", "remove_copy", "run_on_cluster"]

_RETRIES = 5
_CONNECT_S = 5
_CLEAN_S = 10
_LATE, _LATE_S = 4, 60.0
"""How many times as long as others, and how long at least, a shard takes before it is written elsewhere, too."""
_LOOK_S = 1.0
_CODECS = ("simplejpeg", "pillow", "pillow-heif", "pillow-jxl-plugin", "opencv-python-headless", "numpy")


@dataclass(frozen=True, kw_only=True)
class NodeJob:
    """The job of writing one shard on a node that may be another machine, in another folder, with other packages."""

    job: WriteShard
    versions: tuple[str, ...]
    """Of the packages that decide which bytes are written, where the packing was started."""

    @classmethod
    def of(cls, job: WriteShard) -> "NodeJob":
        """Make a job independent of this process's folder."""
        target = job.target
        if isinstance(target, LocalTarget):
            target = replace(target, out=str(Path(target.out).absolute()))
        return cls(job=WriteShard(job.plan, target, job.config), versions=_versions(job.config))

    def __call__(self, task: ShardTask, tick: Tick) -> Finished:
        """Write a shard, and return its record.

        Raises:
            PackError: this node lacks something; the error names the node.
        """
        try:
            here = _versions(self.job.config)
            if here != self.versions:
                pairs = zip(here, self.versions, strict=True)
                shown = ", ".join(f"{ours}, not {theirs}" for ours, theirs in pairs if ours != theirs)
                raise PackError(f"has {shown}: its shards could differ; install the same versions on all nodes")
            self._make_ready()
            return self.job(task, tick)
        except PackError as error:
            raise PackError(f"node {socket.gethostname()}: {error}") from None
        except OSError as error:
            what = f"{error.filename or self.job.target.work}: {error.strerror or error}"
            raise PackError(f"node {socket.gethostname()}: {what}: fix this and run the same command again") from None

    def _make_ready(self) -> None:
        target = self.job.target
        plan = target.address(self.job.plan)
        if isinstance(target, BucketTarget):
            target.work.mkdir(parents=True, exist_ok=True)
        try:
            cached_plan(plan, target.work / "spools")
        except OSError as error:
            raise PackError(
                f"cannot read {plan} ({error.strerror}): with --executor ray, --out must be a folder that every node "
                "has under the same path, or a bucket"
            ) from None
        target.scratch.mkdir(exist_ok=True)


@lru_cache(maxsize=1)
def _versions(config: EncodeConfig) -> tuple[str, ...]:
    names = [*_CODECS, "pyjpegio"] if config.progressive == "transcode" else _CODECS
    return tuple(f"{name} {_version(name)}" for name in names)


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "none"


def run_on_cluster(
    job: WriteShard, tasks: Sequence[ShardTask], *, address: str, workers: int | None, tick: Tick
) -> Iterator[tuple[ShardTask, Finished]]:
    """Write shards on a Ray cluster. A shard whose worker or node dies is written again by another.

    At the end, when CPUs are free, a shard that takes much longer than the others is written by a second worker, too;
    both write the same bytes, and the first one counts.

    Args:
        job: writes one shard.
        tasks: handed out in this order.
        address: of the cluster, as `ray.init` takes it.
        workers: at most this many at a time; None: as many as the cluster has CPUs.
        tick: called with the number of inputs of each finished shard, and their bytes.

    Raises:
        ValueError: Ray is not installed, or there is no cluster.
        PackError: a node lacks something, or workers died repeatedly.
        Exception: what a job raised.
    """
    if not tasks:
        return
    ray = _connect(address)
    write = ray.remote(num_cpus=1, max_retries=_RETRIES)(_write_shard)
    shared, left, given = ray.put(NodeJob.of(job)), deque(tasks), _Given()
    try:
        while left or given.awaited():
            # Read again each time: a cluster may grow, and does so for tasks that wait.
            limit = workers or 2 * max(1, int(ray.cluster_resources().get("CPU", 1)))
            while left and len(given) < limit:
                task = left.popleft()
                given.add(write.remote(shared, task), task)
            if not left:
                for task in given.late()[: max(0, limit - len(given))]:
                    given.add(write.remote(shared, task), task)
            for done in ray.wait(given.awaited(), num_returns=1, timeout=_LOOK_S)[0]:
                task = given.end(done)
                try:
                    finished, num_inputs, num_bytes = _result(ray, done)
                except Exception:
                    if task in given.tasks():
                        # Another worker is at it.
                        continue
                    raise
                given.finish(task)
                tick(num_inputs, num_bytes)
                yield task, finished
    finally:
        if len(given):
            # Ends what still runs or waits. ray.cancel() may end this process instead, when a task is just done (Ray's
            # pull request 54738 says how).
            ray.shutdown()
        if isinstance(job.target, BucketTarget):
            _clean_nodes(ray, address, job.target)
        ray.shutdown()


class _Given:
    """Attempts at shards that have been handed out: two at a late one, of which the first that succeeds counts."""

    def __init__(self) -> None:
        self._attempts: dict[Any, ShardTask] = {}
        self._begun_s: dict[ShardTask, float] = {}
        self._took_s: list[float] = []

    def __len__(self) -> int:
        """Return the number of attempts under way, with those at shards that are there by now."""
        return len(self._attempts)

    def add(self, reference: Any, task: ShardTask) -> None:
        """Note an attempt that begins, or waits for a CPU."""
        self._attempts[reference] = task
        self._begun_s.setdefault(task, time.monotonic())

    def tasks(self) -> Counter[ShardTask]:
        """Return how many attempts there are at each shard that is not there yet."""
        return Counter(task for task in self._attempts.values() if task in self._begun_s)

    def awaited(self) -> list[Any]:
        """Return what to wait for."""
        return [reference for reference, task in self._attempts.items() if task in self._begun_s]

    def end(self, reference: Any) -> ShardTask:
        """Note the end of an attempt."""
        return self._attempts.pop(reference)

    def finish(self, task: ShardTask) -> None:
        """Note that a shard is there."""
        self._took_s.append(time.monotonic() - self._begun_s.pop(task))

    def late(self) -> list[ShardTask]:
        """Return the shards that take much longer than others did, and have one attempt."""
        if not self._took_s:
            return []
        limit_s = max(_LATE_S, _LATE * median(self._took_s))
        return [
            task
            for task, num_attempts in self.tasks().items()
            if num_attempts == 1 and time.monotonic() - self._begun_s[task] > limit_s
        ]


def _write_shard(job: NodeJob, task: ShardTask) -> tuple[Finished | Exception, int, int]:
    """Write a shard on a node; return its record or the error, the number of inputs processed, and their bytes."""
    num_inputs, num_bytes = 0, 0

    def tick(count: int, more_bytes: int = 0, /) -> None:
        nonlocal num_inputs, num_bytes
        num_inputs += count
        num_bytes += more_bytes

    try:
        return job(task, tick), num_inputs, num_bytes
    # Raised again where the packing was started; Ray would wrap it in pages of traceback.
    except Exception as error:
        return portable(error, f"on node {socket.gethostname()}"), num_inputs, num_bytes


def _result(ray: Any, reference: Any) -> tuple[Finished, int, int]:
    try:
        result, num_inputs, num_bytes = ray.get(reference)
    except ray.exceptions.RayError as failure:
        reason = str(failure).strip().partition("\n")[0][:300]
        raise PackError(
            f"Ray could not write a shard in {1 + _RETRIES} tries ({type(failure).__name__}: {reason}): finished "
            "shards are kept; is moco-fast installed on all nodes, and is there enough memory?"
        ) from None
    if isinstance(result, Exception):
        raise result
    return result, num_inputs, num_bytes


def check_cluster(address: str) -> Any:
    """Return the ray module, if there may be a cluster.

    Raises:
        ValueError: Ray is not installed, or nothing listens at the address.
    """
    try:
        ray: Any = import_module("ray")
    except ImportError:
        raise ValueError("--executor ray needs Ray: install it with `pip install 'moco-fast[ray]'`") from None
    host, _, port = address.rpartition(":")
    # Ray itself would try for a minute, and then end this process.
    if host and port.isdecimal() and "/" not in host:
        try:
            socket.create_connection((host, int(port)), timeout=_CONNECT_S).close()
        except OSError as error:
            raise _no_cluster(address, error) from None
    return ray


def _connect(address: str) -> Any:
    """Return the ray module, connected."""
    ray = check_cluster(address)
    try:
        # A plain worker reads its own environment; nothing of this process, which may hold secrets, is sent there.
        ray.init(address=address, logging_level="error", log_to_driver=False)
    except (OSError, RuntimeError) as error:
        raise _no_cluster(address, error) from None
    return ray


def _no_cluster(address: str, error: Exception) -> ValueError:
    reason = str(error).strip().partition("\n")[0][:200]
    return ValueError(
        f"--ray-address {address}: no Ray cluster answers ({reason}): start one with `ray start --head`, or name the "
        "one to use as HOST:PORT"
    )


def _clean_nodes(ray: Any, address: str, target: BucketTarget) -> None:
    """Remove the local folder of every node but this one, whose owner does it."""
    strategy: Any = import_module("ray.util.scheduling_strategies").NodeAffinitySchedulingStrategy
    with suppress(Exception):
        if not ray.is_initialized():
            _connect(address)
        here = ray.get_runtime_context().get_node_id()
        nodes = [node["NodeID"] for node in ray.nodes() if node["Alive"] and node["NodeID"] != here]
        clean = ray.remote(num_cpus=0)(remove_copy)
        jobs = [clean.options(scheduling_strategy=strategy(node, soft=False)).remote(target) for node in nodes]
        ray.wait(jobs, num_returns=len(jobs), timeout=_CLEAN_S)


def remove_copy(target: BucketTarget) -> None:
    """Remove what this node has of a packing to a bucket."""
    # A process that packs to the same place from that machine holds the lock.
    with suppress(PackError, FileNotFoundError), locked(target.work / "lock", holder=target.out):
        shutil.rmtree(target.work)
