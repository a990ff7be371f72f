"""Task: what an encoder is measured by, as one object that everything else asks. Free of torch until it measures.

A task is a frozen dataclass of its options, which the command line shows. It names the features that it wants and the
figures that it gives, and measures them. Who runs it, on one process or many, from a cache or from a live encoder, and
what becomes of the figures, is none of its business: `moco-fast eval` (front.py) caches, repeats over seeds and writes
a result; a run that evaluates at intervals asks the same tasks through `Evaluation` (live.py).
"""

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, Self

from moco_fast.methods.base import Chart

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import torch
    from torch import nn

    from moco_fast.config import Config
    from moco_fast.encoders.encoder import Encoder
    from moco_fast.evaluation.features import Features
    from moco_fast.evaluation.inputs import PerImage
    from pipelines.config import DataConfig
    from pipelines.world import World
    from shards.sets import ShardSet

__all__ = [
    "Evaluation",
    "FigureCurve",
    "FigureInfo",
    "Inputs",
    "Known",
    "Measured",
    "Outcome",
    "RunSets",
    "Saving",
    "Score",
    "Split",
    "Task",
    "Want",
    "refuse_crop_scale",
    "refuse_unless_above",
]

Split = str
"""Name of a set: `train`, `test`, or one that a task's own options name (`Task.more_sets`)."""


@dataclass(frozen=True, kw_only=True)
class Want:
    """Features that a task needs."""

    split: Split
    layer: str = "backbone"
    """Whose output they are (moco_fast.encoders.layers)."""
    at_most: int | None = None
    """At most so many samples, evenly spread over the set; None: all."""
    unit: bool = False
    """Every feature vector scaled to length 1."""


@dataclass(frozen=True, kw_only=True)
class FigureInfo:
    """What a figure is, for tables and charts."""

    title: str
    """A few words, such as `top-1 accuracy`."""
    caption: str
    """A sentence that says what was counted."""
    unit: Literal["share", "number"] = "share"
    """`share`: 0..1, shown in percent."""
    best: Literal["highest", "lowest"] = "highest"
    """Which of its values is the best one."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A figure of one measurement."""

    value: float
    num_trials: int | None = None
    """For a share of independent trials, their number: it gives an interval."""
    interval: tuple[float, float] | None = None
    """95% confidence interval, where the task has one of its own."""


@dataclass(frozen=True, kw_only=True)
class FigureCurve:
    """A figure over something that is varied."""

    title: str
    caption: str
    over: str
    """What is varied, with its unit, such as `severity`."""
    points: tuple[tuple[float, float], ...]
    """(value of what is varied, figure), in rising order."""
    unit: Literal["share", "number"] = "share"
    in_report: bool = True
    """Whether the report draws it; the result holds it anyway."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What one measurement gave."""

    figures: Mapping[str, Measured]
    """By the names of `Task.figures`; one that this data does not have is left out."""
    curves: Mapping[str, FigureCurve] = field(default_factory=dict[str, FigureCurve])
    chosen: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """Hyperparameters that were chosen, on a part of the training set."""
    facts: Mapping[str, int] = field(default_factory=dict[str, int])
    """Counts that say what the figures rest on."""
    notes: tuple[str, ...] = ()
    """What was done otherwise than asked, one line each."""


@dataclass(frozen=True, kw_only=True)
class Saving:
    """Where the trainings of an evaluation keep their state, and how often they write it."""

    folder: Path
    """That all ranks see."""
    every_steps: int = 500
    """Steps between two states."""
    subject: str = ""
    """Digest of everything but the training itself: encoder, sets, view and precision."""


class Known(Protocol):
    """What is known of sets before anything is computed."""

    def set_of(self, split: Split) -> "ShardSet":
        """Return the set of shards that is open for a split."""
        ...

    def class_names(self, split: Split) -> tuple[str, ...]:
        """Return the name of each label of a set; empty where its classes have none."""
        ...

    def label_sets(self, split: Split) -> "npt.NDArray[np.int8] | None":
        """Return the classes of each sample of a set, by its number, where labels are sets; None: it has one label.

        (N, C): 1 for a class that the sample has, 0 for one that it has not, -1 for one that is not to be counted.
        """
        ...

    def label_counts(self, split: Split) -> "npt.NDArray[np.int64]":
        """Return how many samples of a set have each label: (C,), C classes, some of which may have no sample.

        In a run, of those samples that its evaluations look at.
        """
        ...


