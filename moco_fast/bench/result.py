"""Result of a benchmark: figures, their table, and the verdict. Does not import torch."""

from collections.abc import Iterator
from dataclasses import dataclass
from statistics import median
from typing import Any

from moco_fast.bench.names import REST, WAITING
from shards.ground.units import counted, format_bytes

__all__ = ["BenchResult", "Rate", "table", "verdict"]


@dataclass(frozen=True, kw_only=True)
class Rate:
    """Samples/s over all ranks, from the rounds of a measurement; a sample includes all its views."""

    median: float
    lowest: float
    highest: float

    @classmethod
    def of(cls, rates: list[float]) -> "Rate":
        """Summarize rounds."""
        return cls(median=median(rates), lowest=min(rates), highest=max(rates))


@dataclass(frozen=True, kw_only=True)
class BenchResult:
    """Measured figures and the environment. A stage that was not requested is None."""

    reading: Rate | None = None
    """Reading encoded bytes from the shards and verifying them, in the order of a run."""
    read_bytes_per_s: float | None = None
    """Bytes/s of reading, over all ranks."""
    decoding: Rate | None = None
    """Reading and decoding whole images."""
    loader: Rate | None = None
    """The whole loader: reading, decoding and all views on the device; batches are taken and dropped."""
    hand_over: Rate | None = None
    """Copying finished views to the device; None where they are made there."""
    step: Rate | None = None
    """Steps on synthetic batches that are already on the device."""
    end_to_end: Rate | None = None
    """Steps on the loader's batches."""
    parts_alone_s: dict[str, float]
    """Device seconds per part in a step on synthetic batches (moco_fast.bench.parts)."""
    parts_end_to_end_s: dict[str, float]
    """Device seconds per part in a step on the loader's batches, including `waiting for data`."""
    batch_size: int
    """Samples per global batch in the measurement."""
    recipe_batch_size: int
    """Samples per global batch in the recipe."""
    torch_peak_bytes: int | None = None
    """Peak memory that torch held on this rank's GPU, if there is one."""
    device_used_bytes: int | None = None
    """Memory in use on this rank's GPU at the end, including DALI's and all other."""
    environment: dict[str, Any]

    @property
    def headroom(self) -> float | None:
        """Ratio of the loader's rate to the step's."""
        return self.loader.median / self.step.median if self.loader and self.step else None

    @property
    def overlap(self) -> float | None:
        """Ratio of the end-to-end rate to the step's: 1 if the device never waits and loading does not slow it down."""
        return self.end_to_end.median / self.step.median if self.end_to_end and self.step else None

    @property
    def data_wait_share(self) -> float | None:
        """Share of the device's end-to-end time between the end of a step and the start of the next."""
        total = sum(self.parts_end_to_end_s.values())
        return self.parts_end_to_end_s.get(WAITING, 0.0) / total if total else None

    @property
    def slowdown(self) -> float | None:
        """Factor by which a step takes longer while the loader runs, without waiting."""
        alone = sum(self.parts_alone_s.values())
        together = sum(seconds for name, seconds in self.parts_end_to_end_s.items() if name != WAITING)
        return together / alone if alone and together else None

    @property
    def on_gpu(self) -> bool:
        """Whether the step ran on a GPU."""
        return self.torch_peak_bytes is not None


_ENOUGH = 1.3
"""Ratio of the loader's rate to the step's above which end to end should run as fast as the step alone."""
_FULL = 0.97
"""Overlap that counts as running as fast as the step alone."""


def verdict(result: BenchResult) -> str:
    """Say in one sentence what limits the run, and in another what to change, if anything."""
    headroom, overlap = result.headroom, result.overlap
    if headroom is None or overlap is None:
        return "No verdict: it needs the stages loader, step and end_to_end."
    found = f"The loader delivers {headroom:,.{1 if headroom < 10 else 0}f}x what the step consumes; "
    found += f"end to end runs at {overlap:.0%} of the step alone"
    if not result.on_gpu:
        return f"{found}{_on_a_cpu(result)}"
    if headroom < 1.0:
        return f"{found}: bound by the loader. {_slowest_stage(result)}"
    if overlap < _FULL:
        return f"{found}: loader and step slow each other down. {_conflict(result)}"
    if headroom < _ENOUGH:
        return f"{found}: GPU-bound, with little to spare in the loader; watch data_wait_share in the run."
    return f"{found}: GPU-bound, as it should be."


def _on_a_cpu(result: BenchResult) -> str:
    assert result.loader is not None
    assert result.step is not None
    assert result.end_to_end is not None
    shared = 1 / (1 / result.loader.median + 1 / result.step.median)
    share = shared / result.loader.median
    said = f", on cores that both share: taking turns would give {_figure(shared)} samples/s, and it is "
    said += f"{_figure(result.end_to_end.median)}. "
    if share < 0.25:
        return said + f"Bound by the step: loading is {share:.0%} of the work."
    return said + (
        f"Loading is {share:.0%} of the work. Images packed at about the views' size (`make-shards pack --resize`) "
        "decode faster."
    )


