"""Command `finish`: the manifests of a plan whose shards are all written."""

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import PurePosixPath
from typing import Any

from shards.config import WORK_FOLDER
from shards.ground.digests import digest
from shards.ground.errors import PackError
from shards.ground.files import sync
from shards.ground.locks import locked
from shards.packing.aside import read_counts
from shards.packing.plan import HEADER_NAME, PackPlan, ShardTask, open_plan
from shards.packing.records import Finished, read_notes, read_records
from shards.packing.write import NEAR_UNIFORM, shard_stem
from shards.sets.manifest import MANIFEST_NAME, Manifest, ShardEntry, ShardTable
from shards.sets.record import ANNOTATED
from shards.sources.benchmarks import BenchmarkSource
from shards.storage.file_kinds import ASIDE_NAME, FILES_FOLDER, FILES_NAME, REJECTED_NAME, UNIFORM_NAME
from shards.storage.target import PLAN_NAME, WORK_NAME, Target, open_target, path_in

__all__ = ["finish", "read_manifest", "refuse_earlier_version", "write_manifests"]


def finish(out: str, *, work_folder: str = WORK_FOLDER) -> dict[str, Manifest]:
    """Check that every part of a plan is done, and write the manifests.

        import shards

        for part in range(2):
            shards.pack(shards.PackConfig(sources=("photos",), out="in-parts", part=f"{part}/2"))
        print(shards.finish("in-parts"))

    Args:
        out: what was given to `pack`.
        work_folder: local folder for what is unfinished, where the target is a bucket.

    Returns:
        The manifest of each split by its name, as `pack`.

    Raises:
        ValueError: nothing is being packed there.
        PackError: shards are missing.
    """
    target = open_target(out, work_folder=work_folder)
    if not target.has(PLAN_NAME):
        finished = [name for name in target.sizes() if name.rpartition("/")[2] == MANIFEST_NAME]
        if finished:
            if target.work.exists():
                with locked(target.work / "lock", holder=out):
                    target.remove_work()
            return {name.rpartition("/")[0]: read_manifest(target, name.rpartition("/")[0]) for name in finished}
        refuse_earlier_version(target)
        raise ValueError(f"{out} has no plan to finish: begin with `make-shards pack SOURCE --out {out} --part 0/N`")
    target.work.mkdir(parents=True, exist_ok=True)
    with locked(target.work / "lock", holder=out):
        target.scratch.mkdir(exist_ok=True)
        manifests = write_manifests(open_plan(target), target)
        target.remove_work()
    return manifests


def refuse_earlier_version(target: Target) -> None:
    """Refuse a folder in which an earlier version, whose plan was elsewhere, has begun a packing. Raises PackError."""
    place = f"{WORK_NAME}/plan"
    if target.has(f"{place}/{HEADER_NAME}"):
        raise PackError(
            f"{target.address(place)} was written by an earlier version of make-shards: finish the packing with that "
            f"version, or remove {target.out} to start over"
        )


def read_manifest(target: Target, split: str) -> Manifest:
    """Read the manifest of a split."""
    name = path_in(split, MANIFEST_NAME)
    return Manifest.from_json(target.get(name) or b"", where=f"{target.out}/{name}")


def write_manifests(plan: PackPlan, target: Target) -> dict[str, Manifest]:
    """Check that every shard of the plan is there, and write rejected.jsonl and the manifest of each split.

    Raises:
        PackError: shards are missing.
    """
    tasks = plan.tasks()
    records = read_records(target, plan.splits, tasks, target.sizes())
    missing = [shard_stem(task.shard) for task in tasks if task not in records]
    if missing:
        shown = ", ".join(missing[:5]) + (" ..." if len(missing) > 5 else "")
        raise PackError(
            f"{len(missing)} of {len(tasks)} shards are not there yet ({shown}): run the same command again, or the "
            "missing --part"
        )
    manifests: dict[str, Manifest] = {}
    for number, split in enumerate(plan.splits):
        own = [task for task in tasks if task.split == number]
        left_aside = plan.left_aside() if number == 0 else b""
        shards = tuple(records[task].entry for task in own)
        manifest = _manifest(plan, shards, num_duplicates=split.num_duplicates, left_aside=read_counts(left_aside))
        assert manifest.num_inputs == split.num_positions + split.num_duplicates
        _write_pieces(target, path_in(split.name, REJECTED_NAME), _rejected(plan, number, target, own, records))
        if manifest.outcomes.get(NEAR_UNIFORM):
            with_some = [task for task in own if records[task].entry.outcomes.get(NEAR_UNIFORM)]
            _write_pieces(target, path_in(split.name, UNIFORM_NAME), _lines(read_notes(target, with_some, "uniform")))
        if left_aside:
            target.put(path_in(split.name, ASIDE_NAME), left_aside)
        if plan.settings.get(ANNOTATED):
            _write_files(plan, target)
        for name, data in manifest.files():
            target.put(path_in(split.name, name), data)
        manifests[split.name] = manifest
    return manifests


def _write_files(plan: PackPlan, target: Target) -> None:
    """Write what of benchmarks belongs to many images, each file under its own path.

    Raises:
        PackError: a file is not there any more.
    """
    lines: list[str] = []
    for number in range(len(plan.source_specs)):
        source = plan.source(number)
        assert isinstance(source, BenchmarkSource)
        for path in source.files():
            data = source.read_annotation(path)
            folders = PurePosixPath(FILES_FOLDER, path).parents
            target.begin([str(folder) for folder in reversed(folders) if folder.name])
            target.put(f"{FILES_FOLDER}/{path}", data)
            lines.append(json.dumps({"path": path, "size": len(data), "xxh3_128": digest(data)}) + "\n")
    target.put(FILES_NAME, "".join(lines).encode())


def _rejected(
    plan: PackPlan, split: int, target: Target, tasks: list[ShardTask], records: Mapping[ShardTask, Finished]
) -> Iterator[bytes]:
    yield from plan.duplicates(split)
    yield from _lines(read_notes(target, [task for task in tasks if records[task].entry.num_rejected], "rejected"))


def _lines(values: Iterator[dict[str, Any]]) -> Iterator[bytes]:
    for each in values:
        yield json.dumps(each, ensure_ascii=False).encode() + b"\n"


def _write_pieces(target: Target, name: str, pieces: Iterator[bytes]) -> None:
    """Write a file that memory may not hold."""
    aside = target.scratch / name.replace("/", "-")
    with aside.open("wb") as file:
        file.writelines(pieces)
    sync(aside)
    target.publish({name: aside})


def _manifest(
    plan: PackPlan, shards: tuple[ShardEntry, ...], *, num_duplicates: int, left_aside: dict[str, int]
) -> Manifest:
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
        shards=ShardTable.of(shards),
        class_names=plan.class_names,
        has_label_sets=plan.label_sets is not None,
        num_inputs=num_samples + num_rejected,
        num_samples=num_samples,
        num_rejected=num_rejected,
        max_width=max((s.max_width for s in shards), default=0),
        max_height=max((s.max_height for s in shards), default=0),
        max_bytes=max((s.max_bytes for s in shards), default=0),
        outcomes=dict(sorted(outcomes.items())),
        rejections=dict(sorted(rejections.items())),
        left_aside=left_aside,
        jpegs=dict(sorted(jpegs.items())),
        settings=plan.settings,
    )
