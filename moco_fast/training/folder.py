"""Folder of a run: locked by one run at a time, with its configuration and status."""

import json
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from moco_fast import recovery
from moco_fast.config import Config, from_dict, to_dict
from moco_fast.recovery import FoundCheckpoints
from moco_fast.saving.mirror import Mirror, open_mirror
from moco_fast.training.branching import Branch
from moco_fast.training.continuing import Changes, allowing, compare
from moco_fast.training.heartbeat import Heartbeat
from moco_fast.training.state import RunState, last_seen, read_config
from shards.ground.errors import InUseError
from shards.ground.files import write_whole
from shards.ground.locks import is_locked, take_lock

__all__ = ["RunFolder", "open_folder"]


class RunFolder:
    """Folder of a run, locked against a second run for the lifetime of this object; held by the first rank."""

    def __init__(
        self,
        path: Path,
        lock: IO[bytes],
        found: FoundCheckpoints,
        changes: Changes | None,
        mirror: Mirror | None = None,
    ):
        self.path = path
        self.mirror = mirror
        self.found = found
        """Its checkpoints."""
        self.changes = changes
        """What differs from the last start; None: nothing was trained yet."""
        self.heartbeat = Heartbeat(path, lock.fileno())
        self._lock = lock
        self._has_begun = False

    def write_config(self, config: Config) -> None:
        """Write config.json, which decides whether the run may go on: it is synced."""
        _write(self.path / "config.json", to_dict(config), durable=True)

    def write_environment(self, facts: dict[str, Any]) -> None:
        """Write environment.json."""
        _write(self.path / "environment.json", facts)

    def note_changes(self, step: int) -> None:
        """Add what differs from the last start, if anything does, to changes.jsonl."""
        found = self.changes
        if found is None or not (found.allowed or found.noted):
            return
        with (self.path / "changes.jsonl").open("a") as file:
            file.write(json.dumps({"step": step, "allowed": found.allowed, "noted": found.noted}) + "\n")

    def note_start(self, step: int, time_s: float, facts: Mapping[str, Any]) -> None:
        """Add this start to starts.jsonl: from which step on, when, and when the one before was last seen alive."""
        line = {"step": step, "time_s": time_s, "at": time.time(), "before_seen": last_seen(self.path), **facts}
        with (self.path / "starts.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")

    def begin(self, step: int) -> None:
        """Say that the run goes on from a step, now and with every heartbeat."""
        self._has_begun = True
        self._write_outcome({"outcome": "running"})
        self.heartbeat.start(step)

    def end(self, outcome: RunState, **facts: Any) -> None:
        """Write how the run ended: `finished` or `stopped`. Raises OSError."""
        self._write_outcome({"outcome": outcome, **facts})

    def note_failure(self, error: BaseException) -> None:
        """Write that the run failed, if that can be written; a start that was refused leaves what was said before."""
        if not self._has_begun and isinstance(error, ValueError):
            return
        if not self.heartbeat.look():
            facts = {"outcome": "failed", "error": f"{type(error).__name__}: {error}", "step": self.heartbeat.step}
            with suppress(OSError):
                self._write_outcome(facts)

    def close(self) -> None:
        """Release the lock."""
        self.heartbeat.close()
        self._lock.close()

    def _write_outcome(self, facts: Mapping[str, Any]) -> None:
        _write(self.path / "outcome.json", {**facts, "at": time.time()})


def open_folder(config: Config, data: Mapping[str, Mapping[str, Any]], branch: Branch | None = None) -> RunFolder:
    """Create or reopen `config.run.out`.

    Args:
        config: of the run.
        data: what its sets hold (`identity_of`).
        branch: what a new run begins with.

    Raises:
        ValueError: another run uses the folder, it holds a run with other settings or samples, none of its checkpoints
            is whole, or it cannot be written to.
    """
    path = Path(config.run.out)
    try:
        (path / "checkpoints").mkdir(parents=True, exist_ok=True)
        lock = os.fdopen(_take_lock(path / "lock"), "wb")
    except InUseError:
        raise ValueError(f"--run.out {path} is in use by another run: wait for it or choose another folder") from None
    except OSError as error:
        raise ValueError(f"--run.out {path} cannot be used: {error.strerror}") from None
    try:
        address = config.checkpoint.mirror
        mirror = None if address is None else open_mirror(address, path, config.checkpoint)
        if branch is not None and not recovery.candidates(path / "checkpoints"):
            branch.copy_into(path)
        found = recovery.find_whole(path / "checkpoints")
        changes = _changes(path, config, found, data)
        for damaged, _ in found.damaged:
            recovery.set_aside(damaged)
    except BaseException:
        lock.close()
        raise
    return RunFolder(path, lock, found, changes, mirror)


def _take_lock(path: Path) -> int:
    while True:
        try:
            return take_lock(path, holder=f"--run.out {path.parent}")
        except InUseError:
            if is_locked(path):
                raise
            # Whoever asked for the run's state held it, for an instant.


def _changes(
    path: Path, config: Config, found: FoundCheckpoints, data: Mapping[str, Mapping[str, Any]]
) -> Changes | None:
    # Without a checkpoint there is nothing to continue: the run starts from the beginning, with any settings.
    if found.newest is None:
        return None
    state = recovery.read_state(found.newest)
    try:
        # It also tells of changes since the checkpoint; a power cut may have left it empty.
        before = read_config(path / "config.json")
    except ValueError:
        before = from_dict(state["config"])
    changed = compare(before, config, state["numbers"].get("data", {}), data)
    if changed.refused:
        raise ValueError(
            f"--run.out {path} holds a run with other settings ({'; '.join(changed.refused)}): use the same settings "
            f"to continue it, another folder, or {allowing(changed.refused)}"
        )
    return changed


def _write(path: Path, content: dict[str, Any], *, durable: bool = False) -> None:
    write_whole(path, json.dumps(content, indent=2) + "\n", durable=durable)
