"""Targets of packing: a folder or a bucket. In either, a file is there whole or not at all."""

import os
import shutil
import uuid
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from shards.ground.digests import short_digest
from shards.ground.errors import PackError
from shards.ground.files import publish, sync, write_whole
from shards.ground.locks import is_locked
from shards.storage.stores import check_url, is_url, open_folder

__all__ = ["WORK_NAME", "Target", "open_target", "path_in"]

WORK_NAME = ".pack"
_PLAN_HEADER = "plan.json"


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
        """Local folder for the plan, the lock, and files that are being written."""
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

    def share_plan(self, plan: Path) -> None:
        """Let other machines have a plan; afterwards the folder `plan` holds the one that all follow."""
        ...

    def plan_place(self) -> str | None:
        """Return the folder of the plan, as a name; None: no packing was begun, or it is finished."""
        ...

    def has_plan(self) -> bool:
        """Return whether a packing was begun and not finished."""
        ...

    def is_held(self) -> bool:
        """Return whether a packer of this machine is at work here, as far as one can see."""
        ...

    def fetch_plan(self, plan: Path) -> None:
        """Bring the plan that is being followed to the folder `plan`."""
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

    def share_plan(self, plan: Path) -> None:
        """Do nothing but check: a process that sees the folder has the plan."""
        assert plan.is_relative_to(self.work)

    def plan_place(self) -> str | None:
        """Look for plan.json."""
        return f"{WORK_NAME}/plan" if (self.work / "plan" / _PLAN_HEADER).exists() else None

    def has_plan(self) -> bool:
        """Look for plan.json."""
        return self.plan_place() is not None

    def is_held(self) -> bool:
        """Look at the locks."""
        return _any_held(self.work)

    def fetch_plan(self, plan: Path) -> None:
        """Do nothing: the plan is there."""

    def remove_work(self) -> None:
        """Remove `.pack`; without its plan, what a kill leaves of it is not mistaken for an unfinished packing."""
        (self.work / "plan" / _PLAN_HEADER).unlink(missing_ok=True)
        shutil.rmtree(self.work)


@dataclass(frozen=True)
class BucketTarget:
    """A prefix of a bucket. Shards are written to a local folder first, one for each worker at a time.

    Packers on several machines may write to one bucket without a lock: the first plan that arrives is everyone's, and
    any process that writes a shard of it writes the same bytes.
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

    def share_plan(self, plan: Path) -> None:
        """Upload it, unless someone else was faster; plan.json goes last, and only if there is none."""
        folder = open_folder(self.out.rstrip("/"))
        # Other machines may be uploading another plan: its files must not mix with ours.
        header = (plan / _PLAN_HEADER).read_bytes()
        prefix = f"{WORK_NAME}/plan-{short_digest(header)}"
        for path in sorted(plan.iterdir()):
            folder.put(f"{prefix}/{path.name}", path)
        if not folder.put(f"{WORK_NAME}/{_PLAN_HEADER}", prefix.encode(), only_if_new=True):
            self.fetch_plan(plan)

    def plan_place(self) -> str | None:
        """Read the plan's name."""
        place = self.get(f"{WORK_NAME}/{_PLAN_HEADER}")
        return None if place is None else place.decode()

    def has_plan(self) -> bool:
        """Look for the plan's name."""
        return self.plan_place() is not None

    def is_held(self) -> bool:
        """Look at the locks of this machine."""
        return _any_held(self.work)

    def fetch_plan(self, plan: Path) -> None:
        """Download it, unless it is here already."""
        folder = open_folder(self.out.rstrip("/"))
        prefix = self.plan_place() or ""
        wanted = self.get(f"{prefix}/{_PLAN_HEADER}")
        if wanted is None:
            raise PackError(f"{self.out}/{prefix} has no {_PLAN_HEADER}: remove {self.out}/{WORK_NAME} and pack again")
        header = plan / _PLAN_HEADER
        if header.exists() and header.read_bytes() == wanted:
            return
        shutil.rmtree(plan, ignore_errors=True)
        plan.mkdir(parents=True)
        names = [name for name in self.sizes() if name.startswith(f"{prefix}/")]
        # plan.json last: a folder without it is fetched again.
        for name in sorted(names, key=lambda name: name.endswith(_PLAN_HEADER)):
            folder.download(name, plan / name.rpartition("/")[2])
        sync(plan)

    def remove_work(self) -> None:
        """Remove what is below `.pack`, its plan first, and the local folder."""
        folder = open_folder(self.out.rstrip("/"))
        folder.delete([f"{WORK_NAME}/{_PLAN_HEADER}"])
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
