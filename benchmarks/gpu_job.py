"""What a part of the GPU check gets and gives (gpu_parts.py)."""

import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

Row = dict[str, str]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a part found."""

    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)
    ok: bool = True


@dataclass(frozen=True, kw_only=True)
class Job:
    """What a part gets besides its options."""

    name: str
    device: str
    data: Path
    """Folder that all parts share."""
    photos: Path | None

    def shards(self) -> Path:
        """Packed photographs; part `data` makes them, or else the first part that asks for them."""
        from photographs import photograph_shards

        num, size = (2048, (500, 375)) if self.device == "cuda" else (64, (80, 60))
        return photograph_shards(self.data, num=num, photos=self.photos, size=size)


def recipe(
    job: Job,
    *,
    encoder: str,
    size: int,
    batch: int,
    queue: int,
    precision: str = "auto",
    compile: bool = False,  # noqa: A002 (the option's name)
    cuda_graphs: bool = False,
    policy: str = "none",
    data: dict[str, Any] | None = None,
) -> Any:
    """MoCo v2 on photographs. Without a policy for batch norm, it is the step of each of several GPUs.

    The backend is asked for by name, DALI unless `data` says otherwise: where it is missing there is an error, and no
    figure of another backend under its name.
    """
    from moco_fast.config import BatchNormConfig
    from moco_fast.presets import PRESETS

    base = PRESETS["moco-v2"][1]
    options = {"backend": "dali"} | (data or {})
    return replace(
        base,
        data=replace(base.data, shards=str(job.shards()), batch_size=batch, **options),
        views=replace(base.views, size=size),
        model=replace(base.model, encoder=encoder),
        method=replace(base.method, queue_size=queue),
        bn=BatchNormConfig(policy=policy),
        run=replace(base.run, device=job.device, precision=precision, compile=compile, cuda_graphs=cuda_graphs),
    )


def backend_of(description: str, wanted: str) -> str:
    """The backend that a loader's description names.

    Raises:
        ValueError: it is not the one that was asked for.
    """
    found = description.partition(" ")[0]
    if found != wanted:
        raise ValueError(f"figures of the {wanted} backend were asked for, but the loader says: {description}")
    return found


def cpu_seconds() -> float:
    """Processor time of this process and its living children, threads included."""
    import psutil

    family = [psutil.Process(), *psutil.Process().children(recursive=True)]
    times = [one.cpu_times() for one in family]
    return sum(each.user + each.system for each in times)


def processors() -> int:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0))


def repeated(call: Callable[[], object], calls: int) -> Callable[[], object]:
    """A call that makes so many."""

    def all_calls() -> None:
        for _ in range(calls):
            call()

    return all_calls
