"""Part of the GPU check: what the loader takes from the step beside it, on the device alone.

The whole step is one CUDA graph, so that nothing waits for the host: what is lost is lost on the GPU. On a CPU the step
itself stands for it.
"""

import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from gpu_job import Job, Outcome, backend_of, recipe
from step import Ours, Setting

from pipelines.loader import open_loader

AHEAD = 2
"""Steps that the host may be ahead of the device: further ahead, it would take batches faster than a run does."""


def beside(
    job: Job, *, encoder: str, size: int, queue: int, precision: str, batch: int, seconds: float, data: dict[str, Any]
) -> Outcome:
    """Time a step alone and beside the loader, which makes batches as fast as the step takes them."""
    device = torch.device(job.device)
    config = recipe(job, encoder=encoder, size=size, batch=batch, queue=queue, data=data)
    setting = Setting(
        encoder=encoder, batch=batch, size=size, queue=queue, device=device, precision=precision, compile=False
    )
    with open_loader(config.data, config.views, seed=0, device=device) as loader:
        backend = backend_of(loader.description, config.data.backend)
        batches = (each for _ in iter(int, 1) for each in loader)
        for _ in range(loader.most_ready):
            next(batches)
        begin, num = time.perf_counter(), 0
        while num < 2 or time.perf_counter() - begin < seconds / 3:
            next(batches)
            num += 1
        loader_ms = 1e3 * (time.perf_counter() - begin) / num
        step = captured(Ours(setting, setting.views()).step, device)
        alone_ms = step_ms(step, None, seconds / 3, device)
        beside_ms = step_ms(step, batches, seconds, device)
    row = {"part": job.name, "backend": backend, "batch": str(batch), "loader alone, ms a batch": f"{loader_ms:.1f}"}
    row |= {"step alone, ms": f"{alone_ms:.1f}", "beside the loader, ms": f"{beside_ms:.1f}"}
    row["times as long"] = f"{beside_ms / alone_ms:.3f}"
    return Outcome(rows=[row], figures={"loader_ms": loader_ms, "alone_ms": alone_ms, "beside_ms": beside_ms})


def captured(step: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """Return a step as a CUDA graph that is played again; on a CPU the step."""
    if device.type != "cuda":
        return step
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(4):
            step()
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        step()
    return graph.replay


def step_ms(
    step: Callable[[], object], batches: Iterator[object] | None, seconds: float, device: torch.device
) -> float:
    """Return the milliseconds of a step, in which a batch is taken if there are any."""
    done: list[torch.cuda.Event] = []

    def one() -> None:
        if batches is not None:
            next(batches)
        step()
        if device.type == "cuda":
            done.append(torch.cuda.Event())
            done[-1].record()
            if len(done) > AHEAD:
                done.pop(0).synchronize()

    for _ in range(5):
        one()
    begin, num = time.perf_counter(), 0
    while num < 2 or time.perf_counter() - begin < seconds:
        one()
        num += 1
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return 1e3 * (time.perf_counter() - begin) / num
