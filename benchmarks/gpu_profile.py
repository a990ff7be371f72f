"""Part of the GPU check: where the device's time goes in the step, and what it waits for when it does nothing."""

import json
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

from gpu_job import Job, Outcome, backend_of, recipe


def profile(job: Job, *, steps: int, beside: bool = False, **options: Any) -> Outcome:
    """Where the device's time goes in the step, and how much of it is idle; `beside`: on the loader's batches."""
    import torch
    from torch.profiler import ProfilerActivity

    from moco_fast.bench.loading import resident_batch
    from moco_fast.training.build import build
    from moco_fast.training.runtime import start

    config = recipe(job, **options)
    runtime = start(config.run)
    parts = build(config, runtime)
    backend = backend_of(parts.loader.description, config.data.backend)
    if not beside:
        parts.loader.close()
    resident = resident_batch(config, runtime, config.data.batch_size, runtime.device)
    batches = (each for _ in iter(int, 1) for each in (parts.loader if beside else [resident]))

    def train() -> None:
        for _ in range(steps):
            parts.train_step([next(batches)], lr=0.0, scheduled={"momentum": 0.999})
        if runtime.device.type == "cuda":
            torch.cuda.synchronize()

    # Beside the loader: until what it had ready is used up.
    for _ in range(4 if beside else 2):
        train()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if job.device == "cuda" else [])]
    with torch.profiler.profile(activities=activities) as profiler:
        train()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    kinds = ("kernel", "gpu_memcpy", "gpu_memset") if job.device == "cuda" else ("cpu_op",)
    idle_share, wall_us, costs = busy(events, kinds)
    idle_us = waits(events, kinds)
    lines = [f"Idle {idle_share:.1%} of {wall_us / steps / 1e3:.2f} ms per step.", ""]
    lines += ["| share of the busy time | us per step | |", "|---|---|---|"]
    total_us = sum(costs.values())
    for name, of_all_us in sorted(costs.items(), key=lambda item: -item[1])[:15]:
        lines.append(f"| {of_all_us / total_us:.1%} | {of_all_us / steps:,.0f} | `{name[:90].replace('|', ' ')}` |")
    lines += ["", "| us idle per step | before |", "|---|---|"]
    for name, of_all_us in sorted(idle_us.items(), key=lambda item: -item[1])[:15]:
        lines.append(f"| {of_all_us / steps:,.0f} | `{name[:90].replace('|', ' ')}` |")
    row = {"part": job.name, "batches of": backend if beside else "the device", "idle": f"{idle_share:.1%}"}
    row["ms per step"] = f"{wall_us / steps / 1e3:.2f}"
    top = dict(sorted(costs.items(), key=lambda item: -item[1])[:50])
    parts.loader.close()
    runtime.close()
    figures = {"idle_share": idle_share, "us_of_all_steps": top, "idle_us_of_all_steps": idle_us}
    return Outcome(rows=[row], notes=lines, figures=figures)


def busy(events: list[dict[str, Any]], kinds: tuple[str, ...]) -> tuple[float, float, dict[str, float]]:
    """From a trace's events of some kinds: share of the time when none runs, all the time, microseconds by name.

    An event within another counts by itself alone, as a CPU's operators call each other; what runs side by side counts
    for each.
    """
    chosen = sorted(
        (float(event["ts"]), -float(event["dur"]), event["name"], event.get("tid"))
        for event in events
        if event.get("ph") == "X" and event.get("cat") in kinds
    )
    if not chosen:
        raise ValueError(f"the trace has no event of {', '.join(kinds)}: can this machine profile its GPU?")
    costs: defaultdict[str, float] = defaultdict(float)
    open_events: defaultdict[Any, list[tuple[float, str]]] = defaultdict(list)
    covered_us, reached = 0.0, chosen[0][0]
    for begin, negative_us, name, lane in chosen:
        end = begin - negative_us
        covered_us += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
        stack = open_events[lane]
        while stack and stack[-1][0] <= begin:
            stack.pop()
        if stack and end <= stack[-1][0]:
            costs[stack[-1][1]] -= end - begin
        costs[name] += end - begin
        stack.append((end, name))
    wall_us = reached - chosen[0][0]
    return 1 - covered_us / wall_us, wall_us, dict(costs)


def waits(events: list[dict[str, Any]], kinds: tuple[str, ...]) -> dict[str, float]:
    """From a trace's events of some kinds: microseconds when none ran, by the name and lane of what ended the wait."""
    idle_us: defaultdict[str, float] = defaultdict(float)
    reached: float | None = None
    chosen = [event for event in events if event.get("ph") == "X" and event.get("cat") in kinds]
    for event in sorted(chosen, key=lambda event: float(event["ts"])):
        begin = float(event["ts"])
        if reached is not None and begin > reached:
            idle_us[f"{event['name']} in lane {event.get('tid')}"] += begin - reached
        reached = max(begin if reached is None else reached, begin + float(event["dur"]))
    return dict(idle_us)
