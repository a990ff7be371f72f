"""Atomic files and folders: whole under their name or not there at all, with or without a sync to disk."""

import os
import shutil
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path

__all__ = [
    "appearing",
    "aside_of",
    "cache_folder",
    "publish",
    "remove",
    "sync",
    "uncache",
    "write_synced",
    "write_whole",
]


def cache_folder(name: str, env: Mapping[str, str] = os.environ) -> Path:
    """Return a folder in the user's own cache, which need not be there: the XDG base directory's `moco-fast/NAME`."""
    return Path(env.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moco-fast" / name


def aside_of(final: Path) -> Path:
    """Return where a file or folder grows before it gets its name: `.NAME.partial` beside it."""
    return final.with_name(f".{final.name}.partial")


@contextmanager
def appearing(final: Path, *, durable: bool, aside: Path | None = None) -> Generator[Path]:
    """Give a path for what gets its name when the block ends, and is removed if the block raises.

        with appearing(Path("config.json"), durable=False) as aside:
            aside.write_text("{}")

    Args:
        final: name of the file or folder; a file that has it is replaced, a folder must be gone by then.
        durable: sync contents and name to disk, so that a power cut cannot leave the name without the contents.
        aside: where it grows, on the same file system; needed where several processes may write the same name at once.
    """
    aside = aside or aside_of(final)
    remove(aside)
    try:
        yield aside
        if durable:
            _sync_all(aside)
            publish([(aside, final)])
        else:
            aside.replace(final)
    finally:
        remove(aside)


def write_whole(final: Path, data: bytes | str, *, durable: bool, aside: Path | None = None) -> None:
    """Write a file that appears whole or not at all; text as UTF-8. Arguments as in `appearing`."""
    with appearing(final, durable=durable, aside=aside) as path:
        path.write_bytes(data.encode() if isinstance(data, str) else data)


def write_synced(path: Path, data: bytes) -> None:
    """Write a file and wait until it is on the disk."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def publish(pairs: list[tuple[Path, Path]]) -> None:
    """Rename synced files, and sync the folders that they are in now."""
    for aside, final in pairs:
        aside.replace(final)
    for folder in {final.parent for _, final in pairs}:
        sync(folder)


def sync(path: Path) -> None:
    """Wait until a file's bytes, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def uncache(path: Path) -> None:
    """Let the kernel forget a synced file's bytes, so that whoever reads it next reads the disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def remove(path: Path) -> None:
    """Remove a file or a folder with all that is in it, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _sync_all(path: Path) -> None:
    if path.is_dir():
        for inner in path.iterdir():
            _sync_all(inner)
    sync(path)
