"""TFRecord files and MDS shards: a record is an input, its image and its label are among its fields."""

import os
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from shards.config import SourceOptions
from shards.ground.errors import PackError, Rejected
from shards.sources.base import Input, LabelSet, Source, printable
from shards.sources.spools import spooled
from shards.sources.values import USUAL_COLUMNS, USUAL_IMAGES, as_label, column_of
from shards.storage.mds import MdsShard, decoded, raw_picture
from shards.storage.stores import ByteFile, SeekableFile, absolute, is_url, open_bytes
from shards.storage.tar_reading import tar_reader
from shards.storage.tfrecord import Feature, RecordError, check_record, features, records
from shards.storage.unpacking import UnpackError

__all__ = ["MdsSource", "TFRecordSource"]

_MAX_FILE_BYTES = 1 << 30
_LABELS = ("image/class/synset", "image/class/label", "image/class/text", *USUAL_COLUMNS)
_PICTURES = ("jpeg", "png", "pil")


class _Record(NamedTuple):
    offset: int
    size: int
    label: Any
    """As it is written."""


class _RecordSource(ABC):
    """Records of one file.

    Args:
        path: path or URL.
        options: what is wanted.
        spool: the unpacked file, if `path` is compressed.
        root: absolute path, for other processes.
        image: name of the field that holds the image, once it is known.
        encoding: of that field, in MDS.
    """

    kind: ClassVar[str]

    def __init__(
        self,
        path: str,
        options: SourceOptions | None = None,
        spool: Path | None = None,
        root: str = "",
        image: str = "",
        encoding: str = "",
    ) -> None:
        self.path = path
        self._options = options or SourceOptions()
        self._root = root or absolute(path)
        self._spool = spool
        self._image = image
        self._encoding = encoding
        self._label: str | None = None

    @property
    def is_remote(self) -> bool:
        """Whether records are read over a network."""
        return is_url(self._root) and self._spool is None

    def spec(self) -> dict[str, Any]:
        """Return what `reopen_source` needs."""
        spool = {} if self._spool is None else {"spool": self._spool.name}
        field = {"image": self._image, "encoding": self._encoding}
        return {"kind": self.kind, "path": self.path, "root": self._root, **field, **spool}

    def inputs(self, spool: Path) -> Iterator[Input | Source]:
        """List the records, in the file's order."""
        try:
            self._spool = spooled(self._root, spool)
            reader = tar_reader(self._file(), self.is_remote)
            for number, record in enumerate(self._listed(reader)):
                label, label_from = self._as_label(record.label), f"field {self._label}" if self._label else ""
                yield Input(b"record %d" % number, None, label, record.offset, record.size, label_from)
        except (OSError, UnpackError, RecordError) as error:
            raise PackError(
                f"{self.path} cannot be read to its end ({error}): its images would be lost silently; get the whole "
                "file, or leave it out"
            ) from error

    @abstractmethod
    def _listed(self, reader: SeekableFile) -> Iterator[_Record]:
        """Return each record. Raises RecordError."""

    @abstractmethod
    def _image_in(self, data: bytes, offset: int) -> bytes:
        """Return the image out of the bytes of a record. Raises ValueError: why there is none."""

    def _choose(self, names: Collection[str], images: Sequence[str], labels: Sequence[str]) -> None:
        """Decide which fields are image and label. Raises ValueError."""
        columns = self._options.columns
        self._image = column_of(self.path, names, columns.image, images, is_image=True) or ""
        if self._options.labeled:
            self._label = column_of(self.path, names, columns.label, labels, is_image=False)

    def _as_label(self, value: Any) -> LabelSet | str | int | None:
        try:
            return as_label(value, self._class_names)
        except ValueError as error:
            raise self._not_a_label(error) from None

    def _not_a_label(self, error: Exception) -> ValueError:
        return ValueError(
            f"{self.path}, field {self._label}: {error}; name that of labels with --label-column, or use --labels none"
        )

    @cached_property
    def _class_names(self) -> Sequence[str]:
        """Names that numbers of classes stand for, once it is known which field is the label."""
        return ()

    def _file(self) -> ByteFile:
        return open_bytes(str(self._spool) if self._spool is not None else self._root)

    def read(self, name: bytes, offset: int, size: int) -> bytes:
        """Return the image of a record."""
        if size > _MAX_FILE_BYTES:
            raise Rejected("too many bytes", f"{size} bytes, more than {_MAX_FILE_BYTES}")
        try:
            data = self._file().read(offset, size)
        except OSError as error:
            raise PackError(f"cannot read {self.path} ({error.strerror}): is it still there?") from error
        if len(data) != size:
            raise PackError(f"{self.path} is shorter than when it was listed: {printable(name)} is cut")
        try:
            return self._image_in(data, offset)
        except ValueError as error:
            raise Rejected("damaged", str(error)) from None

    def describe(self, name: bytes) -> str:
        """Return the path of the file and the number of the record."""
        return f"{printable(os.fsencode(self.path))}/{printable(name)}"


class TFRecordSource(_RecordSource):
    """Records of a TFRecord file that are `tf.train.Example` messages. Each is checked when it is read."""

    kind = "tfrecord"

    def _listed(self, reader: SeekableFile) -> Iterator[_Record]:
        for offset, size in records(reader):
            label = None
            try:
                found = features(reader.read_at, offset, offset + size)
            except RecordError:
                if not self._image:
                    raise
                # A later one that is damaged is rejected when it is read.
                found = dict[str, Feature]()
            if not self._image:
                self._choose(found, ("image/encoded", *USUAL_IMAGES), _LABELS)
            if self._label in found:
                try:
                    values: list[Any] = [*found[self._label].values(reader.read_at)]
                except RecordError as error:
                    raise self._not_a_label(error) from None
                label = values[0] if len(values) == 1 else values or None
            yield _Record(offset, size, label)

    def _image_in(self, data: bytes, offset: int) -> bytes:
        check_record(data, self._file().read(offset + len(data), 4))

        def read(start: int, count: int) -> bytes:
            return data[start : start + count]

        feature = features(read, 0, len(data)).get(self._image)
        if feature is None or feature.kind != "bytes":
            raise ValueError(f"the record has no image in {self._image}")
        places = feature.places(read)
        if len(places) != 1:
            raise ValueError(f"the record has {len(places)} images in {self._image}")
        [(start, stop)] = places
        return data[start:stop]

    @cached_property
    def _class_names(self) -> Sequence[str]:
        """Names that TensorFlow Datasets writes into a file beside its records."""
        names = Path(self._root).parent / f"{self._label}.labels.txt"
        if is_url(self._root) or not names.is_file():
            return ()
        return names.read_text(encoding="utf-8").splitlines()


class MdsSource(_RecordSource):
    """Samples of one MDS shard."""

    kind = "mds"

    def _listed(self, reader: SeekableFile) -> Iterator[_Record]:
        shard = MdsShard(reader)
        encodings = {column.name: column.encoding for column in shard.columns}
        pictures = [name for name, encoding in encodings.items() if encoding in _PICTURES]
        self._choose(encodings, pictures if len(pictures) == 1 else USUAL_IMAGES, USUAL_COLUMNS)
        self._encoding = encodings[self._image]
        for sample in shard.samples():
            label = None
            if self._label is not None:
                try:
                    label = decoded(reader.read_at(*sample[self._label]), encodings[self._label])
                except (ValueError, IndexError) as error:
                    raise self._not_a_label(error) from None
            yield _Record(*sample[self._image], label)

    def _image_in(self, data: bytes, offset: int) -> bytes:
        del offset
        return raw_picture(data) if self._encoding == "pil" else data
