"""Registry of the backends: how each is started, what it needs, and the choice between them."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec

import torch

from pipelines.backends.base import Job, Stream
from pipelines.config import Backend
from pipelines.plan.steps import Steps
from pipelines.world import World
from shards.ground.cpus import available_cpus

__all__ = ["BACKENDS", "BackendEntry", "choose", "choose_num_threads"]


@dataclass(frozen=True, kw_only=True)
class BackendEntry:
    """What is known of a backend before it is imported."""

    start: Callable[[Job, Steps], Stream]
    """Imports it, and starts it on (epoch, dense sample numbers) of batch after batch."""
    needs: tuple[str, ...]
    """Modules without which it cannot be imported."""
    how: str = ""
    """Where to read how to install them."""
    workers: str = "threads"
    """What it decodes in."""
    only_beton: bool = False
    """Reads nothing but a `.beton`."""


def _start_dali(job: Job, steps: Steps) -> Stream:
    from pipelines.backends.dali import DaliViews

    return DaliViews(job, steps)


def _start_torch(job: Job, steps: Steps) -> Stream:
    from pipelines.backends.torch import WorkerViews

    return WorkerViews(job, steps)


def _start_ffcv(job: Job, steps: Steps) -> Stream:
    from pipelines.backends.ffcv import FfcvViews

    return FfcvViews(job, steps)


BACKENDS: dict[Backend, BackendEntry] = {
    "dali": BackendEntry(start=_start_dali, needs=("nvidia.dali",)),
    "ffcv": BackendEntry(start=_start_ffcv, needs=("ffcv", "numba"), how=" (docs/data.md says how)", only_beton=True),
    "torch": BackendEntry(start=_start_torch, needs=("cv2", "simplejpeg"), workers="processes"),
}
"""By the names of `pipelines.config.Backend`; tests compare the two."""

# Without a GPU and below this size, the work on a sample is less than what Python adds to it in a worker process, and
# the workers take longer to start (benchmarks/loader.py).
_SMALL = 96


def choose(backend: str, *, device: torch.device, size: int, is_beton: bool = False) -> tuple[Backend, str]:
    """Resolve `auto` into a backend, and say why in a few words.

    Args:
        backend: as in DataConfig.
        device: where the views are wanted.
        size: height and width of the largest view.
        is_beton: whether the data is a `.beton`.

    Raises:
        ValueError: no such backend, or one that cannot do what is asked, or what it needs is not installed.
    """
    if backend == "auto":
        return _choose_for(device, size, is_beton=is_beton)
    if backend not in BACKENDS:
        raise ValueError(f"there is no backend {backend!r}: choose auto, {' or '.join(BACKENDS)}")
    if BACKENDS[backend].only_beton and not is_beton:
        raise ValueError(
            f"the {backend} backend reads a .beton: `make-shards beton SHARDS --out FILE.beton` writes one of your "
            "shards; then --data.shards FILE.beton"
        )
    missing = _missing(backend)
    if missing:
        raise ValueError(
            f"the {backend} backend needs {' and '.join(missing)}: install it{BACKENDS[backend].how}, "
            "or use --data.backend auto"
        )
    return backend, "as asked for"


_MOST_GPU_THREADS = 16
"""Each thread of DALI's decoder holds 16 MiB on the device and twice 8 MiB of pinned memory (device_memory_padding,
host_memory_padding of fn.decoders.image): 3 GiB each for the 192 CPUs of a large machine with one GPU."""


def choose_num_threads(name: Backend, asked: int | None, *, device: torch.device, world: World) -> int:
    """Threads or processes per rank that decode, where the user may have asked for a number."""
    if asked is not None:
        return asked
    num_cpus = available_cpus(world.local_world_size)
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
    return [module for module in BACKENDS[backend].needs if find_spec(module) is None]
