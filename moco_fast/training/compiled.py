"""Compiled code that outlives a start: where torch.compile's inductor keeps what it and Triton make."""

import os
import platform
from collections.abc import MutableMapping
from pathlib import Path

from shards.ground.digests import short_digest
from shards.ground.files import cache_folder

__all__ = ["keep_compiled"]

_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"
_OTHERWISE = f"{_VARIABLE} can name another folder"
_OF_A_CPU = ("model name", "flags", "CPU implementer", "CPU part", "Features")


def keep_compiled(env: MutableMapping[str, str], *, cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """Let inductor keep what it compiles where the next start finds it; call this before it compiles.

    Its own choice is among the machine's temporary files (torch 2.15, _inductor/runtime/cache_dir_utils.py), which
    schedulers remove after a job, and containers at each start. Kinds of CPUs have folders of their own, since machines
    may share a home: inductor compiles with -march=native, and its keys do not say what that was (cpp_builder.py).

    Args:
        env: the environment, which is changed unless it names a folder already.
        cpuinfo: what the kernel says of the CPUs.

    Returns:
        the folder, or why nothing is kept over starts.
    """
    if _VARIABLE in env:
        return env[_VARIABLE]
    folder = cache_folder("compiled", env) / _cpu(cpuinfo)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        return f"not kept, since {folder} cannot be made ({error.strerror}); {_OTHERWISE}"
    if not os.access(folder, os.W_OK | os.X_OK):
        return f"not kept, since {folder} cannot be written to; {_OTHERWISE}"
    env[_VARIABLE] = str(folder)
    return env[_VARIABLE]


def _cpu(cpuinfo: Path) -> str:
    """Return a name for the kind of this machine's CPUs, by what the compiler looks at."""
    try:
        lines = cpuinfo.read_text().splitlines()
    except OSError:
        lines = []
    told = sorted({line for line in lines if line.partition(":")[0].strip() in _OF_A_CPU})
    return f"{platform.machine()}-{short_digest(chr(10).join(told).encode())}"
