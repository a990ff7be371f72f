"""Replay of a captured step: the steps from the kept checkpoint to it, and the first value that is not finite."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from moco_fast import checkpoint
from moco_fast.config import Config, from_dict
from moco_fast.encoders.initial import initial_weights
from moco_fast.recovery import find_whole
from moco_fast.training.build import Parts, build, open_sets
from moco_fast.training.capture import Capture, observed, read_capture, read_generators
from moco_fast.training.continuing import identity_of
from moco_fast.training.loop import begin, restore
from moco_fast.training.runtime import Runtime, start
from moco_fast.training.schedule import lr_at
from moco_fast.training.supply import Supply

__all__ = ["Replayed", "replay"]


@dataclass(frozen=True, kw_only=True)
class Replayed:
    """What a replay found."""

    step: int
    """The first step with a value that is not finite, or the last one that was taken."""
    captured_step: int
    rank: int | None
    """Where it was first; None: everything was finite."""
    first: str | None
    """What was not finite: `output of query.backbone.bn1`, `weights of ...`, `loss`, `gradient of ...`."""
    before: tuple[tuple[str, float], ...]
    """What came right before it, with the largest magnitude."""
    same_batches: bool
    """Whether the captured step, as far as it was reached, had the same samples and generators."""
    num_compared: int
    """Steps whose losses and gradient norms the capture has."""
    first_other: int | None
    """The first of them where they are others than the run's, in whatever bit; None: they are the same."""

    @property
    def reproduced(self) -> bool:
        """Whether something was not finite, at the captured step or before it."""
        return self.first is not None


