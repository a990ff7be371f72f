"""Tar archives, plain or compressed: of folders of images, or WebDataset shards."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from shards.config import SourceOptions
from shards.ground.arrays import LabelSets
from shards.ground.errors import PackError, Rejected
from shards.images.sniff import is_image
from shards.sets.local import LocalShardSet
from shards.sets.manifest import MANIFEST_NAME, Manifest
from shards.sources.base import Aside, Found, Input, LabelSet, Source, folder_of, printable
from shards.sources.companions import Companions, Seen
from shards.sources.samples import ALL_MEMBERS, Named, SeveralImages, extension, is_chosen, split_name
from shards.sources.spools import spooled
from shards.storage.file_kinds import IMAGE_SUFFIXES, litter
from shards.storage.stores import ByteFile, SeekableFile, absolute, is_url, open_bytes
from shards.storage.tar import TarError
from shards.storage.tar_reading import TarEntry, members, read_member, tar_reader
from shards.storage.unpacking import UnpackError

__all__ = ["TarSource"]

_HEAD_BYTES = 64
_MAX_FILE_BYTES = 1 << 30
_MOST_IN_RUN = 4096


class TarSource:
    """Members of one or several tars in one file.

    Members next to each other that have a name's first part in common are looked at together. Those of one key
    (shards.sources.samples) are a sample: images are inputs, whatever they are called, `.cls` or what else was chosen
    is their label, the rest is left aside. A member that stands alone is an input.

    Args:
        path: path or URL.
        options: what is wanted.
        spool: the unpacked tar, if `path` is compressed.
        root: absolute path, for other processes.
    """

    def __init__(
        self, path: str, options: SourceOptions | None = None, spool: Path | None = None, root: str = ""
    ) -> None:
        self.path = path
        self._options = options or SourceOptions()
        self._root = root or absolute(path)
        self._spool = spool

    @property
    def is_remote(self) -> bool:
        """Whether members are read over a network."""
        return is_url(self._root) and self._spool is None

    @property
    def is_unpacked(self) -> bool:
        """Whether what is read is a local copy, since the archive is compressed."""
        return self._spool is not None

    def spec(self) -> dict[str, Any]:
        """Return what `reopen_source` needs."""
        spool = {} if self._spool is None else {"spool": self._spool.name}
        return {"kind": "tar", "path": self.path, "root": self._root, **spool}

    def inputs(self, spool: Path) -> Iterator[Input | Source | Found | Aside]:
        """List the members that are images or stand alone, in the archive's order."""
        manifest = self._manifest()
        names = () if manifest is None else manifest.class_names
        try:
            self._spool = spooled(self._root, spool)
            sets = None if manifest is None or not manifest.has_label_sets else self._label_sets(manifest)
            companions, several = Companions(self.path, self._options, names), SeveralImages()
            number = 0
            for run in _runs(self._listed(companions)):
                for item in self._sort_out(run, companions, several):
                    if isinstance(item, Input) and sets is not None:
                        item, number = item._replace(label=_set_of(sets[number], names)), number + 1
                    yield item
            companions.refuse_without()
            several.refuse(self.path)
        except (OSError, UnpackError, TarError) as error:
            raise PackError(
                f"{self.path} cannot be read to its end ({error}): its images would be lost silently; "
                "get the whole archive, or leave it out"
            ) from error

    def _listed(self, companions: Companions) -> Iterator[Seen]:
        """Return each member with what its first bytes say; small ones that may hold labels are read."""
        reader = tar_reader(self._file(), self.is_remote)
        for entry in members(reader):
            wanted = companions.num_wanted(entry)
            if entry.is_file:
                # Right behind its header: over a network, that is already here.
                count = min(entry.size, max(wanted, _HEAD_BYTES))
                data = reader.read_at(entry.offset, count) if count >= 0 else _with_holes(reader, entry)
                yield Seen(entry, is_image(data[:_HEAD_BYTES]), data if wanted else b"")
            else:
                yield Seen(entry, False, b"")

    def _sort_out(self, run: list[Seen], companions: Companions, several: SeveralImages) -> Iterator[Input | Aside]:
        """Return each member of a run as an input or as left aside."""
        samples: dict[bytes, list[Seen]] = {}
        for seen in run:
            samples.setdefault(split_name(seen.entry.name).key or seen.entry.name, []).append(seen)
        for key, own in samples.items():
            inputs = self._inputs_of(key, own, samples)
            if len(inputs) > 1 and not self._options.members:
                several.note([seen.entry.name for seen in inputs if seen.is_image])
            label, label_from = companions.label(key, samples) if inputs and len(run) > 1 else (None, "")
            for seen in own:
                entry, kind = seen.entry, litter(seen.entry.name, is_image=seen.is_image)
                if kind is not None or seen not in inputs:
                    yield Aside(kind or extension(entry.name), entry.name)
                else:
                    yield Input(entry.name, folder_of(entry.name), label, entry.offset, entry.size, label_from)

    def _inputs_of(self, key: bytes, own: list[Seen], samples: dict[bytes, list[Seen]]) -> list[Seen]:
        """Return the members of a sample that are inputs.

        Args:
            key: of the sample.
            own: its members.
            samples: those near it, this one included: where one of its key, or of a key that begins with it, is an
                image, what is none here describes that.
        """
        chosen = self._options.members
        if chosen and ALL_MEMBERS not in chosen:
            return [seen for seen in own if is_chosen(seen.entry.name, chosen)]
        images = [seen for seen in own if seen.is_image or _is_called_image(seen.entry.name)]
        belongs = not images and any(_is_part(each, key) and any(s.is_image for s in samples[each]) for each in samples)
        return images if images or belongs else own

    def _manifest(self) -> Manifest | None:
        """Return what says what labels mean, if this is a shard that make-shards wrote."""
        folder = Path(self._root).parent
        if is_url(self._root) or not (folder / MANIFEST_NAME).exists():
            return None
        try:
            return Manifest.read(folder)
        except ValueError:
            return None

    def _label_sets(self, manifest: Manifest) -> LabelSets | None:
        """Return the classes of each sample, if the manifest names this shard."""
        path = Path(self._root)
        numbers = [number for number, entry in enumerate(manifest.shards) if entry.name == path.name]
        return LocalShardSet(path.parent, manifest).label_sets(numbers[0]) if numbers else None

    def _file(self) -> ByteFile:
        return open_bytes(str(self._spool) if self._spool is not None else self._root)

    def read(self, name: bytes, offset: int, size: int) -> bytes:
        """Return the bytes of a member."""
        if offset < 0:
            raise Rejected("not a file", "a link, a device or the like inside the archive")
        if size > _MAX_FILE_BYTES:
            raise Rejected("too many bytes", f"{size} bytes, more than {_MAX_FILE_BYTES}")
        try:
            data = read_member(self._file(), offset, size)
        except OSError as error:
            raise PackError(f"cannot read {self.path} ({error.strerror}): is it still there?") from error
        except TarError as error:
            raise Rejected("damaged", str(error)) from None
        if size >= 0 and len(data) != size:
            raise PackError(f"{self.path} is shorter than when it was listed: {printable(name)} is cut")
        return data

    def describe(self, name: bytes) -> str:
        """Return the path of the archive and of the member in it."""
        return f"{printable(os.fsencode(self.path))}/{printable(name)}"