def _slowest_stage(result: BenchResult) -> str:
    assert result.step is not None
    if result.reading and result.reading.median < result.step.median:
        return (
            "Reading alone is slower than the step: put the shards on faster storage, raise --data.read-threads, or "
            "pack smaller images (`make-shards pack --resize`)."
        )
    if result.decoding and result.decoding.median < result.step.median:
        return (
            "Decoding is slower than the step: pack images at about the views' size (`make-shards pack --resize`), or "
            "give each rank more CPUs."
        )
    if result.hand_over and result.hand_over.median < 2 * result.step.median:
        return "Copying views to the GPU takes much of the time: use --data.backend dali, which makes them there."
    return "Making the views is the slowest stage: give each rank more CPUs, or use --data.backend dali on the GPU."


def _conflict(result: BenchResult) -> str:
    waiting, slowdown = result.data_wait_share or 0.0, result.slowdown or 1.0
    said = f"The GPU waits {waiting:.1%} of the time, and beside the loader a step takes {slowdown:.2f}x as long. "
    if waiting > slowdown - 1:
        return (
            said
            + "Raise --data.prefetch, and make sure that each rank has its own CPUs (affinity, --data.num-threads)."
        )
    return said + (
        "Both need the GPU: images packed at about the views' size (`make-shards pack --resize`) decode faster; "
        "--data.backend torch moves the work to the CPUs if there are many."
    )


def table(result: BenchResult) -> str:
    """Return the figures as a table for people."""
    return "\n".join([*_opening(result), "", *_rates(result), *_parts(result), *_memory(result), "", verdict(result)])


def _opening(result: BenchResult) -> Iterator[str]:
    where = result.environment
    ranks = counted(where["world_size"], "rank")
    cuda = f", CUDA {where['cuda']}" if where["cuda"] else ""
    versions = f"torch {where['torch']}{cuda}, Python {where['python']}"
    yield f"{where['device']}, {where['num_cpus']} CPUs, {ranks}; {versions}"
    compiled = ", compiled" if where["compile"] else ""
    sizes = " and ".join(str(size) for size in dict.fromkeys(where["view_sizes"]))
    yield f"{where['encoder']} at {sizes} px, batch {result.batch_size}, {where['precision']}{compiled}"
    yield f"loader: {where['loader']}"
    if result.batch_size != result.recipe_batch_size:
        yield (
            f"note: measured with batches of {result.batch_size}, because a step with the recipe's "
            f"{result.recipe_batch_size} would take too long here"
        )


def _rates(result: BenchResult) -> Iterator[str]:
    num_views = len(result.environment["view_sizes"])
    unit = f"samples/s ({num_views} view{'s' if num_views > 1 else ''} each)"
    yield f"{unit:<28}{'median':>10}{'lowest':>10}{'highest':>10}{'to the step':>13}"
    rows = {
        "reading": result.reading,
        "reading, decoding": result.decoding,
        "the whole loader": result.loader,
        "hand-over to the device": result.hand_over,
        "the step alone": result.step,
        "end to end": result.end_to_end,
    }
    for name, rate in rows.items():
        if rate is None:
            if name == "hand-over to the device" and result.loader:
                yield f"{name:<28}{'none: the views are made there':>43}"
            continue
        ratio = f"{_figure(rate.median / result.step.median):>12}x" if result.step else ""
        extent = f"  {format_bytes(result.read_bytes_per_s)}/s" if name == "reading" and result.read_bytes_per_s else ""
        figures = "".join(f"{_figure(each):>10}" for each in (rate.median, rate.lowest, rate.highest))
        yield f"{name:<28}{figures}{ratio}{extent}"


def _parts(result: BenchResult) -> Iterator[str]:
    alone, together = result.parts_alone_s, result.parts_end_to_end_s
    total = sum(alone.values())
    if not total:
        return
    yield ""
    yield f"{'one step, by part':<28}{'ms alone':>10}{'share':>10}{'ms beside the loader':>23}"
    by_cost = sorted({*alone, *together} - {REST, WAITING}, key=lambda name: -alone.get(name, 0.0))
    for name in [*by_cost, REST, WAITING]:
        if name not in alone and name not in together:
            continue
        own = f"{1e3 * alone[name]:>10,.2f}{alone[name] / total:>10.1%}" if name in alone else f"{'':>20}"
        beside = f"{1e3 * together[name]:>23,.2f}" if name in together else ""
        yield f"{name:<28}{own}{beside}".rstrip()
    beside = f"{1e3 * sum(together.values()):>23,.2f}" if together else ""
    yield f"{'all':<28}{1e3 * total:>10,.2f}{'':>10}{beside}".rstrip()
    if result.slowdown is not None and result.data_wait_share is not None:
        waits = f"waits for data {result.data_wait_share:.1%} of the time"
        yield f"beside the loader a step takes {result.slowdown:.2f}x as long, and the device {waits}"


def _memory(result: BenchResult) -> Iterator[str]:
    if result.torch_peak_bytes is not None and result.device_used_bytes is not None:
        yield ""
        torch_peak, in_use = format_bytes(result.torch_peak_bytes), format_bytes(result.device_used_bytes)
        yield f"GPU memory: {torch_peak} at torch's peak, {in_use} in use, including DALI's and all other"


def _figure(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
