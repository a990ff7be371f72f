"""Interface of a training method. Does not import torch until it builds.

A method is a frozen dataclass of its options, which the command line shows under `--method`. It names the values it
watches and how the report shows them, gives the number of backward passes per batch, and builds its head and its
objective. The loop, the checkpoint, the metrics, the report and the bench use these classes and know no method by name.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, ParamSpec, Protocol, TypeVar

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from moco_fast.encoders.encoder import Encoder
    from moco_fast.methods.shuffle import KeyPolicy
    from pipelines.config import ViewsConfig, ViewSpec

__all__ = [
    "Autocast",
    "BatchStatistics",
    "Chart",
    "Clock",
    "Encode",
    "Level",
    "Method",
    "Objective",
    "Pass",
    "Setting",
    "momentum_at",
    "refuse_unless_above_zero",
    "refuse_unless_average",
    "spread_chart",
]

P = ParamSpec("P")
T = TypeVar("T")
Autocast = Callable[[], AbstractContextManager[object]]
BatchStatistics = Literal["auto", "exchange", "virtual", "gather", "sync", "none"]
"""Choices of `--bn.policy`."""


@dataclass(frozen=True, kw_only=True)
class Level:
    """Reference value drawn in a chart."""

    value: float
    label: str


@dataclass(frozen=True, kw_only=True)
class Chart:
    """Chart of the report: one or two watched values, with title and caption."""

    title: str
    caption: str
    curves: Mapping[str, str]
    """Name of a value in metrics.jsonl -> label of its curve; a single curve needs no label."""
    about: Literal["learning", "health"] = "learning"
    """Section of the report."""
    level: Level | None = None
    percent: bool = False
    """Whether values are fractions, shown as percentages."""
    from_zero: bool = False
    """Whether the vertical axis starts at 0."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Pass:
    """Loss of one backward pass of a batch, before it is backpropagated."""

    loss: "Tensor"
    """(), with gradient."""
    watched: "Mapping[str, Tensor]"
    """Values that the method watches: () each, without gradient, of this rank only."""
    afterwards: Callable[[], object] = lambda: None
    """Called after all backward passes of the batch; a queue enqueues its keys here."""


class Encode(Protocol):
    """The query encoder as the step calls it: in the run's precision, its gradients averaged over ranks."""

    def __call__(self, images: "Tensor", /) -> "Tensor":
        """Images (B, 3, H, W) uint8 -> (B, dim), the predictor's output, or the head's if there is no predictor."""
        ...

    def with_projection(self, images: "Tensor", /) -> "tuple[Tensor, Tensor]":
        """Return the same output and the head's: (B, dim) each."""
        ...


class Clock(Protocol):
    """Clock for the parts of a step (moco_fast.bench.clock.PartClock)."""

    def part(self, name: str) -> AbstractContextManager[object]:
        """Return a context whose duration is counted as part `name`."""
        ...

    def timed(self, name: str, function: Callable[P, T]) -> Callable[P, T]:
        """Wrap `function` so that each call is counted as part `name`."""
        ...


class Objective(Protocol):
    """Modules of a method and the losses of a batch. Independent of the device; sees other ranks only by collectives.

    Its collectives must have finished before it yields a pass: none may overlap those of the backward pass.
    """

    @property
    def modules(self) -> "Mapping[str, nn.Module]":
        """Modules that a checkpoint keeps besides the query encoder, by the prefix of their tensors' names."""
        ...

    @property
    def num_passes(self) -> int:
        """Backward passes per batch."""
        ...

    def advance(self, scheduled: Mapping[str, float], /) -> None:
        """Prepare for an optimizer step, before its first batch, with the values of `Method.scheduled`."""
        ...

    def passes(self, encode: Encode, views: "tuple[Tensor, ...]", index: "Tensor", /) -> Iterator[Pass]:
        """Yield the losses of a batch, one for each of `num_passes` backward passes.

        Each is backpropagated before the next is requested, so that only one pass's activations are alive at a time.

        Args:
            encode: the query encoder.
            views: (B, 3, H, W) uint8 each, of the same samples, as `Method.views_of` lists them.
            index: (B,) int64 dense sample numbers, on the host.
        """
        ...

    def on_a_clock(self, clock: Clock, /) -> "Objective":
        """Return the same objective with its parts timed by `clock`; this one is not changed."""
        ...


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Everything a method needs from the run to build its objective."""

    query: "Encoder"
    """The query encoder before the first step, on the run's device and not wrapped."""
    policy: "KeyPolicy"
    """Decides among which samples keys are computed."""
    autocast: Autocast = nullcontext
    """Returns the context that sets the precision of a forward pass."""
    lower_precision: "torch.dtype | None" = None
    """Dtype of autocast where it is lower than that of the weights, else None."""
    compile: "Callable[[nn.Module], object]" = lambda _: None
    """Compiles an encoder, if the run compiles."""
    num_samples: int
    """Number of samples in the training set."""
    seed: int
    """Seed of the run."""
    device: "torch.device"
    available_bytes: int
    """Free memory on the device."""


