"""Registry of the backends: how each is started, what it needs and uses, and the choice between them.

Free of torch, numpy and the backends' libraries: the command line asks it, too.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import TYPE_CHECKING, Literal

from pipelines.config import Backend, DataConfig
from pipelines.world import World
from shards.ground.cpus import available_cpus

if TYPE_CHECKING:
    import torch

    from pipelines.backends.base import Job, Stream
    from pipelines.plan.steps import Steps
    from shards.sets.base import SetKind

__all__ = [
    "BACKENDS",
    "STREAMING",
    "BackendEntry",
    "choose",
    "choose_batches_at_once",
    "choose_num_threads",
    "refuse_unused",
]


@dataclass(frozen=True, kw_only=True)
class BackendEntry:
    """What is known of a backend before it is imported."""

    start: "Callable[[Job, Steps], Stream]"
    """Imports it, and starts it on (epoch, dense sample numbers) of batch after batch."""
    needs: tuple[str, ...]
    """Modules without which it cannot be imported."""
    how: str = ""
    """How to install them, or where to read it."""
    workers: str = "threads"
    """What it decodes in."""
    unused: Mapping[str, str] = field(default_factory=dict[str, str])
    """Fields of DataConfig that it has no use for, and why."""
    only_kind: "SetKind | None" = None
    """The one kind of set that it reads; None: all of them."""
    decodes_on_gpu: bool = False
    """Makes views for a GPU on the GPU, with its JPEG engines."""
    most_gpu_threads: int | None = None
    """Most threads per rank, unless the user asks for more, where it decodes on a GPU."""
    gpu_images_at_once: int = 1
    """Images that it should decode together where it decodes on a GPU: batches are brought together up to these."""


def _start_dali(job: "Job", steps: "Steps") -> "Stream":
    from pipelines.backends.dali import DaliViews

    return DaliViews(job, steps)


def _start_torch(job: "Job", steps: "Steps") -> "Stream":
    from pipelines.backends.torch import WorkerViews

    return WorkerViews(job, steps)


def _start_ffcv(job: "Job", steps: "Steps") -> "Stream":
    from pipelines.backends.ffcv import FfcvViews

    return FfcvViews(job, steps)


_DECODES_ON_CPU = "which decodes on the CPU"
_KEEPS_NO_PIXELS = "which decodes and makes views in one"

BACKENDS: dict[Backend, BackendEntry] = {
    "dali": BackendEntry(
        start=_start_dali,
        needs=("nvidia.dali",),
        how=" (pip install 'moco-fast[gpu]')",
        unused={"cache_decoded": _KEEPS_NO_PIXELS},
        decodes_on_gpu=True,
        # Each thread of DALI's decoder holds 16 MiB on the device and twice 8 MiB of pinned memory
        # (device_memory_padding, host_memory_padding of fn.decoders.image): 3 GiB each for the 192 CPUs of a large
        # machine with one GPU.
        most_gpu_threads=16,
        # An H200 makes views of 3,300 samples/s in batches of 32, of 9,400 in batches of 256.
        gpu_images_at_once=256,
    ),
    "ffcv": BackendEntry(
        start=_start_ffcv,
        needs=("ffcv", "numba"),
        how=" (docs/data.md says how)",
        unused={
            "read_threads": "which maps the file into memory",
            "hw_decoder_load": _DECODES_ON_CPU,
            "cache_decoded": _KEEPS_NO_PIXELS,
        },
        only_kind="beton",
    ),
    "torch": BackendEntry(
        start=_start_torch,
        needs=("cv2", "simplejpeg"),
        workers="processes",
        unused={"read_threads": "whose processes read for themselves", "hw_decoder_load": _DECODES_ON_CPU},
    ),
}
"""By the names of `pipelines.config.Backend`; tests compare the two."""

STREAMING: Backend = "torch"
"""The backend that streams tars without an index."""

_ON_GPU_ONLY = {"hw_decoder_load": "a CPU, which has no JPEG engines"}

# Without a GPU and below this size, the work on a sample is less than what Python adds to it in a worker process, and
# the workers take longer to start (benchmarks/loader.py).
_SMALL = 96


def refuse_unused(data: DataConfig, backend: Literal["auto", Backend], *, on_gpu: bool) -> None:
    """Refuse options that a backend has no use for.

    Args:
        data: as it was given.
        backend: what decodes; `auto`: not known yet, and only what no backend would use is refused.
        on_gpu: whether the views are made for a GPU; True also where that is not known yet.

    Raises:
        ValueError: with the option, why it means nothing, and the way out.
    """
    beside = {} if on_gpu else dict(_ON_GPU_ONLY)
    if backend != "auto":
        unused = BACKENDS[backend].unused.items()
        beside = {name: f"--data.backend {backend}, {why}" for name, why in unused} | beside
    for name, what in beside.items():
        value = getattr(data, name)
        if value is not None:
            users = [other for other, entry in BACKENDS.items() if name not in entry.unused]
            raise ValueError(
                f"--data.{name.replace('_', '-')} {value} means nothing beside {what}: leave it out, or use "
                f"--data.backend {' or '.join(users)}{' on a GPU' if name in _ON_GPU_ONLY else ''}"
            )


def choose(backend: str, *, device: "torch.device", size: int, kind: "SetKind | None" = None) -> tuple[Backend, str]:
    """Resolve `auto` into a backend, and say why in a few words.

    Args:
        backend: as in DataConfig.
        device: where the views are wanted.
        size: height and width of the largest view.
        kind: of the set.

    Raises:
        ValueError: no such backend, or one that cannot do what is asked, or what it needs is not installed.
    """
    if backend == "auto":
        return _choose_for(device, size, kind)
    if backend not in BACKENDS:
        raise ValueError(f"there is no backend {backend!r}: choose auto, {' or '.join(BACKENDS)}")
    only = BACKENDS[backend].only_kind
    if only is not None and kind != only:
        raise ValueError(
            f"the {backend} backend reads a .{only}: `make-shards {only} SHARDS --out FILE.{only}` writes one of your "
            f"shards; then --data.shards FILE.{only}"
        )
    missing = _missing(backend)
    if missing:
        raise ValueError(
            f"the {backend} backend needs {' and '.join(missing)}: install it{BACKENDS[backend].how}, "
            "or use --data.backend auto"
        )
    return backend, "as asked for"


def choose_num_threads(name: Backend, asked: int | None, *, device: "torch.device", world: World) -> int:
    """Threads or processes per rank that decode, where the user may have asked for a number."""
    if asked is not None:
        return asked
    num_cpus, most = available_cpus(world.local_world_size), BACKENDS[name].most_gpu_threads
    return num_cpus if most is None or device.type != "cuda" else min(num_cpus, most)


def choose_batches_at_once(name: Backend, max_batch: int, *, device: "torch.device") -> int:
    """Batches that a backend should decode together: several where one is too small to keep a GPU's decoder busy."""
    at_once = BACKENDS[name].gpu_images_at_once if device.type == "cuda" else 1
    return max(1, at_once // max(1, max_batch))


def _choose_for(device: "torch.device", size: int, kind: "SetKind | None") -> tuple[Backend, str]:
    name: Backend
    if device.type != "cuda" and kind == "beton" and not _missing("ffcv"):
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
        raise ValueError(f"no backend is installed: {name} needs {', '.join(_missing(name))}{BACKENDS[name].how}")
    return other, f"{' and '.join(_missing(name))} is not installed{BACKENDS[name].how}"


def _missing(backend: Backend) -> list[str]:
    return [module for module in BACKENDS[backend].needs if not _is_installed(module)]


def _is_installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:
        return False  # not even what it is in, such as `nvidia`
