"""Warnings about a run's health, each given once, with advice; none of them needs labels."""

import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from moco_fast.config import Config
from moco_fast.methods.base import Method
from moco_fast.training.state import read_warnings

__all__ = ["Alarms", "describe_queue", "key_lag", "key_start_share", "queue_drift"]

# One launch for many tensors.
_minus: Callable[[list[Tensor], list[Tensor]], list[Tensor]] = getattr(torch, "_foreach_sub")  # noqa: B009 - not declared
_norms: Callable[[list[Tensor]], list[Tensor]] = getattr(torch, "_foreach_norm")  # noqa: B009 - not declared

_COLLAPSED = 0.05
"""Spread of features, as a share of an even one, below which they have collapsed."""
_FAR = 0.5
"""Distance of the key encoder's weights from the query encoder's, as a share of the latter's length."""
_NUM_LINES = 3
"""Lines of metrics in a row that have to show it."""
_NUM_FIRST_STEPS = 50
"""Steps in which features may still be alike, as random weights make them."""
_CHUNK_ELEMENTS = 1 << 24  # 64 MiB of float32
_DRIFTED = 0.9
"""Share of the key encoder that may be replaced while a key is in the queue. Where it is 0.92 (m = 0.99, K = 65,536, a
batch of 256), MoCo v1 loses 1.2 points on ImageNet to m = 0.999, where it is 0.23 (section 4.1)."""


def queue_drift(method: Method, batch_size: int, momentum: float) -> float | None:
    """Return the share of the key encoder that is replaced while a key is in the queue: 1 - m^age.

    Args:
        method: of the run.
        batch_size: samples of a step.
        momentum: of the key encoder.

    Returns:
        None: the method has no queue.
    """
    age = method.queue_age(batch_size)
    return None if age is None else 1 - momentum**age


def key_start_share(method: Method, num_steps: int) -> float | None:
    """Return the share of a key encoder at the end of a run that its first weights are: the product of all momenta.

    None: the method has no momentum.
    """
    total, count = 0.0, min(num_steps, 1000)
    for number in range(count):
        momentum = method.scheduled(number * num_steps // count, num_steps).get("momentum")
        if momentum is None:
            return None
        if momentum <= 0:
            return 0.0
        total += math.log(momentum)
    return math.exp(total / count * num_steps)


def describe_queue(config: Config, num_steps: int) -> str | None:
    """Say in a line how old the queue's keys become, and how far the key encoder moves meanwhile; None: no queue."""
    batch_size = config.data.batch_size * config.optim.accumulate
    age = config.method.queue_age(batch_size)
    momentum = config.method.scheduled(0, num_steps).get("momentum")
    if age is None or momentum is None:
        return None
    drift = queue_drift(config.method, batch_size, momentum)
    return f"queue: keys of the last {age:,.4g} steps, in which {drift:.0%} of the key encoder is replaced"


@torch.no_grad()
def key_lag(query: nn.Module, key: nn.Module) -> Tensor:
    """Return the distance of the key encoder's weights from the query encoder's over the latter's length: (1,).

    It is computed on the device, and not waited for.
    """
    of_query = dict(query.named_parameters())
    pairs = [(of_query[name], each) for name, each in key.named_parameters()]
    apart: list[Tensor] = []
    lengths: list[Tensor] = []
    for chunk in _chunks(pairs):
        queries, keys = ([each.float() for each in side] for side in zip(*chunk, strict=True))
        apart += _norms(_minus(keys, queries))
        lengths += _norms(queries)
    return (torch.stack(apart).norm() / torch.stack(lengths).norm()).view(1)


def _chunks(pairs: Sequence[tuple[Tensor, Tensor]]) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Divide parameters into chunks whose differences take little memory."""
    chunk: list[tuple[Tensor, Tensor]] = []
    size = 0
    for pair in pairs:
        chunk.append(pair)
        size += pair[0].numel()
        if size >= _CHUNK_ELEMENTS:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


class Alarms:
    """What to warn of, at the start and from line to line; what a run was warned of before is not repeated.

    Args:
        folder: of the run; warnings are kept in its warnings.jsonl.
        config: of the run.
        num_samples: of the training set.
        num_steps: of the run.
    """

    def __init__(self, folder: Path, config: Config, *, num_samples: int, num_steps: int):
        self._path = folder / "warnings.jsonl"
        self._config, self._num_samples, self._num_steps = config, num_samples, num_steps
        self._in_a_row: Counter[str] = Counter()
        self._given = {line["about"] for line in read_warnings(folder)}

    def at_start(self) -> list[str]:
        """Return what the configuration tells already."""
        return self._new(0, self._about_configuration())

    def look(self, line: Mapping[str, float]) -> list[str]:
        """Return what a line of metrics tells, together with those before it."""
        found = self._about_line(line)
        for name, value in (("collapse", "feature_std"), ("lag", "key_lag")):
            if value in line:  # the lag is not in every line
                self._in_a_row[name] = self._in_a_row[name] + 1 if name in found else 0
        steady = {name: said for name, said in found.items() if self._in_a_row[name] >= _NUM_LINES}
        return self._new(int(line["step"]), steady)

    def _about_configuration(self) -> dict[str, str]:
        found: dict[str, str] = {}
        method, batch_size = self._config.method, self._config.data.batch_size * self._config.optim.accumulate
        size = method.dictionary_size
        if size is not None and size > self._num_samples:
            found["dictionary"] = (
                f"the dictionary of {size:,} keys exceeds the set of {self._num_samples:,} samples, so that it holds "
                "other keys of a query's own image as negatives: lower --method.queue-size (--method.num-negatives)"
            )
        drift = queue_drift(method, batch_size, method.scheduled(0, self._num_steps).get("momentum", 0.0))
        if drift is not None and drift > _DRIFTED:
            found["queue"] = (
                f"{drift:.0%} of the key encoder is replaced while a key is in the queue, so that old and new keys are "
                "hardly comparable: raise --method.momentum, or lower --method.queue-size"
            )
        start = key_start_share(method, self._num_steps)
        if start is not None and start > _FAR:
            found["momentum"] = (
                f"at the end of {self._num_steps:,} steps, {start:.0%} of the key encoder will still be its first "
                "weights, so that it lags behind: lower --method.momentum, or train longer"
            )
        return found

    def _about_line(self, line: Mapping[str, float]) -> dict[str, str]:
        found: dict[str, str] = {}
        even = 1 / math.sqrt(self._config.method.dim)
        spread = line.get("feature_std", even) / even
        if spread < _COLLAPSED and line["step"] > _NUM_FIRST_STEPS:
            found["collapse"] = (
                f"features have collapsed: their spread is {spread:.1%} of an even one, so that hardly anything is "
                "told apart: lower --optim.lr or warm up (--optim.warmup), and look at --bn.policy"
            )
        lag = line.get("key_lag", 0.0)
        if lag > _FAR:
            found["lag"] = (
                f"the key encoder lags behind: its weights are {lag:.0%} of the query encoder's length away from them: "
                "lower --method.momentum or --optim.lr"
            )
        return found

    def _new(self, step: int, found: Mapping[str, str]) -> list[str]:
        new = {name: said for name, said in found.items() if name not in self._given}
        self._given |= new.keys()
        if new:
            with self._path.open("a") as file:
                file.writelines(
                    json.dumps({"step": step, "about": name, "warning": said}) + "\n" for name, said in new.items()
                )
        return [f"warning: {said}" for said in new.values()]