@dataclass(frozen=True, kw_only=True)
class Method(ABC):
    """Base class of all methods: their common options, and the interface that the rest of the code uses."""

    dim: int
    """Size of the head's output."""

    name: ClassVar[str]
    """The method's name in `METHODS`, also written to config.json."""
    num_views: ClassVar[int] = 2
    """Number of large views used per sample, starting with the first."""
    takes_small_views: ClassVar[bool] = False
    """Whether the method also trains on small views (multi-crop)."""
    needs_sample_numbers: ClassVar[bool] = False
    """Whether the method needs the dense sample number of each image."""
    bn_policies: ClassVar[tuple[BatchStatistics, ...]] = ("auto", "exchange", "virtual", "gather", "sync", "none")
    """Values of `--bn.policy` that the method supports."""
    constant_lr: ClassVar[tuple[str, ...]] = ()
    """Parts of the query encoder (`predictor`) whose learning rate stays at its peak."""

    @property
    @abstractmethod
    def watched(self) -> tuple[str, ...]:
        """Names of the values in `Pass.watched`."""

    @property
    def backward_passes(self) -> int:
        """Backward passes per batch."""
        return 1

    @property
    def dictionary_size(self) -> int | None:
        """Keys of earlier batches that a query is compared with; None: there are none."""
        return None

    def queue_age(self, batch_size: int, /) -> float | None:
        """Return the steps that a key stays in the queue, with so many samples per step; None: there is no queue."""
        del batch_size
        return None

    @property
    def num_encoded(self) -> tuple[int, int]:
        """Large views of a sample that the query encoder computes, with gradient, and the key encoder, without."""
        return self.backward_passes, 0

    def validate(self) -> None:
        """Check the options. Raises ValueError: an option cannot work; the message says which values do."""
        refuse_unless_above_zero({"dim": self.dim})

    def views_of(self, views: "ViewsConfig", /) -> "tuple[ViewSpec, ...]":
        """Return the views that the method uses, so that the loader makes no others.

        Raises:
            ValueError: small views are configured, but the method does not train on them.
        """
        if not views.num_small:
            return views.specs[: self.num_views]
        if not self.takes_small_views:
            raise ValueError(
                f"--views.num-small {views.num_small} asks for small views, but {self.name} does not train on them: "
                "leave it out, or train by momentum contrast with a queue (moco-v2-multicrop)"
            )
        return views.specs

    def scheduled(self, step: int, num_steps: int, /) -> dict[str, float]:
        """Return the scheduled values for optimizer step `step` (from 0) of `num_steps`; they are also logged."""
        del step, num_steps
        return {}

    @abstractmethod
    def charts(self, batch_size: int, num_small: int = 0, /) -> tuple[Chart, ...]:
        """Return the report's charts of the loss and the watched values.

        Args:
            batch_size: samples in a global batch.
            num_small: small views per sample.
        """

    @abstractmethod
    def note(self, line: Mapping[str, float], /) -> str:
        """Summarize a line of metrics.jsonl, apart from its loss, in a few words."""

    @abstractmethod
    def build_head(self, feature_dim: int, *, is_transformer: bool) -> "tuple[nn.Module, nn.Module | None]":
        """Build the projection (B, feature_dim) -> (B, dim), and the predictor (B, dim) -> (B, dim) if there is one.

        torch's global generator decides their weights.
        """

    @abstractmethod
    def build(self, setting: Setting, /) -> Objective:
        """Build the objective, equal on all ranks. Raises ValueError: it does not fit into memory."""


def momentum_at(step: int, num_steps: int, start: float, schedule: Literal["constant", "cosine"]) -> float:
    """Return m at optimizer step `step` (from 0): constant, or a cosine from `start` to 1 (MoCo v3, BYOL)."""
    if schedule == "constant":
        return start
    return 1 - (1 - start) * (1 + math.cos(math.pi * step / num_steps)) / 2


def refuse_unless_above_zero(values: Mapping[str, float]) -> None:
    """Check that a method's options are above 0. Raises ValueError: names the first that is not."""
    for name, value in values.items():
        if not value > 0:
            raise ValueError(f"--method.{name.replace('_', '-')} is {value}, but must be above 0")


def refuse_unless_average(name: str, value: float) -> None:
    """Check the momentum of a moving average. Raises ValueError: it is not between 0 and 1."""
    if not 0 <= value <= 1:
        raise ValueError(f"--method.{name} is {value}, but the momentum of a moving average must be between 0 and 1")


def spread_chart(dim: int, what: str) -> Chart:
    """Return the chart of `feature_std` of unit vectors (B, dim)."""
    return Chart(
        title=f"Spread of the {what}",
        caption=f"Standard deviation of the normalized {what}, averaged over their dimensions. Near 0 is collapse.",
        curves={"feature_std": ""},
        about="health",
        level=Level(value=1 / math.sqrt(dim), label="evenly spread"),
        from_zero=True,
    )
