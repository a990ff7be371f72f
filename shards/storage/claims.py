"""Claims: who of several processes, perhaps on several machines, does a piece of work that is to be done once.

A claim saves work; it does not protect it. A holder that is silent for too long may lose its claim and go on without
knowing, so two may do the same: what they make must not mix, and the first that is there counts.
"""

import json
import threading
import time
import uuid
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Protocol

from shards.ground.errors import InUseError, PackError
from shards.ground.locks import locked
from shards.storage.stores import Folder

__all__ = ["BucketClaims", "Claims", "LocalClaims"]

RENEW_S = 10.0
EXPIRED_S = 60.0
_FREE = b"free"


class Claims(Protocol):
    """Gives claims by name."""

    def hold(self, name: str) -> AbstractContextManager[bool]:
        """Hold a claim; gives False, at once, where someone else holds it."""
        ...


class LocalClaims:
    """Claims by lock files, which the kernel releases when their holder ends.

    Args:
        folder: for the lock files, on a file system whose locks work across the machines that pack to it.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @contextmanager
    def hold(self, name: str) -> Generator[bool]:
        """Hold a claim."""
        with ExitStack() as stack:
            is_ours = True
            try:
                stack.enter_context(locked(self._folder / f"lock-{name}", holder=name))
            except InUseError:
                is_ours = False
            yield is_ours


class BucketClaims:
    """Claims by leases: objects that only the first one can create, and that their holder writes again and again.

        .pack/leases/NAME-000001    who holds it, and a number that grows; or `free`

    Who finds a lease free, or unchanged for a minute by its own clock, creates the one of the next number. On one
    machine a lock file beside it tells at once that a holder is dead.

    Args:
        folder: the bucket's prefix.
        place: below it, for the leases.
        work: local folder, one per machine and target.
        renew_s: seconds between two signs of life.
        expired_s: seconds without one after which a claim is lost.
        clock: gives seconds.
    """

    def __init__(
        self,
        folder: Folder,
        place: str,
        work: Path,
        *,
        renew_s: float | None = None,
        expired_s: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._folder = folder
        self._place = place
        self._local = LocalClaims(work)
        self._owner = _owner_of(work)
        self._renew_s = RENEW_S if renew_s is None else renew_s
        self._expired_s = EXPIRED_S if expired_s is None else expired_s
        self._clock = clock
        self._seen: dict[str, tuple[bytes, float]] = {}
        """What leases of others held when they were last seen to change, and when that was."""

    @contextmanager
    def hold(self, name: str) -> Generator[bool]:
        """Hold a claim."""
        with self._local.hold(name) as is_ours_here:
            lease = self._take(name) if is_ours_here else None
            if lease is None:
                yield False
                return
            stop = threading.Event()
            thread = threading.Thread(target=self._renew, args=(lease, stop), daemon=True)
            thread.start()
            try:
                yield True
            finally:
                stop.set()
                thread.join()
                # If this does not arrive, the lease expires.
                with suppress(PackError):
                    self._folder.put(lease, _FREE)

    def _take(self, name: str) -> str | None:
        """Create the next lease and return its name; None where someone holds one."""
        number, found = 0, b""
        while (data := self._get(self._name(name, number + 1))) is not None:
            number, found = number + 1, data
        lease = self._name(name, number)
        if number and found != _FREE and not self._is_dead(lease, found):
            return None
        lease = self._name(name, number + 1)
        return lease if self._folder.put(lease, self._sign(0), only_if_new=True) else None

    def _is_dead(self, lease: str, data: bytes) -> bool:
        # We hold the lock of this machine: its last holder does not.
        if json.loads(data)["owner"] == self._owner:
            return True
        now = self._clock()
        before, since = self._seen.get(lease, (b"", now))
        if before != data:
            self._seen[lease] = data, now
            return False
        return now - since >= self._expired_s

    def _renew(self, lease: str, stop: threading.Event) -> None:
        count = 0
        while not stop.wait(self._renew_s):
            count += 1
            # The next one may arrive.
            with suppress(PackError):
                self._folder.put(lease, self._sign(count))

    def _sign(self, count: int) -> bytes:
        return json.dumps({"owner": self._owner, "count": count}).encode()

    def _name(self, name: str, number: int) -> str:
        return f"{self._place}/{name}-{number:06d}"

    def _get(self, name: str) -> bytes | None:
        try:
            return self._folder.read(name)
        except FileNotFoundError:
            return None


def _owner_of(work: Path) -> str:
    """Return what names the holders on this machine."""
    path = work / "owner"
    with locked(work / "lock-owner", holder="the name of this machine", wait=True):
        if not path.exists():
            path.write_text(uuid.uuid4().hex, encoding="ascii")
        return path.read_text(encoding="ascii")
