"""Summary that `pack` prints when it is done."""

import json
import sys
from collections import Counter
from collections.abc import Iterator
from itertools import islice

from shards.config import WORK_FOLDER, EncodeConfig
from shards.ground.units import counted, format_bytes
from shards.images.formats import ARCHIVE
from shards.packing.aside import describe_aside
from shards.packing.stored_size import describe_stored_size
from shards.packing.write import NEAR_UNIFORM
from shards.sets.manifest import Manifest
from shards.sets.record import ANNOTATED
from shards.sources.links import LINK_REASONS
from shards.storage.file_kinds import ASIDE_NAME, REJECTED_NAME, UNIFORM_NAME
from shards.storage.target import open_target, path_in

__all__ = ["summarize"]

_SHOWN = 3


def summarize(out: str, manifests: dict[str, Manifest], max_rejected: float) -> int:
    """Print what was packed and rejected; returns the exit status: 3 where too much was rejected."""
    for name, manifest in manifests.items():
        size = int(manifest.shards.num_bytes.sum())
        folder = f"{out.rstrip('/')}/{name}".rstrip("/")
        images, files = counted(manifest.num_samples, "image"), counted(len(manifest.shards), "shard")
        print(f"{folder}: {images} in {files}, {format_bytes(size)}", end="")
        classes = counted(len(manifest.class_names), "class", plural="classes")
        print(f", {'sets of ' if manifest.has_label_sets else ''}{classes}" if manifest.class_names else ", no labels")
        if manifest.outcomes:
            print("  " + ", ".join(f"{what} {count:,}" for what, count in manifest.outcomes.items()))
        if line := _about_stored_size(manifest, size):
            print(f"  {line}")
    left_aside = sum((Counter(manifest.left_aside) for manifest in manifests.values()), Counter[str]())
    if left_aside:
        print(f"  {describe_aside(left_aside)}: see {ASIDE_NAME}")
    uniform = sum(manifest.outcomes.get(NEAR_UNIFORM, 0) for manifest in manifests.values())
    if uniform:
        first = ", ".join(_first_uniform(out, manifests))
        print(f"  {counted(uniform, 'image')} nearly one color, such as {first}: see {UNIFORM_NAME}")
    inputs = sum(manifest.num_inputs for manifest in manifests.values())
    rejected = sum(manifest.num_rejected for manifest in manifests.values())
    if not rejected:
        return 0
    reasons: dict[str, int] = {}
    for manifest in manifests.values():
        for reason, count in manifest.rejections.items():
            reasons[reason] = reasons.get(reason, 0) + count
    tally = ", ".join(f"{reason} {count:,}" for reason, count in sorted(reasons.items(), key=lambda item: -item[1]))
    print(f"  rejected {rejected:,} of {inputs:,} ({tally}): see {REJECTED_NAME}")
    links = sum(reasons.get(reason, 0) for reason in LINK_REASONS)
    if links:
        print(f"  {counted(links, 'link')} not followed: --follow-links packs what is there")
    archives = reasons.get(ARCHIVE, 0)
    if archives:
        print(
            f"make-shards: {counted(archives, 'archive')} among the inputs could not be opened, so their images are "
            f"missing: the shards are whole, but look for {ARCHIVE!r} in {REJECTED_NAME}: unpack them, or move them "
            "away",
            file=sys.stderr,
        )
        return 3
    # Duplicates were left out on purpose.
    rejected -= reasons.get("duplicate", 0)
    if rejected <= max_rejected * inputs:
        return 0
    print(
        f"make-shards: {rejected / inputs:.1%} of the inputs were rejected, more than --max-rejected "
        f"{max_rejected:.1%}: the shards are whole, but look at rejected.jsonl before you train on them",
        file=sys.stderr,
    )
    return 3


def _about_stored_size(manifest: Manifest, num_bytes: int) -> str | None:
    settings, num_samples = manifest.settings, max(1, manifest.num_samples)
    return describe_stored_size(
        EncodeConfig(resize=settings.get("resize"), resize_mode=settings.get("resize_mode", "shorter")),
        bytes_per_image=num_bytes / num_samples,
        resized_share=manifest.outcomes.get("resized", 0) / num_samples,
        has_annotations=bool(settings.get(ANNOTATED)),
    )


def _first_uniform(out: str, manifests: dict[str, Manifest]) -> Iterator[str]:
    target = open_target(out, work_folder=WORK_FOLDER)
    files = (target.get(path_in(name, UNIFORM_NAME)) or b"" for name in manifests)
    lines = (line for data in files for line in data.splitlines())
    yield from (json.loads(line)["source"] for line in islice(lines, _SHOWN))
