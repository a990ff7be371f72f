"""Folder of a run: locked by one run at a time, with its configuration and status."""

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from moco_fast.checkpoint import find_newest, read_config, read_numbers
from moco_fast.config import Config, from_dict, to_dict
from moco_fast.saving.mirror import Mirror, open_mirror
from moco_fast.training.branching import Branch
from moco_fast.training.continuing import Changes, allowing, compare
from moco_fast.training.state import last_seen
from shards.ground.errors import InUseError
from shards.ground.files import write_whole
from shards.ground.locks import take_lock

__all__ = ["RunFolder", "open_folder"]


class RunFolder:
    """Folder of a run, locked against a second run for the lifetime of this object; held by the first rank."""

    def __init__(self, path: Path, lock: IO[bytes], changes: Changes | None, mirror: Mirror | None = None):
        self.path = path
        self.mirror = mirror
        self.changes = changes
        """What differs from the last start; None: nothing was trained yet."""
        self._lock = lock

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

    def write_outcome(self, outcome: str, **facts: Any) -> None:
        """Write the run's status: `running`, `finished`, `stopped` or `failed`."""
        _write(self.path / "outcome.json", {"outcome": outcome, "at": time.time(), **facts})

    def close(self) -> None:
        """Release the lock."""
        self._lock.close()


def open_folder(config: Config, data: Mapping[str, Mapping[str, Any]], branch: Branch | None = None) -> RunFolder:
    """Create or reopen `config.run.out`.

    Args:
        config: of the run.
        data: what its sets hold (`identity_of`).
        branch: what a new run begins with.

    Raises:
        ValueError: another run uses the folder, it holds a run with other settings or samples, or it cannot be written
            to.
    """
    path = Path(config.run.out)
    try:
        (path / "checkpoints").mkdir(parents=True, exist_ok=True)
        lock = os.fdopen(take_lock(path / "lock", holder=f"--run.out {path}"), "wb")
    except InUseError:
        raise ValueError(f"--run.out {path} is in use by another run: wait for it or choose another folder") from None
    except OSError as error:
        raise ValueError(f"--run.out {path} cannot be used: {error.strerror}") from None
    try:
        address = config.checkpoint.mirror
        mirror = None if address is None else open_mirror(address, path, config.checkpoint)
        if branch is not None and find_newest(path / "checkpoints") is None:
            branch.copy_into(path)
        changes = _changes(path, config, data)
    except ValueError:
        lock.close()
        raise
    return RunFolder(path, lock, changes, mirror)


def _changes(path: Path, config: Config, data: Mapping[str, Mapping[str, Any]]) -> Changes | None:
    # Without a checkpoint there is nothing to continue: the run starts from the beginning, with any settings.
    newest = find_newest(path / "checkpoints")
    if newest is None:
        return None
    own = path / "config.json"
    before = from_dict(json.loads(own.read_text())) if own.exists() else read_config(newest)
    found = compare(before, config, read_numbers(newest).get("data", {}), data)
    if found.refused:
        raise ValueError(
            f"--run.out {path} holds a run with other settings ({'; '.join(found.refused)}): use the same settings to "
            f"continue it, another folder, or {allowing(found.refused)}"
        )
    return found


def _write(path: Path, content: dict[str, Any], *, durable: bool = False) -> None:
    write_whole(path, json.dumps(content, indent=2) + "\n", durable=durable)
