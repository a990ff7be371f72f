"""`pack`: plan, write every shard, then the manifest. Finished shards stay, and the same call goes on from there."""

import json
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from shards.config import PackConfig
from shards.errors import PackError
from shards.files import locked, write_atomically
from shards.manifest import MANIFEST_NAME, Manifest, ShardEntry
from shards.plan import Plan, Task, difference
from shards.planner import make_plan
from shards.pool import default_workers, run_tasks
from shards.progress import Progress
from shards.sources import open_source
from shards.write import Workplace, WriteShard, shard_stem

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
    place = workplace(config.out, part="" if config.part is None else f"-{config.part.replace('/', '-of-')}")
    finished = _finished(config, place)
    if finished is not None and not place.work.exists():
        return finished
    if not place.work.exists():
        # A mistyped source should not leave a folder behind.
        for path in config.sources:
            open_source(path, config.columns())
    place.work.mkdir(parents=True, exist_ok=True)
    if config.part is not None:
        return _pack_part(config, place, progress)
    with locked(place.work / "lock", holder=config.out):
        finished = _finished(config, place)
        if finished is None:
            plan = _open_plan(config, place, progress)
            _write_missing(plan, plan.tasks(), config, place, progress)
            finished = _finish(plan, place)
        _remove_work(place)
    return finished


def _pack_part(config: PackConfig, place: Workplace, progress: Progress) -> None:
    """Write one part of the plan, beside others who write theirs. Whoever comes first makes the plan."""
    number, _, count = (config.part or "").partition("/")
    with (
        locked(place.work / "lock", shared=True, holder=config.out),
        locked(place.work / f"lock{place.part}", holder=f"part {config.part} of {config.out}"),
    ):
        with locked(place.work / "lock-plan", holder="the plan", wait=True):
            plan = _open_plan(config, place, progress)
        _write_missing(plan, plan.tasks()[int(number) :: int(count)], config, place, progress)
        shutil.rmtree(place.scratch)


def finish(out: str) -> dict[str, Manifest]:
    """Check that every part of a plan is done, and write the manifests.

    Raises:
        ValueError: nothing is being packed there.
        PackError: shards are missing.
    """
    place = workplace(out)
    if not place.plan.exists():
        finished = sorted([*place.out.glob(MANIFEST_NAME), *place.out.glob(f"*/{MANIFEST_NAME}")])
        if finished:
            return {str(p.parent.relative_to(place.out)).strip("."): Manifest.read(p.parent) for p in finished}
        raise ValueError(f"{out} has no plan to finish: begin with `make-shards pack SOURCE --out {out} --part 0/N`")
    with locked(place.work / "lock", holder=out):
        place.scratch.mkdir(exist_ok=True)
        manifests = _finish(Plan.open(place.plan), place)
        _remove_work(place)
    return manifests


def workplace(out: str, *, part: str = "") -> Workplace:
    """The folders of a packing."""
    return Workplace(out=Path(out), work=Path(out) / ".pack", part=part)


def _finished(config: PackConfig, place: Workplace) -> dict[str, Manifest] | None:
    """The manifests of an earlier packing with the same settings."""
    names = config.split_names()
    if (place.plan / "plan.json").exists() or not all((place.folder(n) / MANIFEST_NAME).exists() for n in names):
        return None
    manifests = {name: Manifest.read(place.folder(name)) for name in names}
    _refuse_changes(manifests[names[0]].settings, config, place)
    return manifests


def _refuse_changes(old: dict[str, Any], config: PackConfig, place: Workplace) -> None:
    changes = difference(old, config.settings())
    if changes:
        raise ValueError(
            f"{place.out} was begun with other settings: {changes}. Use the settings of before, another folder, "
            f"or remove {place.out} to begin anew"
        )


def _open_plan(config: PackConfig, place: Workplace, progress: Progress) -> Plan:
    """The plan to follow: the one that is there, or a new one."""
    if place.scratch.exists():
        shutil.rmtree(place.scratch)
    place.scratch.mkdir()
    place.done.mkdir(exist_ok=True)
    if (place.plan / "plan.json").exists():
        plan = Plan.open(place.plan)
        _refuse_changes(plan.settings, config, place)
    else:
        if any(any(place.folder(name).glob("shard-*.tar")) for name in config.split_names()):
            _discard_work(place)
            raise ValueError(f"{place.out} holds shards of unknown origin: choose an empty folder, or remove them")
        try:
            plan = make_plan(config, place.plan, progress)
        except ValueError:
            _discard_work(place)
            raise
    for split in plan.splits:
        place.folder(split.name).mkdir(exist_ok=True)
    return plan


