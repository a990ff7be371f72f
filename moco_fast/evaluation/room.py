"""Room in the cache of evaluations: what was used least recently, features or a set, is removed to make some.

CACHE/ENCODER-DATA/LAYER-REST.safetensors    features (cache.py)
CACHE/sets/DIGEST/                           class folders, packed (packed.py); used last: mtime of manifest.json
CACHE/sets/.DIGEST.lock                      held by who packs or opens it
CACHE/sets/.DIGEST.used                      held, shared, by every process that uses it: it is not removed then
"""

import shutil
from contextlib import suppress
from pathlib import Path

from shards.ground.errors import InUseError
from shards.ground.files import remove
from shards.ground.locks import locked
from shards.sets.manifest import MANIFEST_NAME

__all__ = ["FEATURES_SUFFIX", "SETS_FOLDER", "beside", "make_room"]

FEATURES_SUFFIX = ".safetensors"
"""Of files of features."""

SETS_FOLDER = "sets"
"""Below the cache's folder."""


def beside(folder: Path, suffix: str) -> Path:
    """Return a file that belongs to a set in the cache."""
    return folder.with_name(f".{folder.name}.{suffix}")


def make_room(cache: Path, needed_bytes: int, *, limit_gib: float | None) -> None:
    """Remove what was used least recently until there is room; what processes use now stays.

    Args:
        cache: its folder.
        needed_bytes: that are about to be written.
        limit_gib: size that the cache may grow to; None: four fifths of what the disk has left.
    """
    _sweep(cache / SETS_FOLDER)
    # Not deeper: trainings keep their state there (saving.py).
    found: list[tuple[float, int, Path]] = []
    for path in cache.glob(f"*/[!.]*{FEATURES_SUFFIX}"):
        with suppress(FileNotFoundError):  # Another process makes room too.
            status = path.stat()
            found.append((status.st_mtime, status.st_size, path))
    for manifest in cache.glob(f"{SETS_FOLDER}/[!.]*/{MANIFEST_NAME}"):
        with suppress(FileNotFoundError):
            size = sum(file.stat().st_size for file in manifest.parent.iterdir())
            found.append((manifest.stat().st_mtime, size, manifest.parent))
    used = sum(size for _, size, _ in found)
    limit = 0.8 * (shutil.disk_usage(cache).free + used) if limit_gib is None else limit_gib * 2**30
    for _, size, path in sorted(found):
        if used + needed_bytes <= limit:
            break
        if path.suffix == FEATURES_SUFFIX:
            path.unlink(missing_ok=True)
        elif not _remove_set(path):
            continue
        used -= size


def _remove_set(folder: Path) -> bool:
    """Remove a set that no process uses. Returns whether it is gone."""
    try:
        with locked(beside(folder, "used"), holder=str(folder)):
            aside = beside(folder, "gone")
            remove(aside)
            folder.replace(aside)
            shutil.rmtree(aside)
    except InUseError:
        return False
    return True


def _sweep(sets: Path) -> None:
    """Remove what processes that were killed left half written or half removed."""
    for path in [*sets.glob(".*.partial"), *sets.glob(".*.gone")]:
        with suppress(InUseError), locked(path.with_suffix(".lock"), holder=str(path)):
            remove(path)
