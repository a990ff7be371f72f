"""A contestant timed in a process of its own, which leaves nothing behind for the next."""

import multiprocessing
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import psutil
import torch

from loaders.base import Options
from loaders.registry import open_contestant
from shards.ground.cpus import available_cpus

WARMUP = 2
"""Batches per worker before the clock starts."""
LIMIT_S = 180.0
"""For opening, a first conversion and the slowest loader's batches; the time that is measured comes on top."""


@dataclass(frozen=True, kw_only=True)
class Figures:
    """What one run of a contestant gave."""

    samples_per_s: float
    cpu_ms: float
    """Processor time of all its processes per sample."""
    open_s: float
    """From opening to the first batch; with a conversion, if this run made it."""
    dtype: str
    shape: tuple[int, ...]
    """Of one view of a batch."""


def cpu_seconds() -> float:
    """Processor time of this process and its living children."""
    family = [psutil.Process(), *psutil.Process().children(recursive=True)]
    times = [one.cpu_times() for one in family]
    return sum(each.user + each.system for each in times)


def _array(view: Any) -> np.ndarray:
    if isinstance(view, torch.Tensor):
        return view.numpy()
    return np.asarray(view.as_tensor() if hasattr(view, "as_tensor") else view)


def check_views(batch: Sequence[Any], options: Options) -> tuple[str, tuple[int, ...]]:
    """Return type and shape of one view; raise if these are not two views of what was asked for.

    Raises:
        ValueError: number, shape or pixels are not as asked for.
    """
    arrays = [_array(view) for view in batch]
    num_values = options.batch_size * 3 * options.size**2
    if len(arrays) != 2 or any(each.size != num_values or len(each) != options.batch_size for each in arrays):
        raise ValueError(f"expected two views of {num_values} values, got shapes {[each.shape for each in arrays]}")
    if any((first == second).all() for first, second in zip(*arrays, strict=True)):
        raise ValueError("the two views of a sample are the same")
    return str(arrays[0].dtype), arrays[0].shape


def measure(name: str, options: Options, seconds: float) -> Figures:
    """Time a contestant in this process."""
    begin = time.perf_counter()
    batches, close = open_contestant(name, options)
    dtype, shape = check_views(next(batches), options)
    open_s = time.perf_counter() - begin
    # Workers that began together finish their batches together: only whole rounds of them are a rate.
    workers = available_cpus()
    for _ in range(WARMUP * workers - 1):
        next(batches)
    cpu, num, begin = cpu_seconds(), 0, time.perf_counter()
    while time.perf_counter() - begin < seconds:
        for _ in range(workers):
            next(batches)
        num += workers * options.batch_size
    wall, cpu = time.perf_counter() - begin, cpu_seconds() - cpu
    close()
    return Figures(samples_per_s=num / wall, cpu_ms=1e3 * cpu / num, open_s=open_s, dtype=dtype, shape=shape)


def _send(connection: Connection, name: str, options: Options, seconds: float) -> None:
    try:
        connection.send(measure(name, options, seconds))
    except Exception as error:
        traceback.print_exc()
        connection.send(f"{type(error).__name__}: {error}".splitlines()[0])


def measure_fresh(name: str, options: Options, seconds: float, *, limit_s: float = LIMIT_S) -> Figures:
    """Time a contestant in a fork of this process, which must not have opened a loader itself.

    Raises:
        RuntimeError: it failed, died or took more than `limit_s` beside the time that is measured.
    """
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(sender, name, options, seconds))
    process.start()
    sender.close()
    ended = receiver.poll(limit_s + seconds)
    try:
        found = receiver.recv() if ended else f"no figures after {limit_s + seconds:.0f} s"
    except EOFError:
        found = "its process died"
    # Figures are sent when the loader is closed; what then still runs are workers that wait to be ended.
    process.join(10 if ended else 0)
    if process.is_alive():
        for each in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]:
            each.kill()
        process.join()
    if isinstance(found, str):
        raise RuntimeError(f"{name}: {found}")
    return found
