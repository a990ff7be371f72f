"""Folder of a run: locked by one run at a time, with its configuration and status."""

import json
import os
from pathlib import Path
from typing import IO, Any

from moco_fast.checkpoint import find_newest
from moco_fast.config import Config, differences, from_dict, to_dict
from shards.ground.errors import InUseError
from shards.ground.files import write_whole
from shards.ground.locks import take_lock

__all__ = ["RunFolder", "open_folder"]

# Options that may change between two starts of the same run: none of them affects what is trained.
_FREE = (
    "--run.out",
    "--run.device",
    "--run.timeout-s",
    "--data.num-threads",
    "--data.hw-decoder-load",
    "--data.prefetch",
    "--data.read-threads",
    "--data.cache",
    "--optim.published",
    "--eval.every-steps",
    "--checkpoint.",
    "--log.",
)


class RunFolder:
    """Folder of a run, locked against a second run for the lifetime of this object; held by the first rank."""

    def __init__(self, path: Path, lock: IO[bytes]):
        self.path = path
        self._lock = lock

    def write_config(self, config: Config) -> None:
        """Write config.json."""
        _write(self.path / "config.json", to_dict(config))

    def write_environment(self, facts: dict[str, Any]) -> None:
        """Write environment.json."""
        _write(self.path / "environment.json", facts)

    def write_outcome(self, outcome: str, **facts: Any) -> None:
        """Write the run's status: `running`, `finished`, `stopped` or `failed`."""
        _write(self.path / "outcome.json", {"outcome": outcome, **facts})

    def close(self) -> None:
        """Release the lock."""
        self._lock.close()


def open_folder(config: Config) -> RunFolder:
    """Create or reopen `config.run.out`.

    Raises:
        ValueError: another run uses the folder, it holds a run with other settings, or it cannot be written to.
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
        _refuse_other_settings(path, config)
    except ValueError:
        lock.close()
        raise
    return RunFolder(path, lock)


def _refuse_other_settings(path: Path, config: Config) -> None:
    # Without a checkpoint there is nothing to continue: the run starts from the beginning, with any settings.
    if find_newest(path / "checkpoints") is None or not (path / "config.json").exists():
        return
    before = from_dict(json.loads((path / "config.json").read_text()))
    changed = [line for line in differences(before, config) if not line.startswith(_FREE)]
    if changed:
        raise ValueError(
            f"--run.out {path} holds a run with other settings ({'; '.join(changed)}): use the same settings to "
            "continue it, or another folder"
        )


def _write(path: Path, content: dict[str, Any]) -> None:
    write_whole(path, json.dumps(content, indent=2) + "\n", durable=False)
