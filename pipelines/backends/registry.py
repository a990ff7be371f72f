"""What turns encoded samples into views: the backends, one contract, and the choice between them."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Protocol

import torch

from pipelines.config import Backend, ViewConfig
from pipelines.reading.samples import Draw, Steps
from shards import ShardSet
from shards.ground.arrays import Indices
from shards.ground.cpus import available_cpus

__all__ = ["BACKENDS", "Job", "Made", "Stream", "choose", "choose_num_threads"]


@dataclass(frozen=True, kw_only=True)
class Made:
    """A batch as a backend gives it."""

    samples: Indices
    """(B,) dense sample numbers."""
    labels: Indices
    """(B,), -1 where there is none."""
    views: tuple[torch.Tensor, ...]
    """(B, 3, H, W) uint8 each, channels_last."""
    replaced: tuple[str, ...] = ()
    """What was wrong with each sample that another took the place of."""


class Stream(Protocol):
    """A running backend."""

    def get(self) -> Made:
        """Wait for the next batch. Raises StopIteration at the end, or what went wrong."""
        ...

    def close(self) -> None:
        """End all threads and processes; what is ready is dropped."""
        ...


@dataclass(frozen=True, kw_only=True)
class Job:
    """What a backend shall do."""

    shards: ShardSet
    draw: Draw
    """Gives the views' tables from (epoch, samples, records). Can be pickled."""
    views: tuple[ViewConfig | None, ...]
    """The recipe of each view: which stages there can be. None: crop and resize only."""
    size: int
    """Height and width of a view."""
    max_batch: int
    """Samples in the largest batch."""
    device: torch.device
    """Where the views shall be."""
    num_threads: int
    """Threads or processes that decode."""
    skip: bool = False
    """Replace samples that are damaged, instead of ending."""
    read_threads: int = 4
    """Threads that read shards."""
    prefetch: int = 2
    """Batches kept ready."""
    hw_decoder_load: float = 0.65
    """Share of the JPEGs for the GPU's own engines."""


def _start_dali(job: Job, steps: Steps) -> Stream:
    from pipelines.backends.dali import DaliViews

    return DaliViews(job, steps)


def _start_torch(job: Job, steps: Steps) -> Stream:
    from pipelines.backends.torch import WorkerViews

    return WorkerViews(job, steps)


def _start_ffcv(job: Job, steps: Steps) -> Stream:
    from pipelines.backends.ffcv import FfcvViews

    return FfcvViews(job, steps)


BACKENDS: dict[Backend, Callable[[Job, Steps], Stream]] = {
    "dali": _start_dali,
    "ffcv": _start_ffcv,
    "torch": _start_torch,
}
"""Start a backend on (epoch, dense sample numbers) of batch after batch."""

# Without a GPU and below this size, the work on a sample is less than what Python adds to it in a worker process, and
# the workers take longer to start (benchmarks/loader.py).
_SMALL = 96

_NEEDS = {"dali": ("nvidia.dali",), "ffcv": ("ffcv", "numba"), "torch": ("cv2", "simplejpeg")}
_HOW = {"ffcv": " (docs/data.md says how)"}


def choose(backend: str, *, device: torch.device, size: int, is_beton: bool = False) -> tuple[Backend, str]:
    """Resolve `auto` into a backend, and say why in a few words.

    Args:
        backend: as in DataConfig.
        device: where the views shall be.
        size: height and width of a view.
        is_beton: whether the data is a `.beton`.

    Raises:
        ValueError: no such backend, or one that cannot do what is asked, or what it needs is not installed.
    """
    if backend == "auto":
        return _choose_for(device, size, is_beton=is_beton)
    if backend not in BACKENDS:
        raise ValueError(f"there is no backend {backend!r}: choose auto, {' or '.join(BACKENDS)}")
    if backend == "ffcv" and not is_beton:
        raise ValueError(
            "the ffcv backend reads a .beton: `make-shards beton SHARDS --out FILE.beton` writes one of your shards; "
            "then --data.shards FILE.beton"
        )
    missing = _missing(backend)
    if missing:
        raise ValueError(
            f"the {backend} backend needs {' and '.join(missing)}: install it{_HOW.get(backend, '')}, "
            "or use --data.backend auto"
        )
    return backend, "as asked for"


_MOST_GPU_THREADS = 16
"""Each thread of DALI's decoder holds 16 MiB on the device and twice 8 MiB of pinned memory (device_memory_padding,
host_memory_padding of fn.decoders.image): 3 GiB each for the 192 CPUs of a large machine with one GPU."""


def choose_num_threads(name: Backend, asked: int | None, *, device: torch.device, local_world_size: int) -> int:
    """Threads or processes per rank that decode, where the user may have asked for a number."""
    if asked is not None:
        return asked
    num_cpus = available_cpus(local_world_size)
    return min(num_cpus, _MOST_GPU_THREADS) if name == "dali" and device.type == "cuda" else num_cpus


def _choose_for(device: torch.device, size: int, *, is_beton: bool) -> tuple[Backend, str]:
    name: Backend
    if device.type != "cuda" and is_beton and not _missing("ffcv"):
        return "ffcv", "the data is a .beton"
    if device.type == "cuda":
        name, reason = "dali", "it decodes on the GPU"
    elif size < _SMALL:
        name, reason = "dali", f"the faster one without a GPU for views below {_SMALL} pixels"
    else:
        name, reason = "torch", "the faster one without a GPU"
    if not _missing(name):
        return name, reason
    other: Backend = "dali" if name == "torch" else "torch"
    if _missing(other):
        raise ValueError(f"no backend is installed: {name} needs {', '.join(_missing(name))}")
    return other, f"{' and '.join(_missing(name))} is not installed"


def _missing(backend: Backend) -> list[str]:
    return [module for module in _NEEDS[backend] if find_spec(module) is None]