class _Watch:
    """Largest magnitudes of weights, outputs and gradients, module by module, in the order of the step.

    They are read once a step, so that the steps stay the same ones, and fast.
    """

    def __init__(self, encoders: dict[str, nn.Module], *, with_gradients: bool):
        self._seen: list[tuple[str, Tensor]] = []
        self._with_gradients = with_gradients
        for prefix, encoder in encoders.items():
            for name, module in encoder.named_modules():
                if not list(module.children()):
                    module.register_forward_pre_hook(partial(self._before, f"{prefix}.{name}"))
                    module.register_forward_hook(partial(self._after, f"{prefix}.{name}"))

    def loss(self, loss: Tensor) -> None:
        """Note the loss that is about to be backpropagated."""
        self._note("loss", loss)

    def read(self) -> list[tuple[str, float]]:
        """Return names and magnitudes of the last step; waits for the device."""
        seen, self._seen = self._seen, []
        if not seen:
            return []
        values: list[float] = torch.stack([value for _, value in seen]).tolist()
        return [(name, value) for (name, _), value in zip(seen, values, strict=True)]

    def _before(self, name: str, module: nn.Module, inputs: Any) -> None:
        del inputs
        for each in module.parameters(recurse=False):
            self._note(f"weights of {name}", each)

    def _after(self, name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        del module, inputs
        if not isinstance(output, Tensor) or not output.is_floating_point():
            return
        self._note(f"output of {name}", output)
        if self._with_gradients and output.requires_grad:
            output.register_hook(partial(self._note, f"gradient of the output of {name}"))

    def _note(self, name: str, value: Tensor) -> None:
        if value.numel():
            self._seen.append((name, value.detach().abs().amax().float()))


def replay(path: str | Path, *, device: Literal["auto", "cpu", "cuda"], say: Callable[[str], None]) -> Replayed:
    """Take the steps from a capture's checkpoint to its step again; collective, with as many ranks as the run had.

    Encoders are not compiled, so that each module can be watched.

    Args:
        path: RUN/capture.
        device: to compute on.
        say: prints a line.

    Raises:
        ValueError: there is no capture, other samples are where the run's were, or the ranks are not as many.
    """
    path = Path(path)
    capture = read_capture(path)
    config = _config_of(capture, path, device)
    runtime = start(config.run)
    try:
        if runtime.world_size != capture.world_size:
            raise ValueError(
                f"{path} is of a run with {capture.world_size} ranks, but {runtime.world_size} would repeat other "
                f"steps: accelerate launch --num_processes {capture.world_size} -m moco_fast.cli replay {path}"
            )
        return _replay(capture, config, runtime, say)
    finally:
        runtime.close()


def _config_of(capture: Capture, path: Path, device: Literal["auto", "cpu", "cuda"]) -> Config:
    config = from_dict(capture.config)
    # `precision` as it was settled: another device could settle it otherwise.
    run = replace(config.run, out=str(path), device=device, compile=False, cuda_graphs=False)
    return replace(config, run=replace(run, precision=capture.precision))


def _replay(capture: Capture, config: Config, runtime: Runtime, say: Callable[[str], None]) -> Replayed:
    sets = open_sets(config)
    data = identity_of(sets)
    for option, known in capture.data.items():
        if option == "data.shards" and (now := data.get(option)) is not None and now["digest"] != known["digest"]:
            raise ValueError(f"--{option} {known['where']} holds other samples than when the step was captured")
    initial = initial_weights(config) if capture.from_step == 0 else None
    parts = build(config, runtime, sets.training, initial=initial and initial.tensors)
    try:
        progress = begin(config, runtime, None, data, initial)
        restore(config, runtime, parts, progress, newest=find_whole(Path(config.run.out) / "checkpoints").newest)
        if runtime.rank == 0:
            say(f"from step {progress.step} to the captured step {capture.step} on {runtime.device.type}")
        return _take_steps(capture, config, runtime, parts, progress.step)
    finally:
        parts.loader.close()


def _take_steps(capture: Capture, config: Config, runtime: Runtime, parts: Parts, step: int) -> Replayed:
    encoders = {"query": parts.query, **{k: v for k, v in parts.objective.modules.items() if k == "key"}}
    watch = _Watch(encoders, with_gradients=runtime.precision != "fp16")
    backward = parts.train_step.backward

    def watched_backward(loss: Tensor) -> None:
        watch.loss(loss)
        backward(loss)

    train_step = replace(parts.train_step, backward=watched_backward)
    supply = Supply(parts.loader)
    same, others, num_compared = True, list[int](), 0
    known, may_overflow = capture.observed[runtime.rank], runtime.precision == "fp16"
    found: list[tuple[str, float]] = []
    while step < capture.step:
        is_captured = step + 1 == capture.step
        if is_captured:
            same = _same_generators(Path(config.run.out), runtime)
        batches = list(islice(supply, config.optim.accumulate))
        if is_captured:
            indices = tuple(tuple(batch.index.tolist()) for batch in batches)
            same = same and indices == capture.indices[runtime.rank]
        lr, scheduled = lr_at(step, parts.num_steps, config.optim), config.method.scheduled(step, parts.num_steps)
        watched = train_step(batches, lr=lr, scheduled=scheduled)
        step += 1
        if (of_run := known.get(str(step))) is not None:
            values = torch.stack([value.float() for value in observed(watched, may_overflow=may_overflow)])
            num_compared += 1
            if not values.cpu().allclose(torch.tensor(of_run), rtol=0, atol=0, equal_nan=True):
                others.append(step)
        found = watch.read()
        if any(runtime.gather(_first(found) is not None)):
            break
    first_other = min(filter(None, runtime.gather(others[0] if others else None)), default=None)
    summary = _summary(capture, runtime, step, found, same)
    return replace(summary, num_compared=num_compared, first_other=first_other)


def _same_generators(path: Path, runtime: Runtime) -> bool:
    captured = read_generators(path)
    now = checkpoint.generator_states(runtime.rank, runtime.device)
    # Those of a GPU are not there on a CPU.
    return all(torch.equal(state, captured[name]) for name, state in now.items() if name in captured)


def _first(found: list[tuple[str, float]]) -> int | None:
    return next((number for number, (_, value) in enumerate(found) if not math.isfinite(value)), None)


def _summary(capture: Capture, runtime: Runtime, step: int, found: list[tuple[str, float]], same: bool) -> Replayed:
    place = _first(found)
    own = None if place is None else (place, found[place][0], tuple(found[max(0, place - 4) : place]))
    of_ranks = runtime.gather((own, same))
    bad = [(each, rank) for rank, (each, _) in enumerate(of_ranks) if each is not None]
    if not bad:
        first, before, rank = None, (), None
    else:
        (_, first, before), rank = min(bad)
    return Replayed(
        step=step,
        captured_step=capture.step,
        rank=rank,
        first=first,
        before=before,
        same_batches=all(same for _, same in of_ranks),
        num_compared=0,
        first_other=None,
    )
