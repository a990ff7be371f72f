"""State of a run, as facts in its folder tell it: the lock, the heartbeat and what it said last. Imports no torch."""

import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from moco_fast.config import Config, from_dict
from shards.ground.files import write_whole
from shards.ground.locks import is_locked

__all__ = [
    "BEAT_EVERY_S",
    "Beat",
    "RunState",
    "last_seen",
    "read_beat",
    "read_config",
    "read_json",
    "read_lines",
    "read_outcome",
    "read_warnings",
    "run_state",
    "write_beat",
]

RunState = Literal["running", "stopped", "finished", "failed", "killed"]

BEAT_EVERY_S = 30.0
"""Seconds between two heartbeats: 150 bytes, which no shared storage minds, and a dead node shows after two minutes."""
_MISSED_BEATS = 4


@dataclass(frozen=True, kw_only=True)
class Beat:
    """Sign of life of a run's first rank (heartbeat.json)."""

    time: float
    """Seconds since the epoch."""
    step: int
    """Optimizer steps done."""
    step_time: float
    """When the newest of them ended: a run may be alive and yet not go on."""
    host: str
    pid: int

    @classmethod
    def now(cls, *, step: int, step_time: float) -> "Beat":
        """Return that of this process."""
        return cls(time=time.time(), step=step, step_time=step_time, host=os.uname().nodename, pid=os.getpid())


def write_beat(folder: Path, beat: Beat) -> None:
    """Write heartbeat.json. Raises OSError: the folder is gone, or the disk is full."""
    write_whole(folder / "heartbeat.json", json.dumps(asdict(beat)) + "\n", durable=False)


def read_beat(folder: Path) -> Beat | None:
    """Return the newest sign of life; None: there is none that can be read."""
    try:
        return Beat(**json.loads((folder / "heartbeat.json").read_text()))
    except (OSError, ValueError, TypeError):
        return None


def run_state(folder: Path) -> RunState:
    """Return how a run stands; one that ended without a word, as after a kill or on a full disk, is `killed`.

    The kernel releases the lock when its owner ends, whatever ends it. Where another machine's locks are not seen, a
    heartbeat of the last two minutes counts.
    """
    try:
        held = is_locked(folder / "lock")
    except OSError:
        held = False
    if held:
        return "running"
    outcome = read_outcome(folder).get("outcome", "running")
    if outcome != "running":
        return outcome
    beat = read_beat(folder)
    if beat is None or beat.host == os.uname().nodename:
        return "killed"
    return "running" if time.time() - beat.time < _MISSED_BEATS * BEAT_EVERY_S else "killed"


def last_seen(folder: Path) -> float | None:
    """Return when a run last showed that it was alive, in seconds since the epoch; None: it never did."""
    outcome, beat = read_outcome(folder), read_beat(folder)
    # What a copy of the folder does to the files' times does not matter then.
    if "at" in outcome and outcome["outcome"] != "running":
        return outcome["at"]
    if beat is not None:
        return beat.time
    signs = [folder / name for name in ("metrics.jsonl", "outcome.json")]
    return max((sign.stat().st_mtime for sign in signs if sign.is_file()), default=None)


def read_outcome(folder: Path) -> dict[str, Any]:
    """Return what outcome.json holds; nothing where it is not there or damaged, for then the run has said nothing."""
    try:
        found = json.loads((folder / "outcome.json").read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) and isinstance(found.get("outcome"), str) else {}


def read_json(path: Path) -> dict[str, Any]:
    """Return the object of a JSON file; nothing where there is none. Raises ValueError: it is damaged."""
    try:
        found = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error}): restore it") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} is damaged (it holds no JSON object): restore it")
    return found


def read_config(path: Path) -> Config:
    """Return the configuration that a file holds. Raises ValueError: it is damaged, or of another version."""
    found = read_json(path)
    try:
        return from_dict(found)
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} holds no configuration that this version knows ({error}): restore it") from None


def read_lines(path: Path, *, needs: tuple[str, ...] = ("step",)) -> list[dict[str, Any]]:
    """Return the objects of a file of JSON lines, as metrics.jsonl; nothing where there is none.

    Lines that are no such objects are left out: a kill or a power cut leaves halves of lines, and zeros.

    Args:
        path: of the file.
        needs: names of numbers that every object has to have.

    Raises:
        ValueError: the file is there, but cannot be read.
    """
    try:
        text = path.read_text(errors="replace")
    except FileNotFoundError:
        return []
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror})") from None
    lines: list[dict[str, Any]] = []
    for each in text.splitlines():
        try:
            line = json.loads(each)
        except (ValueError, RecursionError):
            continue
        if isinstance(line, dict) and all(isinstance(line.get(name), int | float) for name in needs):
            lines.append(line)
    return lines


def read_warnings(folder: Path) -> list[dict[str, Any]]:
    """Return what a run was warned of: lines of warnings.jsonl with step, about and warning.

    Raises:
        ValueError: the file is there, but cannot be read.
    """
    lines = read_lines(folder / "warnings.jsonl")
    return [line for line in lines if isinstance(line.get("warning"), str) and isinstance(line.get("about"), str)]