class Inputs(Known, Protocol):
    """What a task is given: features, labels, and for tasks that look at images themselves, encoder and sets."""

    @property
    def encoder(self) -> "Encoder":
        """The encoder, on the device."""
        ...

    @property
    def device(self) -> "torch.device":
        """Where to compute."""
        ...

    @property
    def world(self) -> "World":
        """This process and how many measure together; alone, unless the task is `shared`."""
        ...

    @property
    def seed(self) -> int:
        """Seed of everything that the task draws."""
        ...

    @property
    def num_classes(self) -> int:
        """Classes of the labels in the training and the test set."""
        ...

    @property
    def data(self) -> "DataConfig":
        """How images are read: batch size, backend and cache."""
        ...

    @property
    def size(self) -> int:
        """Height and width of the images in pixels."""
        ...

    @property
    def precision(self) -> str:
        """That the encoder computes in: fp32, tf32, bf16 or fp16."""
        ...

    @property
    def saving(self) -> Saving | None:
        """Where trainings keep their state; None: they keep none."""
        ...

    def autocast(self) -> Any:
        """Return a context in which the encoder computes in the evaluation's precision."""
        ...

    def images(self, split: Split, samples: "npt.NDArray[np.int64]") -> Any:
        """Open this rank's part of samples of a set, as central squares: a loader that is a context manager."""
        ...

    def features(self, want: Want, *, labeled: bool = True) -> "Features":
        """Return features in order of sample number, the same on every rank; `values` are on the host or the device.

        Args:
            want: one of those that the task named.
            labeled: leave out samples without a label.
        """
        ...

    def per_image(self, made: "PerImage") -> "Features":
        """Compute numbers for each labeled image, or find them in the cache; collective, for a `shared` task.

        Returns:
            the numbers in order of sample number, the same on every rank.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class Task(ABC):
    """Options that a task has, and what everything else asks of one."""

    name: ClassVar[str]
    """As the command line has it."""
    takes_label_sets: ClassVar[bool] = False
    """Whether a sample may have several classes."""
    draws: ClassVar[bool] = True
    """Whether figures depend on the seed."""
    classifies: ClassVar[bool] = False
    """Whether it learns the training set's classes and names one for each test sample."""
    live: ClassVar[bool] = False
    """Whether a run can measure it at intervals: from the features that it wants, within minutes."""
    slow: ClassVar[bool] = False
    """Whether it trains or runs the encoder so often that the suite measures it only where it is named."""

    @property
    def needs_labels(self) -> bool:
        """Whether the sets must be labeled, and training and test set have the same classes."""
        return True

    @property
    def splits(self) -> frozenset[Split]:
        """Sets that the task looks at: those that it wants features of."""
        return frozenset(want.split for want in self.wants())

    @property
    def shared(self) -> bool:
        """Whether the ranks measure together; otherwise the first one does, once all have made the features."""
        return False

    @property
    def preset(self) -> str:
        """Name of the published protocol that the options follow, where there are several; else empty."""
        return ""

    def more_sets(self) -> Mapping[Split, str]:
        """Return further sets that the task's own options name: names that `wants` uses, and where the shards are."""
        return {}

    def with_sets(self, there: Collection[Split]) -> Self:
        """Return the task with options that were left open chosen by which of the sets `train` and `test` there are."""
        del there
        return self

    @classmethod
    def for_suite(cls, domains: Mapping[str, str]) -> Self:
        """Return the task as the suite measures it, given by name the sets that are only there to be tested on."""
        del domains
        return cls()

    def settled(self, run: "Config | None", *, is_transformer: bool = False) -> Self:
        """Return the task with every option that was left open filled in.

        Args:
            run: of the encoder, whose options are the defaults; None: it is not from a run.
            is_transformer: whether the backbone is a vision transformer.
        """
        del run, is_transformer
        return self

    @classmethod
    def for_run(cls, config: "Config") -> Self:
        """Return the task, if it is `live`, as a run with this configuration measures it at intervals."""
        return cls().settled(config)

    def validate(self) -> None:  # noqa: B027 - most options cannot be wrong
        """Refuse options that cannot work. Raises ValueError: with the option, its value and what would work."""

    def why_not(self, known: Known) -> str | None:
        """Say why sets do not allow the settled task, before anything is computed; None: they do.

        Its sets are there, labeled if it needs labels, and training and test set have the same classes.
        """
        del known
        return None

    @abstractmethod
    def wants(self) -> tuple[Want, ...]:
        """Return the features that the settled task needs before it measures."""

    @abstractmethod
    def figures(self) -> Mapping[str, FigureInfo]:
        """Return what the settled task measures, the most important figure first."""

    @abstractmethod
    def measure(self, inputs: Inputs) -> Outcome:
        """Measure once.

        Raises:
            ValueError: the samples or the encoder's features cannot be evaluated.
        """


