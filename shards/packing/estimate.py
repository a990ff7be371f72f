"""Estimate of `pack --dry-run`: what packing would give and take, from a listing and a few inputs."""

import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, replace

import numpy as np

from shards.config import PackConfig
from shards.ground.cpus import available_cpus
from shards.ground.errors import Rejected
from shards.ground.progress import ProgressBars
from shards.ground.units import counted, format_bytes, format_duration
from shards.images.libraries import decode_jpeg
from shards.packing.as_is import packed_image
from shards.packing.inputs import read_inputs
from shards.packing.plan import PackPlan
from shards.packing.planning import make_plan
from shards.packing.stored_size import describe_stored_size
from shards.storage.tar import BLOCK, padding
from shards.storage.target import LocalTarget

__all__ = ["Estimate", "estimate"]

_PROBED = 256
# Views of 224 pixels are cut from at least a fifth of the area: a side of 512 leaves such a crop 229 pixels.
_ENOUGH_PIXELS = 512
_MANY_ENCODED = 0.02


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Predictions for a packing."""

    num_inputs: int
    num_classes: int
    shards: dict[str, int]
    """Number of shards by split."""
    num_probed: int
    outcomes: dict[str, int]
    """Of the probed inputs, by what is done to them."""
    rejections: dict[str, int]
    """Of the probed inputs, by reason."""
    bytes_per_sample: float
    seconds_per_sample: float
    """To read and encode one, on one core."""
    decoded_per_second: float
    """Packed images that one core decodes at full size."""
    median_shorter_side: float

    def lines(self, config: PackConfig) -> Iterator[str]:
        """Return the predictions as lines of text."""
        workers = config.workers or available_cpus()
        packed = self.num_inputs * (1 - sum(self.rejections.values()) / self.num_probed)
        found = f"{counted(self.num_inputs, 'input')}, {counted(self.num_classes, 'class', plural='classes')}"
        yield f"{found}; {self.num_probed} of them were tried:"
        shards = ", ".join(
            f"{counted(count, 'shard')}{f' of {name}' if name else ''}" for name, count in self.shards.items()
        )
        yield f"  {packed:,.0f} samples, {format_bytes(packed * self.bytes_per_sample)}, in {shards}"
        for title, tally in (("packed", self.outcomes), ("rejected", self.rejections)):
            yield f"  {title}: {', '.join(f'{what} {count}' for what, count in sorted(tally.items())) or 'none'}"
        seconds = self.num_inputs * self.seconds_per_sample / workers
        yield f"  about {format_duration(seconds)} with {workers} workers, if the disk keeps up"
        yield f"  one core will decode about {self.decoded_per_second:,.0f} of the packed images per second"
        num_encoded = self.outcomes.get("made baseline", 0)
        if config.progressive == "encode" and config.resize is None and num_encoded > _MANY_ENCODED * self.num_probed:
            yield (
                f"  {num_encoded / self.num_probed:.0%} are progressive or unusual JPEGs and would be encoded again: "
                "--progressive transcode would keep their pixels"
            )
        if config.resize is None and not config.annotations and self.median_shorter_side > 1.25 * _ENOUGH_PIXELS:
            gain = (self.median_shorter_side / _ENOUGH_PIXELS) ** 2
            yield (
                f"  half of the images are larger than {self.median_shorter_side:,.0f} pixels on their shorter side; "
                f"crops for 224-pixel views need about {_ENOUGH_PIXELS}: --resize {_ENOUGH_PIXELS} would make them "
                f"about {gain:.0f} times as fast to decode. It costs one more JPEG generation, and detail in the "
                "smallest crops"
            )
        elif line := self._about_stored_size(config):
            yield f"  {line}"

    def _about_stored_size(self, config: PackConfig) -> str | None:
        return describe_stored_size(
            config.encoding(),
            bytes_per_image=self.bytes_per_sample,
            resized_share=self.outcomes.get("resized", 0) / self.num_probed,
            has_annotations=config.annotations,
        )


def estimate(config: PackConfig, progress: ProgressBars | None = None) -> Estimate:
    """List the sources and pack a few inputs to nowhere. Nothing is written to the target.

    Raises:
        ValueError: as `pack`.
    """
    with tempfile.TemporaryDirectory(dir=config.work_folder) as folder:
        target = LocalTarget(folder)
        target.scratch.mkdir(parents=True)
        target.begin([])
        plan = make_plan(replace(config, part=None), target, progress or ProgressBars(enabled=False))
        return _probe(config, plan)


def _tar_bytes(size: int) -> int:
    return BLOCK + size + len(padding(size))


def _probe(config: PackConfig, plan: PackPlan) -> Estimate:
    num_planned = plan.num_positions
    probed = np.unique(np.linspace(0, num_planned - 1, min(_PROBED, num_planned)).astype(np.int64))
    outcomes: Counter[str] = Counter()
    rejections: Counter[str] = Counter()
    packed: list[bytes] = []
    encoding = replace(config.encoding(), depth_range=plan.depth_range)
    sides: list[int] = []
    begin = time.perf_counter()
    with closing(read_inputs(plan, plan.rows_at(probed))) as inputs:
        for item in inputs:
            try:
                if isinstance(item.data, Rejected):
                    raise item.data
                image = packed_image(item.data, encoding)
            except Rejected as rejected:
                rejections[rejected.reason] += 1
                continue
            outcomes.update(image.outcomes)
            packed.append(image.data)
            sides.append(min(image.width, image.height))
    middle = time.perf_counter()
    for data in packed:
        decode_jpeg(data, strict=False)
    end = time.perf_counter()
    return Estimate(
        num_inputs=plan.num_inputs,
        num_classes=len(plan.class_names),
        shards={split.name: split.num_shards for split in plan.splits},
        num_probed=len(probed),
        outcomes=dict(outcomes),
        rejections=dict(rejections),
        bytes_per_sample=sum(_tar_bytes(len(data)) for data in packed) / max(1, len(packed))
        + (_tar_bytes(1) if plan.class_names else 0),
        seconds_per_sample=(middle - begin) / len(probed),
        decoded_per_second=len(packed) / max(end - middle, 1e-9),
        median_shorter_side=float(np.median(sides)) if sides else 0.0,
    )
