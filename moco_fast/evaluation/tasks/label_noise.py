"""Learning from wrong labels as a task: linear on frozen features, fine-tuning and training from scratch."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal, Self

from moco_fast.evaluation.base import (
    FigureInfo,
    Inputs,
    Outcome,
    Split,
    Task,
    Want,
    refuse_crop_scale,
    refuse_unless_above,
)

if TYPE_CHECKING:
    from moco_fast.config import Config
    from moco_fast.evaluation.recipes import Recipe

__all__ = ["WAYS", "LabelNoise", "Noise", "Way"]

Way = Literal["linear", "finetune", "scratch"]
WAYS: dict[Way, str] = {"linear": "linear", "finetune": "fine-tuned", "scratch": "trained from scratch"}


@dataclass(frozen=True, kw_only=True)
class Noise:
    """Wrong labels of one kind."""

    kind: Literal["symmetric", "asymmetric"]
    share: float

    @property
    def name(self) -> str:
        """As figures have it, such as `sym20`."""
        return f"{self.kind.removesuffix('metric')}{100 * self.share:g}"

    def __str__(self) -> str:
        return f"{100 * self.share:g}% {self.kind} noise"


@dataclass(frozen=True, kw_only=True)
class LabelNoise(Task):
    """Learn from training labels of which a share is wrong; takes many hours, and resumes where it was killed."""

    name: ClassVar[str] = "label-noise"
    classifies: ClassVar[bool] = True
    slow: ClassVar[bool] = True

    symmetric: tuple[float, ...] = (0.2, 0.5, 0.8, 0.9, 0.95)
    """Shares of the training samples whose label is drawn again among all classes, its own too."""
    asymmetric: tuple[float, ...] = (0.4,)
    """Shares whose label becomes a similar class: CIFAR-10's published pairs, of other sets the next class."""
    ways: tuple[Way, ...] = ("linear", "finetune", "scratch")
    """What learns: a linear classifier on frozen features, encoder and classifier, the same from random weights."""
    epochs: int = 100
    """Passes over the training set, of each way."""
    batch_size: int = 128
    """Samples in a step, over all ranks."""
    lr: float | None = None
    """Learning rate of `finetune` and `scratch`; unset: 0.02 for 128 samples."""
    weight_decay: float = 5e-4
    """Weight decay of `finetune` and `scratch`."""
    momentum: float = 0.9
    """Momentum of SGD, in all ways."""
    milestones: tuple[float, ...] = (0.5,)
    """Shares of `finetune` and `scratch` after which the learning rate drops to a tenth."""
    crop_scale: tuple[float, float] = (0.08, 1.0)
    """Area of the random crop of `finetune` and `scratch` as a share of the image's."""
    linear_lr: tuple[float, ...] | None = None
    """Learning rates of `linear`; of several, the best is chosen on a tenth of the noisy training set. Unset: 0.01,
    0.1, 1 and 10, times batch size / 256."""

    @property
    def splits(self) -> frozenset[Split]:
        """Both."""
        return frozenset({"train", "test"})

    @property
    def shared(self) -> bool:
        """All ranks train together."""
        return True

    @property
    def noises(self) -> tuple[Noise, ...]:
        """Kinds of noise, in the order in which they are measured."""
        symmetric = (Noise(kind="symmetric", share=share) for share in self.symmetric)
        return (*symmetric, *(Noise(kind="asymmetric", share=share) for share in self.asymmetric))

    def settled(self, run: "Config | None", *, is_transformer: bool = False) -> Self:
        """Fill in learning rates."""
        del run, is_transformer
        rates = tuple(rate * self.batch_size / 256 for rate in (0.01, 0.1, 1.0, 10.0))
        return replace(
            self,
            lr=0.02 * self.batch_size / 128 if self.lr is None else self.lr,
            linear_lr=rates if self.linear_lr is None else self.linear_lr,
        )

    def validate(self) -> None:
        """Refuse numbers that cannot be."""
        refuse_unless_above(0, epochs=self.epochs, batch_size=self.batch_size, lr=self.lr, linear_lr=self.linear_lr)
        refuse_crop_scale(self.crop_scale)
        if not self.ways:
            raise ValueError("--ways names nothing: give one way at least")
        if not self.noises:
            raise ValueError("--symmetric and --asymmetric name no share: give one at least")
        for noise in self.noises:
            if not 0 <= noise.share <= 1:
                raise ValueError(f"--{noise.kind} is {noise.share}, but must be between 0 and 1")

    def wants(self) -> tuple[Want, ...]:
        """Features of both sets for the linear classifier; the other ways look at images."""
        return (Want(split="train"), Want(split="test")) if "linear" in self.ways else ()

    def figures(self) -> Mapping[str, FigureInfo]:
        """Accuracy after the last and after the best epoch, for each way and noise: a curve over the shares."""
        return dict(self._figures())

    def _figures(self) -> Iterator[tuple[str, FigureInfo]]:
        for best, title, caption in (
            ("", "last epoch", "Share of test samples that are classified rightly after the last epoch."),
            (
                "_best",
                "best epoch by the test set",
                "The highest share after any epoch: chosen on the test set, as the literature does, so too high.",
            ),
        ):
            for noise in self.noises:
                for way in self.ways:
                    info = FigureInfo(title=f"{WAYS[way]}, {noise}, {title}", caption=caption)
                    yield f"{way}_{noise.name}{best}", info

    def recipe(self, way: Way) -> "Recipe":
        """Return how `finetune` or `scratch` trains."""
        from moco_fast.evaluation.recipes import Recipe

        assert self.lr is not None
        return Recipe(
            lr=self.lr,
            batch_size=self.batch_size,
            epochs=self.epochs,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
            schedule="steps",
            milestones=self.milestones,
            crop_scale=self.crop_scale,
            from_scratch=way == "scratch",
        )

    def measure(self, inputs: Inputs) -> Outcome:
        """Flip labels, learn from them, test on right ones."""
        from moco_fast.evaluation.noise import measure_label_noise

        return measure_label_noise(self, inputs)
