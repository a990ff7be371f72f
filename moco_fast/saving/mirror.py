"""Mirror of a run in a bucket: its whole checkpoints, its configuration and its metrics.

    ADDRESS/id                                  of the run, as in RUN/mirror-id
    ADDRESS/owner                               of the start that writes here; an earlier one that still lives ends
    ADDRESS/checkpoints/step-00000100/...       the files of a checkpoint; state.json last, so that one with it is whole
    ADDRESS/checkpoints/best                    name of the best one
    ADDRESS/config.json, metrics.jsonl, ...     as in the run's folder

The run's folder on this machine stays the place that training reads and writes.
"""

import threading
import uuid
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from moco_fast import checkpoint
from moco_fast.config import CheckpointConfig
from shards.ground.errors import PackError
from shards.ground.files import appearing, write_whole
from shards.storage.stores import Folder, open_folder

__all__ = ["Mirror", "MirrorLostError", "look_into", "open_mirror"]

_STATE = "state.json"
_ID = "mirror-id"
_SMALL_FILES = (
    *("config.json", "environment.json", "branch.json", "outcome.json"),
    *("changes.jsonl", "metrics.jsonl", "starts.jsonl", "warnings.jsonl"),
)


class MirrorLostError(OSError):
    """Another start of the run writes to the mirror by now."""


def open_mirror(address: str, run: Path, config: CheckpointConfig) -> "Mirror":
    """Claim a mirror for a run's folder, and bring what that lacks: a newer checkpoint, configuration, metrics.

    Raises:
        ValueError: the mirror is another run's, or cannot be reached.
    """
    try:
        mirror = Mirror(address.rstrip("/"), run, config)
        mirror.claim()
        mirror.bring()
    except (PackError, OSError) as error:
        raise ValueError(f"--checkpoint.mirror {address} cannot be used: {error}") from None
    return mirror


def look_into(address: str, name: str) -> bytes | None:
    """Return a small file of a mirror, without claiming it.

    Returns:
        its content, empty if it is not there; None: the mirror has no checkpoint to go on from.

    Raises:
        ValueError: the mirror cannot be reached.
    """
    try:
        store = open_folder(address.rstrip("/"))
        if not any(found.startswith("checkpoints/") and found.endswith(f"/{_STATE}") for found, _ in store.objects()):
            return None
        return store.read(name)
    except FileNotFoundError:
        return b""
    except (PackError, OSError) as error:
        raise ValueError(f"--checkpoint.mirror {address} cannot be used: {error}") from None


