"""Small files out of a folder or an archive, read whole: labels and names that come beside images."""

import io
import os
import tarfile
import zlib
from collections.abc import Collection
from pathlib import Path

from shards.ground.errors import PackError
from shards.storage.stores import SeekableFile, is_url, open_bytes

__all__ = ["small_files"]


def small_files(path: str, names: Collection[str]) -> dict[str, bytes]:
    """Return the files of some names, wherever they are in a folder or in a tar, plain or compressed.

    Args:
        path: of the folder or the archive; of the archive also a URL.
        names: without folders.

    Returns:
        their bytes; a name that is not there is left out.

    Raises:
        PackError: the folder or the archive cannot be read.
    """
    found: dict[str, bytes] = {}
    try:
        if not is_url(path) and Path(path).is_dir():
            for folder, _, inner in os.walk(path):
                found |= {name: (Path(folder) / name).read_bytes() for name in inner if name in names}
            return found
        raw = io.BufferedReader(SeekableFile(open_bytes(path)))
        with tarfile.open(fileobj=raw, mode="r|*") as tar:
            for member in tar:
                name = member.name.rpartition("/")[2]
                file = tar.extractfile(member) if member.isfile() and name in names else None
                if file is not None:
                    found[name] = file.read()
    except (OSError, EOFError, tarfile.TarError, zlib.error) as error:
        raise PackError(f"cannot read {path} to its end ({error}): get it again") from error
    return found
