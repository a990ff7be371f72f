"""Folder of shards, local or in a bucket, whose files are looked at as local ones."""

import os
import tempfile
from collections.abc import Generator, Iterable
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from shards.ground.files import write_whole
from shards.sets.local import LocalShardSet
from shards.sets.manifest import MANIFEST_NAME, Manifest, packing_of
from shards.storage.file_kinds import kind_of_archive
from shards.storage.stores import ByteFile, is_url, open_bytes, open_folder, split_url
from shards.storage.target import PLAN_NAME, WORK_NAME

__all__ = ["ShardFolder"]

# Tables beside tars describe them.
_OF_SAMPLES = ("tar", "zip", "tfrecord", "mds")


@dataclass(frozen=True, kw_only=True)
class ShardFolder:
    """Names and files of a folder. Sent to worker processes."""

    where: str
    """Path or URL."""
    work_folder: str
    """Local folder for files of a bucket while they are looked at."""

    def tars(self) -> list[str]:
        """Return the names of the tars, sorted.

        Raises:
            PackError: the bucket does not answer.
        """
        if is_url(self.where):
            names = (name for name, _ in open_folder(self._url).objects() if "/" not in name)
        else:
            names = (path.name for path in Path(self.where).glob("*.tar") if path.is_file())
        return sorted(name for name in names if name.endswith(".tar"))

    def other_archives(self) -> list[str]:
        """Return the names of archives that are not shards of this folder, sorted: compressed ones, and those below."""
        if is_url(self.where):
            names = [name for name, _ in open_folder(self._url).objects()]
        else:
            names = [str(path.relative_to(self.where)) for path in Path(self.where).rglob("*") if path.is_file()]
        return sorted({name for name in names if kind_of_archive(name) in _OF_SAMPLES}.difference(self.tars()))

    def manifest(self) -> Manifest:
        """Return what the set holds.

        Raises:
            ValueError: there is no finished set.
        """
        if not is_url(self.where):
            return Manifest.read(self.where)
        return Manifest.fetch(self._url)[0]

    def compared_manifest(self) -> tuple[Manifest, str | None]:
        """Return what manifest.json alone says the set holds, and what is wrong with its table; None: it names none.

        Raises:
            ValueError: there is no finished set.
        """
        self.manifest()
        return Manifest.compared(self._url if is_url(self.where) else self.where)

    def has_manifest(self) -> bool:
        """Return whether the folder is described already."""
        if not is_url(self.where):
            return (Path(self.where) / MANIFEST_NAME).exists()
        return MANIFEST_NAME in (name for name, _ in open_folder(self._url).objects())

    def packing(self) -> str | None:
        """Return the target of the unfinished packing that the shards here are of; None: they are of none."""
        if not is_url(self.where):
            target = packing_of(Path(self.where))
            return None if target is None else str(target)
        if any(name.startswith(f"{WORK_NAME}/") for name, _ in open_folder(self._url).objects()):
            return self._url
        parent, _ = split_url(self._url)
        if parent.endswith("/") or not is_url(parent):
            return None
        try:
            open_folder(parent).size(PLAN_NAME)
        except FileNotFoundError:
            return None
        return parent

    def put_manifest(self, manifest: Manifest) -> None:
        """Write the manifest, which makes the folder a set."""
        for name, data in manifest.files():
            self.put(name, data)

    def add_table(self) -> bool:
        """Write the table of a long manifest that lacks it, as in sets of earlier versions. Returns whether it did.

        Raises:
            ValueError: there is no finished set.
        """
        manifest, about_table = self.compared_manifest()
        if about_table == "" or len(list(manifest.files())) == 1:
            return False
        self.put_manifest(manifest)
        return True

    def put(self, name: str, data: bytes) -> None:
        """Write a file, which appears whole or not at all."""
        if is_url(self.where):
            open_folder(self._url).put(name, data)
            return
        final = Path(self.where) / name
        # Two commands may describe one folder at a time.
        write_whole(final, data, durable=True, aside=final.with_name(f".{name}.{os.getpid()}.partial"))

    def open(self, name: str) -> ByteFile:
        """Open a file to read by ranges."""
        return open_bytes(f"{self._url}/{name}" if is_url(self.where) else str(Path(self.where) / name))

    @contextmanager
    def local(self, names: Iterable[str]) -> Generator[Path]:
        """Give a local folder that has some of the files: this one, or a temporary one that they are downloaded to.

        Files that are missing here are missing there.
        """
        if not is_url(self.where):
            yield Path(self.where)
            return
        with tempfile.TemporaryDirectory(dir=self.work_folder, prefix="make-shards-") as folder:
            for name in names:
                with suppress(FileNotFoundError):
                    open_folder(self._url).download(name, Path(folder) / name)
            yield Path(folder)

    @contextmanager
    def opened(self, names: Iterable[str], manifest: Manifest) -> Generator[LocalShardSet]:
        """Give the set, with no more than some of its files."""
        with self.local(names) as folder:
            yield LocalShardSet(folder, manifest)

    @property
    def _url(self) -> str:
        return self.where.rstrip("/")
