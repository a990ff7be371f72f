"""Command `pack`: plan, write every shard, then the manifest. The same call continues an unfinished packing."""

import os
import shutil
import time
from collections.abc import Generator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from shards.config import PackConfig
from shards.ground.cpus import available_cpus
from shards.ground.errors import PackError
from shards.ground.locks import locked, take_lock
from shards.ground.progress import ProgressBars
from shards.ground.units import counted
from shards.images.transcode import transcoder
from shards.packing.executors import executor
from shards.packing.finish import read_manifest, refuse_earlier_version, write_manifests
from shards.packing.late import late_tasks
from shards.packing.plan import PackPlan, ShardTask
from shards.packing.planning import LISTED_NAME, make_plan, refuse_changes
from shards.packing.records import RecordGroups, read_records
from shards.packing.write import WriteShard, shard_stem
from shards.sets.manifest import MANIFEST_NAME, Manifest
from shards.sources import open_source
from shards.storage.stores import is_url
from shards.storage.target import PLAN_NAME, WORK_NAME, Target, open_target, path_in

__all__ = ["pack"]


def pack(config: PackConfig, progress: ProgressBars | None = None) -> dict[str, Manifest] | None:
    """Pack images into shards, or finish a packing that was interrupted.

        import shards

        config = shards.PackConfig(sources=("photos",), out="packed", val_fraction=0.1)
        for split, manifest in (shards.pack(config) or {}).items():
            print(split, manifest.num_samples, manifest.rejections)

    Args:
        config: what is packed, and where to; its fields are the options of `make-shards pack`.
        progress: draws bars; None: silent.

    Returns:
        The manifest of each split by its name; the name is empty where nothing is split. None where only one part of
        the plan was asked for: `finish` writes the manifests when all parts are done.

    Raises:
        ValueError: the options or the sources cannot work, or disagree with what the target holds.
        PackError: packing could not continue.
        OSError: the target cannot be written.
    """
    progress = progress or ProgressBars(enabled=False)
    part = "" if config.part is None else f"-{config.part.replace('/', '-of-')}"
    _refuse_file_as_target(config.out)
    target = open_target(config.out, work_folder=config.work_folder, part=part)
    finished = _finished(config, target)
    if finished is not None and not target.work.exists():
        progress.say(f"{config.out} was packed before, and is left as it is: it holds what the sources held then")
        return finished
    if not target.work.exists():
        # What cannot work should neither list inputs for an hour first nor leave a folder behind.
        for path in config.sources:
            open_source(path, config.source_options())
            _refuse_target_inside(path, config.out)
        executor(config)
        if config.progressive == "transcode":
            transcoder()
    refuse_earlier_version(target)
    if config.part is not None:
        return _pack_part(config, target, progress)
    with _working(target, config):
        finished = _finished(config, target)
        if finished is None:
            plan = _open_plan(config, target, progress)
            _write_missing(plan, plan.tasks(), config, target, progress)
            finished = write_manifests(plan, target)
        target.remove_work()
    return finished


@contextmanager
def _working(target: Target, config: PackConfig, *, shared: bool = False) -> Generator[None]:
    """Hold the local folder of a target."""
    while True:
        target.work.mkdir(parents=True, exist_ok=True)
        # Another part may remove it as it ends, between the two.
        with suppress(FileNotFoundError):
            descriptor = take_lock(target.work / "lock", shared=shared, holder=config.out)
            break
    try:
        yield
    finally:
        os.close(descriptor)


def _refuse_file_as_target(out: str) -> None:
    if is_url(out):
        return
    here = next((path for path in (Path(out), *Path(out).parents) if path.exists()), None)
    if here is not None and not here.is_dir():
        raise ValueError(f"--out {out}: {here} is a file, and shards need a folder: choose another name")


def _refuse_target_inside(source: str, out: str) -> None:
    """Refuse a target inside a source: shards must not become inputs of the next listing."""
    if not is_url(source) and not is_url(out) and Path(out).resolve().is_relative_to(Path(source).resolve()):
        raise ValueError(f"--out {out} lies inside the source {source}: choose a folder outside of it")


