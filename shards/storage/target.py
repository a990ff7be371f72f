"""Targets of packing: a folder or a bucket. In either, a file is there whole or not at all."""

import os
import shutil
import uuid
from collections.abc import Generator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from shards.ground.digests import short_digest
from shards.ground.errors import PackError
from shards.ground.files import appearing, publish, remove, write_whole
from shards.ground.locks import is_locked, locked
from shards.storage.claims import BucketClaims, Claims, LocalClaims
from shards.storage.stores import check_url, is_url, open_folder

__all__ = ["PLAN_NAME", "WORK_NAME", "Target", "open_target", "path_in"]

WORK_NAME = ".pack"
PLAN_NAME = f"{WORK_NAME}/plan.json"
"""Its content names the folder of the plan that everyone follows."""
_LEASES = f"{WORK_NAME}/leases"


def path_in(split: str, name: str) -> str:
    """Return the name of a split's file, below the target."""
    return f"{split}/{name}" if split else name


class Target(Protocol):
    """A place for shards. Names are relative to it, with `/` between folder and file. Sent to worker processes."""

    @property
    def out(self) -> str:
        """As the user wrote it."""
        ...

    @property
    def part(self) -> str:
        """What sets the files of one part of an array job apart, such as `-0-of-4`; empty: there are no parts."""
        ...

    @property
    def work(self) -> Path:
        """Local folder for locks, and for files that are being written."""
        ...

    @property
    def scratch(self) -> Path:
        """Folder below `work` for what this process and its workers are writing."""
        ...

    def begin(self, folders: list[str]) -> None:
        """Make the folders that files will go to."""
        ...

    def publish(self, files: Mapping[str, Path]) -> None:
        """Move synced local files, by their final name, to the target."""
        ...

    def put(self, name: str, data: bytes) -> None:
        """Write a file."""
        ...

    def get(self, name: str) -> bytes | None:
        """Return the content of a file; None where there is none."""
        ...

    def sizes(self) -> dict[str, int]:
        """Return the size of every file."""
        ...

    def address(self, name: str) -> str:
        """Return the path or address of a file or folder, for `open_bytes`."""
        ...

    def has(self, name: str) -> bool:
        """Return whether a file is there."""
        ...

    def put_first(self, name: str, data: bytes) -> bool:
        """Write a file that the first one decides on; False where it is there already. The caller holds a claim."""
        ...

    def sharing(self, name: str) -> AbstractContextManager[Path]:
        """Give an empty local folder, whose files are in the target's folder `name` once the block has ended."""
        ...

    def claims(self) -> Claims:
        """Return what decides who does what is to be done once."""
        ...

    def is_held(self) -> bool:
        """Return whether a packer of this machine is at work here, as far as one can see."""
        ...

    def leave(self) -> None:
        """Remove what this process and its workers have in local folders of their own."""
        ...

    def discard(self) -> None:
        """Leave the target as it was before a packing that never got a plan."""
        ...

    def remove_work(self) -> None:
        """Remove everything that only an unfinished packing needs."""
        ...


@dataclass(frozen=True)
class LocalTarget:
    """A folder; what is unfinished is in `.pack` inside it, on the same file system."""

    out: str
    part: str = ""
    """Sets the files of one part of an array job apart."""

    @property
    def work(self) -> Path:
        """`.pack`."""
        return Path(self.out) / WORK_NAME

    @property
    def scratch(self) -> Path:
        """A folder of this part's own."""
        return self.work / f"scratch{self.part}"

    def begin(self, folders: list[str]) -> None:
        """Make folders."""
        for folder in [f"{WORK_NAME}/done", *folders]:
            (Path(self.out) / folder).mkdir(exist_ok=True)

    def publish(self, files: Mapping[str, Path]) -> None:
        """Rename."""
        publish([(path, Path(self.out) / name) for name, path in files.items()])

    def put(self, name: str, data: bytes) -> None:
        """Write aside, sync, rename."""
        aside = self.scratch / f"{name.replace('/', '-')}.{uuid.uuid4().hex[:8]}"
        write_whole(Path(self.out) / name, data, durable=True, aside=aside)

    def get(self, name: str) -> bytes | None:
        """Read."""
        try:
            return (Path(self.out) / name).read_bytes()
        except FileNotFoundError:
            return None

    def sizes(self) -> dict[str, int]:
        """Walk the folder."""
        root = os.fspath(self.out)
        found: dict[str, int] = {}
        for folder, _, names in os.walk(root):
            inner = os.path.relpath(folder, root)
            for name in names:
                # Another part's temporary file may be gone by now.
                with suppress(FileNotFoundError):
                    size = (Path(folder) / name).lstat().st_size
                    found[name if inner == "." else f"{inner}/{name}"] = size
        return found

    def address(self, name: str) -> str:
        """Return a path."""
        return f"{self.out.rstrip('/')}/{name}"

    def has(self, name: str) -> bool:
        """Look for it."""
        return (Path(self.out) / name).exists()

    def put_first(self, name: str, data: bytes) -> bool:
        """Look whether it is there: a claim is a lock here."""
        if self.has(name):
            return False
        (Path(self.out) / name).parent.mkdir(exist_ok=True)
        self.put(name, data)
        return True

    @contextmanager
    def sharing(self, name: str) -> Generator[Path]:
        """Rename the folder."""
        aside = self.scratch / f"{name.rpartition('/')[2]}.{os.getpid()}"
        with appearing(Path(self.out) / name, durable=True, aside=aside) as folder:
            folder.mkdir()
            yield folder

    def claims(self) -> LocalClaims:
        """Return lock files."""
        return LocalClaims(self.work)

    def is_held(self) -> bool:
        """Look at the locks."""
        return _any_held(self.work)

    def leave(self) -> None:
        """Remove the scratch folder."""
        shutil.rmtree(self.scratch)

    def discard(self) -> None:
        """Remove `.pack`, and the folder if it is empty then."""
        shutil.rmtree(self.work)
        if not any(Path(self.out).iterdir()):
            Path(self.out).rmdir()

    def remove_work(self) -> None:
        """Remove `.pack`; without its plan, what a kill leaves of it is not mistaken for an unfinished packing."""
        (Path(self.out) / PLAN_NAME).unlink(missing_ok=True)
        shutil.rmtree(self.work)


