"""Codecs that may crash at an image: how they are run, so that one image costs one rejection.

A library of images may end its process at one file of a million (a segmentation fault, an abort), never return, or ask
for all memory. A worker process whose task is done again if it dies (`pool.may_die`) calls libraries directly, which
costs nothing. Any other calls them in a child process, and an image at which this one dies twice is rejected.
"""

import atexit
import os
import resource
import signal
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

from shards.ground.child import Child, WorkerDiedError, start_children
from shards.ground.errors import PackError, Rejected, portable
from shards.ground.pool import may_die
from shards.ground.units import format_bytes
from shards.images.libraries import report_codecs

__all__ = ["CODEC_FAILED", "Limits", "close_codecs", "main", "run_codecs"]

CODEC_FAILED = "codec failed"
"""Reason of an image that a library failed at in a way of its own."""

_PAGE_BYTES = resource.getpagesize()
ParamsT = ParamSpec("ParamsT")
ResultT = TypeVar("ResultT")


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one image may take. The slowest codec here, JPEG 2000, decodes a million pixels in 0.1 s and 50 MB."""

    cpu_s: float
    memory_bytes: int

    @classmethod
    def of(cls, max_pixels: int) -> "Limits":
        """Return the limits of images of so many pixels."""
        return cls(cpu_s=60 + 1e-6 * max_pixels, memory_bytes=(1 << 30) + 64 * max_pixels)


@dataclass(frozen=True)
class _Running:
    """The library that is called next."""

    name: str


@dataclass(frozen=True)
class _CodecAnswer:
    value: Any
    error: Exception | None = None


def run_codecs(
    function: Callable[Concatenate[bytes, ParamsT], ResultT],
    limits: Limits,
    data: bytes,
    *arguments: ParamsT.args,
    **options: ParamsT.kwargs,
) -> ResultT:
    """Call a function that gives an image's bytes to libraries.

    Args:
        function: of a module.
        limits: what it may take.
        data: the image.
        *arguments: pickled, like what is returned.
        **options: the same.

    Raises:
        Rejected: the child process died at this image, and so did a fresh one.
        PackError: both were killed by SIGKILL, which is no image's fault: the machine ran out of memory.
        MemoryError: this process may die, and the image took too much.
        Exception: what the function raises.
    """
    if may_die():
        with _limited(limits):
            return function(data, *arguments, **options)
    return _CODECS.run(limits, (function, data, arguments, options))


def close_codecs() -> None:
    """End the child process of this one, if there is any; the next call starts another."""
    _CODECS.close()


@contextmanager
def _limited(limits: Limits) -> Generator[None]:
    """End this process when it takes longer, and refuse it more memory."""
    # Pages of data and stack: what this limit counts.
    in_use = int(Path("/proc/self/statm").read_bytes().split()[5]) * _PAGE_BYTES
    before, most = resource.getrlimit(resource.RLIMIT_DATA)
    goal = in_use + limits.memory_bytes
    if before == resource.RLIM_INFINITY or goal < before:
        resource.setrlimit(resource.RLIMIT_DATA, (goal, most))
    signal.setitimer(signal.ITIMER_PROF, limits.cpu_s)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        resource.setrlimit(resource.RLIMIT_DATA, (before, most))


class _Codecs:
    """The child process in which libraries run; it is started when it is first needed, and stays."""

    def __init__(self) -> None:
        self._child: Child | None = None
        self._pid = 0
        self._codec = ""
        self._lock = threading.Lock()

    def run(self, limits: Limits, call: tuple[Any, ...]) -> Any:
        with self._lock:
            try:
                answer = self._try(limits, call)
            except (WorkerDiedError, MemoryError):
                # Memory may have been short, or an earlier image have left something behind.
                try:
                    answer = self._try(limits, call)
                except (WorkerDiedError, MemoryError) as failure:
                    raise _verdict(failure, self._codec, limits) from None
        if answer.error is not None:
            raise answer.error
        return answer.value

    def _try(self, limits: Limits, call: tuple[Any, ...]) -> _CodecAnswer:
        try:
            child = self._started()
            self._codec = "the codecs"
            child.send((limits, call))
            while isinstance(message := child.receive(), _Running):
                self._codec = message.name
            if isinstance(message.error, MemoryError):
                raise message.error
        except BaseException:
            # It died, or this was interrupted: then its answer must not be taken for that of the next call.
            self._end()
            raise
        return message

    def _started(self) -> Child:
        if self._child is None or self._pid != os.getpid():
            [self._child] = start_children(__name__, None, what="codec process")
            self._pid = os.getpid()
        return self._child

    def _end(self) -> None:
        # After a fork it is the parent's.
        if self._child is not None and self._pid == os.getpid():
            self._child.kill()
        self._child = None

    def close(self) -> None:
        with self._lock:
            self._end()


_CODECS = _Codecs()
atexit.register(close_codecs)


def _verdict(failure: WorkerDiedError | MemoryError, codec: str, limits: Limits) -> Exception:
    """Return what it means that a second process, in which nothing else was done, ended at an image."""
    if isinstance(failure, MemoryError):
        return Rejected(CODEC_FAILED, f"{codec}: needs more than {format_bytes(limits.memory_bytes)} of memory")
    if failure.returncode == -signal.SIGKILL:
        return PackError(
            f"{codec}: the {failure}, twice: finished shards are kept; run the same command to continue, with fewer "
            "--workers or a lower --max-pixels"
        )
    if failure.returncode == -signal.SIGPROF:
        return Rejected(CODEC_FAILED, f"{codec}: takes more than {limits.cpu_s:.0f} s")
    return Rejected(CODEC_FAILED, f"{codec}: its process {failure.how}, twice")


def main(connection: "Connection[Any, Any]", spec: None) -> None:
    """Call functions in the child process until the parent is gone."""
    del spec
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    report_codecs(lambda name: connection.send(_Running(name)))
    while True:
        limits, (function, data, arguments, options) = connection.recv()
        try:
            with _limited(limits):
                result = function(data, *arguments, **options)
        except Exception as error:
            connection.send(_CodecAnswer(None, portable(error, "in the codec process")))
        else:
            connection.send(_CodecAnswer(result))