@dataclass(frozen=True, kw_only=True)
class RunSets:
    """The sets of a run, each opened once."""

    training: "ShardSet | None"
    """Of --data.shards; None where tars without an index are streamed."""
    held_out: "ShardSet | None"
    """Of --eval.shards; None where that is unset."""


@dataclass(frozen=True, kw_only=True)
class Score(Chart):
    """A chart of the report of what an evaluation finds, and a number: the newest value of its first curve.

    Where `level` is unset, the curve is compared with its value before the first step: the untrained encoder's.
    """

    name: str
    """What the number is called, such as `kNN top-1`."""
    best: Literal["highest", "lowest"]
    """Which of its values is the best one."""
    is_headline: bool = True
    """Whether the number is shown, too, not only its curve."""

    @property
    def figure(self) -> str:
        """Name of the number in metrics.jsonl."""
        return next(iter(self.curves))


class Evaluation(Protocol):
    """What a run measures at intervals: tasks with their settings, on sets that are open already."""

    @property
    def notes(self) -> tuple[str, ...]:
        """Return what is measured otherwise than asked, one line each."""
        ...

    @property
    def infos(self) -> Mapping[str, FigureInfo]:
        """Return what can be measured, by the names in metrics.jsonl; what the data does not have is left out later."""
        ...

    def figures(
        self, encoder: "Encoder", *, device: "torch.device", world: "World", probe: "nn.Module | None" = None
    ) -> dict[str, float]:
        """Evaluate an encoder; collective: every rank calls it and gets the figures.

        Args:
            encoder: on `device`; its modes are left as they were.
            device: where to compute.
            world: this process and how many take part.
            probe: classifier that the run trains beside itself, if it does (--eval.online-probe).

        Returns:
            figures by their names in metrics.jsonl, such as `knn/top1`.

        Raises:
            ValueError: the samples or the encoder's features cannot be evaluated.
        """
        ...

    def line(self, figures: Mapping[str, float]) -> str:
        """Say the most important figure of each task in a few words, for the terminal."""
        ...


def refuse_crop_scale(scale: tuple[float, float] | None) -> None:
    """Refuse an area of random crops that there cannot be; None is not given. Raises ValueError."""
    if scale is not None and not 0 < scale[0] <= scale[1] <= 1:
        raise ValueError(
            f"--crop-scale is {scale[0]:g} {scale[1]:g}, but must be two shares of the image, the smaller one first: "
            "above 0, at most 1"
        )


def refuse_unless_above(least: float, **options: float | tuple[float, ...] | None) -> None:
    """Refuse options of a task that are not above a limit; None is not given. Raises ValueError."""
    for name, value in options.items():
        values = value if isinstance(value, tuple) else () if value is None else (value,)
        if isinstance(value, tuple) and not value:
            raise ValueError(f"--{name.replace('_', '-')} names nothing: give one value at least")
        for each in values:
            if not each > least:
                raise ValueError(f"--{name.replace('_', '-')} is {each}, but must be above {least:g}")
