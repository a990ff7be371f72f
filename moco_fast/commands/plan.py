"""Command `moco-fast plan`."""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from moco_fast.commands.common import given, positive
from moco_fast.presets import PRESETS
from moco_fast.sizing.needs import Machines, Needs, Workload, needs

if TYPE_CHECKING:
    from moco_fast.config import Config
    from moco_fast.sizing.recipe import RecipeCost

__all__ = ["PlanRun"]

_SMALL_SIDE, _SMALL_SHARE = 256, 0.27
"""Pixels of the shorter side, and the share of a photo's bytes that is left at it (docs/packing.md)."""
_UTILIZATION = {"convolutional": 0.11, "transformer": 0.35}
"""Share of a GPU's peak that training reaches where it was not measured. ResNet-50 with MoCo v2 in bf16 waits for
memory: 3,574 samples/s beside the loader, compiled, are 12% of an H200, 2,655 without compilation 9%
(benchmarks/results/2026-11-26-H200.md). Transformers: what trainers of vision transformers report."""


@dataclass(frozen=True, kw_only=True)
class PlanRun:
    """Say what a run at scale needs, and what limits it: storage, network, disks, time, checkpoints, failures, cost.

    Everything is arithmetic on stated rates. `moco-fast bench --json` measures those of a machine.
    """

    images: float
    """Number of images, such as 1e9."""
    image_kb: float = 110.0
    """Mean size of an image as stored, in kB (ImageNet: 110)."""
    recipe: Annotated[str, tyro.conf.arg(metavar="RECIPE")] = "moco-v2"
    """Recipe of training, such as moco-v2."""
    encoder: str | None = None
    """Encoder in place of the recipe's."""
    batch_size: int | None = None
    """Samples per global batch; unset: the recipe's."""
    passes: float | None = None
    """Passes over the images; unset: the recipe's length."""
    nodes: int = 1
    """Number of machines."""
    gpus: int = 8
    """GPUs per machine."""
    gpu: str = "h100"
    """Kind of GPU, such as h100, a100 or l40s: tells its peak rate."""
    bench: Annotated[str | None, tyro.conf.arg(metavar="FILE")] = None
    """Figures that `moco-fast bench RECIPE --json FILE` measured on one such machine: rates of step and loader."""
    samples_per_s: float | None = None
    """Samples per second that one GPU trains on; unset: as measured in --bench, else estimated by --utilization."""
    loader_per_s: float | None = None
    """Samples per second that the loader of one rank makes; unset: as measured in --bench, else unknown."""
    utilization: float | None = None
    """Share of the GPU's peak that a step reaches; unset: 0.11 for convolutional encoders, 0.35 for transformers."""
    network_gbit: float = 100.0
    """Gbit/s of a machine's network from where the shards are."""
    disk_gb: float | None = None
    """GB/s that a machine's own disks read; unset: unknown."""
    cache_tb: float = 0.0
    """TB of a machine's disks for --data.cache. 0: the shards are read over the network in every epoch."""
    cores: int | None = None
    """CPU cores per machine; unset: unknown."""
    shard_mb: float = 512.0
    """Size of a shard in MB."""
    checkpoint_gb: float = 1.0
    """GB/s at which a checkpoint leaves the GPU while training stands still."""
    gpu_failure_hours: float = 50_000.0
    """Mean hours between failures of one GPU with its share of the machine."""
    restart_min: float = 10.0
    """Minutes from a failure to the first new step."""
    gpu_hour_price: float | None = None
    """Price of an hour of one GPU; unset: GPU hours are stated alone."""
    tb_month_price: float | None = None
    """Price of storing a TB for a month; unset: none is stated."""
    json: bool = False
    """Print a JSON object."""

    def execute(self) -> int:
        """Print what the run needs; return the exit code.

        Raises:
            ValueError: an option cannot work; the message says what can.
        """
        self._check()
        from moco_fast.sizing.recipe import recipe_cost

        config = self._config()
        self._check_batch(config)
        cost = recipe_cost(config, num_samples=round(self.images))
        step_per_s, source = self._step_rate(config, cost)
        machines = self._machines(step_per_s)
        work = self._work(config, cost)
        small = replace(work, image_bytes=_SMALL_SHARE * work.image_bytes)
        found = {"as stored": needs(work, machines), f"at {_SMALL_SIDE} pixels": needs(small, machines)}
        if self.json:
            facts = {"step_per_s": step_per_s, "step_per_s_source": source}
            print(json.dumps(facts | {name: asdict(each) for name, each in found.items()}, indent=1))
        else:
            print(self._opening(config, step_per_s, source))
            print(_table(found, self))
            print(_conclusion(found))
            if advice := self._batch_advice(work):
                print(advice)
        return 0

    def _check(self) -> None:
        for name in ("images", "image_kb", "nodes", "gpus", "network_gbit", "shard_mb", "checkpoint_gb"):
            positive(name.replace("_", "-"), getattr(self, name))
        for name in ("gpu_failure_hours", "restart_min"):
            positive(name.replace("_", "-"), getattr(self, name))
        for name in ("batch_size", "passes", "samples_per_s", "loader_per_s", "utilization", "disk_gb", "cores"):
            if (value := getattr(self, name)) is not None:
                positive(name.replace("_", "-"), value)
        for name in ("cache_tb", "gpu_hour_price", "tb_month_price"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                raise ValueError(f"--{name.replace('_', '-')} is {value:g}, but must be a number, 0 or above")
        if self.utilization is not None and self.utilization > 1:
            raise ValueError(f"--utilization is {self.utilization:g}, but must be a share: 40% of the peak is 0.4")
        if self.images < 2:
            raise ValueError(f"--images is {self.images:g}: give the number of images, such as 1e9")
        if self.recipe not in PRESETS:
            raise ValueError(f"--recipe {self.recipe} is not a recipe: choose one of {', '.join(PRESETS)}")

    def _check_batch(self, config: "Config") -> None:
        """Refuse what training refuses: a batch that the ranks cannot share, or that the images do not fill."""
        from pipelines.plan.order import check_ranks
        from shards.ground.units import counted

        batch_size = config.data.batch_size
        said = f"--batch-size {batch_size:,}" if self.batch_size else f"{self.recipe}'s batch of {batch_size:,}"
        try:
            check_ranks(batch_size, self.nodes * self.gpus)
        except ValueError as error:
            where = f"{counted(self.nodes, 'node')} of {counted(self.gpus, 'GPU')}, a rank each"
            raise ValueError(f"{said} does not fit {where}: {error}") from None
        if batch_size > self.images:
            ranks = self.nodes * self.gpus
            most = int(self.images) // ranks * ranks
            way = f"a --batch-size of {most:,} or less" if most else f"fewer ranks than {ranks:,}"
            raise ValueError(
                f"--images {self.images:,.0f} is less than one batch of {batch_size:,}: an epoch would have no steps; "
                f"give {way}"
            )

    def _config(self) -> "Config":
        config = PRESETS[self.recipe][1]
        model = replace(config.model, encoder=given(self.encoder, config.model.encoder))
        data = replace(config.data, shards="", batch_size=given(self.batch_size, config.data.batch_size))
        return replace(config, model=model, data=data)

    def _step_rate(self, config: "Config", cost: "RecipeCost") -> tuple[float, str]:
        """Return the samples/s of one GPU, and where the figure comes from."""
        if self.samples_per_s is not None:
            return self.samples_per_s, "as given"
        if self.bench is not None:
            return self._measured("step", config), f"measured, {self.bench}"
        from moco_fast.training.flops import PEAKS, peak_flops

        peak = peak_flops(self.gpu.upper(), "bf16") or peak_flops(self.gpu.upper(), "fp16")
        if peak is None:
            raise ValueError(
                f"--gpu {self.gpu} is not known: choose one of {', '.join(PEAKS)}, or give --samples-per-s or --bench"
            )
        kind = "convolutional" if cost.is_convolutional else "transformer"
        utilization = given(self.utilization, _UTILIZATION[kind])
        return utilization * peak / cost.flops_per_sample, f"estimated at {utilization:.0%} of the peak, not measured"

    def _measured(self, stage: str, config: "Config") -> float:
        assert self.bench is not None
        figures = _read_figures(self.bench)
        environment = figures["environment"]
        if (encoder := environment.get("encoder")) != config.model.encoder:
            raise ValueError(
                f"--bench {self.bench} measured the encoder {encoder}, and this plan is for {config.model.encoder}: "
                f"measure `moco-fast bench {self.recipe}`, or give --samples-per-s"
            )
        if not figures.get(stage):
            raise ValueError(f"--bench {self.bench} has no figure for the {stage}: measure all stages")
        return figures[stage]["median"] / environment["world_size"]

    def _machines(self, step_per_s: float) -> Machines:
        loader = self.loader_per_s
        if loader is None and self.bench is not None:
            loader = self._measured("loader", self._config())
        return Machines(
            num_nodes=self.nodes,
            gpus_per_node=self.gpus,
            step_per_s=step_per_s,
            loader_per_s=loader,
            network_bytes_per_s=self.network_gbit * 1e9 / 8,
            disk_bytes_per_s=None if self.disk_gb is None else self.disk_gb * 1e9,
            cache_bytes=self.cache_tb * 1e12,
            cores=self.cores,
            gpu_failure_hours=self.gpu_failure_hours,
            restart_s=60 * self.restart_min,
            copy_bytes_per_s=self.checkpoint_gb * 1e9,
        )

    def _work(self, config: "Config", cost: "RecipeCost") -> Workload:
        batch_size = config.data.batch_size * config.optim.accumulate
        run = config.run
        samples = run.samples if run.samples is not None else None if run.steps is None else run.steps * batch_size
        passes = run.epochs if samples is None else samples / self.images
        return Workload(
            num_images=round(self.images),
            image_bytes=1e3 * self.image_kb,
            shard_bytes=1e6 * self.shard_mb,
            num_passes=given(self.passes, passes),
            batch_size=batch_size,
            checkpoint_bytes=cost.checkpoint_bytes,
        )

    def _batch_advice(self, work: Workload) -> str | None:
        from moco_fast.training.console import SMALL_BATCH

        num_gpus = self.nodes * self.gpus
        per_gpu = work.batch_size / num_gpus
        if per_gpu > SMALL_BATCH:
            return None
        enough = _enough(SMALL_BATCH) * num_gpus
        return (
            f"A batch of {work.batch_size:,} is {per_gpu:.3g} samples per GPU: up to {SMALL_BATCH}, a GPU waits for "
            "the host and this rate is not reached (docs/performance.md). "
            f"--batch-size {enough:,} or more keeps them busy; "
            "the learning rate has to follow."
        )

    def _opening(self, config: "Config", step_per_s: float, source: str) -> str:
        from shards.ground.units import counted

        where = f"{counted(self.nodes, 'node')} of {counted(self.gpus, 'GPU')} ({self.gpu})"
        return (
            f"{self.recipe} with {config.model.encoder} on {self.images:,.0f} images, {where}\n"
            f"step: {step_per_s:,.0f} samples/s per GPU ({source})\n"
        )


def _enough(too_few: int) -> int:
    """Return the next power of two."""
    return 1 << too_few.bit_length()


def _read_figures(file: str) -> Mapping[str, Any]:
    try:
        figures = json.loads(Path(file).read_text())
        positive("world-size", int(figures["environment"]["world_size"]))
        for stage in ("step", "loader"):
            if figures.get(stage):
                positive(stage, float(figures[stage]["median"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"--bench {file} is not what `moco-fast bench --json` writes: {error}") from error
    return figures


def _table(found: Mapping[str, Needs], plan: PlanRun) -> str:
    from moco_fast.evaluation.result import aligned
    from shards.ground.units import format_bytes, format_duration

    def per_s(num_bytes: float) -> str:
        return f"{format_bytes(num_bytes)}/s"

    rows: list[list[str]] = [["", *found]]

    def row(name: str, *values: str) -> None:
        rows.append([name, *values])

    every = list(found.values())
    row("shards", *(f"{each.num_shards:,}" for each in every))
    row("storage", *(format_bytes(each.storage_bytes) for each in every))
    if plan.tb_month_price is not None:
        row("storage, price per month", *(f"{each.storage_bytes / 1e12 * plan.tb_month_price:,.0f}" for each in every))
    row("samples/s", *(f"{each.samples_per_s:,.0f}" for each in every))
    row("limited by", *(each.bottleneck for each in every))
    for name in every[0].spare:
        row(f"  {name}, of what the GPUs take", *(_times(each.spare[name]) for each in every))
    row("read by a node", *(per_s(each.node_bytes_per_s) for each in every))
    row("read by all nodes", *(per_s(each.all_bytes_per_s) for each in every))
    row("a GPU in MLPerf Storage's H100s", *(f"{each.mlperf_accelerators_per_gpu:.2g}" for each in every))
    row("over the network from epoch 2", *(f"{each.network_share:.0%}" for each in every))
    row("CPU cores per node", *(f"{each.cores_per_node:.2g}" for each in every))
    row("one epoch", *(format_duration(each.epoch_s) for each in every))
    row("steps", *(f"{each.num_steps:,}" for each in every))
    row("the run", *(format_duration(each.run_s) for each in every))
    row("GPU hours", *(f"{each.gpu_hours:,.0f}" for each in every))
    if plan.gpu_hour_price is not None:
        row("GPU hours, price", *(f"{each.gpu_hours * plan.gpu_hour_price:,.0f}" for each in every))
    row("checkpoint", *(format_bytes(each.checkpoint_bytes) for each in every))
    row("  best saved every", *(format_duration(each.checkpoint_interval_s) for each in every))
    row("failures expected", *(f"{each.num_failures:.2g}" for each in every))
    row("  one in", *(format_duration(3600 * each.run_failure_hours) for each in every))
    row("time lost to saves and failures", *(f"{each.lost_share:.2%}" for each in every))
    return aligned(rows)


def _times(ratio: float) -> str:
    return "enough" if ratio > 1000 else f"{ratio:.2g}x"


def _conclusion(found: Mapping[str, Needs]) -> str:
    stored, small = found.values()
    said = f"\nLimited by the {stored.bottleneck}." if stored.bottleneck != "GPUs" else "\nLimited by the GPUs."
    if small.samples_per_s > 1.01 * stored.samples_per_s:
        gain = small.samples_per_s / stored.samples_per_s
        return f"{said} Stored at 256 pixels (make-shards pack --resize 256) it would run {gain:.1f} times as fast."
    saved = 1 - small.storage_bytes / stored.storage_bytes
    return f"{said} Storing at 256 pixels (make-shards pack --resize 256) would save {saved:.0%} of the storage."
