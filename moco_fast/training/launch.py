"""Launch of a run as it was: the launcher's command, its configuration, the variables that decide the world."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moco_fast.training.process import command_of, is_launcher

__all__ = ["launch_facts"]

_PREFIXES = ("ACCELERATE_", "NCCL_", "GLOO_", "TORCH_NCCL_")
_NAMES = ("CUDA_VISIBLE_DEVICES", "MASTER_ADDR", "OMP_NUM_THREADS", "SLURM_JOB_ID", "SLURM_JOB_NODELIST")
_MAX_CONFIG_BYTES = 10_000


def launch_facts(env: Mapping[str, str] = os.environ) -> dict[str, Any]:
    """Return what started this process, as values that JSON can hold.

    `command`: the launcher's words, with ours at their end; None if this process was started by hand. `config_file` and
    `config`: accelerate's file and its text. `variables`: those that accelerate, NCCL and Slurm set or read.
    `folder`: the working directory, which relative paths are relative to.
    """
    parent = command_of(os.getppid())
    command = parent if is_launcher(parent) else None
    file = None if command is None else _config_file(command, env)
    return {
        "command": command,
        "folder": str(Path.cwd()),
        "config_file": None if file is None else str(file),
        "config": None if file is None else _text(file),
        "variables": {name: env[name] for name in sorted(env) if name in _NAMES or name.startswith(_PREFIXES)},
    }


def _config_file(command: Sequence[str], env: Mapping[str, str]) -> Path | None:
    """Return the file that the launcher read: the one that it was given, or accelerate's own default."""
    for place, word in enumerate(command):
        name, is_joined, value = word.partition("=")
        if name in ("--config_file", "--config-file"):
            return Path(value if is_joined else command[place + 1]) if is_joined or place + 1 < len(command) else None
        if word == "-m":
            break  # What follows is the program's.
    # accelerate/commands/config/config_args.py, 1.15.
    home = env.get("HF_HOME") or Path(env.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "huggingface"
    defaults = [Path(home) / "accelerate" / f"default_config.{suffix}" for suffix in ("yaml", "json")]
    return next((file for file in defaults if file.is_file()), None)


def _text(file: Path) -> str | None:
    try:
        return file.read_bytes()[:_MAX_CONFIG_BYTES].decode(errors="replace")
    except OSError:
        return None
