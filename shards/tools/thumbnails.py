"""Thumbnails of images that may be damaged, and where the originals of rejected inputs are read from."""

import base64
import io
import os
import tempfile
import warnings
from collections.abc import Generator, Iterable
from contextlib import contextmanager, suppress
from pathlib import Path

from PIL import Image, ImageFile, ImageOps

from shards.config import SourceOptions
from shards.ground.errors import PackError, Rejected
from shards.sources import Input, open_source
from shards.sources.base import printable

__all__ = ["original_bytes", "thumbnail"]

_MOST_PIXELS = 50_000_000
_MOST_BYTES = 64 << 20
_READ_IN_PLACE = (".tar", ".zip")


def thumbnail(data: bytes, side: int) -> str | None:
    """Return an image's picture as a data URL, at most `side` pixels a side; None where nothing of it can be decoded.

    What is missing of a damaged image stays gray.
    """
    try:
        with _lenient(), Image.open(io.BytesIO(data)) as image:
            if image.width * image.height > _MOST_PIXELS:
                return None
            image.draft("RGB", (2 * side, 2 * side))
            image.thumbnail((side, side))
            upright = ImageOps.exif_transpose(image).convert("RGB")
    # Pillow's plugins raise whatever their parsing runs into.
    except Exception:
        return None
    buffer = io.BytesIO()
    upright.save(buffer, "JPEG", quality=80)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


@contextmanager
def _lenient() -> Generator[None]:
    before = ImageFile.LOAD_TRUNCATED_IMAGES
    ImageFile.LOAD_TRUNCATED_IMAGES = True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = before


def original_bytes(places: Iterable[str]) -> dict[str, bytes]:
    """Return the bytes of those inputs that are still on this machine, as files or in tars and zips.

    Args:
        places: where inputs came from, as in rejected.jsonl.
    """
    found: dict[str, bytes] = {}
    inside: dict[str, set[str]] = {}
    for place in places:
        path = Path(place)
        # A link that packing did not follow is not followed here.
        if _is_file(path) and not path.is_symlink() and path.stat().st_size <= _MOST_BYTES:
            with suppress(OSError):
                found[place] = path.read_bytes()
        archive = next((parent for parent in path.parents if _is_file(parent)), None)
        if archive is not None and archive.name.lower().endswith(_READ_IN_PLACE):
            inside.setdefault(str(archive), set()).add(place)
    for archive, wanted in inside.items():
        found |= _members(archive, wanted)
    return found


def _is_file(path: Path) -> bool:
    return os.path.isfile(path)  # noqa: PTH113 - Path.is_file raises for names that are too long, as URLs may be


def _members(archive: str, wanted: set[str]) -> dict[str, bytes]:
    names = {place[len(archive) + 1 :]: place for place in wanted}
    found: dict[str, bytes] = {}
    with tempfile.TemporaryDirectory() as folder:
        try:
            source = open_source(archive, SourceOptions(labels="none", members=("all",)))
            for item in source.inputs(Path(folder) / "spool"):
                place = names.get(printable(item.name)) if isinstance(item, Input) else None
                if place is None or not isinstance(item, Input):
                    continue
                try:
                    found[place] = source.read(item.name, item.offset, item.size)
                except Rejected:
                    continue
                if len(found) == len(wanted):
                    break
        except (ValueError, PackError, OSError):
            # An archive that has changed since has no pictures to give.
            pass
    return found