@dataclass(frozen=True)
class BucketTarget:
    """A prefix of a bucket. Shards are written to a local folder first, one for each worker at a time.

    Packers on several machines may write to one bucket without a lock: they share the planning, the first plan that
    arrives is everyone's, and any process that writes a shard of it writes the same bytes.
    """

    out: str
    work_folder: str
    part: str = ""

    @property
    def work(self) -> Path:
        """A local folder of this target's own."""
        return Path(self.work_folder) / f"make-shards-{short_digest(self.out.rstrip('/').encode())}"

    @property
    def scratch(self) -> Path:
        """A folder of this part's own."""
        return self.work / f"scratch{self.part}"

    def begin(self, folders: list[str]) -> None:
        """Do nothing: objects need no folders."""

    def publish(self, files: Mapping[str, Path]) -> None:
        """Upload, then remove the local files."""
        for name, path in files.items():
            open_folder(self.out.rstrip("/")).put(name, path)
            path.unlink()

    def put(self, name: str, data: bytes) -> None:
        """Upload."""
        open_folder(self.out.rstrip("/")).put(name, data)

    def get(self, name: str) -> bytes | None:
        """Download."""
        try:
            return open_folder(self.out.rstrip("/")).read(name)
        except FileNotFoundError:
            return None

    def sizes(self) -> dict[str, int]:
        """List."""
        return dict(open_folder(self.out.rstrip("/")).objects())

    def address(self, name: str) -> str:
        """Return an address."""
        return f"{self.out.rstrip('/')}/{name}"

    def has(self, name: str) -> bool:
        """Ask for its size."""
        try:
            open_folder(self.out.rstrip("/")).size(name)
        except FileNotFoundError:
            return False
        return True

    def put_first(self, name: str, data: bytes) -> bool:
        """Upload, on the condition that there is none."""
        return open_folder(self.out.rstrip("/")).put(name, data, only_if_new=True)

    @contextmanager
    def sharing(self, name: str) -> Generator[Path]:
        """Upload each file."""
        aside = self.scratch / f"{name.rpartition('/')[2]}.{os.getpid()}"
        aside.mkdir()
        try:
            yield aside
            for path in sorted(aside.iterdir()):
                open_folder(self.out.rstrip("/")).put(f"{name}/{path.name}", path)
        finally:
            remove(aside)

    def claims(self) -> BucketClaims:
        """Return leases."""
        return BucketClaims(open_folder(self.out.rstrip("/")), _LEASES, self.work)

    def is_held(self) -> bool:
        """Look at the locks of this machine."""
        return _any_held(self.work)

    def leave(self) -> None:
        """Remove the local folder, unless others of this machine are at work."""
        shutil.rmtree(self.scratch, ignore_errors=True)
        # The last one to leave removes it; a process that begins meanwhile makes it again.
        gone = self.work.with_name(f"{self.work.name}.{os.getpid()}")
        with suppress(PackError, FileNotFoundError):
            with locked(self.work / "lock", holder=self.out):
                # At once, so that no one finds the lock taken.
                self.work.rename(gone)
            shutil.rmtree(gone)

    def discard(self) -> None:
        """Remove the leases, without which others do some work twice at most, and the local folder."""
        folder = open_folder(self.out.rstrip("/"))
        folder.delete([name for name in self.sizes() if name.startswith(f"{_LEASES}/")])
        shutil.rmtree(self.work)

    def remove_work(self) -> None:
        """Remove what is below `.pack`, its plan first, and the local folder."""
        folder = open_folder(self.out.rstrip("/"))
        folder.delete([PLAN_NAME])
        folder.delete([name for name in self.sizes() if name.startswith(f"{WORK_NAME}/")])
        shutil.rmtree(self.work, ignore_errors=True)


def _any_held(work: Path) -> bool:
    # Parts hold `lock` together, which others cannot see, and each a lock of its own.
    return any(is_locked(path) for path in work.glob("lock*"))


def open_target(out: str, *, work_folder: str, part: str = "") -> LocalTarget | BucketTarget:
    """Return the target that an --out names.

    Args:
        out: folder or URL.
        work_folder: local folder for what is unfinished, where the target is a bucket.
        part: of an array job.

    Raises:
        ValueError: a URL that cannot be written to, or that holds a secret.
    """
    if not is_url(out):
        return LocalTarget(out, part)
    check_url(out)
    if out.startswith("http"):
        raise ValueError(f"{out} cannot be written to: give a folder, or an s3:// gs:// az:// address")
    return BucketTarget(out, work_folder, part)
