"""Executors, which write the shards of a plan: processes of this machine, or an existing Ray cluster."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Protocol

from shards.config import PackConfig
from shards.ground.progress import Tick
from shards.packing.plan import ShardTask
from shards.packing.records import Finished
from shards.packing.write import WriteShard

__all__ = ["EXECUTORS", "Executor", "executor"]


class Executor(Protocol):
    """Does tasks in any order and at any place, and yields each as it finishes, with what the job returned."""

    def __call__(
        self, job: WriteShard, tasks: Sequence[ShardTask], *, tick: Tick
    ) -> Iterator[tuple[ShardTask, Finished]]:
        """Do the tasks. Raises PackError where one cannot be done."""
        ...


def _local(config: PackConfig) -> Executor:
    from shards.ground.cpus import available_cpus
    from shards.ground.pool import run_tasks

    return partial(run_tasks, workers=config.workers or available_cpus())


def _ray(config: PackConfig) -> Executor:
    from shards.packing.cluster import check_cluster, run_on_cluster

    check_cluster(config.ray_address)
    return partial(run_on_cluster, address=config.ray_address, workers=config.workers)


EXECUTORS: dict[str, Callable[[PackConfig], Executor]] = {"local": _local, "ray": _ray}
"""Give an executor for a configuration. Raises ValueError where it is not there."""


def executor(config: PackConfig) -> Executor:
    """Return the executor that was chosen.

    Raises:
        ValueError: there is none such here.
    """
    return EXECUTORS[config.executor](config)
