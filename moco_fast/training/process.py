"""What a process settles before torch is imported: how idle threads wait, and that it does not outlive its launcher."""

import ctypes
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

__all__ = ["prepare"]

_PR_SET_PDEATHSIG = 1


def prepare() -> None:
    """Call first in a command's main; needs nothing, and may be called again."""
    # Idle OpenMP threads spin by default: beside a loader, or on cores that others use too, a step then takes several
    # times as long. Read when torch loads its OpenMP.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if sys.platform == "linux" and is_launcher(_command_of(os.getppid())):
        _end_with_parent()


def is_launcher(command: Sequence[str]) -> bool:
    """Whether a command line is that of `accelerate launch`, as a script or as a module."""
    words = list(command[:3])
    return words[1:] == ["-m", "accelerate.commands.launch"] or any(
        Path(word).name == "accelerate" for word in words[:2]
    )


def _command_of(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().split("\0")
    except OSError:
        return []


def _end_with_parent() -> None:
    """Let the kernel send SIGTERM when the launcher dies: for one process, accelerate forwards no signal to it."""
    launcher = os.getppid()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != launcher:  # It died in between, and the kernel no longer tells.
        signal.raise_signal(signal.SIGTERM)