def _runs(listing: Iterator[Seen]) -> Iterator[list[Seen]]:
    """Return members next to each other whose names agree up to the first dot of the last part.

    A name that comes again begins another run: as where archives were joined.
    """
    run: list[Seen] = []
    names, last = set[bytes](), Named(b"", b"", b"")
    for seen in listing:
        name, now = seen.entry.name, split_name(seen.entry.name)
        agrees = now.folder == last.folder and (
            now.key == last.key or now.key.partition(b".")[0] == last.key.partition(b".")[0]
        )
        # Hidden names have no key; each stands alone.
        is_other = not agrees or not now.key or name in names or (len(run) >= _MOST_IN_RUN and now.key != last.key)
        if run and is_other:
            yield run
            run, names = [], set[bytes]()
        run.append(seen)
        names.add(name)
        last = now
    if run:
        yield run


def _with_holes(reader: SeekableFile, entry: TarEntry) -> bytes:
    try:
        return read_member(reader.file, entry.offset, entry.size)
    except TarError:
        return b""  # why not is said when it is packed


def _is_part(key: bytes, of: bytes) -> bool:
    return key == of or key.startswith(of + b".")


def _is_called_image(name: bytes) -> bool:
    return name.rpartition(b".")[2].decode("ascii", "replace").lower() in IMAGE_SUFFIXES


def _set_of(row: LabelSets, names: tuple[str, ...]) -> LabelSet:
    present, unsure = (tuple(names[i] for i in np.flatnonzero(row == value)) for value in (1, -1))
    return LabelSet(present, unsure)
