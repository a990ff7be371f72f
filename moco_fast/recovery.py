"""Checkpoints, judged: which of them are whole, and the newest of these. Imports no torch.

A checkpoint folder may have been left in any state by hand or by a file system. It is whole if its name is that of the
step that its state.json was written for, and state.json and all files that this lists are what was written.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shards.ground.digests import digest, digest_file
from shards.ground.files import aside_of, remove

__all__ = [
    "VERSION",
    "FoundCheckpoints",
    "candidates",
    "digest_of",
    "find_whole",
    "fingerprint",
    "read_state",
    "set_aside",
    "verify",
]

VERSION = 1
_NAME = re.compile(r"step-(\d{8,})")


@dataclass(frozen=True, kw_only=True)
class FoundCheckpoints:
    """What a run's `checkpoints` folder holds."""

    newest: Path | None = None
    """Newest whole checkpoint; None: there is no checkpoint at all."""
    damaged: tuple[tuple[Path, str], ...] = ()
    """Those after it, which are not whole, and why, newest first."""

    @property
    def warnings(self) -> list[str]:
        """Say what is damaged, and what is used instead; nothing if nothing is."""
        if self.newest is None:
            return []
        return [f"warning: {reason}; going on from {self.newest.name}" for _, reason in self.damaged]


def candidates(folder: Path) -> list[Path]:
    """Return what has the name of a checkpoint, by step; `step-00000020 (copy)` has not.

    Raises:
        ValueError: the folder cannot be read.
    """
    try:
        named = [path for path in folder.iterdir() if _NAME.fullmatch(path.name)]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise ValueError(f"{folder} cannot be read ({error.strerror}): make it readable") from None
    return sorted(named, key=lambda path: _step_of(path.name))


def find_whole(folder: Path) -> FoundCheckpoints:
    """Find the newest whole checkpoint; reads all of it, and all of those after it.

    Raises:
        ValueError: there are checkpoints, but none is whole.
    """
    damaged: list[tuple[Path, str]] = []
    for path in reversed(candidates(folder)):
        try:
            verify(path)
        except ValueError as error:
            damaged.append((path, str(error)))
        else:
            return FoundCheckpoints(newest=path, damaged=tuple(damaged))
    if damaged:
        raise ValueError(
            f"no checkpoint in {folder} is whole ({damaged[0][1]}): restore one, or remove all of them to begin again"
        )
    return FoundCheckpoints()


def set_aside(path: Path) -> Path:
    """Give a damaged checkpoint a name that no checkpoint has, in place of what had it. Raises OSError."""
    aside = path.with_name(f"damaged-{path.name}")
    if aside.is_symlink() or aside.exists():
        # Its files go one by one: a kill in between leaves what the next start removes.
        remove(aside.rename(aside_of(path)))
    return path.rename(aside)


def verify(path: Path) -> dict[str, Any]:
    """Read all of a checkpoint folder and compare it with what was written; return its state.json.

    Raises:
        ValueError: it is not whole; the message names the file.
    """
    return _check(path, fingerprint)


def seems_whole(path: Path) -> bool:
    """Whether a checkpoint folder has its files in their sizes: whole, unless a byte of its tensors has changed."""
    try:
        _check(path, lambda file: {"bytes": file.stat().st_size})
    except ValueError:
        return False
    return True


def _check(path: Path, known_by: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
    state = read_state(path)
    if _NAME.fullmatch(path.name) and _step_of(path.name) != state["step"]:
        raise ValueError(f"{path}/state.json is of step {state['step']}, so this is a copy of another checkpoint")
    for name, written in state["files"].items():
        file = path / name
        try:
            found = known_by(file)
        except FileNotFoundError:
            raise ValueError(f"{file} is missing, so the checkpoint cannot be used") from None
        except OSError as error:
            raise ValueError(f"{file} cannot be read ({error.strerror})") from None
        if found != {key: written[key] for key in found}:
            raise ValueError(f"{file} is not what was written (its {' and '.join(found)} differ)")
    return state


def read_state(path: Path) -> dict[str, Any]:
    """Return a checkpoint's state.json without its digest, which is checked. Raises ValueError: it is damaged."""
    file = path / "state.json"
    try:
        state = json.loads(file.read_text())
        if state["version"] != VERSION:
            raise ValueError(f"{path} was written in format {state['version']}, but this version reads {VERSION}")
        is_written = state.pop("digest") == digest_of(state)
    except FileNotFoundError:
        raise ValueError(f"{file} is missing, so the checkpoint cannot be used") from None
    except OSError as error:
        raise ValueError(f"{file} cannot be read ({error.strerror})") from None
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{file} is not what was written ({error})") from None
    if not is_written:
        raise ValueError(f"{file} is not what was written (its digest differs)")
    return state


def digest_of(state: dict[str, Any]) -> str:
    """Return the digest of a state.json, without it."""
    return digest(json.dumps(state, sort_keys=True).encode())


def fingerprint(path: Path) -> dict[str, Any]:
    """Return what a file's bytes are known again by."""
    return {"bytes": path.stat().st_size, "xxh3_128": digest_file(path)}


def _step_of(name: str) -> int:
    return int(name.removeprefix("step-"))