class Mirror:
    """Mirror of one run, written by a thread; what comes while a checkpoint is uploaded waits, the newest first.

    An upload that fails is a warning: the next checkpoint tries again. Only the first rank has one.

    Args:
        address: of the mirror.
        run: the run's folder.
        config: what is kept.
    """

    def __init__(self, address: str, run: Path, config: CheckpointConfig) -> None:
        self._address, self._run, self._config = address, run, config
        self._store: Folder = open_folder(address)
        self._token = uuid.uuid4().hex
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="mirror")
        self._lock = threading.Lock()
        self.uploading: Future[None] | None = None
        """The last uploads, under way or done."""
        self._is_offered = False
        self._read: str | None = None
        self._warnings: list[str] = []
        self._error: str | None = None
        self.lost: OSError | None = None
        """Why the run has to end; None: it need not."""

    def claim(self) -> None:
        """Make this start the one that writes. Raises ValueError: the mirror holds another run; PackError."""
        here = self._run / _ID
        own = here.read_text().strip() if here.exists() else None
        there = self._get("id")
        has_run = checkpoint.find_newest(self._checkpoints) is not None
        if there is not None and (own != there.decode() if own is not None else has_run):
            raise ValueError(
                f"--checkpoint.mirror {self._address} holds another run than {self._run}: choose another address, or "
                "an empty --run.out to go on from the mirror"
            )
        own = own or (there.decode() if there is not None else uuid.uuid4().hex)
        write_whole(here, own, durable=True)
        if there is None and not self._store.put("id", own.encode(), only_if_new=True):
            raise ValueError(f"--checkpoint.mirror {self._address} is being claimed by another run: choose another one")
        self._store.put("owner", self._token.encode())

    def bring(self) -> None:
        """Download the newest and the best checkpoint, configuration and metrics, if the mirror is ahead."""
        there = self._whole_there()
        here = checkpoint.find_newest(self._checkpoints)
        if not there or (here is not None and here.name >= max(there)):
            return
        best = (self._get("checkpoints/best") or b"").decode()
        for name in sorted({max(there), best} & there.keys()):
            self._download(name, there[name])
        if best in there:
            checkpoint.link_best(self._checkpoints, best)
        for name in _SMALL_FILES:
            if (content := self._get(name)) is not None:
                write_whole(self._run / name, content, durable=True)

    def offer(self) -> None:
        """Upload what the folder has and the mirror lacks, as soon as the upload before is done."""
        with self._lock:
            self._is_offered = True
            if self.uploading is None or self.uploading.done():
                self.uploading = self._pool.submit(self._upload_all)

    def being_read(self) -> tuple[str, ...]:
        """Return the names of checkpoints that must not be removed now."""
        read = self._read
        return () if read is None else (read,)

    def take_warnings(self) -> list[str]:
        """Return, once, what went wrong."""
        taken, self._warnings = self._warnings, []
        return taken

    def wait(self) -> None:
        """Wait for what was offered; `lost` says afterwards if it is not all in the mirror."""
        with self._lock:
            uploading = self.uploading
        if uploading is not None:
            uploading.exception()
        if self._error is not None and self.lost is None:
            self.lost = OSError(f"the last checkpoint is in {self._checkpoints}, but not in the mirror: {self._error}")

    def finish(self) -> None:
        """Upload the small files once more, with the run's outcome. Raises PackError."""
        self._upload_small_files()

    def close(self) -> None:
        """End the thread once it is done."""
        self._pool.shutdown(wait=True)

    @property
    def _checkpoints(self) -> Path:
        return self._run / "checkpoints"

    def _upload_all(self) -> None:
        while True:
            with self._lock:
                if not self._is_offered:
                    return
                self._is_offered = False
            try:
                self._upload_missing()
                self._error = None
            except MirrorLostError as error:
                self.lost = error
                return
            except (PackError, OSError) as error:
                self._error = str(error)
                self._warnings.append(f"mirror: {error}; the next checkpoint tries again")
            except Exception as error:
                self.lost = OSError(f"the mirror failed: {type(error).__name__}: {error}")
                return

    def _upload_missing(self) -> None:
        there = self._whole_there()
        config = self._config
        best = checkpoint.best_step(self._checkpoints)
        here = {int(path.name.removeprefix("step-")): path for path in self._checkpoints.glob("step-*")}
        needless = set(checkpoint.superfluous([*here], keep=config.keep, keep_every=config.keep_every)) - {best}
        for step in sorted(here.keys() - needless, reverse=True):
            if here[step].name not in there:
                self._upload(here[step])
        if best is not None:
            self._put("checkpoints/best", here[best].name.encode())
        self._upload_small_files()
        self._prune(best)

    def _upload(self, path: Path) -> None:
        self._read = path.name
        try:
            # The state is what makes it whole.
            for file in sorted(path.iterdir(), key=lambda file: file.name == _STATE):
                self._put(f"checkpoints/{path.name}/{file.name}", file)
        except FileNotFoundError:
            if path.exists():
                raise  # It was removed to make room for newer ones, which are uploaded in its place.
        finally:
            self._read = None

    def _upload_small_files(self) -> None:
        for name in _SMALL_FILES:
            if (self._run / name).exists():
                self._put(name, (self._run / name).read_bytes())

    def _prune(self, best: int | None) -> None:
        there, config = self._there(), self._config
        steps = [int(name.removeprefix("step-")) for name, files in there.items() if _STATE in files]
        needless = set(checkpoint.superfluous(steps, keep=config.keep, keep_every=config.keep_every)) - {best}
        for name, files in there.items():
            if int(name.removeprefix("step-")) in needless or _STATE not in files:
                # The state first: what is left by a kill is not taken for a whole one.
                for file in sorted(files, key=lambda file: file != _STATE):
                    self._store.delete([f"checkpoints/{name}/{file}"])

    def _put(self, name: str, data: bytes | Path) -> None:
        """Write an object. Raises MirrorLostError: another start writes here; PackError."""
        if (owner := self._get("owner")) != self._token.encode():
            raise MirrorLostError(
                f"another start of this run writes to {self._address}" + ("" if owner else ", or its owner was removed")
            )
        self._store.put(name, data)

    def _get(self, name: str) -> bytes | None:
        try:
            return self._store.read(name)
        except FileNotFoundError:
            return None

    def _there(self) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for name, _ in self._store.objects():
            folder, _, rest = name.partition("/")
            step, _, file = rest.partition("/")
            if folder == "checkpoints" and file:
                found.setdefault(step, []).append(file)
        return found

    def _whole_there(self) -> dict[str, list[str]]:
        return {name: files for name, files in self._there().items() if _STATE in files}

    def _download(self, name: str, files: list[str]) -> None:
        final = self._checkpoints / name
        if final.exists():
            return
        with appearing(final, durable=True) as aside:
            aside.mkdir(parents=True)
            for file in files:
                self._store.download(f"checkpoints/{name}/{file}", aside / file)
            checkpoint.load(aside)
