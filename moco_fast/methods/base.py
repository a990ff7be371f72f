"""Method: what a run trains by, as one object that everything else asks. Free of torch until it builds.

A method is a frozen dataclass of its options, which the command line shows under `--method`. It names what it watches
and how the report shows it, says how often it backpropagates per batch, and builds its head and its objective. The
loop, the checkpoint, the metrics, the report and the bench know these classes and no method by name.
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
"""The choices of --bn.policy."""


@dataclass(frozen=True, kw_only=True)
class Level:
    """A value to compare a chart's curves with."""

    value: float
    label: str


@dataclass(frozen=True, kw_only=True)
class Chart:
    """A chart of the report: one watched number or two, with the words around them."""

    title: str
    caption: str
    curves: Mapping[str, str]
    """Name of a number in metrics.jsonl -> what its curve is called; a single curve needs no name."""
    about: Literal["learning", "health"] = "learning"
    """The part of the report that it belongs to."""
    level: Level | None = None
    percent: bool = False
    """Values are shares."""
    from_zero: bool = False
    """The vertical axis starts at 0."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Pass:
    """One backward pass of a batch, before it is made."""

    loss: "Tensor"
    """() with gradient."""
    watched: "Mapping[str, Tensor]"
    """What the method watches, each () without gradient, this rank's own."""
    afterwards: Callable[[], object] = lambda: None
    """Called once all backward passes of the batch are over: a queue takes in keys here."""


class Encode(Protocol):
    """The query encoder as the step calls it: in the run's precision, its gradients averaged over ranks."""

    def __call__(self, images: "Tensor", /) -> "Tensor":
        """Images (B, 3, H, W) uint8 -> (B, dim), what the predictor makes, or the head if there is none."""
        ...

    def with_projection(self, images: "Tensor", /) -> "tuple[Tensor, Tensor]":
        """Return the same, and what the head makes: (B, dim) each."""
        ...


class Clock(Protocol):
    """Takes the time of a step's parts (moco_fast.bench.clock.PartClock)."""

    def part(self, name: str) -> AbstractContextManager[object]:
        """Return a context: what is done within is part `name`."""
        ...

    def timed(self, name: str, function: Callable[P, T]) -> Callable[P, T]:
        """Return `function`, every call of which is part `name`."""
        ...


class Objective(Protocol):
    """A method at work: its modules, and the losses of a batch. Knows no device, and ranks only through collectives.

    Its collectives are over when a pass is given out: none may run beside those of the backward pass.
    """

    @property
    def modules(self) -> "Mapping[str, nn.Module]":
        """What a checkpoint keeps beside the query encoder, by the first part of its tensors' names."""
        ...

    @property
    def num_passes(self) -> int:
        """Backward passes per batch."""
        ...

    def advance(self, scheduled: Mapping[str, float], /) -> None:
        """Get ready for an optimizer step, before its first batch, with the numbers of `Method.scheduled`."""
        ...

    def passes(self, encode: Encode, views: "tuple[Tensor, ...]", index: "Tensor", /) -> Iterator[Pass]:
        """Compute the losses of a batch, one for each of `num_passes` backward passes.

        Each is backpropagated before the next is asked for, so that the activations of one are alive at a time.

        Args:
            encode: the query encoder.
            views: (B, 3, H, W) uint8 each, of the same samples: those of `Method.views_of`.
            index: (B,) int64 dense sample numbers, on the host.
        """
        ...

    def on_a_clock(self, clock: Clock, /) -> "Objective":
        """Return the same objective with its parts on `clock`; this one is left as it is."""
        ...


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What a run gives to the method that it builds."""

    query: "Encoder"
    """The query encoder, as it is before the first step, on the run's device and not wrapped."""
    policy: "KeyPolicy"
    """Among which samples keys are computed."""
    autocast: Autocast = nullcontext
    """Makes the context that chooses the precision of a forward pass."""
    lower_precision: "torch.dtype | None" = None
    """Of autocast, where it is lower than the weights'."""
    compile: "Callable[[nn.Module], object]" = lambda _: None
    """Compiles an encoder, if the run compiles."""
    num_samples: int
    """Samples of the training set."""
    seed: int
    """Of the run."""
    device: "torch.device"
    available_bytes: int
    """Memory that is free on the device."""


