"""Process settings made before torch is imported: idle threads sleep, and a process does not outlive its launcher."""

import ctypes
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

__all__ = ["NotMetError", "command_of", "is_launcher", "prepare"]

_PR_SET_PDEATHSIG = 1


class NotMetError(ValueError):
    """What a rank raises that did not find the others; each says so itself, for none can say it for another."""


def prepare() -> None:
    """Apply the settings; call this first in a command's main. Calling it again is harmless."""
    # Idle OpenMP threads spin by default: beside a loader, or on cores shared with others, a step then takes several
    # times as long. OpenMP reads the variable when torch loads it.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if sys.platform == "linux" and is_launcher(command_of(os.getppid())):
        _end_with_parent()


def is_launcher(command: Sequence[str]) -> bool:
    """Return whether a command line is that of `accelerate launch`, as a script or as a module."""
    words = list(command[:3])
    return words[1:] == ["-m", "accelerate.commands.launch"] or any(
        Path(word).name == "accelerate" for word in words[:2]
    )


def command_of(pid: int) -> list[str]:
    """Return the command line of a process; empty if it cannot be read."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_text(errors="replace").removesuffix("\0").split("\0")
    except OSError:
        return []


def _end_with_parent() -> None:
    """Make the kernel send SIGTERM when the launcher dies: accelerate does not forward signals to a single process."""
    launcher = os.getppid()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != launcher:  # It died before the call, so the kernel sends nothing.
        signal.raise_signal(signal.SIGTERM)