def _pack_part(config: PackConfig, target: Target, progress: ProgressBars) -> None:
    """Write one part of the plan, beside other processes that write theirs. All of them make the plan together."""
    number, _, count = (config.part or "").partition("/")
    with (
        _working(target, config, shared=True),
        locked(target.work / f"lock-{number}-of-{count}", holder=f"part {config.part} of {config.out}"),
    ):
        if _finished(config, target) is not None:
            # `finish` was killed while it cleared away.
            return
        plan = _open_plan(config, target, progress)
        tasks = plan.tasks()
        try:
            _write_missing(plan, tasks[int(number) :: int(count)], config, target, progress)
            _write_late(plan, tasks, config, target, progress, num_parts=int(count))
        except (OSError, PackError):
            # Without a lock that all see, others may write this part's shards and finish the set, which ends the plan.
            if not is_url(config.out) or _finished(config, target) is None:
                raise
            progress.say(f"{config.out} was finished meanwhile: others have written the shards of this part")
            target.remove_work()
            return
    target.leave()


def _write_late(
    plan: PackPlan,
    tasks: list[ShardTask],
    config: PackConfig,
    target: Target,
    progress: ProgressBars,
    *,
    num_parts: int,
) -> None:
    """Write what parts that fell silent have left, each shard by one of those that are done with their own."""
    claims, tried = target.claims(), set[ShardTask]()
    workers = config.workers or available_cpus()
    while True:
        records = read_records(target, plan.splits, tasks, target.sizes())
        late = [task for task in late_tasks(tasks, records, num_parts, now_s=time.time()) if task not in tried]
        with ExitStack() as held:
            ours: list[ShardTask] = []
            for task in late:
                tried.add(task)
                if held.enter_context(claims.hold(f"late-{task.split}-{task.shard}")):
                    ours.append(task)
                if len(ours) == workers:
                    break
            if not ours:
                return
            progress.say(f"writing {counted(len(ours), 'shard')} of parts that have finished none for long")
            _write_missing(plan, ours, config, target, progress)


def _finished(config: PackConfig, target: Target) -> dict[str, Manifest] | None:
    """Return the manifests of an earlier packing with the same settings."""
    names = config.split_names()
    if target.has(PLAN_NAME) or any(target.get(path_in(name, MANIFEST_NAME)) is None for name in names):
        return None
    manifests = {name: read_manifest(target, name) for name in names}
    refuse_changes(config, manifests[names[0]].settings)
    return manifests


def _open_plan(config: PackConfig, target: Target, progress: ProgressBars) -> PackPlan:
    """Return the plan to follow: the one that is there, or a new one."""
    if target.scratch.exists():
        shutil.rmtree(target.scratch)
    target.scratch.mkdir()
    is_new = not (target.has(PLAN_NAME) or target.has(LISTED_NAME))
    first = {path_in(name, f"{shard_stem(0)}.tar") for name in config.split_names()}
    try:
        if is_new and any(target.has(name) for name in first):
            raise ValueError(f"{config.out} holds shards of unknown origin: choose an empty folder, or remove them")
        target.begin([])
        plan = make_plan(config, target, progress)
    except ValueError:
        if config.part is None and not target.has(LISTED_NAME):
            target.discard()
        raise
    if config.part is None and not is_new:
        listed = counted(plan.num_inputs, "input")
        progress.say(f"continuing with the {listed} that were listed before: files added since are not among them")
    target.begin([split.name for split in plan.splits])
    return plan


def _write_missing(
    plan: PackPlan, tasks: list[ShardTask], config: PackConfig, target: Target, progress: ProgressBars
) -> None:
    done = read_records(target, plan.splits, tasks, target.sizes())
    missing = [task for task in tasks if task not in done]
    total, todo = (sum(len(plan.positions(task)) for task in some) for some in (tasks, missing))
    done_bytes = sum(finished.entry.num_bytes for finished in done.values())
    groups, worker_s = RecordGroups(target), 0.0
    run_tasks = executor(config)
    try:
        encoding = replace(config.encoding(), depth_range=plan.depth_range)
        with progress.stage("packing", unit=" images", total=total, done=total - todo, done_bytes=done_bytes) as tick:
            for task, finished in run_tasks(
                WriteShard(f"{WORK_NAME}/{plan.name}", target, encoding), missing, tick=tick
            ):
                groups.add(task, finished)
                worker_s += finished.span[1] - finished.span[0] if finished.span else 0.0
        groups.flush()
        # Of less, it says how long starting takes.
        if worker_s >= 1:
            progress.say(f"{todo / worker_s:,.0f} inputs/s per worker, each of which is a CPU")
    finally:
        # Workers that were ended could not remove what they were writing.
        for path in target.scratch.iterdir():
            path.unlink(missing_ok=True)
