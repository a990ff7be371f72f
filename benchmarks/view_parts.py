"""Processor time of the torch backend's views, part by part: where it goes, and what no change of ours can save.

    python benchmarks/view_parts.py                     # on photographs that scikit-image carries, cut to 500 x 375
    python benchmarks/view_parts.py --photos FILE.tar   # on photographs of your own, or --shards DIR
    python benchmarks/view_parts.py --recipe moco-v3 [--num 300] [--rounds 7] [--json FILE]

One thread makes the views of the same samples with more and more of the stages, as a worker process does, in
alternating rounds of one run; a part is what a stage adds. Entropy decoding is decoding to an eighth of the size, which
leaves out nearly all else that libjpeg-turbo does. The last part is what the whole loader (this process and two
workers) takes beyond the others: reports, hand-over, and what two processes at once cost each other.
`benchmarks/loader.py` has the alternatives.
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import median

import cv2
import numpy as np
import numpy.typing as npt
import psutil
import simplejpeg
import torch
from alternating import Claim, claims_table, compare, header, write_claims
from photographs import photograph_shards

from pipelines.backends.pixels import crop, decode, finish
from pipelines.backends.view_process import FINISHED_TOGETHER
from pipelines.config import VIEWS, DataConfig, ViewsConfig
from pipelines.loader import open_loader
from pipelines.plan.augment import ViewTable
from pipelines.plan.draw import draw_views
from pipelines.reading.reader import Reader
from shards.ground.arrays import Pixels
from shards.sets import ShardSet, open_set

# Samples of a task of a worker process at batch 64 and two workers.
TASK = 16
# The stages in their order, from the row that has none of them.
STAGES = ("entropy decoding", "decoding", "crop, resize", "flip", "blur", "colors")
Tables = Sequence[ViewTable]


@dataclass(frozen=True)
class Photos:
    """Samples that are timed again and again."""

    shards: ShardSet
    path: str
    samples: npt.NDArray[np.int64]
    records: npt.NDArray[np.void]
    encoded: Sequence[npt.NDArray[np.uint8]]
    views: ViewsConfig

    @classmethod
    def of(cls, path: str, num: int, views: ViewsConfig) -> "Photos":
        """Read `num` samples of a set, or all, spread over it."""
        shards = open_set(path)
        num = min(num, shards.num_samples)
        samples = np.linspace(0, shards.num_samples - 1, num).astype(np.int64)
        reader = Reader(shards, num_threads=1)
        records = reader.records(samples)
        encoded = reader.submit(samples, records).result()
        reader.close()
        return cls(shards, path, samples, records, encoded, views)

    def tables(self) -> tuple[ViewTable, ...]:
        """Draw the parameters of all views."""
        return draw_views(0, self.samples, self.records, views=self.views.specs, seed=3)


def make_views(photos: Photos, tables: Tables, made: Sequence[Pixels], *, together: int) -> None:
    """Make all views as a worker process does: blur and colors of `together` samples after their crops."""
    for first in range(0, len(photos.samples), together):
        rows = range(first, min(first + together, len(photos.samples)))
        for row in rows:
            image = decode(photos.encoded[row])
            for table, view in zip(tables, made, strict=True):
                crop(image, table, row, view[row])
        for row in rows:
            for table, view in zip(tables, made, strict=True):
                finish(table, row, view[row])


def up_to(stage: str, tables: Tables) -> tuple[ViewTable, ...]:
    """Return the same tables without what comes after a stage."""
    left = STAGES[STAGES.index(stage) + 1 :]
    off = np.zeros(len(tables[0].flip), dtype=np.bool_)
    found = tuple(tables)
    if "flip" in left:
        found = tuple(replace(table, flip=off) for table in found)
    if "blur" in left:
        found = tuple(replace(table, sigma=np.zeros_like(table.sigma)) for table in found)
    if "colors" in left:
        still = np.tile([1.0, 1.0, 1.0, 0.0], (len(off), 1))
        found = tuple(replace(table, factors=still, grayscale=off, solarize=off) for table in found)
    return found


def alternatives(photos: Photos) -> dict[str, Callable[[], object]]:
    """Give what is timed by turns, by name."""
    tables, reader = photos.tables(), Reader(photos.shards, num_threads=1)
    tasks = [slice(first, first + TASK) for first in range(0, len(photos.samples), TASK)]

    def read() -> None:
        for task in tasks:
            reader.submit(photos.samples[task], reader.records(photos.samples[task])).result()

    def draw() -> None:
        for task in tasks:
            draw_views(1, photos.samples[task], photos.records[task], views=photos.views.specs, seed=3)

    def shrink() -> None:
        for each in photos.encoded:
            simplejpeg.decode_jpeg(each.data, colorspace="RGB", min_height=1, min_width=1, min_factor=8)

    # Once, as the ring of a loader: new memory costs as much as a stage.
    made = [np.empty((len(photos.samples), spec.size, spec.size, 3), dtype=np.uint8) for spec in photos.views.specs]
    found: dict[str, Callable[[], object]] = {
        "reading, checking": read,
        "drawing": draw,
        "entropy decoding": shrink,
        "decoding": lambda: [decode(each) for each in photos.encoded],
    }
    for stage in STAGES[2:]:
        found[stage] = partial(make_views, photos, up_to(stage, tables), made, together=FINISHED_TOGETHER)
    found["one by one"] = partial(make_views, photos, tables, made, together=1)
    return found


def measure(photos: Photos, rounds: int) -> dict[str, list[float]]:
    """Return milliseconds of processor time per sample of each alternative in each round, after an untimed one."""
    timed = alternatives(photos)
    ms: dict[str, list[float]] = {name: [] for name in timed}
    for number in range(rounds + 1):
        for name, call in timed.items():
            started = time.process_time()
            call()
            if number:
                ms[name].append(1e3 * (time.process_time() - started) / len(photos.samples))
    return ms


def parts_of(ms: dict[str, list[float]]) -> dict[str, float]:
    """Return what each part adds: medians over rounds of differences between one stage and the one before it."""
    parts = {name: median(ms[name]) for name in ("reading, checking", "drawing", "entropy decoding")}
    for before, stage in pairwise(STAGES):
        parts[stage] = median(b - a for a, b in zip(ms[before], ms[stage], strict=True))
    parts["rest of decoding"] = parts.pop("decoding")
    return {name: parts[name] for name in ("reading, checking", "drawing", STAGES[0], "rest of decoding", *STAGES[2:])}


def of_the_loader(photos: Photos, seconds: float) -> float:
    """Return milliseconds of processor time per sample of the whole loader: this process and two workers."""
    batch_size = 4 * TASK
    data = DataConfig(shards=photos.path, batch_size=batch_size, backend="torch", num_threads=2)
    with open_loader(data, photos.views, seed=0, device=torch.device("cpu")) as loader:

        def take(num: int) -> None:
            taken = 0
            while taken < num:
                for _ in loader:
                    taken += 1
                    if taken == num:
                        return

        take(4)
        family = [psutil.Process(), *psutil.Process().children(recursive=True)]

        def processor_s() -> float:
            return sum(sum(process.cpu_times()[:2]) for process in family)

        begin, before, num = time.perf_counter(), processor_s(), 0
        while time.perf_counter() - begin < seconds:
            take(1)
            num += batch_size
        return 1e3 * (processor_s() - before) / num


def as_table(parts: dict[str, float]) -> str:
    """Markdown: a line per part with its share, and their sum."""
    whole = sum(parts.values())
    rows = [*parts.items(), ("all", whole)]
    lines = [f"| {name} | {value:.2f} | {100 * value / whole:.0f}% |" for name, value in rows]
    return "\n".join(["| part | ms per sample | share |\n|---|---|---|", *lines])


def claims_of(ms: dict[str, list[float]]) -> list[Claim]:
    """Compare with what cannot be saved, and with views that are made one by one."""
    unit = "ms of processor time per sample"
    what = f"decoding and views, {FINISHED_TOGETHER} samples finished together"
    return [
        compare(f"{what} / one by one", ms["colors"], ms["one by one"], unit=unit, less_is_better=True),
        compare(f"{what} / decoding alone", ms["colors"], ms["decoding"], unit=unit, less_is_better=True),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--shards", help="folder that make-shards wrote")
    source.add_argument("--photos", type=Path, help="tar of photographs, packed first")
    parser.add_argument("--recipe", choices=VIEWS, default="moco-v2")
    parser.add_argument("--num", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=8.0, help="how long the whole loader is timed")
    parser.add_argument("--json", type=Path, help="where to write the claims")
    asked = parser.parse_args()
    # As in a worker process.
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    with tempfile.TemporaryDirectory() as folder:
        shards = asked.shards or str(photograph_shards(Path(folder), num=asked.num, photos=asked.photos))
        photos = Photos.of(shards, asked.num, VIEWS[asked.recipe])
        ms = measure(photos, asked.rounds)
        parts = parts_of(ms)
        parts["the loader beyond these"] = of_the_loader(photos, asked.seconds) - sum(parts.values())
    print(
        f"{header()}; {asked.recipe}, {len(photos.samples)} photographs, {asked.rounds} rounds\n\n{as_table(parts)}\n"
    )
    claims = claims_of(ms)
    print(claims_table(claims))
    write_claims(asked.json, claims)


if __name__ == "__main__":
    main()
