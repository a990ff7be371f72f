"""Copies of a run's tensors in host memory, to be written while training goes on."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from shards.ground.units import format_bytes

__all__ = ["NoRoomError", "Staging", "free_bytes"]

_SPARE_BYTES = 1 << 30
"""Of host memory that are left to others."""


class NoRoomError(Exception):
    """There is no memory for a copy; the text says how much is missing where."""


class Staging:
    """Host memory for one copy of a run's tensors, allocated at the first and kept.

    On a GPU it is pinned, and filled by a stream of its own. Where the device has room for the tensors once more, they
    are first copied there, which takes milliseconds, and the next step starts at once; else it waits, on the device,
    for the copy to the host. On the CPU copies have their tensors' strides: another order takes half as long again.

    Args:
        device: of the run.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._kept: dict[str, Tensor] = {}
        self._done: torch.cuda.Event | None = None

    def copy(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Start copying tensors; they may change as soon as this returns.

        Returns:
            copies on the CPU, to be read after `wait`; the next call overwrites them.

        Raises:
            NoRoomError: the host has no memory for them.
        """
        if not _fit(self._kept, tensors):
            self._kept = {}
            self._kept = _allocate(tensors, pinned=self._stream is not None)
        if self._stream is None:
            for name, tensor in tensors.items():
                self._kept[name].copy_(tensor.detach())
        else:
            self._copy_from_gpu(tensors, self._stream)
        return self._kept

    def wait(self) -> None:
        """Wait until the last copy has arrived; may be called by another thread."""
        if self._done is not None:
            self._done.synchronize()

    def _copy_from_gpu(self, tensors: Mapping[str, Tensor], stream: torch.cuda.Stream) -> None:
        current = torch.cuda.current_stream(self._device)
        on_device = {name: each.detach() for name, each in tensors.items() if each.device.type == "cuda"}
        needed = sum(each.nbytes for each in on_device.values())
        has_room = torch.cuda.mem_get_info(self._device)[0] > needed
        if has_room:
            contiguous = torch.contiguous_format
            on_device = {name: each.clone(memory_format=contiguous) for name, each in on_device.items()}
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            for name, tensor in tensors.items():
                self._kept[name].copy_(on_device.get(name, tensor.detach()), non_blocking=True)
            self._done = torch.cuda.Event()
            self._done.record(stream)
        if has_room:
            for each in on_device.values():
                each.record_stream(stream)
        else:
            current.wait_event(self._done)


def free_bytes() -> int:
    """Return the bytes of host memory that this process could still take: of the machine, and of its control group."""
    lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    free = int(lines["MemAvailable"].split()[0]) << 10
    group = Path("/sys/fs/cgroup")
    try:
        limit, used = ((group / name).read_text().strip() for name in ("memory.max", "memory.current"))
        facts = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        # Pages of files count as used, but are given up when they are needed.
        free = min(free, int(limit) - int(used) + int(facts["inactive_file"]))
    except (OSError, ValueError, KeyError):
        pass  # There is no limit, or a control group of the first version.
    return free


def _fit(kept: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> bool:
    return kept.keys() == tensors.keys() and all(
        kept[name].shape == tensor.shape and kept[name].dtype == tensor.dtype for name, tensor in tensors.items()
    )


def _allocate(tensors: Mapping[str, Tensor], *, pinned: bool) -> dict[str, Tensor]:
    needed = sum(tensor.nbytes for tensor in tensors.values())
    free = free_bytes()
    if needed + _SPARE_BYTES > free:
        raise NoRoomError(f"a copy takes {format_bytes(needed)}, and {format_bytes(free)} of memory are free")
    try:
        return {
            name: torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True) if pinned else torch.empty_like(tensor)
            for name, tensor in tensors.items()
        }
    except RuntimeError as error:  # of pinned memory, whose limits are the driver's
        reason = str(error).partition("\n")[0]
        raise NoRoomError(f"{format_bytes(needed)} of memory cannot be pinned ({reason})") from None
