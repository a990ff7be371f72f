"""Small shard folders for tests, written by hand."""

import io
import shutil
import tarfile
from pathlib import Path

import google_crc32c
import numpy as np
from PIL import Image

from shards.sets import open_set
from shards.sets.manifest import Manifest, ShardEntry, ShardTable
from shards.sets.record import RECORD, Flag


def jpeg(image: np.ndarray, quality: int = 92) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def smooth_image(rng: np.random.Generator, width: int, height: int) -> np.ndarray:
    """Random color fields with some detail: like a photo as far as JPEG and resizing are concerned."""
    coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)).resize((width, height), Image.BICUBIC)
    noise = rng.normal(0, 6, (height, width, 1))
    return np.clip(np.asarray(coarse) + noise, 0, 255).astype(np.uint8)


def write_shards(folder: Path, images: list[bytes], *, per_shard: int = 10, labels: list[int] | None = None) -> Path:
    """Write encoded images as a finished set."""
    folder.mkdir(parents=True, exist_ok=True)
    entries = []
    for number, begin in enumerate(range(0, len(images), per_shard)):
        stem = f"shard-{number:06d}"
        members = range(begin, min(begin + per_shard, len(images)))
        with tarfile.open(folder / f"{stem}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for position in members:
                info = tarfile.TarInfo(f"{position:09d}.jpg")
                info.size = len(images[position])
                tar.addfile(info, io.BytesIO(images[position]))
        with tarfile.open(folder / f"{stem}.tar") as tar:
            offsets = [member.offset_data for member in tar.getmembers()]
        records = np.zeros(len(members), dtype=RECORD)
        for record, position, offset in zip(records, members, offsets, strict=True):
            pixels = _pixels(images[position])
            record["position"], record["offset"], record["size"] = position, offset, len(images[position])
            record["height"], record["width"] = pixels.shape[:2]
            record["label"] = labels[position] if labels else -1
            record["crc32c"] = google_crc32c.value(images[position])
            record["mean_rgb"], record["flags"] = np.rint(pixels.mean(axis=(0, 1))), Flag.HAS_MEAN_RGB
        np.save(folder / f"{stem}.index.npy", records)
        entries.append(
            ShardEntry(
                name=f"{stem}.tar",
                num_samples=len(members),
                num_rejected=0,
                num_bytes=(folder / f"{stem}.tar").stat().st_size,
                digests={},
                max_width=int(records["width"].max()),
                max_height=int(records["height"].max()),
                max_bytes=int(records["size"].max()),
                outcomes={},
                rejections={},
            )
        )
    manifest = Manifest(
        shards=ShardTable.of(entries),
        num_inputs=len(images),
        num_samples=len(images),
        num_rejected=0,
        max_width=max(entry.max_width for entry in entries),
        max_height=max(entry.max_height for entry in entries),
        max_bytes=max(entry.max_bytes for entry in entries),
    )
    (folder / "manifest.json").write_text(manifest.to_json())
    return folder


def _pixels(encoded: bytes) -> np.ndarray:
    try:
        return np.asarray(Image.open(io.BytesIO(encoded)).convert("RGB"))
    except OSError:
        return np.zeros((1, 1, 3))


def damaged_copy(shards: Path, to: Path, *, shard: int, sample: int) -> Path:
    """A copy of a set, with a byte of one image flipped; returns its folder."""
    shutil.copytree(shards, to)
    copied = open_set(to)
    content = bytearray(copied.shard_path(shard).read_bytes())
    content[int(copied.index(shard)[sample]["offset"]) + 100] ^= 1
    copied.shard_path(shard).write_bytes(content)
    return to
