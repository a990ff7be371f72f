"""Training step with timed parts: the same step, composed of the same parts, each in a thin wrapper."""

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import replace

from torch.optim import Optimizer

from moco_fast.bench.clock import PartClock
from moco_fast.methods.base import Autocast
from moco_fast.training.step import TrainStep

__all__ = ["on_a_clock"]


@contextmanager
def on_a_clock(step: TrainStep, optimizer: Optimizer, clock: PartClock) -> Generator[TrainStep]:
    """Yield `step` with its parts timed by `clock`; the original is not changed.

    Parts: those of the objective (such as momentum update, key forward, exchange, loss, gather and enqueue); query
    forward; backward (with the averaging of gradients over ranks); optimizer. The rest is the gradient's norm, its
    reset, and the logged values.

    Args:
        step: the step.
        optimizer: the step's optimizer, unwrapped.
        clock: read by the caller.
    """
    hooks = (
        optimizer.register_step_pre_hook(lambda *_: clock.enter("optimizer")),
        optimizer.register_step_post_hook(lambda *_: clock.leave()),
    )
    try:
        yield replace(
            step,
            objective=step.objective.on_a_clock(clock),
            autocast=_timed_autocast(step.autocast, clock),
            backward=clock.timed("backward", step.backward),
        )
    finally:
        for hook in hooks:
            hook.remove()


def _timed_autocast(autocast: Autocast, clock: PartClock) -> Autocast:
    # The step enters its autocast context only around forward passes of the query encoder.
    @contextmanager
    def enter() -> Generator[None]:
        with clock.part("query forward"), autocast():
            yield

    return enter
