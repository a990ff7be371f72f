"""JPEG engines of the GPU: how many there are, why there are none, and what share of the decoding they get.

nvJPEG counts them, by the same call with which DALI's decoder does (nvImageCodec, extensions/nvjpeg/hw_decoder.cpp).
"""

import ctypes
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

import torch

__all__ = ["Engines", "choose_load", "describe_engines", "find_engines"]

_HARDWARE_BACKEND = 3
"""NVJPEG_BACKEND_HARDWARE of nvjpeg.h."""
_LIBRARIES = ("libnvjpeg.so.13", "libnvjpeg.so.12", "libnvjpeg.so")
_DRIVER_LIBRARY = "libnvcuvid.so.1"
"""What the driver capability `video` brings into a container (libnvidia-container, src/nvc_info.c)."""

_FIRST_CAPABILITY = (8, 0)
"""The A100's was the first JPEG engine of a data center's GPU."""

_ONE_ENGINE_LOAD = 0.65
_SEVERAL_ENGINES_LOAD = 0.9


@dataclass(frozen=True, kw_only=True)
class Engines:
    """What nvJPEG finds."""

    count: int
    """JPEG engines; an A100 has one, an H100 several."""
    cores: int = 0
    """Of each engine; engines times cores is how many images are decoded at once."""
    reason: str = ""
    """Why there are none."""


@lru_cache
def find_engines(device: torch.device) -> Engines:
    """Ask nvJPEG about a GPU. Never raises: without an answer there are no engines, and the reason says why."""
    library = _load_nvjpeg()
    if library is None:
        return Engines(count=0, reason="libnvjpeg cannot be loaded")
    with torch.cuda.device(device):
        # The library works in the calling thread's current context, which torch makes on first use.
        torch.cuda.synchronize()
        engines = _ask(library)
    if engines.count:
        return engines
    return Engines(count=0, reason=_reason(torch.cuda.get_device_capability(device), engines.reason))


def choose_load(engines: Engines) -> float:
    """Share of the images for the engines where the user names none.

    One engine, as on an A100: DALI's own default, made for it. There a higher load made decoding slower (NVIDIA/DALI
    issue 5362: 7,000 images/s at 0.75, 5,000 at 1). Several: 0.9, for the rest of the GPU is the trainer's (0.9 instead
    of 0.65 made training with DALI 1.8% faster: NVIDIA/DALI pull request 6366).
    """
    if not engines.count:
        return 0.0
    return _ONE_ENGINE_LOAD if engines.count == 1 else _SEVERAL_ENGINES_LOAD


def describe_engines(engines: Engines, load: float) -> str:
    """Say in a few words how many there are and what they get, or why there are none."""
    if engines.count:
        return f"JPEG engines: {engines.count}, load {load:g}"
    return f"JPEG engines: none: {engines.reason}"


def _reason(capability: tuple[int, int], answer: str) -> str:
    if capability < _FIRST_CAPABILITY:
        return "this GPU has none"
    if not _has_video():
        return (
            "this container lacks the video driver capability, add -e NVIDIA_DRIVER_CAPABILITIES=compute,utility,video "
            "to `docker run`"
        )
    return answer


def _has_video() -> bool:
    try:
        ctypes.CDLL(_DRIVER_LIBRARY)
    except OSError:
        return False
    return True


def _load_nvjpeg() -> ctypes.CDLL | None:
    """The library of a wheel beside this interpreter, or the system's."""
    found = find_spec("nvidia")
    wheels = [Path(folder) for folder in found.submodule_search_locations or ()] if found else []
    names = [str(path) for folder in wheels for path in sorted(folder.glob("*/lib/libnvjpeg.so.*"), reverse=True)]
    for name in [*names, *_LIBRARIES]:
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    return None


def _ask(library: ctypes.CDLL) -> Engines:
    """Count engines by a handle of the hardware backend; nvjpeg.h of CUDA 13 has the signatures."""
    handle = ctypes.c_void_p()
    count, cores = ctypes.c_uint(), ctypes.c_uint()
    status = library.nvjpegCreateEx(_HARDWARE_BACKEND, None, None, 0, ctypes.byref(handle))
    if status:
        return Engines(count=0, reason=f"nvJPEG cannot open them (status {status})")
    try:
        status = library.nvjpegGetHardwareDecoderInfo(handle, ctypes.byref(count), ctypes.byref(cores))
    finally:
        library.nvjpegDestroy(handle)
    if status or not count.value:
        return Engines(count=0, reason=f"nvJPEG finds none (status {status})")
    return Engines(count=count.value, cores=cores.value)
