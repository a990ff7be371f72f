"""`pack`: plan, write every shard, then the manifest. Finished shards stay, and the same call goes on from there."""

import json
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from shards.config import PackConfig
from shards.ground.errors import PackError
from shards.ground.locks import locked
from shards.ground.progress import Progress
from shards.images.transcode import transcoder
from shards.packing.executors import executor
from shards.packing.listing import make_plan
from shards.packing.plan import Plan, Task, difference
from shards.packing.write import WriteShard, record_name, shard_stem
from shards.sets.manifest import MANIFEST_NAME, Manifest, ShardEntry
from shards.sources import open_source
from shards.storage.file_kinds import SHARD_SUFFIXES
from shards.storage.stores import is_url
from shards.storage.target import WORK_NAME, BucketTarget, LocalTarget, Target, open_target, path_in

__all__ = ["REJECTED_NAME", "finish", "pack"]

REJECTED_NAME = "rejected.jsonl"


def pack(config: PackConfig, progress: Progress | None = None) -> dict[str, Manifest] | None:
    """Pack images into shards, or finish a packing that was interrupted.

    Returns:
        The manifest of each split by its name; the name is empty where nothing is split. None where only one part of
        the plan was asked for: `finish` writes the manifests when all parts are done.

    Raises:
        ValueError: the options or the sources cannot work, or disagree with what the target holds.
        PackError: packing could not go on.
        OSError: the target cannot be written.
    """
    progress = progress or Progress(enabled=False)
    part = "" if config.part is None else f"-{config.part.replace('/', '-of-')}"
    target = open_target(config.out, work_folder=config.work_folder, part=part)
    finished = _finished(config, target)
    if finished is not None and not target.work.exists():
        return finished
    if not target.work.exists():
        # What cannot work should not list for an hour first, nor leave a folder behind.
        for path in config.sources:
            open_source(path, config.columns())
            _refuse_target_inside(path, config.out)
        executor(config)
        if config.progressive == "transcode":
            transcoder()
    target.work.mkdir(parents=True, exist_ok=True)
    if config.part is not None:
        return _pack_part(config, target, progress)
    with locked(target.work / "lock", holder=config.out):
        finished = _finished(config, target)
        if finished is None:
            plan = _open_plan(config, target, progress)
            _write_missing(plan, plan.tasks(), config, target, progress)
            finished = _finish(plan, target)
        target.remove_work()
    return finished


def _refuse_target_inside(source: str, out: str) -> None:
    """Shards must not become inputs of the next listing."""
    if not is_url(source) and not is_url(out) and Path(out).resolve().is_relative_to(Path(source).resolve()):
        raise ValueError(f"--out {out} lies inside the source {source}: choose a folder outside of it")


def _pack_part(config: PackConfig, target: Target, progress: Progress) -> None:
    """Write one part of the plan, beside others who write theirs. Whoever comes first makes the plan."""
    number, _, count = (config.part or "").partition("/")
    with (
        locked(target.work / "lock", shared=True, holder=config.out),
        locked(target.work / f"lock-{number}-of-{count}", holder=f"part {config.part} of {config.out}"),
    ):
        with locked(target.work / "lock-plan", holder="the plan", wait=True):
            if _finished(config, target) is not None:
                # `finish` was killed while it cleared away.
                return
            plan = _open_plan(config, target, progress)
        _write_missing(plan, plan.tasks()[int(number) :: int(count)], config, target, progress)
        shutil.rmtree(target.scratch)


def finish(out: str, *, work_folder: str) -> dict[str, Manifest]:
    """Check that every part of a plan is done, and write the manifests.

    Args:
        out: what was given to `pack`.
        work_folder: local folder for a bucket's plan.

    Raises:
        ValueError: nothing is being packed there.
        PackError: shards are missing.
    """
    target = open_target(out, work_folder=work_folder)
    if not target.has_plan():
        finished = [name for name in target.sizes() if name.rpartition("/")[2] == MANIFEST_NAME]
        if finished:
            if target.work.exists():
                with locked(target.work / "lock", holder=out):
                    target.remove_work()
            return {name.rpartition("/")[0]: _read_manifest(target, name.rpartition("/")[0]) for name in finished}
        raise ValueError(f"{out} has no plan to finish: begin with `make-shards pack SOURCE --out {out} --part 0/N`")
    target.work.mkdir(parents=True, exist_ok=True)
    with locked(target.work / "lock", holder=out):
        target.scratch.mkdir(exist_ok=True)
        target.fetch_plan(_plan_folder(target))
        manifests = _finish(Plan.open(_plan_folder(target)), target)
        target.remove_work()
    return manifests


def _plan_folder(target: Target) -> Path:
    return target.work / "plan"


def _read_manifest(target: Target, split: str) -> Manifest:
    name = path_in(split, MANIFEST_NAME)
    return Manifest.from_json(target.get(name) or b"", where=f"{target.out}/{name}")


def _finished(config: PackConfig, target: Target) -> dict[str, Manifest] | None:
    """The manifests of an earlier packing with the same settings."""
    names = config.split_names()
    if target.has_plan() or any(target.get(path_in(name, MANIFEST_NAME)) is None for name in names):
        return None
    manifests = {name: _read_manifest(target, name) for name in names}
    _refuse_changes(manifests[names[0]].settings, config)
    return manifests


def _refuse_changes(old: dict[str, Any], config: PackConfig) -> None:
    changes = difference(old, config.settings())
    if changes:
        raise ValueError(
            f"{config.out} was begun with other settings: {changes}. Use the settings of before, another folder, "
            f"or remove {config.out} to begin anew"
        )