def _write_missing(plan: Plan, tasks: list[Task], config: PackConfig, place: Workplace, progress: Progress) -> None:
    missing = [task for task in tasks if _entry_of(plan, place, task) is None]
    total, todo = (sum(len(plan.positions(task)) for task in some) for some in (tasks, missing))
    job, workers = WriteShard(place, config), config.workers or default_workers()
    try:
        with progress.stage("packing", unit=" images", total=total, done=total - todo) as tick:
            for _ in run_tasks(job, missing, workers=workers, tick=tick):
                pass
    finally:
        # Workers that were ended could not remove what they were writing.
        for path in place.scratch.iterdir():
            path.unlink()


def _entry_of(plan: Plan, place: Workplace, task: Task) -> ShardEntry | None:
    """What a finished shard holds; None where it is not finished, or its tar has gone."""
    try:
        entry = ShardEntry.from_dict(json.loads(place.record(task).read_bytes())["entry"])
        folder = place.folder(plan.splits[task.split].name)
        sizes = [(folder / f"{entry.stem}{suffix}").stat().st_size for suffix in entry.digests]
    except FileNotFoundError:
        return None
    return entry if sizes[0] == entry.num_bytes else None


def _finish(plan: Plan, place: Workplace) -> dict[str, Manifest]:
    """Check that every shard of the plan is there, and write rejected.jsonl and the manifest of each split.

    Raises:
        PackError: shards are missing.
    """
    entries = {task: _entry_of(plan, place, task) for task in plan.tasks()}
    missing = [shard_stem(task.shard) for task, entry in entries.items() if entry is None]
    if missing:
        shown = ", ".join(missing[:5]) + (" ..." if len(missing) > 5 else "")
        raise PackError(
            f"{len(missing)} of {len(entries)} shards are not there yet ({shown}): run the same command again"
        )
    manifests: dict[str, Manifest] = {}
    for number, split in enumerate(plan.splits):
        shards = tuple(entry for task, entry in entries.items() if entry is not None and task.split == number)
        manifest = _manifest(plan, shards, num_duplicates=plan.num_duplicates(number))
        assert manifest.num_inputs == split.num_positions + plan.num_duplicates(number)
        folder = place.folder(split.name)
        rejected = "".join(_rejected_lines(plan, number, place))
        write_atomically(folder / REJECTED_NAME, rejected.encode(), scratch=place.scratch)
        write_atomically(folder / MANIFEST_NAME, manifest.to_json().encode(), scratch=place.scratch)
        manifests[split.name] = manifest
    return manifests


def _rejected_lines(plan: Plan, split: int, place: Workplace) -> Iterator[str]:
    for source, first in plan.duplicates(split):
        yield _line({"key": None, "source": source, "reason": "duplicate", "detail": f"same bytes as {first}"})
    for task in plan.tasks():
        if task.split == split:
            yield from map(_line, json.loads(place.record(task).read_bytes())["rejected"])


def _line(values: dict[str, Any]) -> str:
    return json.dumps(values, ensure_ascii=False) + "\n"


def _manifest(plan: Plan, shards: tuple[ShardEntry, ...], *, num_duplicates: int) -> Manifest:
    outcomes: Counter[str] = Counter()
    rejections: Counter[str] = Counter()
    for shard in shards:
        outcomes.update(shard.outcomes)
        rejections.update(shard.rejections)
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
        settings=plan.settings,
    )


def _remove_work(place: Workplace) -> None:
    # Without its plan, what a kill leaves of the folder is not mistaken for a packing to go on with.
    (place.plan / "plan.json").unlink(missing_ok=True)
    shutil.rmtree(place.work)


def _discard_work(place: Workplace) -> None:
    """Leave the target as it was before a packing that never got a plan."""
    shutil.rmtree(place.work)
    if not any(place.out.iterdir()):
        place.out.rmdir()
