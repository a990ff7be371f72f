"""What loading costs the host on a GPU machine: CPU seconds per 1,000 samples, and the interpreter's share.

    python benchmarks/host.py --shards DIR [--batches 256 128 32] [--seconds 3]

A rank's reader process reads, checks and draws; its view thread takes a batch from it and feeds it to DALI. What DALI
and the GPU do with it is not in here: DALI gets what it gets on a GPU, in a pipeline that gives it back. The thread's
seconds are those of the interpreter, whose lock the training step needs, too: their share is of the rate at which one
GPU trains (--rate).
"""

import argparse
import time
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from alternating import claims_table, compare, header, write_claims
from nvidia.dali import fn, types
from nvidia.dali.pipeline import Pipeline, pipeline_def

from pipelines.backends.dali import inputs_of
from pipelines.config import VIEWS
from pipelines.plan.draw import draw_views
from pipelines.plan.order import OrderPlan
from pipelines.plan.steps import EpochSteps
from pipelines.reading.read_process import ReadingSpec
from pipelines.reading.readahead import EncodedBatch, ReadAhead
from pipelines.world import World
from shards.sets import ShardSet, open_set

ALLOWED_S = 0.08
"""At 256 images per rank and at 32. When each step and view was drawn and fed by itself, 32 took 0.15 and 0.13, by
turns with 0.077 and 0.072 of today."""

_TYPES = {"float32": types.FLOAT, "uint8": types.UINT8, "bool": types.BOOL}


def open_reader(shards: ShardSet, batch: int) -> ReadAhead:
    """The reader process of a rank that trains MoCo v2 with so many images."""
    plan = OrderPlan(shard_sizes=shards.shard_sizes, seed=0, batch_size=batch, lanes=64, window_shards=4)
    return ReadAhead(
        ReadingSpec(
            shards=shards,
            steps=EpochSteps(plan=plan, epoch=0, step=0, world=World()),
            draw=partial(draw_views, views=VIEWS["moco-v2"].specs, seed=0),
            max_batch=batch,
            ahead=2,
            num_threads=4,
            skip=False,
        )
    )


def open_pipeline(first: EncodedBatch) -> Pipeline:
    """A pipeline that takes such inputs and gives them back."""
    given = inputs_of(first)
    arrays = {name: (str(a.dtype), a.ndim - 1) for name, a in given.items() if name != "encoded"}
    arrays["encoded"] = ("uint8", 1)

    @pipeline_def(
        batch_size=len(first.samples), num_threads=1, device_id=None, exec_dynamic=True, prefetch_queue_depth=1
    )
    def back() -> tuple[Any, ...]:
        return tuple(
            fn.external_source(name=name, dtype=_TYPES[dtype], ndim=ndim, no_copy=name == "encoded")
            for name, (dtype, ndim) in arrays.items()
        )

    pipeline = back()
    pipeline.build()
    return pipeline


def measure(reading: ReadAhead, pipeline: Pipeline, seconds: float) -> dict[str, float]:
    """CPU seconds per 1,000 samples of the reader process, and of taking and feeding batches here."""
    # Linux: the clock of all CPU time of another process (clock_getcpuclockid).
    reader_clock = (~reading.pid << 3) | 2
    spent = {"reader": -time.clock_gettime(reader_clock), "take": 0.0, "feed": 0.0}
    num, ends = 0, time.monotonic() + seconds
    while time.monotonic() < ends:
        started = time.thread_time()
        batch = next(reading)
        taken = time.thread_time()
        for name, data in inputs_of(batch).items():
            pipeline.feed_input(name, data)
        pipeline.schedule_run()
        fed = time.thread_time()
        pipeline.outputs()
        spent["take"] += taken - started
        spent["feed"] += fed - taken
        num += len(batch.samples)
    spent["reader"] += time.clock_gettime(reader_clock)
    return {name: 1000 * value / num for name, value in spent.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", required=True)
    parser.add_argument("--batches", type=int, nargs="+", default=[256, 128, 32], help="images per rank")
    parser.add_argument("--seconds", type=float, default=2.0, help="of a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rate", type=float, default=3600.0, help="samples/s of one GPU, for the interpreter's share")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    shards = open_set(options.shards)
    opened = {}
    for batch in options.batches:
        reading = open_reader(shards, batch)
        opened[batch] = (reading, open_pipeline(next(reading)))
    rounds: dict[int, list[dict[str, float]]] = {batch: [] for batch in opened}
    try:
        for number in range(options.rounds + 1):
            for batch, (reading, pipeline) in opened.items():
                found = measure(reading, pipeline, options.seconds)
                if number:
                    rounds[batch].append(found)
    finally:
        for reading, _ in opened.values():
            reading.interrupt()
            reading.close()
    claims = [
        compare(
            f"host CPU time of 1,000 samples, {batch} images per rank / what we allow",
            [sum(each.values()) for each in found],
            [ALLOWED_S] * len(found),
            unit="s",
            less_is_better=True,
            goal=1.0,
        )
        for batch, found in rounds.items()
        if batch in (256, 32)
    ]
    print(header())
    share_of = f"interpreter's share at {options.rate:,.0f} samples/s"
    print(f"\n| images per rank | reader, s | take, s | feed, s | {share_of} |")
    print("|---|---|---|---|---|")
    for batch, found in rounds.items():
        parts = {name: median(each[name] for each in found) for name in found[0]}
        share = (parts["take"] + parts["feed"]) * options.rate / 1000
        print(f"| {batch} | {' | '.join(f'{value:.4f}' for value in parts.values())} | {share:.1%} |")
    mean_bytes = int(shards.manifest.shards.num_bytes.sum()) / shards.num_samples
    print(f"\nCPU seconds per 1,000 samples of {mean_bytes / 1000:.0f} kB.\n\n{claims_table(claims)}")
    write_claims(options.json, claims)


if __name__ == "__main__":
    main()
