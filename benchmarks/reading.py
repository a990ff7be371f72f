"""Reading alone: samples/s of a rank's reader process and of threads, idle and beside a busy interpreter, by turns.

    python benchmarks/reading.py --shards DIR --json build/reading.json

Both read the same random batches from shards in the page cache and check every sample's crc32c. Busy: a loop in pure
Python runs in another thread, as a training step's does.
"""

import argparse
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
from alternating import claims_table, compare, header, write_claims

from pipelines.config import central_crop
from pipelines.plan.draw import draw_views
from pipelines.plan.steps import ListedSteps
from pipelines.reading.read_process import ReadingSpec
from pipelines.reading.readahead import ReadAhead
from pipelines.reading.reader import Reader
from shards.sets import ShardSet, open_set

GOAL = 15_000


def random_steps(shards: ShardSet, batch_size: int) -> ListedSteps:
    samples = np.random.default_rng(0).integers(0, shards.num_samples, 2_000 * batch_size)
    return ListedSteps(samples=samples, batch_size=batch_size)


def by_process(shards: ShardSet, batch_size: int, threads: int) -> tuple[Callable[[], object], Callable[[], None]]:
    reading = ReadAhead(
        ReadingSpec(
            shards=shards,
            steps=random_steps(shards, batch_size),
            draw=partial(draw_views, views=central_crop(8, side=1.0), seed=0),
            max_batch=batch_size,
            ahead=3,
            num_threads=threads,
            skip=False,
        )
    )
    return lambda: next(reading), reading.close


def by_threads(shards: ShardSet, batch_size: int, threads: int) -> tuple[Callable[[], object], Callable[[], None]]:
    reader = Reader(shards, num_threads=threads)

    def batches() -> Iterator[object]:
        waiting = []
        for _, samples in random_steps(shards, batch_size):
            waiting.append(reader.submit(samples, reader.records(samples)))
            if len(waiting) == 3:
                yield waiting.pop(0).result()

    return partial(next, batches()), reader.close


@contextmanager
def busy_interpreter(is_busy: bool) -> Iterator[None]:
    over = threading.Event()

    def spin() -> None:
        while not over.is_set():
            sum(range(100))

    thread = threading.Thread(target=spin)
    if is_busy:
        thread.start()
    try:
        yield
    finally:
        over.set()
        if is_busy:
            thread.join()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", required=True)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--threads", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    shards = open_set(options.shards)
    opened = {
        "process": by_process(shards, options.batch_size, options.threads),
        "threads": by_threads(shards, options.batch_size, options.threads),
    }
    rates: dict[tuple[str, bool], list[float]] = {(name, busy): [] for busy in (False, True) for name in opened}
    try:
        for number in range(options.rounds + 1):
            for (name, is_busy), found in rates.items():
                take = opened[name][0]
                with busy_interpreter(is_busy):
                    for _ in range(4):
                        take()
                    begin, num = time.perf_counter(), 0
                    while time.perf_counter() - begin < options.seconds:
                        take()
                        num += options.batch_size
                    rate = num / (time.perf_counter() - begin)
                if number:
                    found.append(rate)
    finally:
        for _, close in opened.values():
            close()
    claims = [
        compare(
            f"reading by a process, {'beside a busy interpreter' if is_busy else 'idle'}, against threads",
            rates["process", is_busy],
            rates["threads", is_busy],
            unit="samples/s",
        )
        for is_busy in (False, True)
    ]
    busy = rates["process", True]
    claims.append(
        compare(
            "reading beside a busy interpreter, against the goal", busy, [GOAL] * len(busy), unit="samples/s", goal=1
        )
    )
    mean_bytes = int(shards.manifest.shards.num_bytes.sum()) / shards.num_samples
    print(header())
    print(f"Batches of {options.batch_size}, {mean_bytes / 1000:.0f} kB a sample.\n\n{claims_table(claims)}")
    write_claims(options.json, claims)


if __name__ == "__main__":
    main()