def _open_plan(config: PackConfig, target: LocalTarget | BucketTarget | Target, progress: Progress) -> Plan:
    """The plan to follow: the one that is there, or a new one."""
    if target.scratch.exists():
        shutil.rmtree(target.scratch)
    target.scratch.mkdir()
    folder = _plan_folder(target)
    if target.has_plan():
        target.fetch_plan(folder)
        plan = Plan.open(folder)
        _refuse_changes(plan.settings, config)
    else:
        plan = _new_plan(config, target, progress)
    target.begin([split.name for split in plan.splits])
    return plan


def _new_plan(config: PackConfig, target: Target, progress: Progress) -> Plan:
    folder = _plan_folder(target)
    try:
        first = {path_in(name, f"{shard_stem(0)}.tar") for name in config.split_names()}
        if any(target.get(name) is not None for name in first):
            raise ValueError(f"{config.out} holds shards of unknown origin: choose an empty folder, or remove them")
        make_plan(config, folder, progress)
        target.share_plan(folder)
    except ValueError:
        _discard_work(target)
        raise
    plan = Plan.open(folder)
    _refuse_changes(plan.settings, config)
    return plan


def _discard_work(target: Target) -> None:
    """Leave the target as it was before a packing that never got a plan."""
    shutil.rmtree(target.work)
    if isinstance(target, LocalTarget) and not any(Path(target.out).iterdir()):
        Path(target.out).rmdir()


def _write_missing(plan: Plan, tasks: list[Task], config: PackConfig, target: Target, progress: Progress) -> None:
    sizes = target.sizes()
    missing = [task for task in tasks if _entry_of(plan, target, task, sizes) is None]
    total, todo = (sum(len(plan.positions(task)) for task in some) for some in (tasks, missing))
    run_tasks = executor(config)
    try:
        with progress.stage("packing", unit=" images", total=total, done=total - todo) as tick:
            for _ in run_tasks(WriteShard(plan.folder, target, config), missing, tick=tick):
                pass
    finally:
        # Workers that were ended could not remove what they were writing.
        for path in target.scratch.iterdir():
            path.unlink(missing_ok=True)


def _entry_of(plan: Plan, target: Target, task: Task, sizes: dict[str, int]) -> ShardEntry | None:
    """What a finished shard holds; None where it is not finished, or one of its files has gone."""
    record = f"{WORK_NAME}/done/{record_name(task)}"
    data = target.get(record) if record in sizes else None
    if data is None:
        return None
    entry = ShardEntry.from_dict(json.loads(data)["entry"])
    names = [path_in(plan.splits[task.split].name, f"{entry.stem}{suffix}") for suffix in SHARD_SUFFIXES]
    return entry if sizes.get(names[0]) == entry.num_bytes and all(name in sizes for name in names) else None


def _finish(plan: Plan, target: Target) -> dict[str, Manifest]:
    """Check that every shard of the plan is there, and write rejected.jsonl and the manifest of each split.

    Raises:
        PackError: shards are missing.
    """
    sizes = target.sizes()
    entries = {task: _entry_of(plan, target, task, sizes) for task in plan.tasks()}
    missing = [shard_stem(task.shard) for task, entry in entries.items() if entry is None]
    if missing:
        shown = ", ".join(missing[:5]) + (" ..." if len(missing) > 5 else "")
        raise PackError(
            f"{len(missing)} of {len(entries)} shards are not there yet ({shown}): run the same command again, or the "
            "missing --part"
        )
    manifests: dict[str, Manifest] = {}
    for number, split in enumerate(plan.splits):
        shards = tuple(entry for task, entry in entries.items() if entry is not None and task.split == number)
        manifest = _manifest(plan, shards, num_duplicates=plan.num_duplicates(number))
        assert manifest.num_inputs == split.num_positions + plan.num_duplicates(number)
        rejected = "".join(_rejected_lines(plan, number, target))
        target.put(path_in(split.name, REJECTED_NAME), rejected.encode())
        target.put(path_in(split.name, MANIFEST_NAME), manifest.to_json().encode())
        manifests[split.name] = manifest
    return manifests


def _rejected_lines(plan: Plan, split: int, target: Target) -> Iterator[str]:
    for source, first in plan.duplicates(split):
        yield _line({"key": None, "source": source, "reason": "duplicate", "detail": f"same bytes as {first}"})
    for task in plan.tasks():
        if task.split == split:
            record = target.get(f"{WORK_NAME}/done/{record_name(task)}")
            yield from map(_line, json.loads(record or b"")["rejected"])


def _line(values: dict[str, Any]) -> str:
    return json.dumps(values, ensure_ascii=False) + "\n"


def _manifest(plan: Plan, shards: tuple[ShardEntry, ...], *, num_duplicates: int) -> Manifest:
    outcomes: Counter[str] = Counter()
    rejections: Counter[str] = Counter()
    jpegs: Counter[str] = Counter()
    for shard in shards:
        outcomes.update(shard.outcomes)
        rejections.update(shard.rejections)
        jpegs.update(shard.jpegs)
    if num_duplicates:
        rejections["duplicate"] = num_duplicates
    num_samples, num_rejected = sum(s.num_samples for s in shards), sum(s.num_rejected for s in shards) + num_duplicates
    return Manifest(
        shards=shards,
        class_names=plan.class_names,
        num_inputs=num_samples + num_rejected,
        num_samples=num_samples,
        num_rejected=num_rejected,
        max_width=max((s.max_width for s in shards), default=0),
        max_height=max((s.max_height for s in shards), default=0),
        max_bytes=max((s.max_bytes for s in shards), default=0),
        outcomes=dict(sorted(outcomes.items())),
        rejections=dict(sorted(rejections.items())),
        jpegs=dict(sorted(jpegs.items())),
        settings=plan.settings,
    )
