import ctypes
from contextlib import nullcontext

import pytest
import torch

from pipelines.backends import engines as module
from pipelines.backends.engines import Engines, choose_load, describe_engines, find_engines
from pipelines.backends.registry import choose_num_threads
from pipelines.config import DataConfig
from pipelines.loader import choose_decoding
from pipelines.world import World

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
HANDLE = 0x1234


class FakeNvjpeg:
    """The three calls that are made of libnvjpeg, as nvjpeg.h of CUDA 13.3 declares them; there are no others.

    nvjpegStatus_t nvjpegCreateEx(nvjpegBackend_t backend, nvjpegDevAllocator_t *, nvjpegPinnedAllocator_t *,
                                  unsigned int flags, nvjpegHandle_t *handle);
    nvjpegStatus_t nvjpegGetHardwareDecoderInfo(nvjpegHandle_t, unsigned int *engines, unsigned int *cores_per_engine);
    nvjpegStatus_t nvjpegDestroy(nvjpegHandle_t);
    """

    def __init__(self, *, count=7, cores=1, create_status=0, info_status=0):
        self._found = (count, cores)
        self._create_status, self._info_status = create_status, info_status
        self.open_handles = 0

    def nvjpegCreateEx(self, backend, dev_allocator, pinned_allocator, flags, handle):  # noqa: N802 (nvJPEG's name)
        assert (backend, dev_allocator, pinned_allocator, flags) == (3, None, None, 0)
        if self._create_status:
            return self._create_status
        pointer = ctypes.cast(handle, ctypes.POINTER(ctypes.c_void_p))
        pointer[0] = HANDLE
        self.open_handles += 1
        return 0

    def nvjpegGetHardwareDecoderInfo(self, handle, engines, cores):  # noqa: N802 (nvJPEG's name)
        assert handle.value == HANDLE
        for target, value in zip((engines, cores), self._found, strict=True):
            ctypes.cast(target, ctypes.POINTER(ctypes.c_uint))[0] = value
        return self._info_status

    def nvjpegDestroy(self, handle):  # noqa: N802 (nvJPEG's name)
        assert handle.value == HANDLE
        self.open_handles -= 1
        return 0


@pytest.fixture
def gpu(monkeypatch):
    """A GPU with so many engines, in a container with or without the library that `video` brings."""

    def make(library, *, capability=(9, 0), has_video=True):
        find_engines.cache_clear()
        monkeypatch.setattr(module, "_load_nvjpeg", lambda: library)
        monkeypatch.setattr(module, "_has_video", lambda: has_video)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
        monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
        return library

    yield make
    find_engines.cache_clear()


@pytest.mark.parametrize(
    ("count", "cores", "line"),
    [(7, 1, "JPEG engines: 7, load 0.9"), (1, 5, "JPEG engines: 1, load 0.65")],
)
def test_the_load_follows_the_number_of_engines(gpu, count, cores, line):
    library = gpu(FakeNvjpeg(count=count, cores=cores))
    found = find_engines(GPU)
    assert found == Engines(count=count, cores=cores)
    assert describe_engines(found, choose_load(found)) == line
    assert library.open_handles == 0


@pytest.mark.parametrize(
    ("library", "options", "reason"),
    [
        (FakeNvjpeg(create_status=7), {"has_video": False}, "this container lacks the video driver capability, add"),
        (FakeNvjpeg(create_status=7), {"capability": (7, 5), "has_video": False}, "this GPU has none"),
        (FakeNvjpeg(create_status=7), {}, "nvJPEG cannot open them (status 7)"),
        (FakeNvjpeg(count=0), {}, "nvJPEG finds none (status 0)"),
        (FakeNvjpeg(info_status=9), {}, "nvJPEG finds none (status 9)"),
        (None, {}, "libnvjpeg cannot be loaded"),
    ],
)
def test_it_is_said_why_there_are_none(gpu, library, options, reason):
    gpu(library, **options)
    found = find_engines(GPU)
    assert found.count == 0
    assert describe_engines(found, choose_load(found)).startswith(f"JPEG engines: none: {reason}")
    assert choose_load(found) == 0
    assert library is None or library.open_handles == 0


def test_the_real_library_takes_the_call():
    library = module._load_nvjpeg()
    assert library is not None
    found = module._ask(library)
    if not torch.cuda.is_available():
        assert (found.count, bool(found.reason)) == (0, True)


def test_what_the_user_says_counts_and_dali_on_a_gpu_alone_has_engines(gpu):
    gpu(FakeNvjpeg())
    assert choose_decoding("dali", DataConfig(shards="x"), GPU) == (0.9, Engines(count=7, cores=1))
    assert choose_decoding("dali", DataConfig(shards="x", hw_decoder_load=0.5), GPU)[0] == 0.5
    assert choose_decoding("dali", DataConfig(shards="x", hw_decoder_load=0.0), GPU)[0] == 0.0
    assert choose_decoding("dali", DataConfig(shards="x"), CPU) == (0.0, None)
    assert choose_decoding("torch", DataConfig(shards="x"), GPU) == (0.0, None)


def test_dalis_threads_on_a_gpu_are_at_most_sixteen_unless_asked_for(monkeypatch):
    monkeypatch.setattr("pipelines.backends.registry.available_cpus", lambda ranks: 192 // ranks)
    assert choose_num_threads("dali", None, device=GPU, world=World()) == 16
    assert choose_num_threads("dali", None, device=GPU, world=World(world_size=16, local_world_size=16)) == 12
    assert choose_num_threads("dali", 40, device=GPU, world=World()) == 40
    assert choose_num_threads("dali", None, device=CPU, world=World()) == 192
    assert choose_num_threads("torch", None, device=GPU, world=World()) == 192
