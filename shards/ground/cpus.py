"""CPUs that this process really has: affinity, cgroup limits, and the ranks that share the machine."""

import os
from pathlib import Path

__all__ = ["available_cpus", "parse_cpus"]

_CGROUP = Path("/sys/fs/cgroup")


def available_cpus(local_world_size: int = 1, *, cgroup: Path = _CGROUP) -> int:
    """Return CPUs for one of `local_world_size` ranks on this machine: at least 1.

    The machine's share of a rank is bounded by its affinity, which a launcher may have narrowed for this rank alone.
    """
    machine = min(os.cpu_count() or 1, _cpuset(cgroup), _quota(cgroup))
    return max(1, min(len(os.sched_getaffinity(0)), machine // local_world_size))


def parse_cpus(text: str) -> set[int]:
    """Return the CPU numbers of one of the kernel's lists, such as `0-3,8`."""
    spans = [span.split("-") for span in text.strip().split(",") if span]
    return {cpu for span in spans for cpu in range(int(span[0]), int(span[-1]) + 1)}


def _cpuset(cgroup: Path) -> int:
    """Return CPUs that a container may run on."""
    return len(parse_cpus(_read(cgroup / "cpuset.cpus.effective"))) or 1 << 30


def _quota(cgroup: Path) -> int:
    """Return CPUs' worth of time that a container may use: cpu.max of cgroup v2, else the two files of v1."""
    fields = _read(cgroup / "cpu.max").split()
    if len(fields) != 2:
        fields = [_read(cgroup / "cpu" / f"cpu.cfs_{part}_us") for part in ("quota", "period")]
    quota, period = fields
    if quota in ("", "max", "-1") or not period:
        return 1 << 30
    return max(1, int(quota) // int(period))


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
