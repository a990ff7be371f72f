"""What a billion images would take: figures at several sizes, the slope between them, and what it comes to at 1e9.

    python benchmarks/scale.py [--only listing plan finish] [--sizes 1e5 1e6 1e7] [--folder DIR] [--out scale.md]

Each figure is measured in a process of its own. Images are not read: a listing's rows are made up, and so are their
digests. `listing` is that of a bucket's prefix, `plan` the arrangement of a listing, with shuffle, a held-out set and
duplicates, `finish` the reading of the records of its shards.
"""

import argparse
import json
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from shards.config import PackConfig
from shards.storage.target import LocalTarget

SIZES = (100_000, 1_000_000, 10_000_000)
AT = 1_000_000_000
_SAMPLES_PER_SHARD = 5000
Figures = dict[str, float]


def name_of(row: int) -> str:
    """The name of a made-up object."""
    return f"train/n{row // 1300:08d}/n{row // 1300:08d}_{row:09d}.JPEG"


class MadeUpFolder:
    """A bucket's prefix that lists as many objects as it is asked for, in order."""

    def __init__(self, num_rows: int) -> None:
        self.num_rows = num_rows

    def objects(self) -> Iterator[tuple[str, int]]:
        """List."""
        for row in range(self.num_rows):
            yield name_of(row), 110_000


class CountingTarget(LocalTarget):
    """A folder that counts what is read."""

    num_gets = 0

    def get(self, name: str) -> bytes | None:
        """Read."""
        type(self).num_gets += 1
        return super().get(name)


def measure_listing(num_rows: int, folder: Path) -> Figures:
    """List a prefix: sort, sift, label, and write what is an input to the tables of a listing."""
    from shards.ground.progress import ProgressBars
    from shards.packing.listing import _write_tables
    from shards.sources.objects import ObjectsSource

    source: Any = ObjectsSource("s3://bucket/prefix")
    source._folder = partial(MadeUpFolder, num_rows)
    # What making names up takes is not the listing's.
    begin_s = time.process_time()
    for _ in MadeUpFolder(num_rows).objects():
        pass
    made_up_s = time.process_time() - begin_s
    with _Measured() as figures:
        config = PackConfig(sources=(source.path,), out="out")
        _, listed = _write_tables(config, [source], folder, ProgressBars(enabled=False))
    assert listed == num_rows
    figures["CPU seconds"] -= made_up_s
    return figures


