"""The training step with its parts on a clock: the same step, made of the same parts, each in a thin shell."""

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, replace

from torch import Tensor
from torch.optim import Optimizer

from moco_fast.bench.clock import PartClock
from moco_fast.methods.dictionary import Dictionary
from moco_fast.methods.keys import Autocast, KeySource, MomentumKeys, QueryKeys
from moco_fast.methods.shuffle import KeyPolicy
from moco_fast.training.step import TrainStep

__all__ = ["on_a_clock"]


@contextmanager
def on_a_clock(step: TrainStep, optimizer: Optimizer, clock: PartClock) -> Generator[TrainStep]:
    """Give `step` with its parts on `clock`; the original is left as it is.

    Parts: momentum update; key forward; exchange (the shuffle before the key forward and its undoing); query forward;
    loss; backward (with the averaging of gradients over ranks); optimizer; gather and enqueue. The rest is the
    gradient's norm, its reset, and the numbers that are logged.

    Args:
        step: the step.
        optimizer: of the step, without any wrapper.
        clock: to be read by the caller.
    """
    keys = step.keys
    if isinstance(keys, MomentumKeys | QueryKeys):
        keys = replace(keys, policy=_TimedPolicy(keys.policy, clock))
    hooks = (
        optimizer.register_step_pre_hook(lambda *_: clock.enter("optimizer")),
        optimizer.register_step_post_hook(lambda *_: clock.leave()),
    )
    try:
        yield replace(
            step,
            keys=_TimedKeys(keys, clock),
            dictionary=_TimedDictionary(step.dictionary, clock),
            autocast=_timed_autocast(step.autocast, clock),
            backward=clock.timed("backward", step.backward),
        )
    finally:
        for hook in hooks:
            hook.remove()


def _timed_autocast(autocast: Autocast, clock: PartClock) -> Autocast:
    # The step enters its own autocast around the query encoder's forward pass, and nowhere else.
    @contextmanager
    def enter() -> Generator[None]:
        with clock.part("query forward"), autocast():
            yield

    return enter


@dataclass(frozen=True)
class _TimedKeys:
    keys: KeySource
    clock: PartClock

    def advance(self, momentum: float) -> None:
        with self.clock.part("momentum update"):
            self.keys.advance(momentum)

    def __call__(self, images: Tensor, index: Tensor) -> Tensor:
        with self.clock.part("key forward"):
            return self.keys(images, index)


@dataclass(frozen=True)
class _TimedPolicy:
    policy: KeyPolicy
    clock: PartClock

    def shuffle(self, images: Tensor) -> Tensor:
        with self.clock.part("exchange"):
            return self.policy.shuffle(images)

    def unshuffle(self, keys: Tensor) -> Tensor:
        with self.clock.part("exchange"):
            return self.policy.unshuffle(keys)


@dataclass(frozen=True)
class _TimedDictionary:
    dictionary: Dictionary
    clock: PartClock

    def contrast(self, queries: Tensor, keys: Tensor, temperature: float) -> tuple[Tensor, dict[str, Tensor]]:
        with self.clock.part("loss"):
            return self.dictionary.contrast(queries, keys, temperature)

    def take_in(self, queries: Tensor, keys: Tensor, index: Tensor) -> None:
        with self.clock.part("gather and enqueue"):
            self.dictionary.take_in(queries, keys, index)