@dataclass(frozen=True, kw_only=True)
class Method(ABC):
    """Options that all methods have, and what everything else asks of one."""

    dim: int
    """Size of the head's output."""

    name: ClassVar[str]
    """The method's name in `METHODS`; config.json keeps it."""
    num_views: ClassVar[int] = 2
    """Large views of a sample that it looks at, from the first on."""
    takes_small_views: ClassVar[bool] = False
    """It trains on small views beside them, too (multi-crop)."""
    needs_sample_numbers: ClassVar[bool] = False
    """It must know which sample is which."""
    bn_policies: ClassVar[tuple[BatchStatistics, ...]] = ("auto", "exchange", "virtual", "gather", "sync", "none")
    """What --bn.policy may be beside it."""
    constant_lr: ClassVar[tuple[str, ...]] = ()
    """Parts of the query encoder (`predictor`) whose learning rate stays at its peak."""

    @property
    @abstractmethod
    def watched(self) -> tuple[str, ...]:
        """Names of what `Pass.watched` holds."""

    @property
    def backward_passes(self) -> int:
        """Backward passes per batch."""
        return 1

    def validate(self) -> None:
        """Refuse options that cannot work. Raises ValueError: with the option, its value and what would work."""
        refuse_unless_above_zero({"dim": self.dim})

    def views_of(self, views: "ViewsConfig", /) -> "tuple[ViewSpec, ...]":
        """Return the views that it looks at, so that a loader makes no others.

        Raises:
            ValueError: there are small views, and it does not train on them.
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
        """Return the method's numbers for optimizer step `step` (from 0) of `num_steps`; they are logged, too."""
        del step, num_steps
        return {}

    @abstractmethod
    def charts(self, batch_size: int, num_small: int = 0, /) -> tuple[Chart, ...]:
        """Say how the report shows the loss and what is watched.

        Args:
            batch_size: samples of a global batch.
            num_small: small views of each.
        """

    @abstractmethod
    def note(self, line: Mapping[str, float], /) -> str:
        """Say in a few words what a line of metrics.jsonl tells beside its loss."""

    @abstractmethod
    def build_head(self, feature_dim: int, *, is_transformer: bool) -> "tuple[nn.Module, nn.Module | None]":
        """Build the projection (B, feature_dim) -> (B, dim), and the predictor (B, dim) -> (B, dim) if there is one.

        torch's global generator decides their weights.
        """

    @abstractmethod
    def build(self, setting: Setting, /) -> Objective:
        """Build the objective; equal on all ranks. Raises ValueError: what it needs does not fit."""


def momentum_at(step: int, num_steps: int, start: float, schedule: Literal["constant", "cosine"]) -> float:
    """The paper's m at optimizer step `step` (from 0): constant, or from `start` to 1 by a cosine (MoCo v3, BYOL)."""
    if schedule == "constant":
        return start
    return 1 - (1 - start) * (1 + math.cos(math.pi * step / num_steps)) / 2


def refuse_unless_above_zero(values: Mapping[str, float]) -> None:
    """Refuse a method's options that are not above 0. Raises ValueError: with the first of them."""
    for name, value in values.items():
        if not value > 0:
            raise ValueError(f"--method.{name.replace('_', '-')} is {value}, but must be above 0")


def refuse_unless_average(name: str, value: float) -> None:
    """Refuse the momentum of a moving average that is none. Raises ValueError: with the option and its value."""
    if not 0 <= value <= 1:
        raise ValueError(f"--method.{name} is {value}, but a moving average needs a value from 0 to 1")


def spread_chart(dim: int, what: str) -> Chart:
    """Chart `feature_std` of unit vectors (B, dim)."""
    return Chart(
        title=f"Spread of the {what}",
        caption=f"Standard deviation of the normalized {what}, averaged over their dimensions. Near 0 is collapse.",
        curves={"feature_std": ""},
        about="health",
        level=Level(value=1 / math.sqrt(dim), label="evenly spread"),
        from_zero=True,
    )