def measure_plan(num_rows: int, folder: Path) -> Figures:
    """Arrange a listing: 5% held out, one input of ten a duplicate."""
    from shards.packing.arrange import Digests, arrange
    from shards.packing.content import DIGEST
    from shards.packing.plan import Header, PackPlan, Split, TableWriter

    listed, planned = folder / "listed", folder / "planned"
    for each in (listed, planned):
        each.mkdir()
    with TableWriter(listed) as table:
        for row in range(num_rows):
            table.add(0, row // 1300, name_of(row).encode(), -1, 110_000)
    Header(
        settings=PackConfig(sources=("s3://bucket/prefix",), out="out").settings(),
        sources=[{"kind": "objects", "path": "s3://bucket/prefix"}],
        class_names=(),
        splits=[Split(name="", first=0, num_positions=num_rows, shard_samples=_SAMPLES_PER_SHARD)],
        depth_range="full",
        has_label_sets=False,
    ).write(listed)

    def digests(start: int, stop: int) -> Any:
        rows = np.arange(start, stop, dtype=np.uint64)
        # Every tenth is the same as an earlier one.
        contents = np.where(rows % 10 == 9, rows // 2, rows) + np.uint64(1)
        found = np.empty(len(rows), dtype=DIGEST)
        found["high"], found["low"] = contents * np.uint64(0x9E3779B97F4A7C15), contents
        return found

    with _Measured() as figures:
        splits = arrange(
            PackPlan.open(str(listed)),
            planned,
            seed=0,
            shard_samples=_SAMPLES_PER_SHARD,
            digests=Digests(digests, (("val", 0.05),), dedup=True),
        )
    assert sum(split.num_positions + split.num_duplicates for split in splits) == num_rows
    return figures


def measure_finish(num_rows: int, folder: Path) -> Figures:
    """Write the manifest of a plan whose shards are all there, and count what is read."""
    from shards.packing.plan import Split, tasks_of
    from shards.packing.records import Finished, RecordGroups, put_record, read_records
    from shards.sets.manifest import ShardEntry

    target = CountingTarget(str(folder / "out"))
    target.scratch.mkdir(parents=True)
    target.begin([])
    splits = [Split(name="", first=0, num_positions=num_rows, shard_samples=_SAMPLES_PER_SHARD)]
    groups, sizes = RecordGroups(target), dict[str, int]()
    for task in tasks_of(splits):
        stem, suffixes = f"shard-{task.shard:06d}", (".tar", ".index.npy", ".sources.txt", ".idx")
        entry = ShardEntry(
            name=f"{stem}.tar",
            num_samples=_SAMPLES_PER_SHARD,
            num_rejected=0,
            num_bytes=512 << 20,
            digests=dict.fromkeys(suffixes, "0" * 32),
            max_width=500,
            max_height=500,
            max_bytes=1 << 20,
            outcomes={"copied": _SAMPLES_PER_SHARD},
            rejections={},
            jpegs={"4:2:0": _SAMPLES_PER_SHARD},
        )
        finished = Finished(entry=entry, span=(0.0, 1.0), part="")
        put_record(target, task, finished, {"rejected": [], "uniform": []})
        groups.add(task, finished)
        sizes |= {f"{stem}{suffix}": 512 << 20 for suffix in suffixes}
    groups.flush()
    sizes |= target.sizes()
    with _Measured() as figures:
        assert len(read_records(target, splits, tasks_of(splits), sizes)) == len(tasks_of(splits))
    return figures | {"requests": float(target.num_gets)}


SECTIONS: dict[str, Callable[[int, Path], Figures]] = {
    "listing": measure_listing,
    "plan": measure_plan,
    "finish": measure_finish,
}
"""What is measured, by its name: figures for a number of images, in an empty folder. Those of a process are found by
_Measured; others may be added."""


class _Measured:
    """CPU seconds and growth of memory of a block."""

    def __enter__(self) -> Figures:
        self._figures: Figures = {}
        self._begin_bytes = _peak_bytes()
        self._begin_s = time.process_time()
        return self._figures

    def __exit__(self, *rest: object) -> None:
        self._figures["CPU seconds"] = time.process_time() - self._begin_s
        self._figures["GB of memory"] = (_peak_bytes() - self._begin_bytes) / 1e9


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _in_child(section: str, num_rows: int, folder: Path) -> Figures:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    words = [sys.executable, __file__, "--child", section, str(num_rows), "--folder", str(folder)]
    try:
        return json.loads(subprocess.run(words, check=True, stdout=subprocess.PIPE).stdout)
    finally:
        shutil.rmtree(folder)


def table(section: str, found: dict[int, Figures]) -> Iterator[str]:
    """Return the lines of a table: a row for each figure, and what the slope between the largest sizes comes to."""
    sizes = sorted(found)
    yield f"| {section} | {' | '.join(f'{size:,}' for size in sizes)} | per million more | at {AT:,} |"
    yield "|---" * (len(sizes) + 3) + "|"
    for figure in found[sizes[-1]]:
        values = [found[size][figure] for size in sizes]
        # A peak of memory may be lower where rows fill their partitions better.
        slope = max(0.0, (values[-1] - values[-2]) / (sizes[-1] - sizes[-2]))
        shown = " | ".join(f"{value:,.3g}" for value in values)
        yield f"| {figure} | {shown} | {slope * 1e6:,.3g} | {values[-1] + slope * (AT - sizes[-1]):,.4g} |"


def main() -> None:
    """Measure what was asked for and print tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(SECTIONS), default=list(SECTIONS))
    parser.add_argument("--sizes", nargs="+", type=lambda text: int(float(text)), default=list(SIZES))
    parser.add_argument("--folder", type=Path, default=Path("build/scale"))
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--child", nargs=2, default=None, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child is not None:
        section, num_rows = options.child
        print(json.dumps(SECTIONS[section](int(num_rows), options.folder)))
        return
    lines: list[str] = []
    for section in options.only:
        found = {size: _in_child(section, size, options.folder) for size in options.sizes}
        lines += ["", *table(section, found)]
        print("\n".join(table(section, found)), flush=True)
    if options.out is not None:
        from alternating import header

        options.out.write_text("\n".join(["# Scale", "", header(), *lines]) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
