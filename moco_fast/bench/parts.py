"""The training step with its parts on a clock: the same step, made of the same parts, each in a thin shell."""

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
    """Give `step` with its parts on `clock`; the original is left as it is.

    Parts: those of the objective (as momentum update, key forward, exchange, loss, gather and enqueue); query forward;
    backward (with the averaging of gradients over ranks); optimizer. The rest is the gradient's norm, its reset, and
    the numbers that are logged.

    Args:
        step: the step.
        optimizer: of the step, without any wrapper.
        clock: to be read by the caller.
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
    # The step enters its own autocast around the query encoder's forward passes, and nowhere else.
    @contextmanager
    def enter() -> Generator[None]:
        with clock.part("query forward"), autocast():
            yield

    return enter
