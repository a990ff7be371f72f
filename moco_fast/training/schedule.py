"""Schedules as pure functions of the step. Does not import torch."""

import math

from moco_fast.config import Config, OptimConfig

__all__ = ["describe_lr", "lr_at", "run_length"]


def run_length(config: Config, *, batches_per_epoch: int) -> int:
    """Return the number of optimizer steps of the whole run, at least one."""
    run, accumulate = config.run, config.optim.accumulate
    if run.steps is not None:
        return run.steps
    if run.samples is not None:
        return math.ceil(run.samples / (config.data.batch_size * accumulate))
    return max(1, round(run.epochs * batches_per_epoch / accumulate))


def describe_lr(config: Config) -> str:
    """Describe in one line the peak learning rate, and whether it was published for this batch size."""
    optim, batch_size = config.optim, config.data.batch_size * config.optim.accumulate
    given = f"learning rate: {optim.lr:g} for a batch of {batch_size}"
    if any(batch == batch_size and math.isclose(lr, optim.lr) for batch, lr in optim.published):
        return f"{given}, as published"
    if not optim.published:
        return f"{given}, not a published value"
    published = ", ".join(f"{lr:g} for {batch}" for batch, lr in optim.published)
    batch, lr = min(optim.published, key=lambda pair: abs(math.log(pair[0] / batch_size)))
    linear = lr * batch_size / batch
    if math.isclose(linear, optim.lr):
        return f"{given}, not a published value: the published {lr:g} for {batch}, scaled by the linear rule"
    return f"{given}, not a published value: published {published}; the linear rule would give {linear:g}"


def lr_at(step: int, num_steps: int, optim: OptimConfig) -> float:
    """Return the learning rate of optimizer step `step` (from 0) in a run of `num_steps`.

    A linear warm-up from 0 (MoCo v3) is followed by the schedule: `cosine` from the peak to 0 over the remaining steps
    (MoCo v2, there by epochs), `step` to a tenth at each milestone, a share of the whole run (MoCo v1), `exponential`
    by a factor at regular intervals (MoCo v1 on a billion images), or `constant`.
    """
    warmup_steps = round(optim.warmup * num_steps)
    if step < warmup_steps:
        return optim.lr * step / warmup_steps
    match optim.schedule:
        case "cosine":
            progress = (step - warmup_steps) / max(1, num_steps - warmup_steps)
            return optim.lr * (1 + math.cos(math.pi * progress)) / 2
        case "step":
            return optim.lr * 0.1 ** sum(step >= round(share * num_steps) for share in optim.milestones)
        case "exponential":
            return optim.lr * optim.decay ** (step // max(1, round(optim.decay_every * num_steps)))
        case "constant":
            return optim.lr
